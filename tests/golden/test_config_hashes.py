"""The hash of every preset and of every method of every study stays what it was: the hash names the run folder.

`configuration_hashes.json` was written with `python tests/golden/test_config_hashes.py`. A hash changes only on
purpose, and then the reason stands in the commit.
"""

import json
from pathlib import Path
from typing import Any

import yaml

from qtdog.core.config import config_hash
from qtdog.core.config_io import build_config, load_preset, preset_names

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KNOWN = HERE / "configuration_hashes.json"


def layers(part: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the layers that a part of a study (its base, or a method) puts on top of each other."""
    trees = [load_preset(name) for name in part.get("presets", ())]
    for key, value in part.get("set", {}).items():
        section, _, name = key.partition(".")
        trees.append({section: {name: value}})
    return trees


def study_hashes(path: Path) -> dict[str, str]:
    """Return the hash of each method of a study, before the grid and the content of the data are filled in."""
    study = yaml.safe_load(path.read_text())
    base = layers(study.get("base", {}))
    return {
        f"{path.name}: {method}": config_hash(build_config([*base, *layers(part)]))
        for method, part in study["methods"].items()
    }


def all_hashes() -> dict[str, str]:
    """Return the hash of every preset and every method of every study, by name."""
    found = {name: config_hash(build_config([load_preset(name)])) for name in preset_names()}
    for path in sorted((ROOT / "studies").glob("*.yaml")):
        found |= study_hashes(path)
    return found


def test_no_configuration_hash_changed():
    known, found = json.loads(KNOWN.read_text()), all_hashes()
    assert {name: found.get(name) for name in known} == known


def test_every_preset_and_study_is_recorded():
    assert all_hashes().keys() == json.loads(KNOWN.read_text()).keys()


if __name__ == "__main__":
    KNOWN.write_text(json.dumps(all_hashes(), indent=1, sort_keys=True) + "\n")
