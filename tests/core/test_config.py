import pytest
from pydantic import ValidationError

from qtdog.core.config import Config, config_hash
from qtdog.core.config_io import (
    build_config,
    differences,
    load_preset,
    option_rows,
    parse_assignment,
    preset_description,
    preset_names,
    to_yaml,
)
from qtdog.core.errors import ConfigError


def test_defaults_are_the_published_protocol():
    config = Config()
    assert (config.model.backbone, config.optimizer.name, config.optimizer.lr) == ("resnet50.tv_in1k", "adam", 5e-5)
    assert (config.train.steps, config.train.eval_every, config.data.batch_size) == (5000, 300, 32)
    assert (config.quantizer.bits, config.start_step, config.data.holdout_frac) == (7, 2000, 0.2)
    assert config.optimizer.weight_decay == 0


def test_configuration_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Config().train.steps = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"trian": {"steps": 1}}, r"unknown section 'trian'; did you mean 'train'\?"),
        ({"train": {"step": 1}}, r"unknown option in 'train' 'step'; did you mean 'steps'\?"),
        (
            {"optimizer": {"name": "addam"}},
            r"optimizer.name cannot be 'addam'; did you mean 'adam'\? Choices: adam, sgd",
        ),
        ({"quantizer": {"bits": 1}}, r"quantizer.bits: .*greater than or equal to 2 \(got 1\)"),
        ({"quantizer": {"bits": 9}}, r"quantizer.bits: .*less than or equal to 8 \(got 9\)"),
        ({"train": {"steps": "many"}}, r"train.steps: .*integer.*'many'"),
        ({"quantizer": {"start_step": 7}, "train": {"steps": 7}}, "nothing would be quantized"),
    ],
)
def test_mistakes_are_named_with_the_nearest_match(tree, message):
    with pytest.raises(ConfigError, match=message):
        build_config([tree])


def test_later_layers_win_key_by_key():
    config = build_config([{"train": {"steps": 10, "seed": 3}}, {"train": {"steps": 20}}])
    assert (config.train.steps, config.train.seed) == (20, 3)


def test_numbers_are_accepted_as_domain_names_and_as_text():
    config = build_config([parse_assignment("data.target=75"), parse_assignment("optimizer.lr=5e-5")])
    assert config.data.target == "75"
    assert config.optimizer.lr == 5e-5


@pytest.mark.parametrize("text", ["steps=3", "train.steps", "=3", "train.=3", "train.steps=[1"])
def test_malformed_assignments_are_refused(text):
    with pytest.raises(ConfigError, match="--set"):
        parse_assignment(text)


def test_hash_ignores_defaults_and_where_the_data_lies_but_no_result():
    plain = config_hash(Config())
    assert plain == config_hash(
        build_config([{"train": {"steps": 5000}, "data": {"source": "/elsewhere", "workers": 3}}])
    )
    assert len(plain) == 12
    changes = [
        {"train": {"seed": 1}},
        {"data": {"content": "ab"}},
        {"data": {"trial": 1}},
        {"quantizer": {"bits": 6}},
        {"quantizer": {"start_step": 100}},
        {"optimizer": {"lr": 1e-4}},
    ]
    hashes = {config_hash(build_config([change])) for change in changes}
    assert len(hashes | {plain}) == len(changes) + 1


def test_bits_do_not_name_a_float_run():
    float_hashes = {config_hash(build_config([{"quantizer": {"name": "none", "bits": bits}}])) for bits in (4, 7)}
    assert len(float_hashes) == 1


def test_yaml_round_trip_is_the_same_configuration(tmp_path):
    config = build_config([{"quantizer": {"bits": 5, "exclude": ["classifier", "a.*"]}, "data": {"target": "0"}}])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert build_config([load_preset(str(path))]) == config


def test_differences_name_each_changed_value():
    assert differences(Config(), build_config([{"train": {"steps": 7}}])) == ["train.steps: 5000 → 7"]


@pytest.mark.parametrize("name", preset_names())
def test_shipped_presets_are_valid_and_described(name):
    build_config([load_preset(name)])
    assert len(preset_description(name)) > 20


def test_unknown_or_broken_presets_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'pacs-lite'"):
        load_preset("pacs-light")
    with pytest.raises(ConfigError, match="does not exist"):
        load_preset(str(tmp_path / "no.yaml"))
    for text in ("- a\n- b", "train: 3", "a: [1"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"bad\.yaml"):
            load_preset(str(tmp_path / "bad.yaml"))


def test_every_option_is_listed_with_its_default():
    rows = dict(option_rows())
    assert "[7]" in rows["quantizer.bits"]
    assert len(rows) == sum(len(section) for section in Config().model_dump().values())


def test_a_start_step_means_nothing_after_training():
    obc, later = (build_config([{"quantizer": {"name": "obc", "start_step": step}}]) for step in (None, 7))
    assert config_hash(obc) == config_hash(later)
    lsq, other = (build_config([{"quantizer": {"name": "lsq", "start_step": step}}]) for step in (None, 7))
    assert config_hash(lsq) != config_hash(other)


def test_a_mapping_without_the_space_says_what_to_write():
    with pytest.raises(ConfigError, match=r"as in \{weight: 1\}"):
        parse_assignment("objective.params={weight:1}")
    assert parse_assignment("objective.params={weight: 1}") == {"objective": {"params": {"weight": 1}}}


def test_oracle_without_a_target_is_refused_before_anything_runs():
    tree = {"train": {"selection": "oracle"}}
    with pytest.raises(ConfigError, match="oracle chooses by the accuracy on the target"):
        build_config([tree])
    for data in ({"target": "sketch"}, {"target": "all"}, {"test_mode": "in-domain"}):
        assert build_config([tree, {"data": data}]).train.selection == "oracle"
