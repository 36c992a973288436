"""A new user's images: three sites, two classes, mixed kinds of files, one of them broken."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SHORT = ("--image-size", 12, "--batch-size", 4, "--steps", 2, "--set", "train.eval_every=1")
NET = ("--backbone", "digits_cnn", "--weights", "none", *SHORT)


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Make 3 sites × 2 classes × 6 images: PNG, JPEG, WebP, grey, 16-bit and RGBA; and a list with a month each."""
    rng = np.random.default_rng(0)
    rows = ["path,label,site,month"]
    for site in ("harbour", "hill", "valley"):
        for label in ("benign", "malignant"):
            folder = tmp_path / "scans" / site / label
            folder.mkdir(parents=True)
            for i, kind in enumerate(("png", "jpg", "webp", "png", "png", "png")):
                pixels = rng.integers(0, 255, (20 + i, 24, 3), dtype=np.uint8)
                image = Image.fromarray(pixels)
                sixteen_bit = Image.fromarray(pixels[..., 0].astype(np.uint16) * 256)
                kinds = {3: image.convert("L"), 4: sixteen_bit, 5: image.convert("RGBA")}
                kinds.get(i, image).save(folder / f"{i}.{kind}")
                rows.append(f"{site}/{label}/{i}.{kind},{label},{site},2024-0{1 + i % 2}")
    (tmp_path / "scans" / "list.csv").write_text("\n".join(rows))
    return tmp_path / "scans"


def test_a_broken_image_is_named_and_left_out_on_demand(qtdog, scans, tmp_path):
    broken = scans / "hill" / "malignant" / "2.webp"
    broken.write_bytes(broken.read_bytes()[:60])
    outcome = qtdog("train", "--data", scans, "--target", "valley", *NET, "--out", tmp_path / "a")
    assert outcome.code == 1
    assert str(broken) in outcome.err
    assert "--skip-unreadable goes on" in outcome.err
    run = tmp_path / "b"
    outcome = qtdog("train", "--data", scans, "--target", "valley", *NET, "--skip-unreadable", "--out", run)
    assert outcome.code == 0
    assert "1 unreadable images are left out" in outcome.err
    (skipped,) = json.loads((run / "skipped.json").read_text())
    assert skipped["image"] == "hill/malignant/2.webp"
    assert "cannot be read as an image" in skipped["reason"]
    assert json.loads((run / "result.json").read_text())["n_skipped"] == 1
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((run / "model.safetensors").read_bytes())
    assert qtdog("eval", alone, scans).code == 1
    outcome = qtdog("eval", alone, scans, "--skip-unreadable", "--json")
    assert outcome.code == 0
    assert "1 unreadable images are left out" in outcome.err
    assert {name: score["n"] for name, score in json.loads(outcome.out)["domains"].items()} == {
        "harbour": 12,
        "hill": 11,
        "valley": 12,
    }
    outcome = qtdog("predict", run / "model.safetensors", scans / "valley", "--json")
    assert outcome.code == 0
    assert len(json.loads(outcome.out)) == 12


def test_an_interrupted_run_goes_on_without_the_broken_image(qtdog, scans, tmp_path):
    (scans / "hill" / "malignant" / "2.webp").write_bytes(b"")
    run = tmp_path / "b"
    assert qtdog("train", "--data", scans, "--target", "valley", *NET, "--skip-unreadable", "--out", run).code == 0
    (run / "result.json").unlink()
    assert qtdog("train", "--resume", "--out", run).code == 0


def test_a_sound_data_set_gives_the_same_run_either_way(qtdog, scans, tmp_path):
    first = qtdog("train", "--data", scans, "--target", "valley", *NET, "--out", tmp_path / "a", "--json")
    again = (
        "train",
        "--data",
        scans,
        "--target",
        "valley",
        *NET,
        "--skip-unreadable",
        "--out",
        tmp_path / "b",
        "--json",
    )
    assert json.loads(first.out)["config_hash"] == json.loads(qtdog(*again).out)["config_hash"]
    assert not (tmp_path / "b" / "skipped.json").exists()


