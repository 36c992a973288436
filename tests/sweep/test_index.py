"""The index is a cache of the run folders, and can only be read."""

# attributes of modules and options that are not there are what is tested
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import pytest

from qtdog.core.errors import ConfigError
from qtdog.core.files import sha256_file
from qtdog.runs.aggregate import aggregate
from qtdog.runs.find import find_runs
from qtdog.runs.folder import RunFolder
from qtdog.runs.index import ask, index_file, read_row, refresh
from qtdog.runs.statistics import Condition, average_over_targets, replicate
from qtdog.sweep.journal import Outcome, merge_folders, save_failure, save_labels
from qtdog.sweep.results import comparisons, results, values


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Return a plan and a folder in which it is done; not to be changed."""
    from qtdog.sweep.local import run_task
    from qtdog.sweep.plan import make_plan
    from qtdog.sweep.study import Study
    from qtdog.training.run import RunCallbacks

    sets = {"data.image_size": 8, "data.batch_size": 2, "train.steps": 8, "train.eval_every": 1}
    tree = {
        "name": "tiny",
        "base": {"presets": ["digits"], "set": sets},
        "methods": {"float": {"presets": ["float"]}, "lsq": {"presets": ["lsq"]}, "rtn": {"presets": ["rtn"]}},
        "grid": {"target": "75", "seed": "0..1"},
        "ensembles": [{"name": "EoQ", "method": "lsq", "kind": "eoq", "members": "0..1"}],
        "share_prefix": True,
    }
    plan, out = make_plan(Study.model_validate(tree)), tmp_path_factory.mktemp("runs") / "tiny"
    for task in plan.tasks:
        assert run_task(task, out, plan.dataset, RunCallbacks()).status == "done"
    save_labels(plan.study.name, plan.labels, out)
    return plan, out


@pytest.fixture
def copied(swept, tmp_path):
    """Return the plan, and a copy of its folder that may be changed."""
    return swept[0], shutil.copytree(swept[1], tmp_path / "runs" / "tiny")


def test_every_run_is_there_once_with_what_it_measured(copied):
    plan, out = copied
    found = ask(refresh(out), "kind = 'run'")
    runs = [task for task in plan.tasks if task.kind == "run"]
    assert sorted(str(row["folder"]) for row in found) == sorted(task.name for task in runs)
    for task in runs:
        row = next(row for row in found if row["folder"] == task.name)
        folder = RunFolder(out / task.name)
        result, records = folder.read_result(), folder.read_metrics()
        assert result is not None
        assert (row["study"], row["method"], row["seed"]) == ("tiny", *(task.labels[0][k] for k in ("method", "seed")))
        assert row["test_accuracy"] == result["test_accuracy"]
        assert row["size_bytes"] == result["size"]["bytes"]
        assert row["state"] == "done"
        late = [record.test_accuracy or 0.0 for record in records if record.seen.step > 3]
        expected = None if row["method"] == "rtn" else pytest.approx(sum(late) / len(late))
        assert row["mean_after_start"] == expected
        assert row["bits"] == (None if row["method"] == "float" else 7)


def test_ensembles_are_rows_and_shared_steps_are_not(copied):
    _, out = copied
    (row,) = ask(refresh(out), "method = 'EoQ'")
    assert (row["kind"], row["members"], row["target"]) == ("ensemble", 2, "75")
    assert ask(refresh(out), "folder like 'prefix-%'") == []


def test_only_what_changed_is_read_again_and_what_is_gone_goes(copied):
    plan, out = copied
    refresh(out.parent)
    read = []

    def noted(folder, failure):
        read.append(folder.name)
        return read_row(folder, failure)

    refresh(out.parent, read=noted)
    assert read == []
    task = next(task for task in plan.tasks if task.kind == "run")
    result = json.loads((out / task.name / "result.json").read_text())
    (out / task.name / "result.json").write_text(json.dumps(result | {"test_accuracy": 0.125}))
    assert ask(refresh(out.parent, read=noted), "test_accuracy = 0.125")[0]["folder"] == f"tiny/{task.name}"
    assert read == [task.name]
    shutil.rmtree(out / task.name)
    assert ask(refresh(out.parent), f"folder = 'tiny/{task.name}'") == []


@pytest.mark.parametrize("damage", [b"", b"no database", None])
def test_a_damaged_or_deleted_index_is_made_anew(copied, damage):
    _, out = copied
    before = ask(refresh(out))
    file = index_file(out)
    file.unlink() if damage is None else file.write_bytes(damage)
    assert ask(refresh(out)) == before


def test_an_index_of_another_version_is_made_anew(copied):
    _, out = copied
    before = ask(refresh(out))
    database = sqlite3.connect(index_file(out))
    database.execute("PRAGMA user_version = 99")
    database.close()
    assert ask(refresh(out)) == before


def test_failures_and_their_reasons_are_found(copied):
    plan, out = copied
    task = next(task for task in plan.tasks if task.kind == "run")
    (out / task.name / "result.json").unlink()
    save_failure(Outcome(task.name, "failed", "no luck"), out)
    (row,) = ask(refresh(out), "state = 'failed'", columns=["folder", "error"])
    assert row == {"folder": task.name, "error": "no luck"}


def test_a_damaged_run_is_named_and_a_foreign_file_is_none(copied):
    _, out = copied
    before = ask(refresh(out))
    for name, text in (("a", "]["), ("b", "[1]"), ("c", "data: 3")):
        (out / name).mkdir()
        (out / name / "config.yaml").write_text(text)
    assert ask(refresh(out)) == before
    for name in "abc":
        (out / name / "result.json").write_text((out / name / "config.yaml").read_text())
    found = {row["folder"]: row for row in ask(refresh(out))}
    assert [found.pop(name)["state"] for name in "abc"] == ["damaged"] * 3
    assert list(found.values()) == before
    assert "result.json" in str(ask(refresh(out), "folder = 'a'")[0]["error"])


class Unreadable(type(Path())):
    """A path whose method has a mistake, as a program may have."""

    def is_file(self):
        raise AttributeError("a mistake in the program")


def test_damaged_files_are_rows_that_say_so_and_mistakes_of_the_program_are_not_taken_for_damage(copied):
    plan, out = copied
    folder = out / next(task.name for task in plan.tasks if task.kind == "run")
    result = json.loads((folder / "result.json").read_text())
    row = read_row(folder)
    assert row is not None
    assert row["test_accuracy"] == result["test_accuracy"]
    without = {key: result[key] for key in result if key != "selection"}
    for damaged in (result | {"size": "large"}, result | {"size": {}}, result | {"test_accuracy_80": 3}, without):
        (folder / "result.json").write_text(json.dumps(damaged))
        row = read_row(folder)
        assert row is not None
        assert row["state"] == "damaged"
        assert "result.json" in str(row["error"])
        assert "test_accuracy" not in row
    with pytest.raises(AttributeError, match="a mistake in the program"):
        read_row(Unreadable(folder))


ATTACKS = [
    ("1); DROP TABLE folders; --", "one statement at a time"),
    ("1) UNION SELECT name FROM pragma_table_list --", "no condition"),
    ("(SELECT load_extension('x'))", "can only be read"),
    ("(SELECT writefile('x', 'y'))", "no such function"),
    ("bitz = 7", "unknown column 'bitz'; did you mean 'bits'"),
    ('objective = "coral', "no condition in SQL"),
    ("(WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT max(x) FROM c) > 0", "can only be read"),
    (f"(SELECT count(*) FROM {', '.join(f'runs r{i}' for i in range(14))}) > 0", "longer than"),
]


@pytest.mark.parametrize(("condition", "message"), ATTACKS)
def test_the_index_can_only_be_read(swept, condition, message):
    file = refresh(swept[1])
    before = file.read_bytes()
    with pytest.raises(ConfigError, match=message):
        ask(file, condition, max_s=0.2)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("1; DELETE FROM folders", "--order '1; DELETE FROM folders' is nothing to sort by: .*test_accuracy"),
        ("test_acuracy desc", "--order: unknown column 'test_acuracy'; did you mean 'test_accuracy'"),
        ("seed, bitz asc", "--order: unknown column 'bitz'; did you mean 'bits'"),
        ("abs(bitz)", "--order: unknown column 'bitz'; did you mean 'bits'"),
        ("load_extension('x')", "--order: 'load_extension\\('x'\\)': the index can only be read"),
    ],
)
def test_a_wrong_order_is_named_as_such(swept, order, message):
    file = refresh(swept[1])
    with pytest.raises(ConfigError, match=message):
        ask(file, order=order)
    with pytest.raises(ConfigError, match="unknown column 'a'"):
        ask(file, columns=["a"])


def test_an_order_may_be_several_columns_or_an_expression(swept):
    file = refresh(swept[1])
    seeds = [row["seed"] for row in ask(file, "method = 'lsq'", order="seed DESC, folder")]
    assert seeds == [1, 0]
    assert [row["seed"] for row in ask(file, "method = 'lsq'", order="-seed")] == seeds


def test_a_folder_that_cannot_be_written_is_indexed_in_memory(copied):
    _, out = copied
    expected = ask(refresh(out))
    shutil.rmtree(out / ".sweep" / "studies")  # names of runs go, and a file stands where the index would lie
    index_file(out).unlink()
    index_file(out).mkdir()
    (index_file(out) / "x").touch()
    index = refresh(out)
    assert isinstance(index, sqlite3.Connection)
    found = ask(index)
    assert [row["folder"] for row in found] == sorted({str(row["folder"]) for row in expected})
    assert ask(index, "seed = 1", columns=["folder"]) == ask(index, "seed = 1", columns=["folder"])
    index.close()


def test_a_comment_in_the_condition_does_not_swallow_the_rest(swept):
    assert len(ask(refresh(swept[1]), "method = 'lsq' -- and more")) == 2


def test_merging_copies_what_is_missing_and_keeps_what_is_farther(copied, tmp_path):
    plan, ours = copied
    theirs = shutil.copytree(ours, tmp_path / "theirs")
    first, second, third, *_ = (task.name for task in plan.tasks if task.kind == "run")
    shutil.rmtree(ours / first)
    (ours / second / "result.json").unlink()
    (theirs / third / "result.json").unlink()
    result = json.loads((theirs / second / "result.json").read_text())
    found = merge_folders([theirs], ours)
    assert sorted(found.copied) == sorted([first, second])
    assert third in found.kept
    assert json.loads((ours / second / "result.json").read_text()) == result
    assert not [path for path in ours.iterdir() if path.suffix == ".tmp"]
    assert merge_folders([theirs], ours).copied == []
    (theirs / first / "model.safetensors").write_bytes(b"other")
    assert merge_folders([theirs], ours).kept.count(first) == 1  # its hash is another one: that run is not finished
    digest = sha256_file(theirs / first / "model.safetensors")
    (theirs / first / "result.json").write_text(json.dumps(result | {"model_sha256": digest}))
    assert merge_folders([theirs], ours).conflicts == [first]


def test_a_run_in_use_is_not_replaced(copied, tmp_path):
    plan, ours = copied
    theirs = shutil.copytree(ours, tmp_path / "theirs")
    name = next(task.name for task in plan.tasks if task.kind == "run")
    (ours / name / "result.json").unlink()
    with RunFolder(ours / name).lock():
        assert merge_folders([theirs], ours).busy == [name]


def test_a_summary_has_every_run_and_pairs_agree_in_target_trial_and_seed(swept):
    plan, out = swept
    finished = results(plan, out)
    table = values(finished, "test_accuracy")
    assert list(table) == ["float", "lsq", "rtn", "EoQ"]
    assert list(table["lsq"]) == [Condition("75", replicate([(0, seed)])) for seed in (0, 1)]
    (ensemble,) = table["EoQ"]
    assert ensemble == Condition("75", replicate([(0, 0), (0, 1)]))
    compared = comparisons(table, "float")
    expected = [table["lsq"][one] - table["float"][one] for one in table["lsq"]]
    assert compared["lsq"].differences == pytest.approx(expected)
    # an ensemble against the mean of the reference's runs with its members' seeds
    mean = sum(table["float"].values()) / 2
    assert compared["EoQ"].differences == pytest.approx([table["EoQ"][ensemble] - mean])
    assert "rtn" not in values(finished, "mean_after_start")
    with pytest.raises(ConfigError, match="unknown method 'flota'; did you mean 'float'"):
        comparisons(table, "flota")


@pytest.mark.parametrize(("selection", "measure"), [("source", "test_accuracy"), ("mean", "mean_after_start")])
def test_table_and_sweep_table_agree_to_the_last_digit(swept, selection, measure):
    plan, out = swept
    study = values(results(plan, out), measure)
    rows = {row.method: row for row in aggregate(find_runs([out]).of("rotated-digits"), selection).rows}
    assert set(rows) == set(study)
    for method, by_condition in study.items():
        assert rows[method].cells["75"] == average_over_targets(by_condition, ["75"])


def test_trials_and_seeds_pair_whatever_order_the_study_has_them_in(make_tiny, running, tmp_path):
    plan = make_tiny(
        grid={"trial": [0, 1], "target": ["75"], "seed": "0..1"},
        ensembles=[{"name": "EoQ", "method": "lsq", "kind": "eoq", "members": "0..1"}],
        set={"train.steps": 2},
    )
    running.in_this_process(plan, tmp_path)
    table = values(results(plan, tmp_path), "test_accuracy")
    compared = comparisons(table, "float")
    for condition, value in zip(compared["lsq"].conditions, compared["lsq"].differences, strict=True):
        assert value == table["lsq"][condition] - table["float"][condition]
    assert compared["lsq"].n == 4
    assert compared["EoQ"].n == 2
    for condition, value in zip(compared["EoQ"].conditions, compared["EoQ"].differences, strict=True):
        members = [table["float"][Condition("75", one)] for one in condition.replicate.single()]
        assert {one.trial for one in condition.replicate.members} == {condition.replicate.trial}
        assert value == pytest.approx(table["EoQ"][condition] - sum(members) / 2)


@pytest.mark.parametrize("changes", [{"averager.name": "swad"}, {"quantizer.name": "inq"}, {}])
def test_the_mean_after_the_start_is_of_what_ships(changes, make_tiny, running, tmp_path):
    method = {"presets": ["inq" if "quantizer.name" in changes else "float"], "set": changes}
    plan = make_tiny(methods={"one": method}, grid={"target": "75", "seed": [0]})
    running.in_this_process(plan, tmp_path)
    (found,) = results(plan, tmp_path)
    assert (found.row.get("mean_after_start") is None) == bool(changes)
