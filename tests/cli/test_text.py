"""A model of text from its file alone, where the hub cannot be reached; what works on it, and what is refused."""

# attributes of modules and options that are not there are what is tested
# pyright: reportIndexIssue=false

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from qtdog.core.config_io import build_config, load_preset
from qtdog.core.errors import FormatError, ModelError
from qtdog.data.open import open_any
from qtdog.ensemble.prediction import find_texts, predict_texts
from qtdog.models import text_backbones
from qtdog.models.text_backbones import TEXT_BACKBONES, make_tokenizer
from qtdog.runs.folder import RunFolder
from qtdog.training.load_model import load_model, read_info
from qtdog.training.protocol import resolve
from qtdog.training.run import run

NAME = "distilbert-base-uncased"
SIGNS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SIGNS, "awful", "poor", "okay", "good", "great", "a", "box", "kitchen", "##s", "é"]
SIZES: dict[str, Any] = {"vocab_size": len(WORDS), "dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}
SECTIONS = {
    "data": {"target": "unseen", "batch_size": 16, "max_tokens": 8},
    "model": {"backbone": NAME, "weights": "none"},
    "train": {"steps": 8, "eval_every": 4},
    "quantizer": {"name": "lsq", "bits": 7, "start_step": 4},
    "optimizer": {"lr": 5e-3},
}


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reviews")
    (root / "splits").mkdir()
    rows, parts = [], []
    for author in range(12):
        for review in range(8):
            stars = (author + review) % 5 + 1
            rows.append((f"U{author:02}", f"{stars}.0", f"A {WORDS[4 + stars]} box, kitchens"))
            parts.append(3 if author % 3 == 2 else 0 if review < 5 else 2 if review < 7 else 4)
    for path, table in (("reviews.csv", [("reviewerID", "overall", "reviewText"), *rows]),
                        ("splits/user.csv", [("split",), *((part,) for part in parts)])):  # fmt: skip
        with (root / path).open("w", newline="") as stream:
            csv.writer(stream).writerows(table)
    return root


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Make a folder as the hub would give it, and let the name mean it."""
    folder = tmp_path_factory.mktemp("hub")
    transformers.DistilBertConfig(**SIZES).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "DistilBertTokenizer", "do_lower_case": true}')
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TEXT_BACKBONES, NAME, replace(TEXT_BACKBONES[NAME], hub_name=str(folder), sizes=SIZES))
        yield folder


@pytest.fixture(scope="module")
def trained(reviews: Path, hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train, then take the hub away."""
    dataset, folder = open_any(str(reviews)), tmp_path_factory.mktemp("runs") / "text"
    source = {"data": SECTIONS["data"] | {"source": str(reviews)}}
    config = resolve(build_config([load_preset("digits"), SECTIONS, source]), dataset)
    run(config, dataset, RunFolder(folder))
    shutil.rmtree(hub)
    text_backbones._from_hub.cache_clear()
    return folder


def test_the_file_alone_answers_as_the_network_in_training(trained, reviews, tmp_path):
    with pytest.raises(ModelError, match="could not be had"):
        make_tokenizer(NAME, 8)
    shipped = load_model(trained / "model.safetensors")
    assert shipped.info.preprocessing.vocabulary == tuple(WORDS)
    lines = ["A great box, kitchens", "AWFUL É kitchen"]
    (tmp_path / "today.txt").write_text("\n".join(lines), encoding="utf-8")
    rows = list(predict_texts(shipped, find_texts([tmp_path / "today.txt"])))
    tokens = [[2, 10, 9, 11, 1, 12, 13, 3], [2, 5, 1, 12, 3, 0, 0, 0]]  # the accent is dropped, and "e" is unknown
    with torch.no_grad():
        expected = (shipped(torch.tensor(tokens)) / shipped.info.temperature).softmax(1).max(1)
    assert [row["probability"] for row in rows] == pytest.approx(expected.values.tolist(), abs=1e-6)
    assert [row["class"] for row in rows] == [shipped.info.classes[i] for i in expected.indices.tolist()]


def test_predict_and_eval_need_no_hub(qtdog, trained, reviews, tmp_path):
    model = tmp_path / "model.safetensors"
    shutil.copy(trained / "model.safetensors", model)
    (tmp_path / "today.txt").write_text("good box\nawful")
    found = qtdog("predict", model, tmp_path / "today.txt", "--json")
    assert found.code == 0, found.err
    assert len(json.loads(found.out)) == 2
    found = qtdog("eval", model, reviews, "--json")
    assert found.code == 0, found.err
    result = json.loads((trained / "result.json").read_text())
    assert json.loads(found.out)["domains"]["unseen"]["accuracy"] == pytest.approx(result["test_accuracy"])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("flatness", ("--directions", 4, "--images", 8, "--radii", "0,3")),
        ("hessian", ("--images", 2, "--vectors", 10, "--error", 100, "--probes", 0, "--eigenvalues", 1)),
        ("noise", ()),
        (
            "errors",
            (
                "--images",
                20,
            ),
        ),
    ],
)
def test_analyses_of_weights_and_answers_work_on_text(qtdog, trained, tmp_path, kind, options):
    found = qtdog("analyze", kind, trained, *options, "--out", tmp_path, "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["numbers"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("analyze", "cam", "RUN"), "reads text: it has no feature maps to show"),
        (("export", "MODEL", "--out", "OUT.onnx"), "reads text; only models of images can be exported"),
        (("bench", "MODEL", "--data", "DATA"), "reads text; only models of images can be exported or timed"),
        (("bits", "--data", "DATA", "--target", "unseen", "--backbone", NAME), "has only one, 'seen'"),
    ],
)
def test_what_is_for_images_says_so(qtdog, trained, reviews, tmp_path, command, message):
    places = {"RUN": trained, "MODEL": trained / "model.safetensors", "DATA": reviews, "OUT.onnx": tmp_path / "a.onnx"}
    found = qtdog(*(places.get(word, word) for word in command))
    assert found.code in (1, 2), (found.out, found.err)
    assert message in found.err


def described(**changes: Any) -> dict[str, Any]:
    how = {"image_size": 32, "channels": 3, "mean": [0, 0, 0], "std": [1, 1, 1], "max_tokens": 8}
    how |= {"vocabulary": WORDS}
    about = {"backbone": NAME, "classes": ["1"], "source_domains": ["seen"], "target_domain": None, "accuracy": {}}
    about |= {"pretraining": "none", "bits": 7, "step": 1, "config_hash": ""}
    return about | {"backbone": changes.pop("backbone", NAME), "preprocessing": how | changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocabulary": [*WORDS, "more"]}, "takes 15 words, the vocabulary has 16"),
        ({"vocabulary": [*WORDS[:-1], "good"]}, "appears twice"),
        ({"vocabulary": "good"}, "valid tuple"),
        ({"vocabulary": [1, 2]}, "valid string"),
        ({"max_tokens": 0}, "max_tokens is 0, and that does not fit"),
        ({"backbone": "distilbert-mini"}, "distilbert-mini takes 0 words"),
        ({"backbone": "resnet18", "vocabulary": []}, "max_tokens is 8, and that does not fit resnet18"),
    ],
)
def test_a_hostile_vocabulary_is_refused(hub, changes, message):
    with pytest.raises(FormatError, match=message):
        read_info(Path("m.safetensors"), described(**changes))


def test_an_older_file_without_vocabulary_asks_the_hub(hub):
    assert read_info(Path("m.safetensors"), described(vocabulary=[])).preprocessing.vocabulary == ()
