from __future__ import annotations

import shutil

import numpy as np
import pytest

from qtdog.core.errors import DataError
from qtdog.data.cards import check_counts
from qtdog.data.dataset import DomainSubset
from qtdog.data.decoded_cache import content_sha256, open_cache
from qtdog.data.image_folder import open_folder
from qtdog.data.known_datasets import RotatedDigits


@pytest.mark.parametrize("kept", [["0"], ["75", "0"], ["15", "30", "60"]])
def test_a_subset_has_the_images_and_labels_of_its_domains_in_order(kept):
    whole = RotatedDigits()
    subset = DomainSubset(whole, kept)
    assert subset.domains == tuple(sorted(kept, key=whole.domains.index))
    places = np.concatenate([whole.indices(domain) for domain in subset.domains])
    assert subset.keys == [whole.keys[place] for place in places]
    assert subset.class_index.tolist() == whole.class_index[places].tolist()
    assert [subset.domains[d] for d in subset.domain_index] == [whole.domains[d] for d in whole.domain_index[places]]
    assert all(np.array_equal(subset.read(i), whole.read(place)) for i, place in enumerate(places))
    assert check_counts(subset) == []
    assert {subset.domain_index.dtype, subset.class_index.dtype} == {np.dtype(np.int16)}


def test_all_domains_are_the_data_set_itself(image_tree):
    whole = open_folder(image_tree)
    subset = DomainSubset(whole, whole.domains)
    assert content_sha256(subset) == content_sha256(whole)
    assert subset.signature() == whole.signature()
    assert subset.newest_change_ns() == whole.newest_change_ns()


def test_a_subset_is_the_folder_without_the_other_domains(image_tree):
    subset = DomainSubset(open_folder(image_tree), ["indoor", "outdoor"])
    content, pixels = content_sha256(subset), open_cache(subset, 16).gather(range(len(subset)))
    shutil.rmtree(image_tree / "night")  # nothing of it is asked for, and nothing of it was counted
    alone = open_folder(image_tree)
    assert content == content_sha256(alone)
    assert subset.signature() == alone.signature()
    assert subset.newest_change_ns() == alone.newest_change_ns()
    assert pixels.equal(open_cache(alone, 16).gather(range(len(alone))))
    assert subset.read(0).shape == (20, 24, 3)


def test_a_change_in_a_kept_image_is_seen_and_one_elsewhere_is_not(image_tree):
    subset = DomainSubset(open_folder(image_tree), ["indoor", "outdoor"])
    before = subset.signature(), subset.content_sha256()
    (image_tree / "night" / "cat" / "0.png").write_bytes(b"other")
    assert (subset.signature(), subset.content_sha256()) == before
    (image_tree / "indoor" / "cat" / "0.png").write_bytes(b"other")
    assert subset.signature() != before[0]
    assert subset.content_sha256() != before[1]


def test_wrong_domains_are_refused():
    with pytest.raises(DataError, match="'90' is not a domain"):
        DomainSubset(RotatedDigits(), ["0", "90"])
    with pytest.raises(DataError, match="no domain of rotated-digits is kept"):
        DomainSubset(RotatedDigits(), [])
