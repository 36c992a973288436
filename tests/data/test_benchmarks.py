"""What the cards say, and the readers of MNIST, Camelyon17 and Amazon reviews."""

from __future__ import annotations

import gzip
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtdog.core.errors import DataError
from qtdog.data.archive import unpack
from qtdog.data.cards import CARDS, UNCHECKED, check_counts
from qtdog.data.image_folder import open_folder
from qtdog.data.known_datasets import FILES, FLIP_COLOR, MnistDataset, open_camelyon17, open_reviews, read_mnist
from qtdog.data.splits import make_splits
from qtdog.data.text import TextDataset
from qtdog.data.verify import verify_texts
from qtdog.training.evaluation import group_accuracy

PUBLISHED = {
    "pacs": (9991, 4, 7),
    "vlcs": (10729, 4, 5),
    "office-home": (15588, 4, 65),
    "terra-incognita-24788": (24788, 4, 10),
    "terra-incognita-24330": (24330, 4, 10),
    "domainnet": (586575, 6, 345),
    "office-caltech": (2533, 4, 10),
    "digits-dg": (24000, 4, 10),
    "colored-mnist": (70000, 3, 2),
    "rotated-mnist": (70000, 6, 10),
    "camelyon17": (455954, 5, 2),
    "amazon-reviews": (539502, 0, 5),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals_are_the_published_ones(name):
    card = CARDS[name]
    assert (card.n_expected, len(card.domains or ()), len(card.classes or ())) == PUBLISHED[name]


OFFICE = Path(os.environ.get("QTDOG_DATA") or Path(__file__).parents[3] / "shared" / "data") / "office_caltech10"


@pytest.mark.skipif(not OFFICE.is_dir(), reason=f"Office-Caltech10 is not at {OFFICE}; set QTDOG_DATA to its parent")
def test_a_copy_of_office_caltech_is_recognised_and_complete(tmp_path):
    dataset = open_folder(OFFICE)
    assert dataset.card == CARDS["office-caltech"]
    assert check_counts(dataset) == []
    counts = dataset.counts()
    assert counts.sum(axis=0).tolist() == [284, 234, 237, 277, 222, 282, 297, 236, 216, 248]
    assert (counts.min(), counts.max()) == (8, 151)  # mugs of dslr, backpacks of caltech
    shutil.copytree(OFFICE, tmp_path / "copy", copy_function=os.symlink)
    (tmp_path / "copy" / "dslr" / "mug" / "frame_0001.jpg").unlink()
    differences = check_counts(open_folder(tmp_path / "copy"))
    assert differences == ["domain dslr has 156 images, the dataset card says 157"]


def test_the_protocol_is_the_papers():
    for name in ("pacs", "vlcs", "office-home", "terra-incognita-24788"):
        assert (CARDS[name].steps, CARDS[name].eval_every) == (5000, 300)
    assert (CARDS["domainnet"].steps, CARDS["domainnet"].eval_every) == (15000, 1000)
    assert CARDS["camelyon17"].steps is None


@pytest.fixture(scope="module")
def full_mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make 70,000 digits, each one its label's grey value all over, so that all can be told apart."""
    root = tmp_path_factory.mktemp("mnist")
    for part, n in (("train", 60000), ("t10k", 10000)):
        labels = (np.arange(n) * 7 % 10).astype(np.uint8)
        images = np.repeat(labels * 20 + 40, 4).reshape(n, 2, 2).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            sizes = np.array(array.shape, dtype=">u4").tobytes()
            (root / f"{part}-{kind}-ubyte").write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())
    return root


def test_colored_mnist_has_domainbeds_counts_and_correlations(full_mnist):
    dataset = MnistDataset(CARDS["colored-mnist"], full_mnist)
    counts = dict(zip(dataset.domains, dataset.counts().sum(axis=1).tolist(), strict=True))
    assert counts == CARDS["colored-mnist"].expected_counts
    for domain, probability in FLIP_COLOR.items():
        members = dataset.indices(domain)[::20]
        pixels = np.stack([dataset.read(i) for i in members])
        green = pixels[..., 1].max(axis=(1, 2)) > 0
        assert (green != (pixels[..., 0].max(axis=(1, 2)) > 0)).all()
        assert not pixels[..., 2].any()
        small = dataset.class_index[members] == 0
        assert abs((green == small).mean() - probability) < 0.04  # red (0) goes with 0-4 unless flipped
        digit = (pixels.max(axis=(1, 2, 3)) - 40) // 20
        assert abs((small != (digit < 5)).mean() - 0.25) < 0.04


def test_rotated_mnist_has_domainbeds_counts_and_whole_classes(full_mnist):
    dataset = MnistDataset(CARDS["rotated-mnist"], full_mnist)
    counts = dict(zip(dataset.domains, dataset.counts().sum(axis=1).tolist(), strict=True))
    assert counts == CARDS["rotated-mnist"].expected_counts
    i = int(dataset.indices("0")[0])
    assert dataset.read(i).shape == (2, 2, 1)
    assert (dataset.read(i) == 40 + 20 * dataset.class_index[i]).all()


def test_mnist_is_the_same_each_time_and_packed_or_not(full_mnist, tmp_path):
    for name in FILES:
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((full_mnist / name).read_bytes(), 1))
    first, second = (MnistDataset(CARDS["colored-mnist"], root) for root in (full_mnist, tmp_path))
    assert first.keys == second.keys
    assert [first.sample_sha256(i) for i in range(50)] == [second.sample_sha256(i) for i in range(50)]


