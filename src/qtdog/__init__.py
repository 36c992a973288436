"""Quantization-aware training for domain generalization: train, select and save one quantized model.

    result = qtdog.train("photos/", target="hospital_c", preset="lsq-sma")     # docs/tasks/python.md
    model = qtdog.load(result.folder)
    model.predict("new-site/").table()

The names below are loaded at their first use, so that `import qtdog` (and `qtdog --help`) stays fast.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if importlib.util.find_spec("fcntl") is None:  # locks of run folders
    raise ImportError("qtdog runs on Linux and macOS; on Windows use WSL")

if TYPE_CHECKING:
    __version__: str
    import qtdog.api.analyses as analyze  # noqa: F401
    from qtdog.api.datasets import Dataset as Dataset
    from qtdog.api.notebook import RunResult as RunResult
    from qtdog.api.notebook import RunResults as RunResults
    from qtdog.api.notebook import train as train
    from qtdog.api.studies import StudyResult as StudyResult
    from qtdog.api.studies import compare as compare
    from qtdog.api.studies import sweep as sweep
    from qtdog.api.trained_model import TrainedModel as TrainedModel
    from qtdog.api.trained_model import load as load
    from qtdog.api.trained_model import load as load_any  # noqa: F401
    from qtdog.conversion.attach import attach as attach
    from qtdog.conversion.attach import attached as attached
    from qtdog.conversion.load import load_into as load_into
    from qtdog.conversion.save import save as save
    from qtdog.core.config import Config as Config
    from qtdog.core.errors import QtdogError as QtdogError
    from qtdog.core.progress import RunCallback as RunCallback
    from qtdog.core.quantized import QuantizedTensor as QuantizedTensor
    from qtdog.core.quantized import QuantSpec as QuantSpec
    from qtdog.core.registry import HyperParameter as HyperParameter
    from qtdog.models.feature_layers import FeatureLayer as FeatureLayer
    from qtdog.objectives.base import Objective as Objective
    from qtdog.quantizers.base import Quantizer as Quantizer
    from qtdog.training.averagers import Averager as Averager
    from qtdog.training.plugins import load_plugins as load_plugins
    from qtdog.training.plugins import register as register
    from qtdog.training.step_rules import StepRule as StepRule

# Name → module, or module:name where it is called otherwise there, or "module:" for the module itself.
_HOMES = {
    "Averager": "qtdog.training.averagers",
    "FeatureLayer": "qtdog.models.feature_layers",
    "HyperParameter": "qtdog.core.registry",
    "Objective": "qtdog.objectives.base",
    "Quantizer": "qtdog.quantizers.base",
    "StudyResult": "qtdog.api.studies",
    "compare": "qtdog.api.studies",
    "sweep": "qtdog.sweep",
    "StepRule": "qtdog.training.step_rules",
    "load_plugins": "qtdog.training.plugins",
    "register": "qtdog.training.plugins",
    "Config": "qtdog.core.config",
    "Dataset": "qtdog.api.datasets",
    "QtdogError": "qtdog.core.errors",
    "QuantSpec": "qtdog.core.quantized",
    "QuantizedTensor": "qtdog.core.quantized",
    "RunCallback": "qtdog.core.progress",
    "RunResult": "qtdog.api.notebook",
    "RunResults": "qtdog.api.notebook",
    "TrainedModel": "qtdog.api.trained_model",
    "analyze": "qtdog.api.analyses:",  # a module: a function for each question
    "attach": "qtdog.conversion.attach",
    "attached": "qtdog.conversion.attach",
    "load": "qtdog.api.trained_model",
    "load_any": "qtdog.api.trained_model:load",  # an earlier name
    "load_into": "qtdog.conversion.load",
    "save": "qtdog.conversion.save",
    "train": "qtdog.api.notebook",
}

__all__ = ["__version__", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def _version() -> str:
    from importlib import metadata  # takes a third of the time of `import qtdog`

    try:
        return metadata.version("qtdog")
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return "0.0.0"


def __getattr__(name: str) -> Any:
    if name == "__version__":
        globals()[name] = _version()
        return globals()[name]
    if name not in _HOMES:
        raise AttributeError(f"module 'qtdog' has no attribute '{name}'")
    module, colon, inside = _HOMES[name].partition(":")
    if name == "sweep":  # the package has the name of the function, and is called like it
        return importlib.import_module("qtdog.sweep")
    home = importlib.import_module(module)
    value = home if colon and not inside else getattr(home, inside or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
