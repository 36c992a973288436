import csv
import json
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qtdog.core.errors import DataError
from qtdog.data.dataset import composed, is_missing
from qtdog.data.image_folder import open_folder
from qtdog.data.manifest import open_manifest

TABLE = [
    ("indoor/cat/0.png", "cat", "indoor"),
    ("night/cat/1.png", "cat", "night"),
    ("night/bird/0.png", "bird", "night"),
]


def as_csv(root: Path, header: str = "path,class,domain", rows: list[tuple[str, ...]] | None = None) -> Path:
    lines = [header, *(",".join(row) for row in (TABLE if rows is None else rows))]
    (root / "list.csv").write_text("\n".join(lines) + "\n")
    return root / "list.csv"


def as_jsonl(root: Path, rows: list[object]) -> Path:
    (root / "list.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return root / "list.jsonl"


def test_csv(image_tree: Path) -> None:
    dataset = open_manifest(as_csv(image_tree))
    assert dataset.keys == ["indoor/cat/0.png", "night/bird/0.png", "night/cat/1.png"]
    assert (dataset.domains, dataset.classes) == (("indoor", "night"), ("bird", "cat"))
    assert (dataset.domain_index.tolist(), dataset.class_index.tolist()) == ([0, 1, 1], [1, 0, 1])
    assert dataset.read(0).shape == (20, 24, 3)


def test_jsonl_gives_the_same_as_csv(image_tree: Path) -> None:
    rows: list[object] = [{"path": path, "label": label, "domain": domain} for path, label, domain in TABLE]
    first, second = open_manifest(as_csv(image_tree)), open_manifest(as_jsonl(image_tree, rows))
    assert first.content_sha256() == second.content_sha256()


def test_a_manifest_of_everything_equals_the_folder(image_tree: Path) -> None:
    folder = open_folder(image_tree)
    rows = [(key, key.split("/")[1], key.split("/")[0]) for key in reversed(folder.keys)]
    manifest = open_manifest(as_csv(image_tree, rows=rows))
    assert manifest.keys == folder.keys
    assert manifest.content_sha256() == folder.content_sha256()


def test_spreadsheet_habits_are_accepted(image_tree: Path) -> None:
    text = "\ufeffPath, Label ,Domain,note\nindoor/cat/0.png, 7 ,indoor,x\n./night/cat/1.png,7,night,y\n"
    (image_tree / "list.csv").write_text(text, encoding="utf-8")
    dataset = open_manifest(image_tree / "list.csv")
    assert dataset.classes == ("7",)
    assert dataset.keys == ["indoor/cat/0.png", "night/cat/1.png"]


@pytest.mark.parametrize("path", ["../secret.png", "/etc/hosts", "indoor/../../x.png", "C:\\x.png"])
def test_a_path_that_leaves_the_folder_is_refused(image_tree: Path, path: str) -> None:
    with pytest.raises(DataError, match=r"line 2: path .* leaves the manifest's folder"):
        open_manifest(as_csv(image_tree, rows=[(path, "cat", "indoor"), *TABLE]))


def test_a_misspelt_column_is_named(image_tree: Path) -> None:
    with pytest.raises(DataError, match=r"list\.csv, line 1: the column 'domain' is missing; rename 'domian'\?"):
        open_manifest(as_csv(image_tree, header="path,class,domian"))


def test_a_missing_column_is_named(image_tree: Path) -> None:
    with pytest.raises(DataError, match=r"line 2: the column 'class' is missing\. Found: path"):
        open_manifest(as_jsonl(image_tree, [{"path": TABLE[0][0], "class": "x", "domain": "a"}, {"path": "b"}]))


def test_a_missing_file_is_named_with_its_line(image_tree: Path) -> None:
    with pytest.raises(DataError, match=r"list\.csv, line 5: .*gone\.png does not exist \(paths are relative to"):
        open_manifest(as_csv(image_tree, rows=[*TABLE, ("gone.png", "cat", "night")]))


def test_an_empty_cell_is_named_with_its_line(image_tree: Path) -> None:
    with pytest.raises(DataError, match="line 3: 'class' is empty"):
        open_manifest(as_csv(image_tree, rows=[TABLE[0], (TABLE[1][0], " ", "night")]))


def test_a_short_line_is_named(image_tree: Path) -> None:
    with pytest.raises(DataError, match="line 3: 'domain' is empty"):
        open_manifest(as_csv(image_tree, rows=[TABLE[0], TABLE[1][:2]]))


def test_an_image_listed_twice_is_refused(image_tree: Path) -> None:
    with pytest.raises(DataError, match=r"line 5: indoor/cat/0\.png is listed twice"):
        open_manifest(as_csv(image_tree, rows=[*TABLE, ("./indoor/cat/0.png", "cat", "night")]))


def test_an_image_listed_in_two_domains_is_refused(image_tree: Path) -> None:
    with pytest.raises(DataError, match=r"line 5: indoor/cat/0\.png is listed twice, in the domains 'indoor' and 'x'"):
        open_manifest(as_csv(image_tree, rows=[*TABLE, ("indoor/cat/0.png", "cat", "x")]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,class,domain\na.png,salt, sea,west\n", r"line 2 has 4 cells, but there are 3 columns: .* in quotes"),
        ("path,class,domain,Domain\na.png,x,y,z\n", r"line 1: there are 2 columns 'domain'; rename or remove one"),
        ("path;class;domain\na.png;x;y\n", r"'path' is missing.*the first line names the columns, with commas between"),
        ("path,class,domain\nnight\\cat\\0.png,cat,a\n", r"does not exist .*; between folders goes a /"),
        ("path,class,domain\nnight/cat,cat,a\n", r"line 2: .*cat is a folder; list each image"),
        ('path,class,domain\n"' + "x" * 200_000 + '",cat,a\n', "is no list of lines with commas: field larger"),
    ],
)
def test_a_malformed_csv_is_explained(image_tree: Path, text: str, message: str) -> None:
    (image_tree / "list.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        open_manifest(image_tree / "list.csv")


def test_empty_cells_at_the_end_of_a_line_are_no_mistake(image_tree: Path) -> None:
    (image_tree / "list.csv").write_text("path,class,domain\nnight/cat/0.png,cat,a,,\nnight/cat/1.png,cat,b\n")
    assert len(open_manifest(image_tree / "list.csv")) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"path": "night/cat/0.png", "class": "cat", "domain": ["a", "b"]}', "line 1: 'domain' is a list; give one"),
        ('{"path": 1', "line 1 is not JSON"),
        ("[1, 2]", "line 1 must be an object"),
        ("", "lists no images"),
    ],
)
def test_a_malformed_jsonl_is_explained(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        open_manifest(tmp_path / "list.jsonl")


def test_an_empty_csv_is_explained(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("")
    with pytest.raises(DataError, match=r"column 'path' is missing\. Found: none"):
        open_manifest(tmp_path / "list.csv")


def test_a_binary_file_is_explained(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        open_manifest(tmp_path / "list.csv")


def test_a_missing_manifest_names_its_neighbour(image_tree: Path) -> None:
    as_csv(image_tree)
    with pytest.raises(DataError, match=r"did you mean .*list\.csv\?"):
        open_manifest(image_tree / "lists.csv")


def test_one_domain_only(image_tree: Path) -> None:
    path = as_csv(image_tree, rows=TABLE[1:])
    with pytest.raises(DataError, match=r"list\.csv has 1 domain \(night\)"):
        open_manifest(path)
    assert len(open_manifest(path, min_domains=1)) == 2


def test_another_column_may_hold_the_domains(image_tree: Path) -> None:
    path = image_tree / "list.csv"
    path.write_text("path,label,Month\nnight/cat/0.png,cat,1\nnight/cat/1.png,cat,2\n")
    assert open_manifest(path, domain_column="month").domains == ("1", "2")
    with pytest.raises(
        DataError, match=r"the column 'domain' is missing.*list\.csv:month'.* Found: path, label, month"
    ):
        open_manifest(path)
    path = image_tree / "list.jsonl"
    path.write_text('{"path": "night/cat/0.png", "class": "cat", "Site": 7, "domain": "x"}\n')
    assert open_manifest(path, min_domains=1, domain_column="site").domains == ("7",)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "path,class,domain\nnight/cat/0.png,cat,a\nnight/cat/0.png,dog,a\n"),
        ("a.csv", "path,class,domain\nnight/cat/0.png,cat,a\nnight/cat/1.png,cat|dog,b\n"),
        ("a.jsonl", '{"path": "night/cat/0.png", "class": ["cat", "dog"], "domain": "a"}\n'),
    ],
)
def test_several_classes_for_one_image_are_refused_with_a_clear_word(image_tree: Path, name: str, text: str) -> None:
    (image_tree / name).write_text(text)
    with pytest.raises(DataError, match=r"several classes for one image \(multi-label\) are not supported"):
        open_manifest(image_tree / name)


