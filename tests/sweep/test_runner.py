"""The driver: what is shared, what waits, what is tried again, and when it stops."""

from __future__ import annotations

import fcntl
import json
import threading

import pytest

from qtdog.core.errors import RunError
from qtdog.runs.folder import RunFolder
from qtdog.sweep.journal import Outcome, Status, append_journal, read_failures, read_journal, read_warnings
from qtdog.sweep.local import _WORK, run_task
from qtdog.sweep.plan import Task, make_plan, select_tasks
from qtdog.sweep.runner import (
    MAX_LOST,
    Driver,
    check_tasks,
    discard_unfinished,
    is_done,
    is_in_use,
    task_states,
    unfinished,
)
from qtdog.sweep.study import Study
from qtdog.training.run import RunCallbacks

METHODS = {
    "float": {"presets": ["float"]},
    "lsq": {"presets": ["lsq"]},
    "lsq-decay": {"presets": ["lsq-decay"]},
    "freeze": {"presets": ["freeze"]},
    "sma": {"presets": ["float"], "set": {"averager.name": "sma", "averager.params": {"start": 2}}},
    "lsq+swad": {"presets": ["lsq"], "set": {"averager.name": "swad"}},
    "swad": {"presets": ["float"], "set": {"averager.name": "swad"}},
    "rtn": {"presets": ["rtn"]},
    "sma-rtn": {"presets": ["rtn"], "set": {"averager.name": "sma", "averager.params": {"start": 2}}},
}


ONE_SEED = {"methods": METHODS, "grid": {"target": "75", "seed": 0}}


@pytest.fixture(scope="module")
def forked(make_tiny, running, tmp_path_factory):
    """Return the plan of runs that share their float steps, the folder in which it is done, and what was measured."""
    plan, out = make_tiny(**ONE_SEED, share_prefix=True), tmp_path_factory.mktemp("forked")
    return plan, out, running.measured(running.in_this_process(plan, out), plan)


def test_shared_prefixes_give_the_same_bits_and_save_the_steps(make_tiny, tmp_path, running, forked):
    separate = make_tiny(**ONE_SEED)
    shared, out, found = forked
    assert found == running.measured(running.in_this_process(separate, tmp_path), separate)
    # quantized from step 2 of 6: nine runs of 6 steps; of the nine, swad counts from the first step on, and the two
    # that are rounded afterwards go on from step 5 of the float run and of its average
    assert sum(task.steps for task in separate.tasks) == 9 * 6
    assert sum(task.steps for task in shared.tasks) == 2 + 6 * 4 + 6 + 1 + 1
    for task in shared.tasks:
        result = RunFolder(task.folder(out)).read_result()
        if task.kind == "run" and result is not None:
            assert result["forked_from_step"] == task.step


def test_what_a_kill_left_at_a_fork_point_is_removed_when_nothing_is_to_be_done(forked, running):
    plan, out, _ = forked
    (point,) = (task for task in plan.tasks if task.kind == "fork_point")
    left = RunFolder(point.folder(out)).checkpoints / ".step-00000002.abcdefgh.tmp"
    left.mkdir()
    assert not Driver(plan.tasks, out, Scripted(None, out), running.Quiet()).run().failed
    assert not left.exists()


def test_shared_updates_give_the_same_bits_and_save_the_steps(make_tiny, tmp_path, running, forked):
    shared = make_tiny(**ONE_SEED, share_prefix=True, share_averaged=True)
    separate, _, expected = forked
    assert running.measured(running.in_this_process(shared, tmp_path), shared) == expected
    # float makes the four updates behind the fork point for sma, lsq for lsq+swad; swad begins at step 0
    assert sum(task.steps for task in separate.tasks) == 2 + 6 * 4 + 6 + 1 + 1
    assert sum(task.steps for task in shared.tasks) == 2 + 4 * 4 + 6 + 1 + 1
    made = {task.labels[0]["method"]: task.updates_from for task in shared.tasks if task.updates_from}
    names = {task.labels[0]["method"]: task.name for task in shared.tasks if task.labels}
    assert made == {"sma": names["float"], "lsq+swad": names["lsq"]}


