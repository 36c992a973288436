import os
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import ImageFolder

from qtdog.core.errors import DataError
from qtdog.data.cards import CARDS
from qtdog.data.decoded_cache import content_sha256
from qtdog.data.image_folder import open_folder


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


def test_a_benchmark_is_recognised_by_its_names(tmp_path: Path) -> None:
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
