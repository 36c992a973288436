"""Reviews from WILDS' files to a packed model that answers text: the whole path, with a small random transformer."""

# attributes of modules and options that are not there are what is tested
# pyright: reportArgumentType=false, reportIndexIssue=false

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qtdog.core.config import Config
from qtdog.core.errors import ConfigError, DataError, Interrupted, ModelError
from qtdog.core.progress import StopAfter
from qtdog.data.dataset import ImageDataset
from qtdog.data.decoded_cache import open_cache
from qtdog.data.open import open_any, open_texts
from qtdog.data.text import TextDomains, open_tokens
from qtdog.ensemble.assemble import EnsembleSpec, assemble
from qtdog.ensemble.model import load, read_member
from qtdog.ensemble.prediction import find_texts, predict_texts
from qtdog.ensemble.scoring import open_evaluation_set
from qtdog.models.text_backbones import make_tokenizer
from qtdog.runs.folder import RunFolder
from qtdog.training.load_model import load_model
from qtdog.training.protocol import check_input, resolve
from qtdog.training.run import RunCallbacks, run

FILLING = ["the", "product", "came", "in", "a", "box", "and", "i", "used", "it", "for", "my", "kitchen", "with", "that"]
TELLING = {1: "awful", 2: "poor", 3: "okay", 4: "good", 5: "great"}
N_AUTHORS, N_EACH, N_TOKENS = 30, 9, 12
TRAIN, VAL, ID_VAL, TEST, ID_TEST = range(5)  # as WILDS numbers them in the file
TEXT = {
    "data": {"target": "unseen", "batch_size": 16, "max_tokens": N_TOKENS},
    "model": {"backbone": "distilbert-mini", "weights": "none"},
    "train": {"steps": 30, "eval_every": 10},
    "quantizer": {"name": "lsq", "bits": 7, "start_step": 10},
    "optimizer": {"lr": 2e-3},
}


def part_of(author: int, review: int) -> int:
    if author % 3 == 2:
        return VAL if author % 2 else TEST
    return TRAIN if review < 6 else ID_VAL if review == 6 else ID_TEST


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reviews")
    (root / "splits").mkdir()
    rng = random.Random(0)
    rows, parts = [], []
    for author in range(N_AUTHORS):
        for review in range(N_EACH):
            stars = review % 5 + 1
            words = [*rng.choices(FILLING, k=5), *([TELLING[stars]] if rng.random() > 0.05 * (author % 8) else [])]
            rows.append((f"U{author:03}", f"{stars}.0", " ".join(rng.sample(words, len(words)))))
            parts.append(part_of(author, review))
    with (root / "reviews.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("reviewerID", "overall", "reviewText"), *rows])
    with (root / "splits" / "user.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("split",), *((part,) for part in parts)])
    return root


@pytest.fixture(scope="module")
def dataset(reviews: Path) -> TextDomains:
    found = open_any(str(reviews))
    assert isinstance(found, TextDomains)
    return found


def text_config(short_config: Callable[..., Config], dataset: TextDomains, **changes: dict[str, Any]) -> Config:
    sections = {name: TEXT.get(name, {}) | changes.get(name, {}) for name in (*TEXT, *changes)}
    return resolve(short_config(**sections), dataset)


def reference(folder: Path, texts: Any, part: str) -> tuple[float, float]:
    """Return average and 10th percentile over authors, from the file and NumPy alone."""
    shipped, rows = load_model(folder / "model.safetensors"), texts.indices(part)
    tokens = make_tokenizer("distilbert-mini", N_TOKENS)(texts.texts(rows))
    with torch.no_grad():
        chosen = shipped(torch.from_numpy(tokens).long()).argmax(1).numpy()
    right = chosen == texts.class_index[rows]
    authors = texts.domain_index[rows]
    each = [right[authors == author].mean() for author in sorted(set(authors.tolist()))]
    return right.mean(), np.percentile(each, 10)


def test_from_reviews_to_answers(
    reviews: Path, dataset: TextDomains, tmp_path: Path, short_config: Callable[..., Config]
):
    result = run(text_config(short_config, dataset), dataset, RunFolder(tmp_path / "run"))
    texts = open_texts(str(reviews))
    for name, part in (("in", "id_test"), ("out", "test")):
        average, percentile = reference(tmp_path / "run", texts, part)
        found = result["groups"][name]
        assert found["average"] == pytest.approx(average, abs=1e-12)
        assert found["percentile_10"] == pytest.approx(percentile, abs=1e-12)
        assert found["percentile_10"] < found["average"]
    assert result["groups"]["out"]["average"] == pytest.approx(result["test_accuracy"])
    assert result["groups"]["out"]["n_groups"] == 5
    assert result["source_domains"] == ["seen"]
    assert result["pretraining"] == "none"
    assert result["test_accuracy"] > 0.5  # chance is 0.2
    assert result["size"]["ratio"] > 4
    assert {layer["bits"] for layer in result["layers"]} == {7}

    (tmp_path / "today.txt").write_text("a great box\n\nAWFUL product\n")
    (tmp_path / "broken.txt").write_bytes(b"\xff\xfe")
    shipped = load_model(tmp_path / "run" / "model.safetensors")
    rows = list(predict_texts(shipped, find_texts([tmp_path / "today.txt", tmp_path / "broken.txt"])))
    assert [row["text"].rpartition(":")[2] for row in rows[:2]] == ["1", "3"]
    assert all(row["class"] in "12345" and 0 < row["probability"] <= 1 for row in rows[:2])
    assert isinstance(rows[2], DataError)
    with pytest.raises(DataError, match=r"no \.txt file"):
        list(find_texts([tmp_path / "run"]))


def test_only_texts_of_the_seen_side_are_trained_and_selected_on(dataset: TextDomains, tmp_path: Path, short_config):
    from qtdog.training.protocol import make_protocol

    protocol = make_protocol(text_config(short_config, dataset), dataset)
    assert protocol.sources == ("seen",)
    assert dataset.official_split is not None
    parts = {"train": protocol.train_pools()["seen"], "id_val": protocol.selection_sets()["seen"]}
    names = np.array(["train", "id_val", "id_test", "val", "test"])
    for name, rows in parts.items():
        assert set(names[dataset.official_split[rows]]) == {name}
        assert len(rows) == {"train": 20 * 6, "id_val": 20}[name]


def test_stopped_and_resumed_is_bit_identical(dataset: TextDomains, tmp_path: Path, short_config):
    config = text_config(short_config, dataset, train={"steps": 6, "eval_every": 2}, quantizer={"start_step": 2})
    whole, broken = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "broken")
    run(config, dataset, whole)
    with pytest.raises(Interrupted):
        run(config, dataset, broken, callbacks=RunCallbacks(StopAfter(3)))
    run(config, dataset, broken, resume=True)
    assert whole.model_file.read_bytes() == broken.model_file.read_bytes()


def test_two_text_models_make_an_ensemble(dataset: TextDomains, tmp_path: Path, short_config):
    for seed in (0, 1):
        changes: dict[str, Any] = {"train": {"steps": 4, "eval_every": 2, "seed": seed}, "quantizer": {"start_step": 1}}
        run(text_config(short_config, dataset, **changes), dataset, RunFolder(tmp_path / str(seed)))
    members = [read_member(tmp_path / str(seed)) for seed in (0, 1)]
    evaluation_set = open_evaluation_set(members[0].config, dataset, same_splits=True)
    result = assemble(members, EnsembleSpec("eoq", tmp_path / "eoq" / "model.safetensors"), evaluation_set)
    assert 0 <= result["test_accuracy"] <= 1
    rows = list(predict_texts(load(tmp_path / "eoq" / "model.safetensors"), find_texts([_note(tmp_path)])))
    assert {"class", "mutual_information"} <= set(rows[0])
    assert result["pretraining"] == "none"


def _note(folder: Path) -> Path:
    (folder / "note.txt").write_text("good")
    return folder / "note.txt"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"backbone": "resnet18"}}, r"is text, which backbone 'resnet18' cannot read; use one of distilbert"),
        ({"objective": {"name": "mixup"}}, r"objective 'mixup' works on images"),
        ({"model": {"feature_layer": "mixstyle"}}, r"feature layer 'mixstyle' works on images"),
        ({"data": {"augment": "domainbed"}}, r"data\.augment=domainbed cannot change: set it to none"),
    ],
)
def test_what_works_on_images_is_refused(dataset: TextDomains, short_config, changes, message):
    with pytest.raises(ConfigError, match=message):
        check_input(text_config(short_config, dataset, **changes), dataset)


