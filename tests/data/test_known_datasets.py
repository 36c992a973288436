import numpy as np
from sklearn.datasets import load_digits

from qtdog.data.cards import check_counts
from qtdog.data.known_datasets import RotatedDigits, assign_domains


def test_it_is_what_its_card_says() -> None:
    digits = RotatedDigits()
    assert len(digits) == 1797
    assert check_counts(digits) == []
    assert digits.missing_classes() == []
    assert digits.card.channels == 1


def test_every_image_is_in_exactly_one_domain() -> None:
    numbers = [key.rsplit("/", 1)[1] for key in RotatedDigits().keys]
    assert sorted(numbers) == [f"{i:04d}" for i in range(1797)]


def test_labels_follow_the_source() -> None:
    digits = RotatedDigits()
    targets = load_digits(return_X_y=True)[1]
    expected = [targets[int(key.rsplit("/", 1)[1])] for key in digits.keys]
    assert digits.class_index.tolist() == expected


def test_classes_are_spread_evenly() -> None:
    counts = RotatedDigits().counts()
    assert np.all(counts.max(axis=0) - counts.min(axis=0) <= 1)


def test_the_assignment_is_fixed_and_looks_random() -> None:
    labels = np.asarray(load_digits(return_X_y=True)[1])
    domains = assign_domains(labels)
    assert np.array_equal(domains, assign_domains(labels))
    assert len(set(domains[:30].tolist())) > 3


def test_images_are_turned_by_the_angle_of_their_domain() -> None:
    """The main axis of the ones, upright in the first domain, leans further in every next one."""
    digits = RotatedDigits()
    leanings = []
    for domain in digits.domains:
        ones = [i for i in digits.indices(domain) if digits.class_index[i] == 1]
        image = np.mean([digits.read(i)[:, :, 0] for i in ones], axis=0)
        rows, columns = np.mgrid[:28, :28] - 13.5
        moments = [np.sum(image * a * b) for a, b in ((columns, columns), (columns, rows), (rows, rows))]
        leanings.append(np.degrees(0.5 * np.arctan2(2 * moments[1], moments[2] - moments[0])))
    assert np.all(np.diff(leanings) > 5)
    assert 55 < leanings[-1] - leanings[0] < 95


def test_content_and_signature_are_stable() -> None:
    first, second = RotatedDigits(), RotatedDigits()
    assert first.signature() == second.signature()
    assert first.content_sha256() == second.content_sha256()
