"""Many runs from one study file, on one machine or many."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any


class _SweepPackage(types.ModuleType):
    """This package, which `qtdog.sweep("study.yaml")` calls: package and function have one name."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        # by name: the function stands above this package, which must not depend on it
        return importlib.import_module("qtdog.api.studies").sweep(*args, **options)


sys.modules[__name__].__class__ = _SweepPackage
