"""What several runs in one folder were asked for is remembered."""

import json
from pathlib import Path

import pytest

from qtdog.api.experiment import Members, keep_plan, read_plan
from qtdog.core.config import Config
from qtdog.core.config_io import build_config
from qtdog.core.errors import RunError


def test_a_plan_is_read_as_it_was_kept(tmp_path: Path):
    config = build_config([{"train": {"seed": 4}}])
    keep_plan(tmp_path, config, Members(3, "same", "start"))
    kept = read_plan(tmp_path)
    assert kept is not None
    assert (build_config([kept[0]]), kept[1]) == (config, Members(3, "same", "start"))


@pytest.mark.parametrize(
    ("old", "members"),
    [
        ({"members": 5, "splits": "different", "fork_at": None}, Members(5, "different", None)),
        ({"members": 2, "splits": "same", "fork_at": "40"}, Members(2, "same", "40")),
    ],
)
def test_a_plan_of_the_first_version_is_still_read(old: dict[str, object], members: Members, tmp_path: Path):
    tree = Config().model_dump(mode="json")
    (tmp_path / "plan.json").write_text(json.dumps({"config": tree, "crew": old}))
    assert read_plan(tmp_path) == (tree, members)


@pytest.mark.parametrize("text", ["{", "[]", '{"config": {}}', '{"config": {}, "crew": {"members": 2}}'])
def test_a_damaged_plan_is_an_error_that_says_what_to_do(text: str, tmp_path: Path):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(RunError, match=r"is damaged.* give the flags again"):
        read_plan(tmp_path)
    (tmp_path / "plan.json").unlink()
    assert read_plan(tmp_path) is None
