"""Text that somebody else wrote stays within its bounds, and stays text on a terminal and in a spreadsheet."""

import csv
import io
import os
import re

import pytest

from qtdog.core.config_io import load_preset, parse_assignment
from qtdog.core.errors import ConfigError, RunError
from qtdog.core.printable import printable
from qtdog.core.safe_text import csv_line, no_formula, parse_json, parse_yaml, read_json, read_text
from qtdog.sweep.study import read_study

ALIASES = "objective:\n  params:\n    a0: &a0 [x,x]\n" + "".join(
    f"    a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 8)
)
COSTLY = {
    "aliases": ALIASES,
    "an alias of itself": "&a [*a]",
    "nesting": "[" * 1000,
    "long": "a: b # " + "x" * 1_000_001,
    "many": "[" + "[]," * 60_000 + "]",
    "a number to base 60": ":".join("1" * 2000),
    "a tag of Python": "!!python/object/apply:os.system [id]",
    "a date that is none": "a: 2020-99-99",
    "an unfinished text": "a: 'b",
    "a key that is a list": "? [a]\n: b",
}


@pytest.mark.parametrize("text", COSTLY.values(), ids=COSTLY)
def test_costly_yaml_is_refused_in_one_line(text, tmp_path):
    with pytest.raises(ValueError, match=r".") as found:
        parse_yaml(text)
    assert "\n" not in str(found.value)
    file = tmp_path / "a.yaml"
    file.write_text(text)
    for read in (lambda: load_preset(str(file)), lambda: read_study(file)):
        with pytest.raises(ConfigError, match=re.escape(str(file))):
            read()


def test_yaml_means_what_it_meant():
    text = "a: NO\nb: [010, 1.5, null, 2020-01-01]\nc: {d: 'x', <<: {e: 1}}\n75: yes\n"
    value, texts = parse_yaml(text)
    assert value == {"a": False, "b": [8, 1.5, None, value["b"][3]], "c": {"d": "x", "e": 1}, 75: True}
    assert texts == {"a": "NO", "b": ["010", "1.5", "null", "2020-01-01"], "c": {"e": "1", "d": "x"}, "75": "yes"}
    assert parse_yaml("") == (None, None)
    assert parse_assignment("train.steps=[1, {a: 2}]") == {"train": {"steps": [1, {"a": 2}]}}
    with pytest.raises(ConfigError, match="alias"):
        parse_assignment("train.steps=[&a 1, *a]")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" + "[]," * 600_000 + "[]]", "9" * 5000, "{"])
def test_costly_json_is_refused(text, tmp_path):
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(RunError, match=r"a\.json is damaged: it is not valid JSON"):
        read_json(tmp_path / "a.json")


def test_only_regular_files_of_text_are_read(tmp_path):
    file = tmp_path / "a"
    file.write_text("[]")
    (tmp_path / "link").symlink_to(file)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert read_text(file, 2) == "[]"
    for name, reason in {
        "link": "is a link",
        "fifo": "is no regular file",
        "": "is no regular file",
        "none": "cannot be read",
        "binary": "no text in UTF-8",
    }.items():
        with pytest.raises(RunError, match=reason):
            read_text(tmp_path / name, 100)
    with pytest.raises(RunError, match="2 bytes, and 1 are the limit"):
        read_text(file, 1)


def test_nothing_but_characters_reaches_the_terminal():
    every = "".join(map(chr, range(0x110000)))
    left = printable(every)
    assert len(left) == len(every)
    for bad in ("\x1b", "\x9b", "\x07", "\x08", "\r", "\x7f", "\u202e", "\u2066", "\ud800", "\u2028", "\ufeff"):
        assert bad not in left
    assert printable("ä€漢字🙂\n\t") == "ä€漢字🙂\n\t"


CELLS = ("=1+1", "+1+1", "-1-1", "@SUM(1)", "\t=1", "\r=1", "\n=1", "  =1", "＝1+1", "=cmd|'C calc'!A0")


@pytest.mark.parametrize("text", CELLS)
def test_no_cell_of_a_csv_is_a_formula(text):
    (read,) = next(csv.reader(io.StringIO(csv_line([text]), newline="")))
    assert read.startswith("'")
    assert no_formula(read) == read


@pytest.mark.parametrize("text", ["-0.4", "+1", "1e-05", "-inf", "nan", "-27.1 3.5; -2e-05 1.0", "plain", "a=b", ""])
def test_numbers_and_plain_texts_stay(text):
    assert no_formula(text) == text
