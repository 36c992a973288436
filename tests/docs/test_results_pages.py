"""Tables of the results pages are what their commands print from the records in the repository."""

from __future__ import annotations

import json
import re
import runpy
import statistics
import sys
from pathlib import Path

import pytest
from scipy import stats

from qtdog.runs.statistics import Comparison, compare_values

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"


def test_the_tables_of_shifts_are_what_their_command_prints(capsys: pytest.CaptureFixture[str]):
    scores = runpy.run_path(str(ROOT / "benchmarks" / "shift_scores.py"))
    runs = list(json.loads((RESULTS / "runs" / "shift-office.json").read_text()).values())
    scores["tables"](runs, "float")
    assert capsys.readouterr().out in (RESULTS / "shift.md").read_text()
    on_pacs = list(json.loads((RESULTS / "runs" / "shift-pacs-short.json").read_text()).values())
    scores["tables"](on_pacs, "float")
    assert capsys.readouterr().out in (RESULTS / "shift.md").read_text()
    under_noise = scores["differences"](on_pacs, "noise-matched, 4 bits", "float")["noise"]
    assert f"one of {100 * seen(under_noise):.1f}" in (RESULTS / "shift.md").read_text()
    tiny = list(json.loads((RESULTS / "runs" / "shift-pacs-short-tiny.json").read_text()).values())
    robust = next(run["method"] for run in on_pacs if "noise of 3 steps" in run["method"])
    for compared, other, reference, column in (
        (runs, "lsq, 7 bits, sma", "float, sma", "all corruptions"),
        (runs, "lsq, 7 bits, sma", "float, sma", "digital"),
        (on_pacs, "float, sma", "lsq, 7 bits, sma", "all corruptions"),
        (on_pacs, "lsq, 4 bits, sma", "float, sma", "noise"),
        (on_pacs, robust, "float, sma", "clean"),
        (on_pacs, robust, "float, sma", "noise"),
        (on_pacs, robust, "float, sma", "blur"),
        (tiny, "lsq, 5 bits, depthwise 8 bits, sma", "lsq, 7 bits, sma", "all corruptions"),
        (tiny, "lsq, 5 bits, depthwise 8 bits, sma", "lsq, 7 bits, sma", "blur"),
    ):
        found = scores["text"](scores["differences"](compared, other, reference)[column]).replace("*", "")
        assert found in (RESULTS / "shift.md").read_text()
    readme = (ROOT / "README.md").read_text()
    for method in ("float", "float, sma", "lsq, 7 bits, sma", "lsq, 4 bits, sma", robust):
        of = scores["by_method"](runs)[method].values()
        cells = [100 * statistics.fmean(one[shift] for one in of) for shift in ("clean", "noise", "all corruptions")]
        row = " | ".join(f"{cell:.1f}" for cell in cells)
        assert f" | {row} | {float(scores['megabytes'](runs, method)):.1f} MB |" in readme, method
    gain, cost = (scores["differences"](on_pacs, robust, "float")[shift] for shift in ("noise", "clean"))
    readme = " ".join(readme.split())
    said = f"{100 * gain.mean:.1f} ({100 * gain.low:.1f} … {100 * gain.high:.1f}) points under noise"
    paid = f"{-100 * cost.mean:.1f} ({-100 * cost.high:.1f} … {-100 * cost.low:.1f}) on clean images"
    assert f"{said}, for {paid}" in readme
    scores["tables"](runs, "float, sma")
    robust = capsys.readouterr().out.splitlines()[-1]
    assert "noise of 3 steps" in robust
    assert "−8.7" in robust


def test_the_table_of_bits_under_noise_is_what_its_command_prints(capsys: pytest.CaptureFixture[str]):
    scores = runpy.run_path(str(ROOT / "benchmarks" / "shift_scores.py"))
    runs = list(json.loads((RESULTS / "runs" / "shift-bits-office.json").read_text()).values())
    page = (RESULTS / "shift.md").read_text()
    scores["tables"](runs, "float")
    assert capsys.readouterr().out in page
    for method, shift in (("lsq, 5 bits, sma", "noise"), ("lsq, 5 bits, sma", "clean")):
        assert scores["text"](scores["differences"](runs, method, "float, sma")[shift]).replace("*", "") in page
    to_float = scores["differences"](runs, "lsq, 5 bits", "float")
    assert f"a gain of {100 * seen(to_float['noise']):.1f} points would have been seen" in page
    noise, jpeg = (scores["text"](to_float[shift]).replace("*", "") for shift in ("noise", "jpeg"))
    study, log, index = ((RESULTS / f"{name}.md").read_text() for name in ("study", "log", "index"))
    assert f"5 bits under JPEG, {jpeg}" in study
    assert f"5 bits under JPEG {jpeg}" in log
    assert f"(5 bits {noise})" in index
    main = list(json.loads((RESULTS / "runs" / "shift-office.json").read_text()).values())
    for method, reader in (("lsq, 4 bits", study), ("lsq, 4 bits", index), ("noise-matched, 4 bits", index)):
        assert scores["text"](scores["differences"](main, method, "float")["noise"]).replace("*", "") in reader
    by_method = scores["by_method"](runs)
    alone, averaged = (
        100 * statistics.fmean(one["clean"] for one in by_method[method].values())
        for method in ("lsq, 3 bits", "lsq, 3 bits, sma")
    )
    assert f"to {alone:.1f} % on clean images, and its average to {averaged:.1f} %" in page


