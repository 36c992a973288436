"""Study files: what they mean, and that every mistake is reported before anything starts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from qtdog.core.config_io import build_config
from qtdog.core.errors import ConfigError
from qtdog.sweep.plan import make_plan, select_tasks
from qtdog.sweep.runner import check_tasks
from qtdog.sweep.study import Search, Study, draw_values, read_study

STUDIES = sorted((Path(__file__).parents[2] / "studies").glob("*.yaml"))


def labels(plan):
    return [one for task in plan.tasks if task.kind == "run" for one in task.labels]


def test_methods_times_grid_with_methods_taking_turns(make_tiny):
    plan = make_tiny(grid={"seed": "0..1", "target": ["0", "75"]})
    found = [(one["method"], one["seed"], one["target"]) for one in labels(plan)]
    assert found == [(m, s, t) for s in (0, 1) for t in ("0", "75") for m in ("float", "lsq")]


def test_target_all_means_every_domain_and_commas_one_value_for_several_keys(make_tiny):
    plan = make_tiny(grid={"target": "all", "trial, seed": "3..4"}, methods={"float": {"presets": ["float"]}})
    runs = [task.config for task in plan.tasks]
    assert {config.data.target for config in runs} == {"0", "15", "30", "45", "60", "75"}
    assert {(config.data.trial, config.train.seed) for config in runs} == {(3, 3), (4, 4)}


def test_axes_of_a_method_replace_those_of_the_study(make_tiny):
    bits = {"presets": ["lsq"], "grid": {"quantizer.bits": [8, 4], "seed": 7}}
    plan = make_tiny(methods={"float": {"presets": ["float"]}, "bits": bits})
    found = [task.config for task in plan.tasks if task.labels[0]["method"] == "bits"]
    assert [(config.quantizer.bits, config.train.seed) for config in found] == [(8, 7), (4, 7)]


def test_methods_that_come_to_the_same_run_are_one_task_with_two_names(make_tiny):
    plan = make_tiny(methods={"lsq": {"presets": ["lsq"]}, "seven": {"presets": ["lsq"], "set": {"quantizer.bits": 7}}})
    assert len(plan.tasks) == 2
    assert [one["method"] for one in plan.tasks[0].labels] == ["lsq", "seven"]


def test_order_puts_the_informative_first_and_needs_before_them(make_tiny):
    order = [{"method": "lsq", "seed": 1}, {"seed": 1}]
    plan = make_tiny(order=order, share_prefix=True)
    kinds = [(task.kind, task.labels[0]["method"] if task.labels else None) for task in plan.tasks[:3]]
    assert kinds == [("fork_point", None), ("run", "lsq"), ("run", "float")]
    assert plan.tasks[1].labels[0]["seed"] == 1


def test_only_takes_what_the_words_mean_and_what_it_needs(make_tiny):
    plan = make_tiny(share_prefix=True)
    found = select_tasks(plan.tasks, "lsq seed=1")
    assert [task.kind for task in found] == ["fork_point", "run"]
    assert found[1].needs == (found[0].name,)
    with pytest.raises(ConfigError, match="means no run"):
        select_tasks(plan.tasks, "seed=9")


MISTAKES = [
    ({"metods": {}}, "unknown key of the study 'metods'; did you mean 'methods'"),
    ({"methods": {"a": {"preset": []}}}, r"unknown key of methods\.a 'preset'; did you mean 'presets'"),
    ({"seeds": "0..2"}, r"unknown key of the study 'seeds'; did you mean 'seed', below 'grid'\?"),
    ({"search": {"n": 2, "ower": []}}, "unknown key of search 'ower'; did you mean 'over'"),
    ({"order": [{"sed": 1}]}, "unknown label 'sed'; did you mean 'seed'"),
    ({"order": [{"method": "lqs"}]}, "unknown method 'lqs'; did you mean 'lsq'"),
    ({"ensembles": [{"name": "e", "method": "lqs", "kind": "eoq", "members": "0..1"}]}, "did you mean 'lsq'"),
    ({"ensembles": [{"name": "lsq", "method": "lsq", "kind": "eoq", "members": "0..1"}]}, "has the name of a method"),
    ({"ensembles": [{"name": "e", "method": "lsq", "kind": "eoq", "members": "0..0"}]}, "two members or more"),
    ({"grid": {"seed": []}}, "at least 1"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_mistakes_in_the_file_are_reported_with_the_nearest_name(changes, message, tmp_path):
    tree = {"name": "a", "methods": {"lsq": {"presets": ["lsq"]}}, "grid": {"seed": "0..1"}} | changes
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=message):
        read_study(file)


def test_an_axis_called_seeds_is_answered_with_the_nearest_name(make_tiny):
    with pytest.raises(ConfigError, match=r"'seeds' is no dotted key, like train\.steps; did you mean 'seed'"):
        make_tiny(grid={"seeds": "0..1", "target": "75"})


def test_names_of_domains_are_the_text_of_the_file(tmp_path, make_tiny):
    file = tmp_path / "study.yaml"
    file.write_text(
        "name: a\nmethods: {float: {presets: [float], grid: {data.target: 1.50}}, lsq: {set: {data.target: on}}}\n"
        "grid: {target: [NO, 010, sketch], seed: 0..1, quantizer.bits: [7, 010]}\norder: [{target: [010], seed: 0}]\n"
    )
    study = read_study(file)
    assert study.grid["target"] == ["NO", "010", "sketch"]
    assert study.grid["quantizer.bits"] == [7, 8]
    assert study.order == [{"target": ["010"], "seed": [0]}]
    assert study.methods["float"].grid == {"data.target": ["1.50"]}
    assert study.methods["lsq"].set == {"data.target": "on"}
    with pytest.raises(ConfigError, match="False is no name of a domain; quote it"):
        make_tiny(grid={"target": [False]})


def test_all_mistakes_are_reported_at_once(make_tiny):
    methods = {
        "a": {"presets": ["lqs"]},
        "b": {"set": {"train.stepz": 3}},
        "c": {"set": {"nodots": 3}},
        "d": {"grid": {"target": "57"}},
        "e": {"set": {"quantizer.start_step": 9}},
    }
    with pytest.raises(ConfigError) as caught:
        make_tiny(methods=methods)
    text = str(caught.value)
    assert text.startswith("5 mistakes in the study, and nothing was started:")
    for expected in (
        "method 'a': unknown preset 'lqs'; did you mean 'lsq'",
        "method 'b': unknown option in 'train' 'stepz'; did you mean 'steps'",
        "method 'c': 'nodots' is no dotted key",
        "method 'd': unknown target domain '57'; did you mean '75'",
        "method 'e': quantizer.start_step 9 is not before train.steps 6",
    ):
        assert expected in text


def test_combinations_that_do_not_go_together_are_found_by_putting_them_together(make_tiny):
    methods = {
        "fine": {"presets": ["float"]},
        "a": {"set": {"objective.name": "emr"}},
        "b": {"set": {"model.feature_layer": "context"}},
        "c": {"set": {"averager.name": "sma", "averager.params": {"stat": 3}}},
    }
    plan = make_tiny(methods=methods)
    with pytest.raises(ConfigError) as caught:
        check_tasks(plan.tasks, plan.dataset)
    text = str(caught.value)
    assert text.startswith("3 mistakes in the study")
    assert "method 'a': unknown objective 'emr'; did you mean 'erm'" in text
    assert "method 'b': feature layer 'context' makes no sense with objective 'erm'" in text
    assert "method 'c': averager" in text


def test_an_objective_that_compares_domains_is_refused_on_one_source(image_tree):
    methods = {"coral": {"set": {"objective.name": "coral"}}}
    for extra in sorted(image_tree.iterdir())[2:]:
        for file in sorted(extra.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        extra.rmdir()
    grid = {"target": "all"}
    base = {"presets": ["digits"], "set": {"data.image_size": 8}}
    study = Study.model_validate({"name": "a", "methods": methods, "grid": grid, "base": base})
    plan = make_plan(study, str(image_tree))
    with pytest.raises(ConfigError, match="needs at least 2 source domains"):
        check_tasks(plan.tasks, plan.dataset)


def test_members_of_an_ensemble_without_a_run_are_reported(make_tiny):
    ensemble = {"name": "EoQ", "method": "lsq", "kind": "eoq", "members": "0..3"}
    with pytest.raises(ConfigError, match=r"ensemble 'EoQ': no run target=75 seed=2, 3"):
        make_tiny(ensembles=[ensemble])


def test_all_targets_are_meant_in_ensembles_and_in_the_order(make_tiny):
    ensemble = {"name": "EoQ", "method": "lsq", "kind": "eoq", "members": "0..1", "grid": {"target": "all"}}
    plan = make_tiny(ensembles=[ensemble], grid={"target": "all", "seed": "0..1"}, order=[{"target": "all", "seed": 1}])
    joined = [one for group in plan.labels.values() for one in group if one["method"] == "EoQ"]
    assert {one["target"] for one in joined} == {one["target"] for one in labels(plan)}
    assert [one["seed"] for one in labels(plan) if one["method"] == "lsq"][:2] == [1, 1]


def test_draws_are_the_same_for_all_methods_and_the_first_is_the_defaults():
    search = Search(n=3, seed=1, over=["objective", "lr", "batch_size"])
    coral, erm = (build_config([{"objective": {"name": name}}]) for name in ("coral", "erm"))
    assert draw_values(search, 0, coral) == {}
    first, other = draw_values(search, 1, coral), draw_values(search, 1, erm)
    assert first["optimizer"] == other["optimizer"]
    assert 1e-5 <= first["optimizer"]["lr"] <= 10**-3.5
    assert 8 <= first["data"]["batch_size"] <= 45
    assert 0.1 <= first["objective"]["params"]["weight"] <= 10
    assert "objective" not in other
    assert draw_values(search, 2, coral) != first == draw_values(search, 1, coral)


def test_a_search_makes_runs_with_draws(make_tiny):
    plan = make_tiny(search={"n": 3, "over": ["lr"]}, methods={"float": {"presets": ["float"]}}, grid={"target": "75"})
    assert [one["draw"] for one in labels(plan)] == [0, 1, 2]
    assert len({task.config.optimizer.lr for task in plan.tasks}) == 3


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_shipped_studies_can_be_read(path):
    study = read_study(path)
    assert study.share_prefix or path.stem == "crop"  # whose runs have no step in common
    if study.data == "rotated-digits":
        plan = make_plan(study)
        runs = [task for task in plan.tasks if task.kind == "run"]
        alone = {task.labels[0]["method"] for task in runs if not task.fork_from}
        assert alone <= {"float-one-start"}
        assert len({task.name for task in plan.tasks}) == len(plan.tasks)


def test_the_study_in_the_documentation_is_one():
    page = (Path(__file__).parents[2] / "docs" / "tasks" / "sweeps.md").read_text()
    first, second = re.findall(r"```yml\n(.*?)```", page, re.DOTALL)
    study = Study.model_validate(yaml.safe_load(first) | yaml.safe_load(second))
    assert study.search is not None
    assert study.grid["seed"] == [0, 1, 2, 3, 4]