def test_images_for_a_text_backbone_are_refused(short_config):
    digits = open_any("rotated-digits")
    with pytest.raises(ConfigError, match="'distilbert-mini' reads text, and rotated-digits is of images"):
        check_input(short_config(model={"backbone": "distilbert-mini"}), digits)


def test_a_method_that_needs_stages_says_so(dataset: TextDomains, tmp_path: Path, short_config):
    config = text_config(short_config, dataset, objective={"name": "miro"})
    with pytest.raises(ModelError, match="no stages with a feature map"):
        run(config, dataset, RunFolder(tmp_path / "run"))


def test_texts_are_no_images(dataset: TextDomains):
    assert not isinstance(dataset, ImageDataset)
    with pytest.raises(DataError, match="is a data set of texts, and images are wanted here"):
        open_cache(dataset, 8)


def test_texts_are_tokenized_once(dataset: TextDomains, tmp_path: Path):
    calls = []

    def tokenize(texts: Any) -> np.ndarray:
        calls.append(len(texts))
        return np.array([[1, len(text), 65535] for text in texts], dtype=np.int32)

    how: dict[str, Any] = {"length": 3, "folder": tmp_path}
    cache = open_tokens(dataset, tokenize, name="a", **how)
    rows = cache.gather([5, 0])
    assert rows.tolist() == [[1, len(text), 65535] for text in dataset.texts(np.array([5, 0]))]
    assert rows.dtype == torch.int64
    open_tokens(dataset, tokenize, name="a", **how)
    assert calls == [len(dataset)]
    cache.path.write_bytes(cache.path.read_bytes()[:-1])
    open_tokens(dataset, tokenize, name="a", **how)
    open_tokens(dataset, tokenize, name="b", **how)
    assert calls == [len(dataset)] * 3
    with pytest.raises(DataError, match="not 16 bits"):
        open_tokens(dataset, lambda texts: tokenize(texts) + 1, name="c", **how)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size == 0]
