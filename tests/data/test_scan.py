"""What is counted, what is passed over and said, and what is refused: links, suffixes, junk, levels, names."""

# attributes of modules and options that are not there are what is tested
# pyright: reportOptionalMemberAccess=false

from __future__ import annotations

import os
import string
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qtdog.api.datasets import SequenceDataset
from qtdog.core.errors import DataError
from qtdog.data.cards import DatasetCard
from qtdog.data.dataset import look_alikes
from qtdog.data.file_index import files_below
from qtdog.data.image_folder import open_folder, open_manifest
from qtdog.data.import_layouts import adopt
from qtdog.data.scan import IMAGE_SUFFIXES, JUNK_FOLDERS, PassedOver, names_below
from qtdog.data.verify import verify


def make(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return make(tmp_path / "photos", *(f"{d}/{c}/{i}.png" for d in "ab" for c in ("cat", "dog") for i in range(5)))


def images(root: Path) -> Path:
    """20 different images."""
    for i, (d, c, n) in enumerate((d, c, n) for d in "ab" for c in ("cat", "dog") for n in range(5)):
        (root / d / c).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), i, dtype=np.uint8)).save(root / d / c / f"{n}.png")
    return root


@pytest.mark.parametrize("place", ["c", "a/cow"])
def test_a_domain_or_class_that_is_a_link_to_nowhere_is_refused(small, place):
    (small / place).symlink_to("unmounted")
    with pytest.raises(DataError, match="link to unmounted, which does not exist: a whole domain or class"):
        open_folder(small)


def test_a_deeper_link_to_nowhere_is_said(small):
    (small / "a" / "cat" / "more").symlink_to("unmounted")
    problems = open_folder(small).passed_over.problems()
    assert problems == [f"1 links lead nowhere, such as {small}/a/cat/more: is a disk not mounted?"]
    assert problems[0] in verify(open_folder(small)).notes


