"""`qtdog.sweep` and `qtdog.compare` on runs of the digits; the shipped studies of the paper's tables are valid."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import qtdog
from qtdog.api.budget import training_flops
from qtdog.api.studies import TRIALS, Cost, count_runs, find_study, narrow, shipped_studies
from qtdog.core.config import Config
from qtdog.core.config_io import build_config, load_preset, preset_names
from qtdog.core.errors import ConfigError
from qtdog.data.cards import CARDS
from qtdog.models.backbones import preprocessing
from qtdog.models.feature_layers import make_feature_layer
from qtdog.quantizers.base import OPTION_NAMES
from qtdog.quantizers.registry import QUANTIZERS
from qtdog.sweep.plan import make_plan
from qtdog.sweep.results import expected_rows
from qtdog.sweep.study import Study, expand_without_data
from qtdog.training.build import AVERAGERS, OBJECTIVES, STEP_RULES

STUDY = """
name: tiny
base: {set: {data.image_size: 12, data.batch_size: 4, train.steps: 2, train.eval_every: 2}}
methods:
  float: {set: {quantizer.name: none}}
  lsq: {set: {quantizer.start_step: 1}}
grid: {target: ['75'], seed: [0, 1]}
"""


def test_a_study_runs_and_its_table_compares_by_pairs(tmp_path: Path):
    (tmp_path / "tiny.yaml").write_text(STUDY)
    study = qtdog.sweep(tmp_path / "tiny.yaml", out=tmp_path / "out", workers=1, progress=False)
    assert study.is_done
    assert "4 of 4 done" in repr(study)
    float_row, lsq = study.rows(reference="float")
    assert (float_row["method"], lsq["method"]) == ("float", "lsq")
    assert lsq["pairs"] == 2
    assert lsq["difference"] == pytest.approx(lsq["75"] - float_row["75"])
    assert list(study.table()["method"]) == ["float", "lsq"]
    with pytest.raises(ConfigError, match="did you mean 'float'"):
        study.table(reference="flaot")

    table = qtdog.compare(tmp_path / "out")
    assert sorted(table["75"]) == pytest.approx(sorted([float_row["75"], lsq["75"]]))
    assert list(table["trials"]) == [2, 2]
    with pytest.raises(ConfigError, match="sourc"):
        qtdog.compare([tmp_path / "out"], selection="sourc")


def test_what_a_run_of_a_sweep_warns_of_is_a_warning_that_names_it(tmp_path: Path):
    text = STUDY.replace("train.steps: 2, train.eval_every: 2", "train.steps: 50, optimizer.lr: 1.0e-9")
    (tmp_path / "tiny.yaml").write_text(text)
    with pytest.warns(UserWarning, match=r"^float target=75 seed=0: the network learned next to nothing.*\(lr=2e-10;"):
        study = qtdog.sweep(tmp_path / "tiny.yaml", out=tmp_path, workers=1, progress=False, only="float seed=0")
    assert list(study.warnings) == ["float target=75 seed=0"]
    assert (
        "(lr=2e-10; it was 1e-09) or train longer (steps=100; it was 50)" in study.warnings["float target=75 seed=0"][0]
    )


SOURCE = Path(__file__).parents[2] / "src" / "qtdog"
TABLES = {
    f"{name}-{dataset}": study.on_dataset(dataset)
    for name, study in shipped_studies().items()
    for dataset in study.datasets
}


def configs_of(study: Study) -> dict[str, Config]:
    """Return the configuration of each method of a study on its first target."""
    once = study.model_copy(update={"grid": study.grid | {TRIALS: [0]}})
    domains = CARDS[study.data or ""].domains or ("unseen",)
    return {str(labels["method"]): config for labels, config in expand_without_data(once, domains[:1])}


def test_every_shipped_study_is_a_table_of_expected_values():
    assert len(TABLES) == 28
    assert all(study.expected for study in TABLES.values())
    named = {preset for study in TABLES.values() for preset in study.base.presets}
    assert named == {name for name in preset_names() if name.startswith("paper/")}


@pytest.mark.parametrize("table", TABLES)
def test_every_method_is_a_configuration_of_members_that_exist(table: str):
    study = TABLES[table]
    card, configs = CARDS[study.data or ""], configs_of(study)
    for config in configs.values():
        preprocessing(config.model.backbone)
        make_feature_layer(config.model.feature_layer, config.model.feature_params)
        for registry, section in ((OBJECTIVES, config.objective), (STEP_RULES, config.step_rule)):
            assert set(section.params) <= set(registry[section.name].HYPERPARAMETERS)
        AVERAGERS[config.averager.name](config.averager.params, config.start_step or 0)
        assert config.quantizer.name == "none" or QUANTIZERS[config.quantizer.name]
        assert config.data.target in (card.domains or ("unseen",))
    for row in expected_rows(study):
        domains = [name.partition("/")[2] for name in row.values]
        assert set(filter(None, domains)) <= set(card.domains or ())
        assert all(10 <= value < 100 for value in row.values.values())
        config = configs.get(row.name)
        assert config is None or ("in_domain" in row.values) == (config.data.test_mode == "in-domain")


def test_methods_of_a_table_differ_and_ensembles_have_the_members_of_the_paper():
    for name, study in TABLES.items():
        trained = [config.model_dump_json() for config in configs_of(study).values()]
        assert len(set(trained)) == len(trained), name
        members = {row.name: row.members for row in expected_rows(study) if row.members > 1}
        assert members.items() <= {"ERM ensemble": 6, "EoA": 6, "EoQ": 5}.items(), name


def settings_of(tree: dict[str, Any]) -> Iterator[tuple[str, str]]:
    return ((section, key) for section, values in tree.items() for key in values)


def names_read(source: str) -> set[str]:
    """Return the names of all attributes that a module reads."""
    nodes = ast.walk(ast.parse(source))
    return {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}


def unread(settings: set[tuple[str, str]]) -> set[tuple[str, str]]:
    read = set().union(OPTION_NAMES, *(names_read(path.read_text()) for path in SOURCE.rglob("*.py")))
    return {(section, key) for section, key in settings if key not in read}


def test_every_option_that_a_preset_sets_is_read_somewhere():
    settings = {setting for name in preset_names() for setting in settings_of(load_preset(name))}
    for study in TABLES.values():
        keys = [key for layer in (study.base, *study.methods.values()) for key in layer.set]
        settings |= {(section, key) for section, _, key in (text.partition(".") for text in keys)}
    assert len(settings) > 15
    assert unread(settings) == set()
    assert unread({("train", "no_such_option_anywhere")})


@pytest.mark.parametrize(
    ("table", "method", "measure", "value"),
    [
        ("table01-PACS", "ERM", "unseen", 84.7),
        ("table01-PACS", "EoQ", "unseen", 89.3),
        ("table01-VLCS", "SWAD", "unseen", 79.1),
        ("table01-OfficeHome", "MIRO", "unseen", 70.5),
        ("table01-TerraIncognita", "QT-DoG", "unseen", 50.8),
        ("table01-DomainNet", "DiWA", "unseen", 47.7),
        ("domains-PACS", "QT-DoG", "unseen/sketch", 82.3),
        ("quantizers-PACS", "INQ", "in_domain", 97.1),
        ("bits-PACS", "2 bits", "unseen", 82.8),
        ("bits-TerraIncognita", "float", "unseen", 47.2),
        ("scale-PACS", "per layer", "unseen", 86.3),
        ("start-PACS", "step 4000", "unseen", 85.1),
        ("table15-PACS", "noise 5e-6", "unseen", 85.6),
        ("combination-TerraIncognita", "MixStyle + QT-DoG", "unseen", 47.7),
        ("deit-PACS", "QT-DoG", "unseen", 86.2),
        ("clip-OfficeHome", "CLIPood", "unseen", 87.0),
        ("resnext-VLCS", "EoQ", "mean_of_five", 72.9),
        ("table12-TerraIncognita", "QT-DoG", "in_domain", 91.1),
        ("amazon-Amazon", "QT-DoG", "percentile_10_out", 55.9),
        ("camelyon17-Camelyon17", "ERM", "source", 93.2),
    ],
)
def test_values_are_those_of_the_paper(table: str, method: str, measure: str, value: float):
    assert value in [row.values.get(measure) for row in expected_rows(TABLES[table]) if row.title == method]


def test_the_main_table_has_the_published_means():
    means = {"CORAL": 64.1, "QT-DoG": 66.2, "EoQ": 68.4, "SWAD": 66.9, "MIRO": 65.9}
    main = [study for name, study in TABLES.items() if name.startswith("table01")]
    assert len(main) == 5
    for method, mean in means.items():
        values = [study.expected[method]["unseen"] for study in main]
        assert sum(values) / 5 == pytest.approx(mean, abs=0.051), method


def test_the_published_settings():
    pacs = build_config([load_preset("paper/table01-pacs")])
    assert pacs.model_copy(update={"data": Config().data}) == Config(quantizer=pacs.quantizer)
    net = build_config([load_preset("paper/table01-domainnet")])
    assert (net.train.steps, net.quantizer.start_step, net.train.eval_every) == (15000, 8000, 1000)


def test_finding_a_table():
    assert find_study("scale")[1] == "PACS"
    assert find_study("table01", "office-home")[0].data == "office-home"
    with pytest.raises(ConfigError, match=r"unknown table 'table1'; did you mean 'table1"):
        find_study("table1")
    with pytest.raises(ConfigError, match=r"deit has several data sets: add --dataset, one of PACS, TerraIncognita"):
        find_study("deit")
    with pytest.raises(ConfigError, match=r"unknown data set of scale 'vlcs'"):
        find_study("scale", "vlcs")


def test_a_study_of_ones_own_may_have_expected_values(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    tree = {"name": "mine", "data": "pacs", "methods": {"lsq": {}}}
    file.write_text(yaml.safe_dump(tree | {"expected": {"lsq": 80}}))
    study, dataset = find_study(str(file))
    assert (study.expected, dataset) == ({"lsq": {"unseen": 80.0}}, "pacs")
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match="says nothing of what is expected"):
        find_study(str(file))
    file.write_text(yaml.safe_dump(tree | {"expected": {"lsk": 80}}))
    with pytest.raises(ConfigError, match="unknown method 'lsk'; did you mean 'lsq'"):
        find_study(str(file))
    file.write_text(yaml.safe_dump(tree | {"expected": {"lsq": {"unsen": 80}}}))
    with pytest.raises(ConfigError, match="unknown measure 'unsen'; did you mean 'unseen'"):
        find_study(str(file))


def test_choosing_methods():
    study, _ = find_study("quantizers")
    assert [row.title for row in expected_rows(study, ["lsq"])] == ["LSQ", "LSQ"]
    assert [row.name for row in expected_rows(study, ["LSQ in domain"])] == ["LSQ in domain"]
    assert len(expected_rows(study)) == 8
    with pytest.raises(ConfigError, match="no method 'LSK'; did you mean 'LSQ"):
        expected_rows(study, ["LSK"])


def test_a_study_of_several_data_sets_is_no_plan_of_one():
    with pytest.raises(ConfigError, match="table12 is of several data sets"):
        make_plan(shipped_studies()["table12"])


def test_members_of_an_ensemble_are_the_first_trials_of_its_method():
    study, _ = find_study("table01", "PACS")
    rows = expected_rows(study, ["QT-DoG", "EoQ"])
    narrowed = narrow(study, rows, 2, [{"data": {"target": "sketch"}, "train": {"steps": 3000}}])
    runs = count_runs(narrowed, rows, 2)
    assert [(run.method, run.config.data.trial, run.config.train.seed) for run in runs] == [
        ("QT-DoG", 0, 0),
        ("QT-DoG", 1, 1),
        *(("EoQ", seed, seed) for seed in range(5)),
    ]
    assert {(run.config.data.target, run.config.train.steps, run.n_sources) for run in runs} == {("sketch", 3000, 3)}


def test_arithmetic_is_counted():
    assert training_flops("resnet50", channels=3, size=224) == pytest.approx(3 * 2 * 4.09e9, rel=0.01)
    text = training_flops("distilbert-base-uncased", channels=3, size=100)
    assert text == pytest.approx(3 * 2 * 100 * 42.5e6, rel=0.01)  # 66.4 M weights without 23.8 M of words
    assert Cost(1, 1, 3.6e15).hours(1) == pytest.approx(1.0)