def test_two_runs_of_one_name_are_no_pair():
    scores = runpy.run_path(str(ROOT / "benchmarks" / "shift_scores.py"))
    run = {"method": "float", "target": "a", "seed": 0, "scores": {"clean": 0.5}}
    assert list(scores["by_method"]([run, run | {"seed": 1}])["float"]) == [("a", 0), ("a", 1)]
    with pytest.raises(ValueError, match="two runs are called 'float'"):
        scores["by_method"]([run, run])


def test_scores_without_the_reference_are_no_table():
    tables = runpy.run_path(str(ROOT / "benchmarks" / "shift_scores.py"))["tables"]
    with pytest.raises(SystemExit, match=r"no finished run is called 'float'\. Scored: none"):
        tables([], "float")
    with pytest.raises(SystemExit, match=r"called 'erm'\. Scored: sma"):
        tables([{"method": "sma", "target": "a", "seed": 0, "scores": {"clean": 0.5}}], "erm")
    with pytest.raises(SystemExit, match=r"no finished run is called 'plain'\. Scored: none"):
        runpy.run_path(str(ROOT / "benchmarks" / "left_out_choice.py"))["tables"]([], "plain")


def test_only_the_named_methods_are_compared(capsys: pytest.CaptureFixture[str]):
    tables = runpy.run_path(str(ROOT / "benchmarks" / "left_out_choice.py"))["tables"]
    kept = json.loads((RESULTS / "runs" / "levers-more.json").read_text())
    scores = [score for both in kept.values() for score in both]
    tables(scores, "plain", ["probe"])
    text = capsys.readouterr().out
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| p")]
    assert rows == ["| plain", "| probe"] * 2
    assert all(line in (RESULTS / "recipe.md").read_text() for line in text.splitlines())
    with pytest.raises(SystemExit, match=r"no finished run is called 'miro'\. Scored: coral, mixup, plain, probe"):
        tables(scores, "plain", ["probe", "miro"])


def accuracies(name: str, method: str, measure: str = "test_accuracy") -> dict[tuple[str, int], float]:
    """Return the accuracy in % by target and seed, on the unseen domain or another measure of the table."""
    runs = json.loads((RESULTS / "runs" / f"{name}.json").read_text())["runs"]
    return {(run["target"], run["seed"]): 100 * run[measure] for run in runs if run["method"] == method}


def told(first: dict[tuple[str, int], float], second: dict[tuple[str, int], float]) -> tuple[str, float]:
    """Return second - first with its interval as pages write it, and what would be seen in four of five studies."""
    pairs = sorted(first.keys() & second.keys())
    found = compare_values([first[pair] for pair in pairs], [second[pair] for pair in pairs])
    return f"{found.mean:+.1f} ({found.low:+.1f} … {found.high:+.1f})".replace("-", "−"), round(seen(found), 1)


def seen(found: Comparison) -> float:
    """Return the difference that four of five studies with these pairs and their spread would tell from none."""
    assert found.low is not None
    t = stats.t(found.n - 1)
    return float((found.mean - found.low) * (t.ppf(0.975) + t.ppf(0.8)) / t.ppf(0.975))