@pytest.mark.parametrize("content", [b"", b"\0\0\x08", b"\0\0\x0d\x03" + bytes(12), b"\0\0\x08\x01\xff\xff\xff\xff"])
def test_a_file_that_is_not_mnists_is_refused(full_mnist, tmp_path, content):
    for name in FILES:
        (tmp_path / name).write_bytes((full_mnist / name).read_bytes() if name != FILES[0] else content)
    with pytest.raises(DataError, match=r"is no file of MNIST|claims to hold|is cut short|is damaged"):
        read_mnist(tmp_path)


def unpacked(files: dict[str, bytes], folder: Path) -> Path:
    for file, content in files.items():
        (folder / file).write_bytes(content)
        unpack(folder / file, folder / "loose")
    return next((folder / "loose").iterdir())


def test_camelyon_keeps_the_official_division(published, tmp_path):
    dataset = open_camelyon17(unpacked(published("camelyon17"), tmp_path), CARDS["camelyon17"])
    assert dataset.domains == CARDS["camelyon17"].domains
    assert [dataset.trains_on(domain) for domain in dataset.domains] == [True, False, False, True, True]
    splits = make_splits(dataset, trial=3)
    assert dataset.official_split is not None
    assert {len(splits[domain].train) for domain in ("hospital_0", "hospital_3", "hospital_4")} == {16}
    assert {len(splits[domain].heldout) for domain in ("hospital_0", "hospital_3", "hospital_4")} == {4}
    assert len(splits["hospital_2"].everything) == 20
    assert dataset.read(0).shape == (12, 12, 3)


def test_camelyons_unseen_hospitals_are_never_sources(published, tmp_path, short_config):
    from qtdog.training.protocol import make_protocol

    dataset = open_camelyon17(unpacked(published("camelyon17"), tmp_path), CARDS["camelyon17"])
    protocol = make_protocol(short_config(data={"target": "hospital_2"}), dataset)
    assert protocol.sources == ("hospital_0", "hospital_3", "hospital_4")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"center", b"centre", "has no column center"),
        (b"0,000,1,0", b"0,../,1,0", "line 2 is no patch"),
        (b",7,0", b",7,5", "no patch"),
    ],
)
def test_a_wrong_list_of_patches_is_explained(published, tmp_path, old, new, message):
    root = unpacked(published("camelyon17"), tmp_path)
    (root / "metadata.csv").write_bytes((root / "metadata.csv").read_bytes().replace(old, new, 1))
    with pytest.raises(DataError, match=message):
        open_camelyon17(root, CARDS["camelyon17"])


def test_reviews_have_reviewers_stars_and_the_official_division(published, tmp_path):
    reviews = open_reviews(unpacked(published("amazon-reviews"), tmp_path), CARDS["amazon-reviews"])
    assert len(reviews) == 60 - 60 // 7
    assert reviews.classes == ("1", "2", "3", "4", "5")
    assert set(reviews.domains) == {f"{kind}{i}" for kind in ("seen", "test", "val") for i in range(3)}
    assert [len(reviews.indices(part)) for part in ("train", "id_val", "id_test", "val", "test")] == [18, 9, 9, 8, 8]
    i = int(reviews.indices("test")[0])
    assert reviews.domains[reviews.domain_index[i]].startswith("test")
    assert reviews.text(i) == 'It said "5",\nand more, ü'
    assert reviews.classes[reviews.class_index[i]] == "1"
    report = verify_texts(reviews)
    assert report.parts["test"] == (8, 3)
    assert report.differences == [f"there are 52 in all, the dataset card says 539,502 ({UNCHECKED})"]


def test_a_reviewer_in_training_and_test_is_noticed():
    leaky = TextDataset(CARDS["amazon-reviews"], "ab", ["1", "2"], ["ann", "ann"], [0, 4])
    assert "1 domains of test are also in the parts that are trained on, such as ann" in verify_texts(leaky).text()


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("splits/user.csv", "-1,True", "9,True", "the split is '9'"),
        ("splits/user.csv", "0,True\n", "", "do not have the same number of rows"),
        ("reviews.csv", "overall", "stars", "has no column overall"),
        ("reviews.csv", "1.0", "many", "'overall' is 'many'"),
        ("reviews.csv", "1.0", "9.0", "the label '9'"),
    ],
)
def test_wrong_reviews_are_explained(published, tmp_path, file, old, new, message):
    root = unpacked(published("amazon-reviews"), tmp_path)
    (root / file).write_text((root / file).read_text().replace(old, new, 1))
    with pytest.raises(DataError, match=message):
        open_reviews(root, CARDS["amazon-reviews"])


@given(st.lists(st.text(), min_size=1, max_size=20))
def test_texts_come_back_as_they_were(texts):
    n = len(texts)
    dataset = TextDataset(CARDS["amazon-reviews"], texts, ["1"] * n, ["a"] * n, [0] * n)
    assert dataset.texts(range(n)) == texts


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), min_size=1, max_size=60))
def test_accuracy_over_groups_is_numpys(pairs):
    correct, groups = np.array([c for c, _ in pairs]), np.array([g for _, g in pairs])
    own: Any = [correct[groups == g].mean() for g in sorted(set(groups.tolist()))]
    found = group_accuracy(correct, groups)
    assert found.percentile_10 == pytest.approx(np.percentile(own, 10), abs=1e-12)
    assert (found.average, found.worst) == (pytest.approx(correct.mean()), pytest.approx(min(own)))
    assert found.n_groups == len(own)


def test_accuracy_over_nothing_is_refused():
    with pytest.raises(DataError, match="as many groups as answers"):
        group_accuracy(np.array([], dtype=bool), np.array([], dtype=int))
