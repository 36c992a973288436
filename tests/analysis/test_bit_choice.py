import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict

import pytest

from qtdog.analysis.bit_plan import BitTrial, Choice, choose
from qtdog.core.errors import RunError


def trials(table: Mapping[int, tuple[float, ...]], flatness: dict[int, float] | None = None) -> list[BitTrial]:
    return [
        BitTrial(bits, f"d{i}", accuracy, (flatness or {}).get(bits, 0.5), 0.1 * (i + 1), 2.0, 1000 * bits, None)
        for bits, row in table.items()
        for i, accuracy in enumerate(row)
    ]


def by_bits(choice: Choice) -> dict:
    return {candidate.bits: candidate for candidate in choice.candidates}


def test_the_best_wins_if_the_others_are_clearly_behind():
    choice = choose(trials({8: (0.80, 0.70, 0.90), 6: (0.70, 0.61, 0.79), 4: (0.5, 0.4, 0.6)}))
    assert (choice.best, choice.bits) == (8, 8)
    assert [candidate.bits for candidate in choice.candidates] == [8, 6, 4]
    assert [candidate.eligible for candidate in choice.candidates] == [True, False, False]


def test_fewer_bits_win_within_one_standard_error_of_the_paired_differences():
    table = {8: (0.80, 0.70, 0.90), 6: (0.79, 0.72, 0.88), 4: (0.78, 0.68, 0.88)}
    choice = choose(trials(table))
    six, four = by_bits(choice)[6], by_bits(choice)[4]
    differences = [0.01, -0.02, 0.02]
    assert six.behind == pytest.approx(statistics.mean(differences))
    assert six.behind_error == pytest.approx(statistics.stdev(differences) / math.sqrt(3))
    # 4 bits lose the same 2 points everywhere: well within the spread between domains, but not by chance
    assert four.behind == pytest.approx(0.02)
    assert four.behind_error == pytest.approx(0, abs=1e-9)
    assert not four.eligible
    assert (choice.best, choice.bits) == (8, 6)


def test_of_equally_accurate_candidates_the_flattest_is_the_reference():
    table = {8: (0.5, 0.75), 4: (0.75, 0.5)}
    assert choose(trials(table, {8: 0.2, 4: 0.9})).best == 8
    assert choose(trials(table, {8: 0.9, 4: 0.2})).best == 4
    assert choose(trials({8: (0.5, 0.5), 4: (0.5, 0.5)})).bits == 4


def test_numbers_of_a_candidate():
    (candidate,) = choose(trials({5: (0.6, 0.8)})).candidates
    assert candidate.accuracies == {"d0": 0.6, "d1": 0.8}
    assert candidate.accuracy == pytest.approx(0.7)
    assert candidate.standard_error == pytest.approx(0.1)
    assert (candidate.behind, candidate.behind_error) == (0, 0)
    assert candidate.flatness_error == pytest.approx(math.hypot(0.1, 0.2) / 2)
    assert candidate.n_bytes == 5000


def test_domains_are_paired_by_name_not_by_place():
    table = trials({8: (0.9, 0.1), 4: (0.9, 0.1)})
    shuffled = [table[0], table[1], table[3], table[2]]
    assert by_bits(choose(shuffled))[4].behind_error == 0


def test_a_candidate_that_failed_once_is_out_and_stays_in_the_table():
    table = [*trials({8: (0.6, 0.7)}), BitTrial(4, "d0", 0.9, 0.1, 0.0, 1.0, 9), BitTrial(4, "d1", failed="collapsed")]
    choice = choose(table)
    assert choice.bits == 8
    failed = by_bits(choice)[4]
    assert (failed.accuracy, failed.eligible, failed.accuracies) == (None, False, {"d0": 0.9, "d1": None})
    with pytest.raises(RunError, match="4 bits without d1: collapsed"):
        choose(table[2:])


def test_the_choice_can_be_kept_as_json():
    choice = choose(trials({8: (0.6, 0.7), 7: (0.6, 0.65)}))
    assert json.loads(json.dumps(asdict(choice)))["bits"] == choice.bits
