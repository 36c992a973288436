import pytest

from qtdog.core.errors import ConfigError, nearest
from qtdog.core.registry import Registry


def test_unknown_name_gives_the_nearest_match():
    registry = Registry[int]("objective")
    registry.add("coral", 1)
    registry.add("erm", 2)
    with pytest.raises(ConfigError, match=r"unknown objective 'corall'; did you mean 'coral'\? Known: coral, erm"):
        registry["corall"]


def test_a_name_is_taken_once():
    registry = Registry[int]("objective")
    registry.register("erm")(1)
    with pytest.raises(ValueError, match="twice"):
        registry.add("erm", 2)


def test_names_are_sorted_and_case_is_forgiven_in_hints():
    registry = Registry[int]("x")
    for name in ("b", "a"):
        registry.add(name, 0)
    assert list(registry) == ["a", "b"]
    assert nearest("ResNet50", ["resnet50", "vit"]) == "resnet50"
    assert nearest("zzzz", ["resnet50"]) is None