def test_any_column_may_hold_the_domains(qtdog, scans, tmp_path):
    outcome = qtdog("data", "card", f"{scans}/list.csv:month", "--json")
    assert json.loads(outcome.out)["counts"] == {m: {"benign": 9, "malignant": 9} for m in ("2024-01", "2024-02")}
    args = ("--target", "2024-02", *NET, "--out", tmp_path / "run")
    assert qtdog("train", "--data", f"{scans}/list.csv:month", *args).code == 0
    outcome = qtdog("train", "--data", scans / "list.csv", "--target", "hill")
    assert outcome.code == 1
    assert "the column 'domain' is missing" in outcome.err
    assert "list.csv:site'" in outcome.err
    outcome = qtdog("data", "card", f"{scans}/list.csv:mnth")
    assert outcome.code == 1
    assert "rename 'month'?" in outcome.err


def test_rare_classes_may_weigh_more(qtdog, scans, tmp_path):
    args = ("--target", "valley", *NET, "--set", "data.class_weights=balanced", "--out", tmp_path / "run")
    assert qtdog("train", "--data", scans, *args).code == 0
    outcome = qtdog("train", "--data", scans, *NET, "--set", "data.class_weights=balance")
    assert outcome.code == 2
    assert "did you mean 'balanced'" in outcome.err


def test_every_later_command_leaves_out_what_the_run_left_out(qtdog, scans, tmp_path):
    broken = scans / "hill" / "malignant" / "2.webp"
    broken.write_bytes(broken.read_bytes()[:60])
    train = ("train", "--data", scans, "--target", "valley", *NET, "--skip-unreadable")
    runs = [tmp_path / "0", tmp_path / "1"]
    for seed, run in enumerate(runs):
        assert qtdog(*train, "--seed", seed, "--out", run).code == 0
    five = tmp_path / "made" / "five"
    commands = [
        ("export", runs[0], "-o", tmp_path / "model.h"),
        ("bench", runs[0], "--rounds", 1, "--data", scans, "--domain", "hill"),
        ("eval", runs[0] / "model.safetensors", scans),
        ("ensemble", *runs, "--out", five),
        ("export", five, "-o", tmp_path / "five.h"),
        ("eval", five / "model.safetensors", scans),
        ("analyze", "surface", runs[0], "--points", 3, "--images", 2, "--out", tmp_path / "a"),
    ]
    for command in commands:
        outcome = qtdog(*command)
        assert outcome.code == 0, (command, outcome.err)


def test_predict_loses_no_row_for_an_odd_name(qtdog, scans, tmp_path):
    run = tmp_path / "run"
    assert qtdog("train", "--data", scans, "--target", "valley", *NET, "--out", run).code == 0
    new = tmp_path / "new"
    new.mkdir()
    image = (scans / "hill" / "benign" / "0.png").read_bytes()
    for name in (b"plain.png", b"sch\xf6n.png", "Ü 東.png".encode(), b"a,b\n.png"):
        Path(os.fsdecode(os.path.join(os.fsencode(new), name))).write_bytes(image)
    (new / "broken.png").write_bytes(b"")
    (new / "x.cr2").write_bytes(b"raw")
    for style in ("csv", "json", "table"):
        out = tmp_path / f"rows.{style}"
        outcome = qtdog("predict", run / "model.safetensors", new, "--format", style, "--out", out)
        assert outcome.code == 1
        assert "1 of 5 images could not be read" in outcome.err
        assert "1 files .cr2 are left out" in outcome.err
        text = out.read_text(encoding="utf-8")
        text = json.dumps(json.loads(text), ensure_ascii=False) if style == "json" else text
        assert "plain.png" in text
        assert "Ü 東.png" in text
        assert r"sch\xf6n.png" in text.replace("\\\\", "\\")
    assert len(json.loads((tmp_path / "rows.json").read_text())) == 4


def test_a_domain_is_a_name_and_no_path(qtdog, scans, tmp_path):
    rows = (scans / "list.csv").read_text().splitlines()
    odd = {"harbour": "../up", "hill": "a/b", "valley": "n" * 300}
    changed = [row.replace(f",{site},", f",{odd[site]},") for row in rows[1:] for site in odd if f",{site}," in row]
    (scans / "odd.csv").write_text("\n".join([rows[0], *changed]))
    out = tmp_path / "deep" / "runs"
    outcome = qtdog("train", "--data", f"{scans}/odd.csv:site", "--target", "all", *NET, "--out", out)
    assert outcome.code == 0
    assert len([path for path in out.iterdir() if (path / "result.json").is_file()]) == 3
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["runs"]
