"""The feature layers by name, as the configuration spells them."""

from __future__ import annotations

from collections.abc import Mapping

from qtdog.core.registry import Registry, Value
from qtdog.models.context import ContextLayer
from qtdog.models.feature_layer import FeatureLayer, NoFeatureLayer
from qtdog.models.mixstyle import MixStyle

FEATURE_LAYERS: Registry[type[FeatureLayer]] = Registry("feature layer")
FEATURE_LAYERS.add("none", NoFeatureLayer)
FEATURE_LAYERS.add("mixstyle", MixStyle)
FEATURE_LAYERS.add("context", ContextLayer)


def make_feature_layer(name: str, params: Mapping[str, Value]) -> FeatureLayer:
    """Return the feature layer of that name, not yet in a network.

    Raises:
        ConfigError: an unknown name (with the nearest match), hyper-parameter or value.

    Example:
        >>> make_feature_layer("mixstyle", {"p": 0.3}).params
        {'p': 0.3, 'alpha': 0.1, 'n_stages': 3}
    """
    return FEATURE_LAYERS[name](name, params)