def test_a_class_with_a_separator_in_its_name_is_no_two_classes(image_tree: Path) -> None:
    (image_tree / "a.csv").write_text(
        'path,class,domain\nnight/cat/0.png,"salt, sea",a\nnight/cat/1.png,"salt, rock",b\n'
    )
    assert open_manifest(image_tree / "a.csv").classes == ("salt, rock", "salt, sea")


ODD_LABELS = ["0", "0.0", "-1", "NaN", "None", "NULL", "<NA>", "", " ", "a|b", "a", "b", "cafe\u0301", "caf\u00e9", "A"]
LETTERS = st.characters(blacklist_categories=("Cs", "Cc"))  # a line break in a cell moves the numbers of lines
LABELS = st.one_of(st.sampled_from(ODD_LABELS), st.text(LETTERS, min_size=1, max_size=8))


@settings(max_examples=25, deadline=None)
@given(st.lists(LABELS, min_size=1, max_size=6), st.booleans())
@example(["a", "a|b"], False)
def test_every_label_is_a_class_or_named_with_its_line(labels, as_table):
    names = [composed(label.strip()) for label in labels]
    wrong = [i for i, name in enumerate(names) if is_missing(name)]
    with tempfile.TemporaryDirectory() as folder:
        path = write_labels(Path(folder), labels, as_table=as_table)
        try:
            dataset, refusal = open_manifest(path, min_domains=1), ""
        except DataError as error:
            dataset, refusal = None, str(error)
    joined = any(re.search(r"[|;,]", name) for name in names)
    if dataset is None:
        assert joined or (wrong and f", line {wrong[0] + 1 + as_table}: " in refusal)
        return
    assert not wrong
    assert dataset.classes == tuple(sorted(set(names)))
    found = {key: dataset.classes[c] for key, c in zip(dataset.keys, dataset.class_index, strict=True)}
    assert found == {f"{i}.png": name for i, name in enumerate(names)}


def write_labels(root: Path, labels: list[str], *, as_table: bool) -> Path:
    """Write a list of images that have these labels, and the images."""
    path = root / ("list.csv" if as_table else "list.jsonl")
    rows = [{"path": f"{i}.png", "label": label, "domain": "d"} for i, label in enumerate(labels)]
    for row in rows:
        (root / row["path"]).touch()
    with path.open("w", encoding="utf-8", newline="") as stream:
        if as_table:
            writer = csv.DictWriter(stream, ["path", "label", "domain"])
            writer.writeheader()
            writer.writerows(rows)
        else:
            stream.writelines(json.dumps(row) + "\n" for row in rows)
    return path
