"""Where data sets that are known by name lie."""

from __future__ import annotations

import os
from pathlib import Path


def data_home() -> Path:
    """Return the data home: $QTDOG_DATA, else $XDG_DATA_HOME/qtdog, else ~/.local/share/qtdog."""
    own = os.environ.get("QTDOG_DATA")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "qtdog"