def test_a_run_makes_its_own_updates_if_the_run_that_shares_them_fails(make_tiny, tmp_path, running):
    plan = make_tiny(methods={name: METHODS[name] for name in ("float", "swad")}, share_averaged=True, grid={"seed": 0})
    first, second = plan.tasks
    assert (second.updates_from, first.updates_from, first.steps, second.steps) == (first.name, "", 6, 0)

    def end(task):
        return Outcome(task.name, "failed" if task.name == first.name else "done", "no luck", "RunError")

    engine = Scripted(end, tmp_path, slots=2)
    progress = Driver(plan.tasks, tmp_path, engine, running.Quiet()).run()
    assert engine.begun == [first.name, second.name]
    assert engine.most == 1  # one behind the other, with room for both
    assert engine.steps == [6, 6]
    assert set(progress.failed) == {first.name}
    assert progress.done == {second.name}


def test_runs_left_over_from_shared_updates_share_their_own(make_tiny, tmp_path):
    names = ("float", "swad", "sma")
    plan = make_tiny(methods={name: METHODS[name] for name in names}, share_averaged=True, grid={"seed": 0})
    first, second, third = plan.tasks
    assert [name for name, _ in first.shared_runs] == [second.name, third.name]
    assert run_task(select_tasks(plan.tasks, "float")[0], tmp_path, plan.dataset, RunCallbacks()).status == "done"
    assert not second.folder(tmp_path).exists()  # nobody asked for it
    left, along = unfinished(plan.tasks, tmp_path)
    assert (left.name, left.updates_from, left.steps) == (second.name, "", 6)
    assert (along.name, along.updates_from) == (third.name, second.name)
    again = Task.from_json(json.loads(json.dumps(first.to_json())))
    assert again == first


def test_a_run_warns_by_itself_of_having_learned_nothing_though_another_made_its_updates(make_tiny, tmp_path):
    methods = {name: METHODS[name] for name in ("float", "sma")}
    spoiled = {"train.steps": 50, "train.eval_every": 50, "train.checkpoint_every": 50, "optimizer.lr": 1e-9}
    plan = make_tiny(set=spoiled, methods=methods, share_averaged=True, grid={"target": "75", "seed": 0})
    for task in plan.tasks:
        warnings: list[str] = []
        assert run_task(task, tmp_path, plan.dataset, RunCallbacks(warn=warnings.append)).status == "done"
        assert len(warnings) == 1
        assert f"{task.labels[0]['method']} target=75 seed=0: the network learned next to nothing" in warnings[0]
    assert plan.tasks[1].updates_from == plan.tasks[0].name


