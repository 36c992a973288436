"""Data that moved, names in other Unicode forms, and names that are no text."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import unicodedata

import pytest

from qtdog.core.config_io import build_config, load_preset
from qtdog.core.errors import ConfigError, DataError, unknown
from qtdog.data.image_folder import open_folder
from qtdog.data.open import open_dataset, recorded_source
from qtdog.training.protocol import resolve


def test_data_that_moved_are_asked_for(image_tree, tmp_path):
    hint = r"gone does not exist.*if the data moved, --data tells where it is\.$"
    with pytest.raises(DataError, match=hint), recorded_source(str(tmp_path / "gone")):
        open_dataset(str(tmp_path / "gone"))
    with pytest.raises(DataError) as found, recorded_source(str(image_tree / "night")):  # it is there, but wrong
        open_dataset(str(image_tree / "night"))
    assert "--data tells" not in str(found.value)
    with pytest.raises(DataError) as found, recorded_source("gone/x.csv:month", is_recorded=False):
        open_dataset("gone/x.csv:month")
    assert "--data tells" not in str(found.value)


def test_a_target_in_another_unicode_form_is_the_domain(image_tree):
    (image_tree / "night").rename(image_tree / "café")
    dataset = open_folder(image_tree)
    config = build_config([load_preset("digits"), {"data": {"target": unicodedata.normalize("NFD", "café")}}])
    assert resolve(config, dataset).data.target == "café"


def test_names_that_look_alike_are_shown_with_their_codes():
    text = unknown("target domain", unicodedata.normalize("NFD", "münchen"), ["münchen", "bern"])
    assert text == r"unknown target domain 'mu\u0308nchen', which only looks like 'm\xfcnchen': take that"
    assert "did you mean 'münchen'?" in unknown("target domain", "munchen", ["münchen"])


def test_every_message_can_be_written(image_tree):
    shutil.rmtree(image_tree / "night")
    (image_tree / os.fsdecode(b"n\xff") / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match=r"no images in .*n\\xff: fill or remove the folder") as found:
        open_folder(image_tree)
    str(found.value).encode()
    assert str(ConfigError("half a pair: \ud800")).encode()


def test_file_names_are_utf8_whatever_the_locale_says(image_tree):
    (image_tree / "night").rename(image_tree / "café")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "200"}
    command = [sys.executable, "-m", "qtdog", "data", "card", str(image_tree), "--json"]
    done = subprocess.run(command, env=os.environ | ascii_only, capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["counts"]["café"] == {"bird": 6, "cat": 6, "dog": 6}
