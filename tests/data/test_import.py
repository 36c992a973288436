"""Copies of the benchmarks in the layouts that are found in the wild."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qtdog.core.errors import DataError
from qtdog.data.cards import CARDS, DatasetCard
from qtdog.data.file_index import files_below, read_hashes
from qtdog.data.import_layouts import adopt, find_layout
from qtdog.data.open import open_dataset

LAYOUTS = {
    "DomainBed": ("kfold/{domain}/{label}/{i}.jpg", "DOMAIN/CLASS/image (DomainBed, TLlib)"),
    "Dassl": ("pacs/images/{domain}/{label}/{i}.jpg", "DOMAIN/CLASS/image (DomainBed, TLlib)"),
    "Dassl with a division": ("{domain}/train/{label}/{i}.jpg", "DOMAIN/SPLIT/CLASS/image (Dassl)"),
}


@pytest.fixture
def lay_out(tmp_path: Path) -> Callable[..., Path]:
    """Return a function: pattern, domains, classes → a folder with two different files for each of them."""

    def make(pattern: str, domains: object, classes: object, name: str = "copy") -> Path:
        for domain in domains:  # type: ignore[attr-defined]
            for label in classes:  # type: ignore[attr-defined]
                for i in range(2):
                    path = tmp_path / name / pattern.format(domain=domain, label=label, i=i)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(f"{domain} {label} {i} {pattern}".encode())
        return tmp_path / name

    return make


def expected(card: DatasetCard) -> list[str]:
    return sorted(f"{d}/{c}/{i}.jpg" for d in card.domains or () for c in card.classes or () for i in range(2))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how", ["link", "copy"])
def test_layouts_of_pacs(lay_out, tmp_path, layout, how):
    card = CARDS["pacs"]
    pattern, words = LAYOUTS[layout]
    source = lay_out(pattern, card.domains, card.classes)
    before = files_below(source)
    assert adopt(source, tmp_path / "new", card, how, {"dataset": "pacs"}) == words
    assert files_below(tmp_path / "new") == expected(card) == sorted(read_hashes(tmp_path / "new") or ())
    assert files_below(source) == before
    inode = os.stat(next(source.rglob("0.jpg"))).st_ino
    linked = any(path.stat().st_ino == inode for path in (tmp_path / "new").rglob("0.jpg"))
    assert linked == (how == "link")


def test_other_names_of_domains_and_classes(lay_out, tmp_path):
    source = lay_out("VLCS/{domain}/full/{label}/{i}.jpg", ["CALTECH", "LABELME", "PASCAL", "SUN"], range(5))
    adopt(source, tmp_path / "new", CARDS["vlcs"], "copy", {})
    assert files_below(tmp_path / "new") == expected(CARDS["vlcs"])
    card = CARDS["office-home"]
    source = lay_out("{domain}/{label}/{i}.jpg", ["art", "clipart", "product", "real_world"], card.classes, "dassl")
    adopt(source, tmp_path / "office", card, "link", {})
    assert files_below(tmp_path / "office") == expected(card)
    found = open_dataset(str(tmp_path / "office")).card
    assert (found.domains, found.expected_counts, found.steps) == (card.domains, card.expected_counts, card.steps)
    assert found.name == "office"  # it has far fewer images than the data set, so it keeps its own name


def test_office_caltech_by_the_names_of_office_31(lay_out, tmp_path):
    card = CARDS["office-caltech"]
    theirs = {"backpack": "back_pack", "laptop": "laptop_computer"}
    source = lay_out("{domain}/{label}/{i}.jpg", card.domains, [theirs.get(c, c) for c in card.classes or ()])
    adopt(source, tmp_path / "new", card, "link", {})
    assert files_below(tmp_path / "new") == expected(card)


def test_a_division_is_joined_and_equal_names_are_kept_apart(lay_out, tmp_path):
    card = CARDS["digits-dg"]
    lay_out("{domain}/train/{label}/{i}.jpg", card.domains, card.classes)
    source = lay_out("{domain}/val/{label}/{i}.jpg", card.domains, card.classes)
    adopt(source, tmp_path / "new", card, "link", {})
    keys = files_below(tmp_path / "new")
    assert len(keys) == 4 * 10 * 4
    assert "mnist/3/0.jpg" in keys
    assert "mnist/3/val_0.jpg" in keys


def test_the_whole_is_taken_where_it_lies_beside_its_parts(lay_out):
    card = CARDS["vlcs"]
    for part in ("train", "crossval", "test", "full"):
        source = lay_out(f"{{domain}}/{part}/{{label}}/{{i}}.jpg", card.domains, card.classes)
    assert len(find_layout(source, card).images) == 4 * 5 * 2


def test_lists_decide_which_images_of_domainnet_count(lay_out, tmp_path):
    card = CARDS["domainnet"]
    source = lay_out("{domain}/{label}/{i}.jpg", card.domains, ["dog", "zebra"])
    (source / "image_list").mkdir()
    for domain in card.domains or ():
        (source / "image_list" / f"{domain}_train.txt").write_text(f"{domain}/dog/0.jpg 5\n")
        (source / "image_list" / f"{domain}_test.txt").write_text(f"{domain}/zebra/1.jpg 7\n\n")
    assert adopt(source, tmp_path / "new", card, "link", {}) == "the authors' lists (TLlib)"
    assert len(files_below(tmp_path / "new")) == 12
    (source / "image_list" / "real_test.txt").write_text("real/dog/gone.jpg 5\n")
    with pytest.raises(DataError, match=r"1 listed images are missing, the first is .*gone\.jpg"):
        find_layout(source, card)
    (source / "image_list" / "real_test.txt").write_text("real/../secret.jpg 5\n")
    with pytest.raises(DataError, match="which is no domain and class of it"):
        find_layout(source, card)


def test_wilds_and_mnist_are_adopted_as_they_are(published, packers, tmp_path):
    from qtdog.data.archive import unpack

    for name, marker in (("camelyon17", "metadata.csv"), ("amazon-reviews", "splits/user.csv")):
        for file, content in published(name).items():
            (tmp_path / file).write_bytes(content)
            unpack(tmp_path / file, tmp_path / "loose" / name)
        assert adopt(tmp_path / "loose" / name, tmp_path / name, CARDS[name], "link", {}) == "WILDS"
        assert marker in files_below(tmp_path / name)
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    for file, content in published("colored-mnist").items():
        (tmp_path / "MNIST" / "raw" / file).write_bytes(content)
    adopt(tmp_path / "MNIST", tmp_path / "colors", CARDS["colored-mnist"], "copy", {"dataset": "colored-mnist"})
    assert open_dataset(str(tmp_path / "colors")).domains == ("+80%", "+90%", "-90%")


def test_what_is_something_else_is_said(lay_out, tmp_path):
    card = CARDS["pacs"]
    source = lay_out("{domain}/{label}/{i}.jpg", ["photo", "sketch"], card.classes)
    with pytest.raises(DataError, match=r"is no copy of pacs: .*\(missing: art_painting, cartoon\)"):
        adopt(source, tmp_path / "new", card, "link", {})
    lay_out("{domain}/{label}/{i}.jpg", card.domains, [*(card.classes or ()), "zebra"])
    with pytest.raises(DataError, match="zebra is no class of pacs; they are dog, elephant"):
        adopt(source, tmp_path / "new", card, "link", {})
    with pytest.raises(DataError, match=r"no folder in it has metadata\.csv and patches"):
        adopt(source, tmp_path / "new", CARDS["camelyon17"], "link", {})
    with pytest.raises(DataError, match="has no train-images-idx3-ubyte"):
        adopt(source, tmp_path / "new", CARDS["rotated-mnist"], "link", {})
    with pytest.raises(DataError, match="is there already"):
        adopt(source, source, card, "link", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


@pytest.mark.parametrize("what", ["image", "folder"])
def test_a_link_that_leads_out_of_the_folder_is_refused(lay_out, tmp_path, what):
    card = CARDS["pacs"]
    source = lay_out("{domain}/{label}/{i}.jpg", card.domains, card.classes)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "0.jpg").write_bytes(b"mine")
    if what == "image":
        (source / "photo" / "dog" / "0.jpg").unlink()
        (source / "photo" / "dog" / "0.jpg").symlink_to(tmp_path / "secret" / "0.jpg")
    else:
        (source / "photo" / "dog" / "more").symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match="leads out of"):
        adopt(source, tmp_path / "new", card, "copy", {})
    assert not (tmp_path / "new").exists()
    inside = source / "photo" / "dog" / ("0.jpg" if what == "image" else "more")
    inside.unlink()
    (source / "photo" / "dog" / "2.jpg").symlink_to(source / "photo" / "dog" / "1.jpg")
    adopt(source, tmp_path / "new", card, "copy", {})
    assert (tmp_path / "new" / "photo" / "dog" / "2.jpg").read_bytes() == (source / "photo/dog/1.jpg").read_bytes()
