"""Folders of images and manifests as data sets."""

import csv
import json
import os
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torchvision.datasets import ImageFolder

from qtdog.core.errors import DataError
from qtdog.data.cards import CARDS
from qtdog.data.dataset import composed, is_missing
from qtdog.data.decoded_cache import content_sha256
from qtdog.data.image_folder import open_folder, open_manifest


def make(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_domains_classes_and_labels(image_tree: Path) -> None:
    dataset = open_folder(image_tree)
    assert dataset.domains == ("indoor", "night", "outdoor")
    assert dataset.classes == ("bird", "cat", "dog")
    assert len(dataset) == 54
    assert dataset.keys[:2] == ["indoor/bird/0.png", "indoor/bird/1.png"]
    for key, d, c in zip(dataset.keys, dataset.domain_index, dataset.class_index, strict=True):
        assert key.startswith(f"{dataset.domains[d]}/{dataset.classes[c]}/")
    assert dataset.counts().tolist() == [[6] * 3] * 3


def test_the_order_within_a_domain_is_that_of_image_folder(image_tree: Path) -> None:
    nested = image_tree / "night" / "cat" / "more"
    nested.mkdir()
    (image_tree / "night" / "cat" / "3.png").rename(nested / "0.png")
    (image_tree / "night" / "cat" / "4.png").rename(image_tree / "night" / "cat" / "Z.PNG")
    dataset = open_folder(image_tree)
    for domain in dataset.domains:
        expected = ImageFolder(str(image_tree / domain)).samples
        members = dataset.indices(domain)
        assert [str(dataset.path(i)) for i in members] == [path for path, _ in expected]
        assert dataset.class_index[members].tolist() == [label for _, label in expected]


def test_hidden_and_other_files_are_ignored(image_tree: Path) -> None:
    make(image_tree, "indoor/cat/.hidden.png", "indoor/cat/notes.txt", ".git/cat/a.png", "splits/train.txt", "a.csv")
    make(image_tree, "indoor/.trash/a.png", "indoor/cat/.thumbs/a.png")
    assert len(open_folder(image_tree)) == 54


def test_links_to_images_and_folders_are_followed(image_tree: Path) -> None:
    (image_tree / "night" / "cat" / "link.png").symlink_to(image_tree / "night" / "cat" / "0.png")
    (image_tree / "street").symlink_to(image_tree / "night", target_is_directory=True)
    dataset = open_folder(image_tree)
    assert dataset.counts().sum(axis=1).tolist() == [18, 19, 18, 19]


def test_a_link_that_leads_back_is_not_followed(image_tree: Path) -> None:
    for name, place in (("here", "."), ("up", ".."), ("top", "../..")):
        (image_tree / "night" / "cat" / name).symlink_to(place, target_is_directory=True)
    (image_tree / "night" / "cat" / "beside").symlink_to("../dog", target_is_directory=True)
    dataset = open_folder(image_tree)
    assert dataset.counts().tolist() == [[6, 6, 6], [6, 12, 6], [6, 6, 6]]
    assert "night/cat/beside/0.png" in dataset.keys


def test_a_link_to_nowhere_is_named(image_tree: Path) -> None:
    (image_tree / "night" / "cat" / "gone.png").symlink_to("elsewhere/a.png")
    with pytest.raises(DataError, match=r"night/cat/gone\.png cannot be read: .*--skip-unreadable goes on"):
        content_sha256(open_folder(image_tree), folder=image_tree.parent / "cache")
    (image_tree.parent / "data").symlink_to("elsewhere")
    with pytest.raises(DataError, match=r"data is a link to elsewhere, which does not exist"):
        open_folder(image_tree.parent / "data")


def test_what_an_archive_of_a_mac_leaves_behind_is_no_domain(image_tree: Path) -> None:
    make(image_tree, "__MACOSX/night/cat/._0.png", ".DS_Store", "night/Thumbs.db", "night/cat/.DS_Store")
    assert open_folder(image_tree).domains == ("indoor", "night", "outdoor")


def test_names_of_every_kind(image_tree: Path) -> None:
    (image_tree / "night").rename(image_tree / "Straße 東京 #1")
    (image_tree / "Straße 東京 #1" / "cat" / "0.png").rename(image_tree / "Straße 東京 #1" / "cat" / "Ü [b], 1.PNG")
    dataset = open_folder(image_tree)
    assert dataset.domains == ("Straße 東京 #1", "indoor", "outdoor")
    assert dataset.read(dataset.keys.index("Straße 東京 #1/cat/Ü [b], 1.PNG")).shape == (20, 24, 3)


def test_a_name_that_is_not_utf8_is_shown(image_tree: Path) -> None:
    odd = os.fsencode(image_tree / "night" / "cat") + b"/sch\xf6n.png"
    os.rename(image_tree / "night" / "cat" / "0.png", odd)
    with pytest.raises(DataError, match=r"photos/night/cat/sch\\xf6n\.png is not UTF-8: rename it"):
        open_folder(image_tree)


def test_the_name_of_an_empty_class_is_utf8_as_well(image_tree: Path) -> None:
    (image_tree / "night" / "ki\udcffn").mkdir()
    with pytest.raises(DataError, match=r"photos/night/ki\\xffn is not UTF-8: rename it"):
        open_folder(image_tree)


def test_an_image_is_read_as_stored(image_tree: Path) -> None:
    pixels = open_folder(image_tree).read(0)
    assert pixels.shape == (20, 24, 3)


def test_a_class_missing_in_a_domain_is_listed(image_tree: Path) -> None:
    for path in (image_tree / "night" / "dog").iterdir():
        path.unlink()
    assert open_folder(image_tree).missing_classes() == [("night", "dog")]


def test_a_benchmark_is_recognized_by_its_names(tmp_path: Path) -> None:
    card = CARDS["pacs"]
    make(tmp_path, *(f"{domain}/{name}/a.jpg" for domain in card.domains or () for name in card.classes or ()))
    found = open_folder(tmp_path).card  # with other images: its name stays the folder's
    assert (found.domains, found.classes, found.steps) == (card.domains, card.classes, card.steps)
    make(tmp_path, "photo/zebra/a.jpg")
    assert open_folder(tmp_path).card.name == tmp_path.name


def test_a_missing_path_names_its_neighbour(image_tree: Path) -> None:
    with pytest.raises(DataError, match=r"photoz does not exist; did you mean .*photos\?"):
        open_folder(image_tree.parent / "photoz")


def test_a_missing_parent_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither does its folder"):
        open_folder(tmp_path / "a" / "b")


def test_a_file_is_no_folder(image_tree: Path) -> None:
    with pytest.raises(DataError, match=r"0\.png is a file; give a folder laid out as ROOT/DOMAIN/CLASS/image"):
        open_folder(image_tree / "night" / "cat" / "0.png")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "has no domains, it is empty of folders"),
        (("a.png",), "has images but no domains"),
        (("cat/a.png", "dog/a.png"), "If .* is one domain with its classes, give the folder above it"),
        (("x/cat/a.txt", "y/cat/b.txt"), "has folders but no images in them"),
        (("x/cat/a.png", "y/cat/b.txt"), r"no images in .*/y: fill or remove"),
        (("x/cat/a.png",), r"has 1 domain \(x\), but domain generalization needs at least 2"),
    ],
)
def test_a_wrong_layout_is_explained(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_folder(make(tmp_path, *names))


def test_one_domain_is_enough_to_evaluate(tmp_path: Path) -> None:
    assert open_folder(make(tmp_path, "x/cat/a.png"), min_domains=1).domains == ("x",)


def test_an_unknown_domain_is_refused(image_tree: Path) -> None:
    with pytest.raises(DataError, match="'noon' is not a domain of photos; it has indoor, night, outdoor"):
        open_folder(image_tree).indices("noon")


def test_the_content_hash_follows_content_names_and_labels_not_the_place(image_tree: Path, tmp_path: Path) -> None:
    before = open_folder(image_tree).content_sha256()
    moved = image_tree.rename(tmp_path / "elsewhere")
    assert open_folder(moved).content_sha256() == before
    (moved / "night" / "cat" / "0.png").rename(moved / "night" / "cat" / "00.png")
    renamed = open_folder(moved).content_sha256()
    data = bytearray((moved / "night" / "cat" / "1.png").read_bytes())
    data[-1] ^= 1
    (moved / "night" / "cat" / "1.png").write_bytes(data)
    changed = open_folder(moved).content_sha256()
    (moved / "night" / "cat" / "2.png").rename(moved / "night" / "dog" / "2.PNG")
    assert len({before, renamed, changed, open_folder(moved).content_sha256()}) == 4


def test_the_signature_sees_a_changed_file_of_the_same_size(image_tree: Path) -> None:
    dataset = open_folder(image_tree)
    before = dataset.signature()
    assert dataset.signature() == before
    path = dataset.path(5)
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert dataset.signature() != before


def test_indices_are_small(image_tree: Path) -> None:
    dataset = open_folder(image_tree)
    assert dataset.domain_index.dtype == dataset.class_index.dtype == np.int16


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