def means(name: str, method: str, *, members: int = 3) -> dict[tuple[str, int], float]:
    """Return the mean over each whole group of seeds by target and first seed, as an ensemble of these is paired."""
    groups: dict[tuple[str, int], list[float]] = {}
    for (target, seed), value in accuracies(name, method).items():
        groups.setdefault((target, seed // members * members), []).append(value)
    return {group: statistics.fmean(found) for group, found in groups.items() if len(found) == members}


def unsigned(text: str) -> str:
    """Return a difference as a sentence says how much more there is."""
    return text.replace("+", "")


def test_differences_of_the_recipe_and_the_power_that_its_page_states():
    page = " ".join((RESULTS / "recipe.md").read_text().split())
    small, tiny = accuracies("recipe-office", "lsq+sma"), accuracies("recipe-office", "lsq-5-depthwise-8+sma")
    lite1 = accuracies("recipe-office", "lite1-lsq-5-depthwise-8+sma")
    text, power = told(small, tiny)
    assert f"{text} points from 7 bits everywhere" in page
    assert f"With 20 pairs a difference of {power} points would have been seen in four of five studies" in page
    text, power = told(small, lite1)
    assert f"the bytes of Lite0 at 7: {text}" in page
    assert f"with 8 pairs one of {power:.1f}." in page


def test_differences_of_the_students():
    page = " ".join((RESULTS / "recipe.md").read_text().split())
    records = json.loads((RESULTS / "runs" / "recipe-students.json").read_text())
    student = {(target, 0): 100 * record["test_accuracy"] for target, record in records.items()}
    teacher = accuracies("recipe-office", "EoQ of averages of 5 bits")
    assert f"{sum(student.values()) / 4:.1f} %: {told(teacher, student)[0]} points to its teacher" in page
    assert f"{told(accuracies('recipe-office', 'lsq-5-depthwise-8+sma'), student)[0]} on four pairs" in page


def test_differences_of_the_students_on_pacs():
    page = " ".join((RESULTS / "recipe.md").read_text().split())
    records = json.loads((RESULTS / "runs" / "recipe-pacs-students.json").read_text())
    student, on_sources = (
        {(target, 0): 100 * record[measure] for target, record in records.items()}
        for measure in ("test_accuracy", "source_accuracy")
    )
    name, teacher = "recipe-pacs-short", "EoQ of averages"
    text, power = told(accuracies(name, teacher), student)
    members, of_members = told(means(name, "lsq+sma", members=5), student)
    assert (
        f"has {statistics.fmean(student.values()):.1f} %: {text} points to its teacher, {members} to the mean" in page
    )
    assert power == of_members
    assert f"A difference of {power} points would have been seen." in page
    assert f"on the sources {told(accuracies(name, teacher, 'source_accuracy'), on_sources)[0]} to the teacher" in page
    assert f"it is {text} from its teacher and {members} from the mean" in page


def test_differences_under_wrong_labels():
    page = " ".join((RESULTS / "study.md").read_text().split())
    one = {method: accuracies("label-noise-office", method) for method in ("float", "sma", "lsq-4", "lsq-4+sma")}
    (text, power), averaged = told(one["float"], one["lsq-4"]), told(one["sma"], one["lsq-4+sma"])[0]
    gain = told(one["float"], one["sma"])[0]
    assert f"is not shown: {text} to float, and with SMA it is {averaged} points from the float average" in page
    assert f"A gain of {power} points over float would have been seen" in page
    said = f"4 bits {text}, with SMA {averaged} to float SMA, which gains {gain} over float, {len(one['sma'])} pairs"
    assert said in page
    assert f"Averaging does, {gain} points" in (RESULTS / "index.md").read_text()


def test_differences_of_the_soups():
    page = " ".join((RESULTS / "recipe.md").read_text().split())
    small = means("soup-office", "lsq+sma")
    for method, words in (
        ("soup of lsq", "as good as one with SMA**,"),
        ("soup of lsq+sma", "no better than one of them,"),
    ):
        assert small.keys() == accuracies("soup-office", method).keys()
        assert f"{words} {told(small, accuracies('soup-office', method))[0]}" in page, method
    both = told(small, accuracies("soup-office", "EoQ of averages"))[0]
    assert f"keeps them as an ensemble ({both} points" in page


def test_small_and_ensembles_on_pacs():
    page = " ".join((RESULTS / "recipe.md").read_text().split())
    name = "recipe-pacs-short"
    single = {method: accuracies(name, method) for method in ("float", "sma", "lsq", "lsq+sma")}
    text, power = told(single["float"], single["lsq+sma"])
    assert f"and {unsigned(text)} points better than plain float. On the sources" in page
    assert f"to plain float one of {power}." in page
    text, power = told(single["sma"], single["lsq+sma"])
    assert f"half a point behind float SMA on styles**, {text} points on {len(single['sma'])} pairs" in page
    assert f"a difference of {power} points between the averages" in page
    assert f"gains nothing: {told(single['float'], single['lsq'])[0]} to float" in page
    probe = accuracies(name, "lsq+sma+probe")
    (text, power), to_float = told(single["lsq+sma"], probe), told(single["sma"], probe)[0]
    on_sources = told(*(accuracies(name, method, "source_accuracy") for method in ("lsq+sma", "lsq+sma+probe")))[0]
    assert f"{text} to LSQ with SMA and {to_float} to float SMA on {len(probe)} pairs, and {on_sources} on the" in page
    assert f"is not shown: one of {power} points would have been seen" in page
    one, small = means(name, "float", members=5), means(name, "lsq+sma", members=5)
    five, raw, of_floats = (accuracies(name, method) for method in ("EoQ of averages", "EoQ", "EoA"))
    assert one.keys() == small.keys() == five.keys() == raw.keys() == of_floats.keys()
    assert f"have {statistics.fmean(five.values()):.1f} %: {unsigned(told(one, five)[0])} points" in page
    assert f"{unsigned(told(small, five)[0])} more than one member" in page
    averages = f"(EoA, {statistics.fmean(of_floats.values()):.1f} %, 67.9 MB)"
    assert f"and {told(of_floats, five)[0]} from five float averages {averages}" in page
    plain = f"no worse: {statistics.fmean(raw.values()):.1f} %, {unsigned(told(one, raw)[0])} more than one float model"
    assert f"an EoQ of plain LSQ is {plain}" in page


def test_the_probe_in_the_steps_of_the_bar():
    page = " ".join((RESULTS / "recipe.md").read_text().split())
    small, probe = (
        [accuracies(name, method, measure) for measure in ("mean_after_start", "test_accuracy")]
        for name, method in (("study-pacs", "lsq+sma"), ("probe-pacs", "lsq+sma+probe"))
    )
    after, selected = (statistics.fmean(found.values()) for found in probe)
    assert f"{after:.1f} % in the mean after the start step and {selected:.1f} % at the selected checkpoint" in page
    after, selected = (statistics.fmean(small[at][pair] for pair in probe[at]) for at in (0, 1))
    assert f"on another machine, has {after:.1f} and {selected:.1f}, so {told(small[0], probe[0])[0]} and" in page
    assert f"{told(small[1], probe[1])[0]}, four pairs" in page


def test_tiny_on_pacs():
    page = " ".join((RESULTS / "recipe.md").read_text().split())
    text, power = told(accuracies("pacs-short", "lsq+sma"), accuracies("pacs-short", "tiny"))
    assert f"**`tiny` is as good as `small` on styles too**: {text} points on eight pairs" in page
    assert f"a difference of {power} points would have been seen" in page


@pytest.mark.parametrize("name", ["levers-pacs", "levers-average", "levers-more"])
def test_the_levers_of_pacs_are_what_their_command_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
):
    page = (RESULTS / "recipe.md").read_text()
    (command,) = re.findall(rf"`python (\S+left_out_choice.py [^`]*{name}\.json)`", page)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", command.split())
    runpy.run_path(command.split()[0], run_name="__main__")
    assert capsys.readouterr().out in page


def test_differences_of_the_levers():
    log, study, page = (" ".join((RESULTS / f"{name}.md").read_text().split()) for name in ("log", "study", "recipe"))
    average, more = left_out("levers-average"), left_out("levers-more")
    for values, method, words in (
        (average, "early", "from a fifth of the steps on"),
        (average, "earlier", "from a tenth"),
        (average, "dequantized", "of the rounded weights"),
        (average, "dequantized-6", "these with 6 bits"),
        (average, "bma", "Beta average"),
        (more, "probe", "The sources choose the probe:"),
        (more, "probe+smoothing", "both"),
        (more, "coral", "CORAL"),
        (more, "mixup", "Mixup"),
    ):
        assert f"{words} {told(values['plain'], values[method])[0]}" in log, method
    assert f"the mean of the rounded weights: {told(average['plain'], average['dequantized'])[0]}" in study
    assert f"in all {told(more['plain'], more['probe'])[0]}" in page
    held_out = left_out("levers-more", "source_accuracy")
    assert f"trains on {told(held_out['plain'], held_out['probe'])[0]} (18 pairs)" in page
    assert len(held_out["probe"]) == 18


def test_differences_of_the_probe_on_photographs():
    page = " ".join((RESULTS / "recipe.md").read_text().split())
    small, probe = accuracies("probe-office", "lsq+sma"), accuracies("probe-office", "lsq+sma+probe")
    text, power = told(small, probe)
    assert f"gains nothing**, {text} on {len(probe)} pairs of Office-Caltech" in page
    assert f"a gain of {power} points would have been seen" in page
    on_sources = [accuracies("probe-office", method, "source_accuracy") for method in ("lsq+sma", "lsq+sma+probe")]
    assert f"and {told(*on_sources)[0]} on the sources; a gain" in page


def left_out(name: str, measure: str = "accuracy") -> dict[str, dict[tuple[str, int], float]]:
    """Return by method what runs on two domains score, in %, by held-out domain and sources, and seed.

    The accuracy on the sources is one number of a run, and counts once.
    """
    values: dict[str, dict[tuple[str, int], float]] = {}
    for run in json.loads((RESULTS / "runs" / f"{name}.json").read_text()).values():
        for one in run:
            about = f"{one['domain']} of {one['sources']}" if measure == "accuracy" else str(one["sources"])
            values.setdefault(one["method"], {})[about, one["seed"]] = 100 * one[measure]
    return values


def test_differences_of_the_small_networks():
    page = " ".join((RESULTS / "recipe.md").read_text().split())
    log = " ".join((RESULTS / "log.md").read_text().split())
    small = accuracies("small-networks", "lite0-lsq-7+sma")

    def to_small(method: str) -> tuple[str, float]:
        return told(small, accuracies("small-networks", method))

    (lite1, seen_1), (lite2, seen_2) = to_small("lite1-lsq-7+sma"), to_small("lite2-lsq-7+sma")
    (four, _), (four_1, _) = to_small("lite0-lsq-4-depthwise-8+sma"), to_small("lite1-lsq-4-depthwise-8+sma")
    assert f"At 7 bits Lite1 is {lite1} points from Lite0, in 2.74 MB, and Lite2 {lite2}, in 3.15 MB" in page
    assert f"that of Lite1 in float, {to_small('lite1-sma')[0]}, in 16.85 MB" in page
    assert f"1.86 MB and is {to_small('lite0-lsq-5-depthwise-8+sma')[0]} from 7 bits" in page
    assert f"At 4 bits it is {four}, Lite1 {four_1} in 2.01 MB" in page
    assert (
        f"a difference of {seen_1} points would have been seen between Lite1 and Lite0 at 7 bits, of {seen_2}" in page
    )
    assert f"Lite1 {lite1}, Lite2 {lite2}, Lite0 at 4 bits {four}, Lite1 at 4 bits {four_1} (8 pairs each)" in log
    runs = json.loads((RESULTS / "runs" / "small-networks.json").read_text())["runs"]
    for method, size in (
        ("lite1-lsq-7+sma", 2.74),
        ("lite2-lsq-7+sma", 3.15),
        ("lite1-sma", 16.85),
        ("lite0-lsq-5-depthwise-8+sma", 1.86),
        ("lite1-lsq-4-depthwise-8+sma", 2.01),
    ):
        sizes = [run["size_bytes"] for run in runs if run["method"] == method]
        assert statistics.mean(sizes) / 1e6 == pytest.approx(size, abs=0.005)


def on_pacs(method: str) -> str:
    """Return the difference of a control to float in short runs on PACS."""
    return told(accuracies("controls-pacs-short", "float"), accuracies("controls-pacs-short", method))[0]


def test_differences_of_the_controls():
    page = " ".join((RESULTS / "study.md").read_text().split())
    float_runs, small = accuracies("controls-office", "float"), accuracies("controls-office", "lsq+sma")
    for method, words in (
        ("freeze", "freeze in float"),
        ("released", "released"),
        ("lsq", "LSQ"),
        ("lsq-activations-8", "8 bits"),
        ("lsq-6-activations-6", "6 bits for weights and activations"),
    ):
        assert f"{words} {told(float_runs, accuracies('controls-office', method))[0]}" in page, method
    assert f"On PACS freezing gains nothing, {on_pacs('freeze')};" in page
    assert f"on PACS freeze {on_pacs('freeze')}, released {on_pacs('released')} ([12 pairs]" in page
    assert f"freezing gains nothing**, {on_pacs('freeze')} in float and {on_pacs('released')} rounded" in page
    decay = f"{on_pacs('float-decay')} in float and {on_pacs('lsq-decay')} with rounding"
    assert f"falling rate gains {decay}, as much as averaging, {on_pacs('sma')}." in page
    averaged = accuracies("controls-pacs-short", "lsq+sma")
    both, alone = (
        told(averaged, accuracies("controls-pacs-short", name))[0] for name in ("lsq-decay+sma", "lsq-decay")
    )
    assert f"LSQ with both is {both} to LSQ with SMA, with a falling rate alone {alone}." in page
    power = told(accuracies("controls-pacs-short", "float"), accuracies("controls-pacs-short", "freeze"))[1]
    assert f"With 12 pairs a gain of {power} points by freezing would have been seen" in page
    averaged = told(small, accuracies("controls-office", "lsq-activations-8+sma"))[0]
    assert f"changes an average by {averaged.replace(')', ', four pairs)')}" in page
