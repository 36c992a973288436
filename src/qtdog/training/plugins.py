"""Plug-ins: members of an axis that come from outside the package: a file, an installed package, a notebook.

    @qtdog.register("objective", "max-min")
    class MaxMin(qtdog.Objective):
        def loss(self, domains): ...

A plug-in is code, so only its user makes it run: `--plugin FILE.py`, `plugins: [FILE.py]` in a study or a preset file,
`qtdog.train(plugins=[...])`, or an installed package with an entry point `qtdog.plugins`. What a run folder or a model
file says of plug-ins is compared, never run.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Protocol, TypeVar

from qtdog.core.config import Config, PluginsConfig
from qtdog.core.errors import ConfigError, QtdogError, unknown
from qtdog.core.files import write_atomic
from qtdog.core.registry import Registry
from qtdog.data.augment import AUGMENTATIONS
from qtdog.data.open import OWN_DATASETS
from qtdog.models.feature_layers import FEATURE_LAYERS
from qtdog.models.network import OWN_BACKBONES
from qtdog.objectives.base import OBJECTIVES
from qtdog.quantizers.base import Quantizer
from qtdog.quantizers.registry import QUANTIZERS, QuantizerKind
from qtdog.training.averagers import AVERAGERS
from qtdog.training.step_rules import STEP_RULES

Member = TypeVar("Member")
ENTRY_POINTS = "qtdog.plugins"
MAX_BYTES = 4 * 1024**2  # of a plug-in file
AXES: dict[str, Registry[Any]] = {
    "augmentation": AUGMENTATIONS,
    "averager": AVERAGERS,
    "backbone": OWN_BACKBONES,
    "dataset": OWN_DATASETS,
    "feature-layer": FEATURE_LAYERS,
    "objective": OBJECTIVES,
    "quantizer": QUANTIZERS,
    "step-rule": STEP_RULES,
}


@dataclass(frozen=True)
class Plugin:
    """A piece of code that enters members.

    Attributes:
        name: of the file, or what else it came from.
        sha256: of its text.
        text: the source; "" if it is not known.
        path: of the file; "" for one that is no file of the user.
    """

    name: str
    sha256: str
    text: str = field(default="", repr=False)
    path: str = ""


_loaded: dict[str, Plugin] = {}  # by sha256
_origins: dict[tuple[str, str], Plugin] = {}  # by axis and name of the member
_entered: dict[str, set[tuple[str, str]]] = {}  # by sha256: axis and name of each member that it entered
_named: list[Plugin] = []  # for all runs of this process: `--plugin`
_loading: ContextVar[Plugin | None] = ContextVar("loading", default=None)
_entry_points_loaded = False


def register(axis: str, name: str) -> Callable[[Member], Member]:
    """Return a decorator that enters a class or function as a member of an axis.

    Args:
        axis: "objective" (a subclass of `qtdog.Objective`), "quantizer" (`qtdog.Quantizer`), "averager"
            (`qtdog.Averager`), "step-rule" (`qtdog.StepRule`), "feature-layer" (`qtdog.FeatureLayer`), "backbone" (a
            function (channels, image_size) → `nn.Module` that maps images (n, channels, size, size) in [0, 1] to
            features (n, d)), "augmentation" (a function (images uint8 (n, H, W, C), generator) → the same), "dataset"
            (a function () → `qtdog.Dataset`).
        name: as `--objective` and its kin take it. It may replace that of an earlier plug-in, never a built-in one.

    Raises:
        ConfigError: an unknown axis, with the nearest one, or the name of a built-in member.

    Example:
        >>> @register("averager", "example-of-the-docs")
        ... class Last(AVERAGERS["none"]):
        ...     pass
        >>> AVERAGERS["example-of-the-docs"].__name__
        'Last'
    """
    axis = axis.replace("_", "-")
    if axis not in AXES:
        raise ConfigError(unknown("axis of a plug-in", axis, AXES))

    def enter(member: Member) -> Member:
        plugin = _loading.get() or _of_python(member)
        given: Any = member
        entered = given
        if axis == "quantizer" and isinstance(given, type) and issubclass(given, Quantizer):
            make: Any = given
            about = (inspect.getdoc(given) or "").partition("\n")[0]
            entered = QuantizerKind(make, about, frozenset(getattr(member, "READS", ())))
        AXES[axis].add_foreign(name, entered)
        _origins[axis, name] = plugin
        _entered.setdefault(plugin.sha256, set()).add((axis, name))
        return member

    return enter


def _of_python(member: Any) -> Plugin:
    try:
        text = inspect.getsource(member)
    except (OSError, TypeError):  # typed in at the prompt
        text = f"{member.__module__}.{member.__qualname__}"
    return Plugin(f"{member.__module__}.{member.__qualname__}", hashlib.sha256(text.encode()).hexdigest(), text)


def load_plugins(paths: Sequence[str | Path]) -> list[Plugin]:
    """Run plug-in files, each content once, and return what they are.

    Raises:
        ConfigError: no such file, or it failed; the text names file and line.
    """
    return [load_plugin_text(str(path), _read(Path(path).expanduser())) for path in paths]


def _read(path: Path) -> str:
    if path.suffix != ".py" or not path.is_file():
        raise ConfigError(f"plug-in {path} is not a Python file; give --plugin FILE.py")
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(f"plug-in {path} has {path.stat().st_size:,} bytes: no plug-in is that long")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"plug-in {path} cannot be read: {error}") from error


def load_plugin_text(path: str, text: str) -> Plugin:
    """Run the text of a plug-in file, unless its members are those of this process now, and return what it is.

    Raises:
        ConfigError: it failed; the text names file and line.
    """
    digest = hashlib.sha256(text.encode()).hexdigest()
    if digest in _loaded and all(_origins[key].sha256 == digest for key in _entered.get(digest, ())):
        return _loaded[digest]
    where = Path(path).expanduser().absolute()
    plugin = Plugin(where.name, digest, text, str(where))
    module = types.ModuleType(f"qtdog_plugin_{digest[:12]}")
    module.__file__ = plugin.path
    sys.modules[module.__name__] = module  # dataclasses, pickle and inspect look a class's module up
    token = _loading.set(plugin)
    try:
        exec(compile(text, plugin.path, "exec"), module.__dict__)
    except QtdogError as error:
        del sys.modules[module.__name__]
        raise ConfigError(f"plug-in {path}: {error}") from error
    except Exception as error:
        del sys.modules[module.__name__]
        raise ConfigError(f"plug-in {path} failed{_line_of(error, plugin.path)}: {error!r}") from error
    finally:
        _loading.reset(token)
    _loaded[digest] = plugin
    return plugin


def _line_of(error: Exception, path: str) -> str:
    line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == path:
            line = trace.tb_lineno
        trace = trace.tb_next
    return f" in line {line}" if line else ""


def place_in_plugin(error: BaseException) -> str:
    """Return where in a plug-in an error arose, like "plug-in my_loss.py, line 5"; "" if it arose in none."""
    trace, place = error.__traceback__, ""
    names = {plugin.path: plugin.name for plugin in _loaded.values()}
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if file in names:
            place = f"plug-in {names[file]}, line {trace.tb_lineno}"
        trace = trace.tb_next
    return place


def name_plugins(paths: Sequence[str | Path]) -> None:
    """Run plug-in files for all further runs of this process (`--plugin`), instead of those that were named before.

    Raises:
        ConfigError: as in `load_plugins`.
    """
    _named[:] = list(dict.fromkeys(load_plugins(paths)))


def forget_plugins() -> None:
    """Remove every plug-in from this process: from its axes, and from what further runs name."""
    for registry in AXES.values():
        registry.remove_foreign()
    for known in (_loaded, _origins, _entered, _named):
        known.clear()


def named_plugins(more: Sequence[Plugin] = ()) -> list[Plugin]:
    """Return the plug-ins that are named for all runs of this process, and `more`, each once."""
    return list(dict.fromkeys([*_named, *more]))


class EntryPoint(Protocol):
    """What is read of an entry point of an installed package (`importlib.metadata.EntryPoint`)."""

    value: str
    module: str
    dist: Any

    def load(self) -> Any:
        """Import what it names."""
        ...


def load_entry_points(points: Iterable[EntryPoint] | None = None) -> None:
    """Run the plug-ins of installed packages.

    Args:
        points: some entry points; None for those of all installed packages, once in a process.

    Raises:
        ConfigError: one failed; the text names its package.
    """
    global _entry_points_loaded
    if points is None:
        if _entry_points_loaded:
            return
        _entry_points_loaded = True
    for point in metadata.entry_points(group=ENTRY_POINTS) if points is None else points:
        about = f"{point.dist.name} {point.dist.version}" if point.dist else point.value
        try:
            module = import_module(point.module)
            text = inspect.getsource(module)
            plugin = Plugin(about, hashlib.sha256(text.encode()).hexdigest())
            token = _loading.set(plugin)
            try:
                point.load()
            finally:
                _loading.reset(token)
        except Exception as error:
            raise ConfigError(f"the plug-in of package {about} failed: {error!r}") from error
        for key, origin in _origins.items():  # entered while its module was imported
            if origin.name.startswith(f"{point.module}."):
                _origins[key] = plugin


def plugins_of(config: Config, named: Sequence[Plugin] = ()) -> list[Plugin]:
    """Return the plug-ins of a run: those that were named, and those whose members its configuration uses."""
    load_entry_points()
    used = [_origins[item] for item in _members(config) if item in _origins]
    found = {plugin.sha256: plugin for plugin in [*_named, *named, *used]}
    return [found[digest] for digest in sorted(found)]


def check_reachable(configs: Iterable[Config]) -> None:
    """Refuse members that were registered in Python, in a notebook say: no other process has them.

    Raises:
        ConfigError: naming the member and the remedy.
    """
    for axis, name in dict.fromkeys(member for config in configs for member in _members(config)):
        plugin = _origins.get((axis, name))
        if plugin is not None and plugin.text and not plugin.path:  # that of an installed package has no text
            raise ConfigError(
                f"{axis} '{name}' was registered in Python ({plugin.name}), so the processes that make the runs of a "
                "study do not have it: save it to a file and name it, plugins=['FILE.py'], or in the study "
                "'plugins: [FILE.py]'"
            )


def _members(config: Config) -> list[tuple[str, str]]:
    """Return axis and name of each member that a configuration uses."""
    chosen = {
        "augmentation": config.data.augment,
        "averager": config.averager.name,
        "backbone": config.model.backbone,
        "dataset": config.data.source,
        "feature-layer": config.model.feature_layer,
        "objective": config.objective.name,
        "quantizer": config.quantizer.name,
        "step-rule": config.step_rule.name,
    }
    return list(chosen.items())


def with_plugins(config: Config, named: Sequence[Plugin] = ()) -> Config:
    """Return the configuration with the plug-ins that it uses recorded; as it is without any.

    Raises:
        ConfigError: it was made with a plug-in that nobody named, or with another version of one.
    """
    found = plugins_of(config, named)
    missing = [
        (name, digest)
        for name, digest in zip(config.plugins.files, config.plugins.sha256, strict=True)
        if digest not in {plugin.sha256 for plugin in found}
    ]
    if missing:
        name, digest = missing[0]
        file = Path(name).name
        other = next((plugin for plugin in found if plugin.name == file), None)
        if other is not None:
            text = f"the plug-in {file} changed since this configuration was made ({digest[:12]} → {other.sha256[:12]})"
            raise ConfigError(f"{text}: that is another configuration. Start a new run")
        raise ConfigError(
            f"this run was made with the plug-in {name} ({digest[:12]}); if you trust it, name it: --plugin {file}"
        )
    if not found:
        return config
    files = tuple(plugin.path or plugin.name for plugin in found)
    recorded = PluginsConfig(files=files, sha256=tuple(plugin.sha256 for plugin in found))
    return config.model_copy(update={"plugins": recorded})


def keep_plugins(config: Config, folder: Path) -> None:
    """Write a copy of each plug-in of a configuration to `plugins/` in its run folder, to be read, never to be run."""
    for digest in config.plugins.sha256:
        plugin = next((one for one in [*_loaded.values(), *_origins.values()] if one.sha256 == digest), None)
        if plugin is not None and plugin.text:
            name = plugin.name if plugin.name.endswith(".py") else f"{plugin.name}.py"
            write_atomic(folder / "plugins" / f"{digest[:12]}-{name}", plugin.text)


def origin_of(axis: str, name: str) -> Plugin | None:
    """Return the plug-in that entered a member of an axis; None for a built-in one."""
    return _origins.get((axis, name))


def member_origins() -> dict[tuple[str, str], str]:
    """Return where each member that is not built in came from, by axis and name."""
    return {key: plugin.name for key, plugin in _origins.items()}