def test_a_folder_that_cannot_be_read_is_refused(small, monkeypatch):
    inner = os.scandir

    def scandir(path):
        if str(path).endswith("b/dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return inner(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"the folder .*photos/b/dog cannot be read: Permission denied"):
        open_folder(small)
    with pytest.raises(DataError, match=r"the folder .*photos/b/dog cannot be read: Permission denied"):
        files_below(small)


def test_pipes_are_passed_over_and_said(small):
    os.mkfifo(small / "a" / "cat" / "x.png")
    dataset = open_folder(small)
    assert len(dataset) == 20
    assert "1 pipes, sockets or devices" in dataset.passed_over.problems()[0]


@pytest.mark.parametrize("name", [*sorted(JUNK_FOLDERS), "@eaDir", ".thumbnails", ".ipynb_checkpoints"])
def test_what_others_leave_behind_is_no_image_class_or_domain(small, name):
    make(small, *(f"{place}{name}/cat/thumb.jpg" for place in ("", "a/", "a/cat/")), "a/cat/Thumbs.db")
    dataset = open_folder(small)
    assert (len(dataset), dataset.classes, dataset.domains) == (20, ("cat", "dog"), ("a", "b"))


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_image_suffix_counts(small, suffix):
    make(small, f"a/cat/x{suffix.upper()}")
    assert len(open_folder(small)) == 21


def test_an_image_without_a_suffix_is_known_by_its_content(small):
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000"):
        Image.fromarray(np.full((8, 8, 3), 9, dtype=np.uint8)).save(small / "a" / "cat" / kind.lower(), kind)
    (small / "a" / "cat" / "README").write_text("about")
    dataset = open_folder(small)
    assert len(dataset) == 28
    assert dataset.read(dataset.keys.index("a/cat/avif")).shape == (8, 8, 3)
    assert dataset.passed_over.summary() == f"passed over: 1 without a suffix (such as {small}/a/cat/README)"


def test_images_outside_of_a_class_and_raw_files_are_said(small):
    make(small, "a/lost.jpg", "top.png", "a/cat/x.CR2", "a/cat/notes.txt", "b/list.txt")
    dataset = open_folder(small)
    assert len(dataset) == 20
    first, second = dataset.passed_over.problems()
    assert first.startswith("2 images lie outside of a class folder and are left out, such as ")
    assert second.startswith("1 files .cr2 are left out, such as ")
    assert "2 .txt" in dataset.passed_over.summary()


def test_verify_says_what_it_passed_over(tmp_path):
    root = images(tmp_path / "photos")
    assert verify(open_folder(root)).text() == "20 images: nothing wrong"
    make(root, "a/notes.txt", "a/cat/more.txt", "b/@eaDir/x.jpg")
    report = verify(open_folder(root))
    assert report.text().splitlines() == [
        "20 images: nothing wrong with these, 2 other files passed over",
        f"passed over: 2 .txt (such as {root}/a/notes.txt), 1 folders @eaDir",
    ]


def test_an_image_with_an_unknown_suffix_is_a_finding(tmp_path):
    root = images(tmp_path / "photos")
    (root / "a" / "cat" / "0.png").rename(root / "a" / "cat" / "0.jpg_large")
    make(root, "a/cat/0.jpg_large~", "a/cat/x.xmp")
    dataset = open_folder(root)
    text = f"1 files .jpg_large hold images and are left out for their name, such as {root}/a/cat/0.jpg_large"
    assert dataset.passed_over.problems() == [f"{text}: give them an image's suffix"]
    report = verify(dataset)
    assert not report.ok
    assert "problems found" in report.text()


def test_files_of_a_common_suffix_are_not_all_opened(tmp_path):
    root = images(tmp_path / "photos")
    make(root, *(f"a/cat/{i:03d}.xmp" for i in range(30)))
    (root / "a" / "cat" / "999.xmp").write_bytes((root / "a/cat/0.png").read_bytes())
    assert open_folder(root).passed_over.problems() == []
    (root / "a" / "cat" / "999.xmp").rename(root / "a" / "cat" / "-.xmp")
    assert len(open_folder(root).passed_over.problems()) == 1


def test_a_file_that_is_passed_over_need_not_be_readable():
    passed = PassedOver()
    passed.add_file("/nowhere/at/all.xmp")
    assert (passed.n_files, passed.problems()) == (1, [])


@pytest.mark.parametrize("parts", [("train", "val"), ("train", "crossval", "test"), ("Train",)])
def test_the_parts_of_a_split_are_no_classes(tmp_path, parts):
    names = (f"{d}/{p}/{c}/{i}.png" for d in "ab" for p in parts for c in ("cat", "dog") for i in range(2))
    root = make(tmp_path / "photos", *names)
    with pytest.raises(DataError, match=r"DOMAIN/SPLIT/CLASS/image .*'qtdog data import .*photos -o NEW'"):
        open_folder(root)
    adopt(root, tmp_path / "new", DatasetCard("new", "New"), "link", {})
    dataset = open_folder(tmp_path / "new")
    assert (dataset.domains, dataset.classes, len(dataset)) == (("a", "b"), ("cat", "dog"), 8 * len(parts))


def test_a_class_may_be_called_train(tmp_path):
    root = make(tmp_path / "photos", *(f"{d}/{c}/{i}.png" for d in "ab" for c in ("train", "test") for i in range(2)))
    assert open_folder(root).classes == ("test", "train")


@pytest.mark.parametrize("above", ["photos", "all", "export/photos"])
def test_a_folder_above_that_of_the_domains_is_named_in_what_is_refused(tmp_path, above):
    make(tmp_path, *(f"{above}/{d}/{c}/0.png" for d in ("day", "night") for c in ("cat", "dog")))
    with pytest.raises(DataError, match=rf"the folders cat, dog repeat in them: .* give the folder below.*/{above}$"):
        open_folder(tmp_path)
    assert open_folder(tmp_path / above).domains == ("day", "night")


def test_a_folder_one_level_too_high_is_said(tmp_path):
    names = (f"{s}/{d}/{c}/{i}.png" for s in ("x", "y") for d in "ab" for c in ("cat", "dog") for i in range(2))
    (note,) = open_folder(make(tmp_path / "photos", *names)).notes
    assert "the folders cat, dog repeat in them: if these are the classes, give the folder below" in note


def test_train_and_test_are_hardly_domains(tmp_path):
    names = (f"{d}/{c}/{i}.png" for d in ("train", "test") for c in ("cat", "dog") for i in range(2))
    (note,) = open_folder(make(tmp_path / "photos", *names)).notes
    assert note.startswith("the domains test, train look like the parts of a split")


@pytest.mark.parametrize("name", ["none", "all"])
def test_a_domain_whose_name_means_something_else_is_refused(tmp_path, name):
    root = make(tmp_path / "photos", *(f"{d}/{c}/0.png" for d in ("a", name) for c in ("none", "all")))
    with pytest.raises(DataError, match=f"a domain of photos is called '{name}'.*rename it"):
        open_folder(root)
    with pytest.raises(DataError, match=f"called '{name}'" if name == "all" else "means that there is none"):
        SequenceDataset("s", lambda _: None, ["x", "y"], ["a", name])


def test_one_name_in_two_unicode_forms_is_one(tmp_path):
    names = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    root = make(tmp_path / "photos", *(f"{d}/{c}/{i}.png" for d, c in zip("ab", names, strict=True) for i in range(2)))
    make(root, f"a/{names[1]}/z.png", "a/tea/0.png", "b/tea/0.png")
    dataset = open_folder(root)
    assert dataset.classes == ("café", "tea")
    assert dataset.counts().tolist() == [[3, 1], [2, 1]]
    assert dataset.class_index.tolist() == [0, 0, 0, 1, 0, 0, 1]
    assert all((root / key).is_file() for key in dataset.keys)


@pytest.mark.parametrize(
    "pair", [("0", "0.0"), ("cat", "Cat"), ("cat", "cat "), ("1", "01"), ("a\u00a0b", "a b"), ("\uff21", "a")]
)
def test_names_that_look_alike_are_shown_with_their_difference(pair):
    (sentence,) = look_alikes("classes", pair)
    assert ascii(pair[0]) in sentence
    assert ascii(pair[1]) in sentence
    assert not look_alikes("classes", ("cat", "cats", "1", "2", "1e", "nan"))


@pytest.mark.parametrize("label", ["NaN", "nan", "None", "NULL", "null", "-1", "-1.0", "NA", "<NA>", "n/a"])
def test_a_label_that_means_none_is_an_error_with_its_line(small, label):
    (small / "list.csv").write_text(f"path,label,domain\na/cat/0.png,cat,a\na/cat/1.png,{label},a\n")
    with pytest.raises(DataError, match=r"list\.csv, line 3: 'class' is .*, which means that there is none"):
        open_manifest(small / "list.csv")


@pytest.mark.parametrize(("label", "reason"), [(-1, "is -1"), (2, "is 2"), (None, "None"), (float("nan"), "nan")])
def test_a_label_out_of_range_is_an_error_with_its_position(label, reason):
    with pytest.raises(DataError, match=rf"image 1 .*{reason}"):
        SequenceDataset("s", lambda _: None, [0, label], ["a", "b"], classes=["x", "y"])


def test_both_columns_of_classes_are_said(small):
    (small / "list.csv").write_text("path,label,class,domain\na/cat/0.png,x,cat,a\nb/cat/0.png,x,cat,b\n")
    dataset = open_manifest(small / "list.csv")
    assert dataset.classes == ("cat",)
    assert dataset.notes == ["there are the columns 'class' and 'label': the classes are those of 'class'"]


def test_a_column_with_too_many_values_is_named():
    with pytest.raises(DataError, match=r"40,000 domains, more than 32,767; such as '0'. Is this the right column\?"):
        SequenceDataset("s", lambda _: None, ["x"] * 40_000, list(range(40_000)))


NAMES = st.text(st.characters(blacklist_characters="/\0", blacklist_categories=("Cs",)), min_size=1, max_size=12)
ENDINGS = st.sampled_from([".png", ".JPG", ".txt", "", ".heic", ".db", ".tar.gz", ".jfif"])


def _fits(name: str) -> bool:
    return name not in (".", "..") and len(os.fsencode(name)) < 200 and "\n" not in name


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(string.ascii_lowercase[:3]), NAMES.filter(_fits), NAMES.filter(_fits), ENDINGS),
        min_size=1,
        max_size=25,
    ),
    st.lists(st.tuples(NAMES.filter(_fits), ENDINGS), max_size=5),
)
def test_images_and_what_is_passed_over_add_up_to_the_files_on_disk(images, others):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "photos"
        for domain, label, name, ending in images:
            _touch(root / domain / label / (name + ending))
        for name, ending in others:
            _touch(root / (name + ending))
        try:
            dataset = open_folder(root, min_domains=1)
        except DataError:
            return  # refused is allowed, a wrong count is not
        assert dataset.passed_over is not None
        junk = {"thumbs.db", "ehthumbs.db", "desktop.ini", "picasa.ini"}
        visible = [
            path
            for path in root.rglob("*")
            if path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(root).parts)
            and not any(part.lower() in JUNK_FOLDERS for part in path.relative_to(root).parts[:-1])
            and path.name.lower() not in junk
        ]
        assert len(dataset) + dataset.passed_over.n_files == len(visible)
        assert len(set(dataset.keys)) == len(dataset) == dataset.counts().sum()
        assert set(names_below(root)) >= set(dataset.keys)


