import pytest
import torch
from torch import nn

from qtdog.conversion.attach import attach
from qtdog.training.checkpoint import flatten_optimizer, plain_names, restore_moments_, restore_optimizer_

MAKERS = {
    "adam": lambda groups: torch.optim.Adam(groups, lr=1e-2),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
    "adam-fused": lambda groups: torch.optim.Adam(groups, lr=1e-2, fused=True),
    "adam-foreach": lambda groups: torch.optim.Adam(groups, lr=1e-2, foreach=True),
}


def make(name: str) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    weight = model[0].get_parameter("weight")
    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    groups = [{"params": model[0].parameters(), "lr": 0.05}, {"params": model[2].parameters(), "weight_decay": 0.1}]
    return model, MAKERS[name](groups)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(4, 3, 3, 3)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("name", MAKERS)
def test_restored_optimizer_goes_on_bit_for_bit(name):
    model, optimizer = make(name)
    for _ in range(3):
        step(model, optimizer)
    tensors, groups = flatten_optimizer(optimizer, plain_names(model))
    saved = {key: value.clone() for key, value in tensors.items()}
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    step(model, optimizer)

    other, fresh = make(name)
    other.load_state_dict(weights)
    restore_optimizer_(fresh, plain_names(other), saved, groups)
    step(other, fresh)
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


@pytest.mark.parametrize(("fused", "place"), [(True, "meta"), (False, "cpu")])
def test_steps_are_counted_where_the_code_of_an_update_reads_them(fused, place):
    """On the device by the one kernel, on the CPU by the others, whose counts then cost no wait for a device."""
    model = nn.Linear(2, 2, device="meta")
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.param_groups[0]["fused"] = fused
    restore_moments_(
        optimizer, plain_names(model), {"weight|step": torch.tensor(3.0), "weight|exp_avg": torch.ones(2, 2)}
    )
    state = optimizer.state[model.weight]
    assert (state["step"].device.type, state["exp_avg"].device.type) == (place, "meta")


def test_moments_get_the_memory_format_of_their_parameter():
    model, optimizer = make("adam")
    step(model, optimizer)
    tensors, groups = flatten_optimizer(optimizer, plain_names(model))
    restore_optimizer_(
        optimizer, plain_names(model), {key: value.contiguous() for key, value in tensors.items()}, groups
    )
    weight = model[0].get_parameter("weight")
    assert optimizer.state[weight]["exp_avg"].stride() == weight.stride()


def test_other_groups_are_refused():
    model, optimizer = make("adam")
    with pytest.raises(ValueError, match="expected 2 parameter groups, found 1"):
        restore_optimizer_(optimizer, plain_names(model), {}, [{}])


def test_a_shared_weight_has_one_name_with_and_without_quantizers():
    plain, attached = (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(2))
    for model in (plain, attached):
        model[1].weight = model[0].weight
    attach(attached)
    names = set(plain_names(attached).values())
    assert names == set(plain_names(plain).values()) | {"0.weight@log_scale", "0.weight@set_share"}
