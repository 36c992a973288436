from __future__ import annotations

import pytest

from qtdog.cli.analyze import labels_of
from qtdog.runs.folder import RunFolder

FLOAT, DECAY = {"quantizer": {"name": "none"}}, {"optimizer": {"schedule": "linear"}}


@pytest.mark.parametrize(
    ("several", "names"),
    [
        (({}, FLOAT), ["erm + lsq 7 bit", "erm + float"]),
        (({}, {}, DECAY), ["erm + lsq 7 bit (a)", "erm + lsq 7 bit (b)", "erm + lsq 7 bit (schedule=linear)"]),
        (({}, {"train": {"seed": 3}}, FLOAT), ["erm + lsq 7 bit, seed 0", "erm + lsq 7 bit, seed 3", "erm + float"]),
        (({}, {"data": {"target": "0"}}), ["erm + lsq 7 bit, 75 unseen", "erm + lsq 7 bit, 0 unseen"]),
    ],
)
def test_a_run_is_called_what_tells_it_from_the_others(several, names, short_config, tmp_path):
    paths = [tmp_path / letter for letter, _ in zip("abc", several, strict=False)]
    for path, changes in zip(paths, several, strict=True):
        path.mkdir()
        RunFolder(path).claim(short_config(**changes), resume=False)
    assert labels_of(paths) == names