def _touch(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError:
        return  # a file stands where a folder should, or the other way round


def test_an_import_says_what_it_leaves_behind(tmp_path):
    names = [f"{d}/{p}/{c}/{i}.png" for d in "ab" for p in ("train", "val") for c in ("cat", "dog") for i in range(2)]
    root = make(tmp_path / "photos", *names, "a/lost.png", "a/train/x.jpg", "b/val/dog/notes.txt", "b/val/dog/x.cr2")
    passed = PassedOver()
    adopt(root, tmp_path / "new", DatasetCard("new", "New"), "link", {}, passed=passed)
    assert len(open_folder(tmp_path / "new")) == len(names)
    assert passed.n_files == 4
    first, second = passed.problems()
    assert first.startswith("2 images lie outside of a class folder")
    assert second.startswith("1 files .cr2 are left out")


def test_an_import_keeps_every_image_whose_names_become_equal(tmp_path):
    names = ("a/train/cat/x/y_z.png", "a/train/cat/x_y/z.png", "a/train/cat/x_y_z.png", "a/val/cat/x_y_z.png")
    root = make(tmp_path / "photos", *names, "b/train/cat/x.png")
    for how in ("link", "copy"):
        adopt(root, tmp_path / how, DatasetCard("new", "New"), how, {})
        assert len(open_folder(tmp_path / how)) == 5


LEVELS = st.sampled_from(["train", "val", "test", "cat", "dog", "a", "b"])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(LEVELS, min_size=1, max_size=4), min_size=1, max_size=12))
def test_whatever_the_layout_each_image_has_its_folders_or_a_word(places):
    deep = [tuple(parts[:2]) for parts in places if len(parts) > 1]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "photos"
        for i, parts in enumerate(places):
            _touch(root.joinpath(*parts) / f"{i}.png")
        try:
            dataset = open_folder(root, min_domains=1)
        except DataError as error:
            text = str(error)
            assert "photos" in text
            return
    labels = zip(dataset.domain_index, dataset.class_index, strict=True)
    assert sorted((dataset.domains[d], dataset.classes[c]) for d, c in labels) == sorted(deep)
    assert len(dataset.passed_over.misplaced) == len(places) - len(deep)
    assert (not dataset.passed_over.problems()) == (len(places) == len(deep))
