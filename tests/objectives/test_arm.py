import pytest
import torch
from torch.nn.functional import cross_entropy

from qtdog.core.errors import ConfigError
from qtdog.data.digits import RotatedDigits
from qtdog.models.backbones import create_network
from qtdog.objectives.arm import ARM
from qtdog.objectives.base import DomainBatch, ModelView, ObjectiveSetting
from qtdog.training.build import build_components
from qtdog.training.components import Trainable
from qtdog.training.protocol import resolve

SIZES = (4, 6, 2)


@pytest.fixture
def network():
    options = {"n_classes": 3, "channels": 1, "image_size": 8, "weights": "none", "freeze_bn": True, "seed": 0}
    # evaluation mode, so that batch norm does not join what the contexts keep apart
    return create_network("digits_cnn", feature_layer="context", feature_params={"width": 4}, **options).double().eval()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(sum(SIZES), 1, 8, 8, dtype=torch.float64, generator=generator)
    return DomainBatch(images, torch.randint(3, (sum(SIZES),), generator=generator), SIZES)


def loss(network, batch):
    return ARM(ObjectiveSetting(3, 3, 32, 4, network), {})(ModelView(Trainable(network), network), batch)


def test_the_loss_is_that_of_every_domain_with_its_own_context(network, batch):
    logits = torch.cat([network(images) for images, _ in batch.split()])
    torch.testing.assert_close(loss(network, batch), cross_entropy(logits, batch.labels))
    assert not torch.isclose(loss(network, batch), cross_entropy(network(batch.images), batch.labels))


def test_the_gradient_reaches_the_context_network(network, batch):
    loss(network, batch).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
    assert network.context.layers[0].weight.grad.abs().sum() > 0


def test_without_a_context_it_is_refused():
    plain = create_network("digits_cnn", n_classes=3, channels=1, image_size=8, weights="none", freeze_bn=True, seed=0)
    with pytest.raises(ConfigError, match=r"this network has none: add --set model\.feature_layer=context"):
        ARM(ObjectiveSetting(3, 3, 32, 4, plain), {})


@pytest.mark.parametrize(
    ("objective", "layer", "message"),
    [
        ("arm", "none", r"add --set model\.feature_layer=context"),
        ("arm", "mixstyle", r"add --set model\.feature_layer=context"),
        ("erm", "context", "'context' makes no sense with objective 'erm': it is for arm. Add --objective arm"),
        ("erm", "mixstile", "unknown feature layer 'mixstile'; did you mean 'mixstyle'"),
    ],
)
def test_names_that_do_not_go_together_are_refused(short_config, objective, layer, message):
    digits = RotatedDigits()
    config = resolve(short_config(objective={"name": objective}, model={"feature_layer": layer}), digits)
    with pytest.raises(ConfigError, match=message):
        build_components(config, digits)
