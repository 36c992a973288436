# pyright: reportIndexIssue=false

import pytest
import torch
from torch import nn

from qtdog.core.errors import ModelError
from qtdog.export.executorch_int8 import clip_observers_, integer_networks
from qtdog.export.runtimes import open_runtime


@pytest.mark.filterwarnings("ignore")
def test_executorch_in_integers_is_small_and_answers_alike(exported, photos):
    pytest.importorskip("executorch")
    made = exported("test_resnet", "executorch-int8", n_calibration=16)
    n_integer, n_products = made.info.integer_products
    assert n_integer == n_products - 1 > 5  # the classifier stays float
    assert made.info.notes == ()
    assert made.parity.agreement_frac > 0.85
    assert made.n_bytes < 0.5 * exported("test_resnet", "executorch").n_bytes
    assert open_runtime(made.path)(photos.pixels[:3])["logits"].shape == (3, 3)


@pytest.mark.filterwarnings("ignore")
def test_executorch_gets_the_very_codes_of_the_packed_file(source, photos):
    pytest.importorskip("executorch")
    packed = source("test_resnet")
    (network,), rounded, (n_integer, _) = integer_networks(packed, photos.pixels[:2])
    stored = [value.codes.abs() for value in packed.codes().values()]  # batch norm may turn a channel's sign
    held = [value.abs() for value in network.state_dict().values() if value.dtype == torch.int8 and value.dim() > 1]
    assert not rounded
    assert len(held) == n_integer == len(stored)
    for one in held:
        left = one.flatten(1).any(1)  # batch norm of these models sets a channel to zero
        assert left.sum() >= len(left) - 1
        assert any(one.shape == other.shape and torch.equal(one[left], other[left]) for other in stored)


def test_executorch_in_integers_refuses_rounding_that_was_trained(source, photos):
    with pytest.raises(ModelError, match="rounds activations as trained, which the format 'executorch-int8'"):
        integer_networks(source("test_resnet", activations=6), photos.pixels[:2])


class Observer(nn.Identity):
    bounds = None


class Clipped(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third, self.fourth = (Observer() for _ in range(4))

    def forward(self, x):
        x = torch.ops.aten.hardtanh.default(self.first(x), 0.0, 6.0)
        x = torch.ops.aten.relu6.default(self.second(x))
        x = torch.ops.aten.hardtanh.default(self.third(x))
        x = self.fourth(x)
        return torch.ops.aten.hardtanh.default(x, 0.0, 6.0) + x


def test_what_is_only_clipped_afterwards_needs_no_wider_range():
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m, module_qualified_name):
            return isinstance(m, Observer)

    network = Clipped()
    graph = torch.fx.GraphModule(network, Tracer().trace(network))
    assert clip_observers_(graph, Observer) == 3
    found = [getattr(graph, name).bounds for name in ("first", "second", "third", "fourth")]
    assert found == [(0.0, 6.0), (0.0, 6.0), (-1.0, 1.0), None]  # the last one is read unclipped too
