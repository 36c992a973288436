"""The presets of the paper's tables: valid, with names that exist, options that are read and values of the paper."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qtdog.api.paper import PaperRow, PaperTable, choose_rows, find_table, paper_tables
from qtdog.core.config import Config
from qtdog.core.config_io import build_config, load_preset, paper_part, preset_names
from qtdog.core.errors import ConfigError
from qtdog.data.cards import CARDS
from qtdog.models.backbones import preprocessing
from qtdog.models.feature_layers import make_feature_layer
from qtdog.quantizers.base import OPTION_NAMES
from qtdog.quantizers.registry import QUANTIZERS
from qtdog.training.build import AVERAGERS, OBJECTIVES, STEP_RULES

SOURCE = Path(__file__).parents[2] / "src" / "qtdog"
TABLES = paper_tables()
ROWS = [(table, row) for table in TABLES for row in table.rows]


BASES = {table.preset: load_preset(table.preset) for table in TABLES}


def config_of(table: PaperTable, row: PaperRow) -> Config:
    return build_config([BASES[table.preset], row.change])


def test_every_file_is_a_table_and_no_other_preset_says_anything_of_the_paper():
    files = {f"paper/{path.stem}" for path in (SOURCE / "presets" / "paper").iterdir()}
    assert files == {table.preset for table in TABLES}
    assert not [name for name in preset_names() if name not in files and paper_part(name)]


@pytest.mark.parametrize(
    ("table", "row"), ROWS, ids=[f"{table.preset}-{row.method}-{next(iter(row.values))}" for table, row in ROWS]
)
def test_every_row_is_a_configuration_of_members_that_exist(table: PaperTable, row: PaperRow):
    config = config_of(table, row)
    assert config.data.source in list(CARDS)
    preprocessing(config.model.backbone)
    make_feature_layer(config.model.feature_layer, config.model.feature_params)
    for registry, section in ((OBJECTIVES, config.objective), (STEP_RULES, config.step_rule)):
        assert set(section.params) <= set(registry[section.name].HYPERPARAMETERS)
    AVERAGERS[config.averager.name](config.averager.params, config.start_step or 0)
    assert config.quantizer.name == "none" or QUANTIZERS[config.quantizer.name]
    target, domains = config.data.target, CARDS[config.data.source].domains or ("unseen",)
    assert target in ("all", *domains)
    named = [name.partition("/")[2] for name in row.values]
    assert set(filter(None, named)) <= set(CARDS[config.data.source].domains or ())
    assert all(10 <= value < 100 for value in row.values.values())
    assert ("in_domain" in row.values) == (config.data.test_mode == "in-domain") or row.missing


def test_rows_of_a_table_differ():
    for table in TABLES:
        trained = [config_of(table, row).model_dump_json() + str(row.members) for row in table.rows if not row.missing]
        assert len(set(trained)) == len(trained), table.preset


def settings_of(tree: dict[str, Any]) -> Iterator[tuple[str, str]]:
    return ((section, key) for section, values in tree.items() for key in values)


def names_read(source: str) -> set[str]:
    """Return the names of all attributes that a module reads."""
    nodes = ast.walk(ast.parse(source))
    return {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}


def unread(settings: set[tuple[str, str]]) -> set[tuple[str, str]]:
    files = [path for path in SOURCE.rglob("*.py") if path.name != "config.py"]
    read = set().union(OPTION_NAMES, *(names_read(path.read_text()) for path in files))
    return {(section, key) for section, key in settings if key not in read}


def test_every_option_that_a_preset_sets_is_read_somewhere():
    trees = [load_preset(name) for name in preset_names()] + [row.change for _, row in ROWS]
    settings = {setting for tree in trees for setting in settings_of(tree)}
    assert len(settings) > 15
    assert unread(settings) == set()
    assert unread({("train", "no_such_option_anywhere")})


@pytest.mark.parametrize(
    ("preset", "method", "measure", "value"),
    [
        ("paper/table01-pacs", "ERM", "unseen", 84.7),
        ("paper/table01-pacs", "EoQ", "unseen", 89.3),
        ("paper/table01-vlcs", "SWAD", "unseen", 79.1),
        ("paper/table01-officehome", "MIRO", "unseen", 70.5),
        ("paper/table01-terraincognita", "QT-DoG", "unseen", 50.8),
        ("paper/table01-domainnet", "DiWA", "unseen", 47.7),
        ("paper/domains-pacs", "QT-DoG", "unseen/sketch", 82.3),
        ("paper/quantizers-pacs", "INQ", "in_domain", 97.1),
        ("paper/bits-pacs", "2 bits", "unseen", 82.8),
        ("paper/bits-terraincognita", "float", "unseen", 47.2),
        ("paper/scale-pacs", "per layer", "unseen", 86.3),
        ("paper/start-pacs", "step 4000", "unseen", 85.1),
        ("paper/table15-pacs", "noise 5e-6", "unseen", 85.6),
        ("paper/combination-terraincognita", "MixStyle + QT-DoG", "unseen", 47.7),
        ("paper/deit-pacs", "QT-DoG", "unseen", 86.2),
        ("paper/clip-officehome", "CLIPood", "unseen", 87.0),
        ("paper/resnext-vlcs", "EoQ", "mean_of_five", 72.9),
        ("paper/table12-terraincognita", "QT-DoG", "in_domain", 91.1),
        ("paper/amazon", "QT-DoG", "percentile_10_out", 55.9),
        ("paper/camelyon17", "ERM", "source", 93.2),
    ],
)
def test_values_are_those_of_the_paper(preset: str, method: str, measure: str, value: float):
    table = next(table for table in TABLES if table.preset == preset)
    assert value in [row.values.get(measure) for row in table.rows if row.method == method]


def test_the_main_table_has_the_published_means():
    means = {"CORAL": 64.1, "QT-DoG": 66.2, "EoQ": 68.4, "SWAD": 66.9, "MIRO": 65.9}
    main = [table for table in TABLES if table.study == "table01"]
    assert len(main) == 5
    for method, mean in means.items():
        values = [row.values["unseen"] for table in main for row in table.rows if row.method == method]
        assert sum(values) / 5 == pytest.approx(mean, abs=0.051), method


def test_the_published_settings():
    pacs = build_config([load_preset("paper/table01-pacs")])
    assert pacs.model_copy(update={"data": Config().data}) == Config(quantizer=pacs.quantizer)
    net = build_config([load_preset("paper/table01-domainnet")])
    assert (net.train.steps, net.quantizer.start_step, net.train.eval_every) == (15000, 8000, 1000)


def test_finding_a_table():
    assert find_table("scale", None).dataset == "PACS"
    assert find_table("table01", "office-home").preset == "paper/table01-officehome"
    with pytest.raises(ConfigError, match=r"unknown table 'table1'; did you mean 'table1"):
        find_table("table1", None)
    with pytest.raises(ConfigError, match=r"deit has several data sets: add --dataset, one of PACS, TerraIncognita"):
        find_table("deit", None)
    with pytest.raises(ConfigError, match=r"unknown data set of scale 'vlcs'"):
        find_table("scale", "vlcs")


def test_choosing_methods():
    table = find_table("quantizers", None)
    assert [row.method for row in choose_rows(table, ["lsq"])] == ["LSQ", "LSQ"]
    assert len(list(choose_rows(table, []))) == len(table.rows)
    with pytest.raises(ConfigError, match="no method 'LSK'; did you mean 'LSQ'"):
        list(choose_rows(table, ["LSK"]))


def test_a_measure_that_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="unknown measure 'unsen'; did you mean 'unseen'"):
        PaperRow(method="x", values={"unsen": 1.0})