def test_a_fork_point_that_is_gone_or_broken_changes_nothing(make_tiny, tmp_path, capsys):
    plan = make_tiny(share_prefix=True, grid={"target": "75", "seed": 0})
    first, *runs = plan.tasks
    run_task(first, tmp_path, plan.dataset, RunCallbacks())
    file = next(first.folder(tmp_path).glob("checkpoint/step-00000002/network.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    warnings = []
    assert run_task(runs[0], tmp_path, plan.dataset, RunCallbacks(warn=warnings.append)).status == "done"
    assert "training from step 0 instead" in warnings[0]


class Scripted:
    """An engine that ends each task as a function says."""

    def __init__(self, end, out, slots=1):
        self.slots, self.end, self.out, self.begun, self.running, self.stopped = slots, end, out, [], [], False
        self.most, self.steps = 0, []

    def start(self, task):
        self.begun.append(task.name)
        self.steps.append(task.steps)
        self.running.append(task)
        self.most = max(self.most, len(self.running))

    def poll(self, timeout_s):
        ended, self.running = [self.end(task) for task in self.running], []
        for outcome in ended:
            if outcome.status == "done":
                folder = self.out / outcome.name
                (folder / "checkpoint" / "step-00000002").mkdir(parents=True)
                for name in ("result.json", "model.safetensors", "checkpoint/step-00000002/checkpoint.json"):
                    (folder / name).write_text("{}")
        return ended

    def stop(self):
        self.stopped = True

    def close(self):
        pass


def test_a_run_that_fails_stops_no_other_but_what_needs_it(make_tiny, tmp_path, running):
    plan = make_tiny(share_prefix=True)
    bad = plan.tasks[0].name  # the fork point of two of the four runs

    def end(task):
        return Outcome(task.name, "failed", "no luck", "RunError") if task.name == bad else Outcome(task.name, "done")

    engine = Scripted(end, tmp_path)
    progress = Driver(plan.tasks, tmp_path, engine, running.Quiet()).run()
    assert len(progress.done) == 3
    assert [task.fork_from for task in progress.blocked()] == [bad, bad]
    assert read_failures(tmp_path)[bad].reason == "no luck"
    assert task_states(plan.tasks, tmp_path)[bad] == "failed"
    again = Scripted(lambda task: Outcome(task.name, "done"), tmp_path)
    Driver(plan.tasks, tmp_path, again, running.Quiet()).run()
    assert len(again.begun) == 3  # only what is missing or failed
    assert read_failures(tmp_path) == {}


def test_a_process_that_dies_each_time_counts_as_a_failure(make_tiny, tmp_path, running):
    plan = make_tiny(methods={"float": {"presets": ["float"]}}, grid={"target": "75"})
    engine = Scripted(lambda task: Outcome(task.name, "lost", "its process died of SIGKILL"), tmp_path)
    progress = Driver(plan.tasks, tmp_path, engine, running.Quiet()).run()
    assert len(engine.begun) == MAX_LOST
    assert progress.failed[plan.tasks[0].name].reason == "5 times its process died of SIGKILL"


def test_a_full_disk_stops_the_sweep(make_tiny, tmp_path, running):
    plan = make_tiny()
    engine = Scripted(lambda task: Outcome(task.name, "disk", "the disk is full", "RunError"), tmp_path)
    with pytest.raises(RunError, match="the sweep stopped, since it cannot write: the disk is full"):
        Driver(plan.tasks, tmp_path, engine, running.Quiet()).run()
    assert engine.stopped
    assert len(engine.begun) == 1
    assert read_failures(tmp_path) == {}


def test_a_folder_in_use_is_looked_at_again_later(make_tiny, tmp_path, running):
    plan = make_tiny(methods={"float": {"presets": ["float"]}}, grid={"target": "75"})
    statuses: list[Status] = ["busy", "busy", "done"]
    ends = iter(statuses)
    engine = Scripted(lambda task: Outcome(task.name, next(ends)), tmp_path)
    Driver(plan.tasks, tmp_path, engine, running.Quiet(), busy_s=0.05).run()
    assert len(engine.begun) == 3
    assert is_done(plan.tasks[0], tmp_path)


def test_limit_begins_no_more_than_so_many(make_tiny, tmp_path, running):
    plan = make_tiny()
    engine = Scripted(lambda task: Outcome(task.name, "done"), tmp_path)
    progress = Driver(plan.tasks, tmp_path, engine, running.Quiet(), limit=3).run()
    assert len(engine.begun) == len(progress.done) == 3


def test_discarding_spares_runs_that_are_finished_or_in_use(make_tiny, tmp_path):
    tasks = make_tiny().tasks
    for task in tasks[:3]:
        (task.folder(tmp_path) / "checkpoint").mkdir(parents=True)
        (task.folder(tmp_path) / "config.yaml").write_text("")
    for name in ("result.json", "model.safetensors"):  # another machine finished it meanwhile
        (tasks[0].folder(tmp_path) / name).write_text("{}")
    with RunFolder(tasks[1].folder(tmp_path)).lock():
        assert discard_unfinished(tasks, tmp_path) == [tasks[0], tasks[1]]
    assert is_done(tasks[0], tmp_path)
    assert (tasks[1].folder(tmp_path) / "config.yaml").is_file()
    assert [path.name for path in tasks[2].folder(tmp_path).iterdir()] == [".lock"]


def test_asking_for_the_state_does_not_make_a_folder_busy(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.lock():
        assert is_in_use(folder.path)
    assert not is_in_use(folder.path)
    with (folder.path / ".lock").open("rb") as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        released = threading.Timer(0.1, fcntl.flock, (asking, fcntl.LOCK_UN))
        released.start()
        with folder.lock():
            assert is_in_use(folder.path)
        released.join()


def test_a_random_search_builds_each_composition_once(make_tiny):
    search = {"n": 5, "over": ["objective", "lr", "batch_size"]}
    methods = {
        "coral": {"set": {"objective.name": "coral"}},
        "weights": {"set": {"objective.name": "coral"}, "grid": {"objective.params": [{"weight": 2.0}]}},
    }
    plan = make_tiny(search=search, methods=methods, grid={"target": ["0", "75"], "seed": "0..1"})
    assert len(plan.tasks) == 2 * 5 * 4
    built = []
    check_tasks(plan.tasks, plan.dataset, build=lambda config, dataset, progress: built.append(config))
    assert len(built) <= 3  # the defaults, the drawn weights, and those of the second method


def test_an_ensemble_is_made_of_finished_members(make_tiny, tmp_path, running):
    ensembles = [
        {"name": "EoQ", "method": "lsq", "kind": "eoq", "members": "0..1"},
        {"name": "DiWA", "method": "one-start", "kind": "diwa", "members": "0..1"},
    ]
    methods = {"lsq": {"presets": ["lsq"]}, "one-start": {"presets": ["float"], "set": {"model.init_seed": 0}}}
    plan = make_tiny(methods=methods, ensembles=ensembles)
    running.in_this_process(plan, tmp_path)
    made = [task for task in plan.tasks if task.kind == "ensemble"]
    assert [task.name.split("-")[0] for task in made] == ["eoq", "diwa"]
    for task in made:
        result = json.loads((task.folder(tmp_path) / "result.json").read_text())
        assert {member["folder"] for member in result["members"]} == {f"../{name}" for name in task.needs}
        assert is_done(task, tmp_path)
    assert unfinished(plan.tasks, tmp_path) == []


def test_a_full_disk_is_distinguished_from_other_failures(make_tiny, tmp_path, monkeypatch):
    plan = make_tiny()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qtdog.core.files.tempfile.mkstemp", full)
    outcome = run_task(plan.tasks[0], tmp_path, plan.dataset, RunCallbacks())
    assert (outcome.status, outcome.error) == ("disk", "RunError")
    assert "the disk is full" in outcome.reason


def test_a_plan_is_the_same_each_time(make_tiny):
    assert (
        make_tiny(share_prefix=True).tasks
        == make_plan(Study.model_validate(make_tiny().study.model_dump() | {"share_prefix": True})).tasks
    )


def test_a_warning_names_the_run_that_it_is_about(make_tiny, tmp_path, monkeypatch):
    plan = make_tiny()
    told: list[str] = []
    monkeypatch.setitem(_WORK, "run", lambda task, out, dataset, callbacks: callbacks.warn("it learned nothing") or 0.0)
    outcome = run_task(plan.tasks[0], tmp_path, plan.dataset, RunCallbacks(warn=told.append))
    assert outcome.warnings == ("it learned nothing",)
    assert told == [f"{plan.tasks[0].text}: it learned nothing"]
    assert "method" not in plan.tasks[0].text
    assert f"target={plan.tasks[0].labels[0]['target']}" in plan.tasks[0].text


def test_the_journal_keeps_warnings_and_survives_damaged_lines(tmp_path):
    append_journal(Outcome("quiet", "done", seconds=2.0, trained_s=1.0), 5, tmp_path)
    append_journal(Outcome("loud", "done", seconds=2.0, trained_s=1.0, warnings=("odd",)), 5, tmp_path)
    append_journal(Outcome("resumed", "done", seconds=1.0, trained_s=9.0, warnings=("odd",)), 5, tmp_path)
    damaged = ['["a"]', "7", "{", '{"name": 3, "seconds": 1, "trained_s": 1}']
    damaged += [
        f'{{"name": "x", "seconds": {seconds}, "trained_s": {trained_s}, "warnings": ["odd"]}}'
        for seconds, trained_s in (('"1"', 1), (-1, 1), (1, -1), (1, "NaN"))
    ]
    damaged += ['{"name": "y", "seconds": 1, "trained_s": 1, "warnings": "odd"}']
    with (tmp_path / ".sweep" / "journal.jsonl").open("a") as stream:
        stream.write("\n".join(damaged) + "\n")
    assert read_warnings(tmp_path) == {"loud": ["odd"], "resumed": ["odd"]}
    assert set(read_journal(tmp_path)) == {"quiet", "loud"}  # of a resumed one the time is that of its last start only
