"""float16: what small gradients become, that nobody sees the scale, and what an overflow leaves as it was."""

import pytest
import torch
from torch import nn

from qtdog.core.errors import ConfigError, Interrupted, NonFiniteLossError
from qtdog.core.progress import StopAfter
from qtdog.objectives.base import OBJECTIVES
from qtdog.runs.folder import RunFolder
from qtdog.training import loss_scale
from qtdog.training.build import build_components
from qtdog.training.loop import begin_step, update
from qtdog.training.loss_scale import FIRST, GROWS_AFTER, GradientOverflow, LossScale
from qtdog.training.protocol import resolve
from qtdog.training.run import RunCallbacks, run, train_fork_point
from qtdog.training.step_rules import STEP_RULES

TINY_LOSS = 1e-8


def small_loss(layer, images, factor, halves=torch.float16):
    def pass_over():
        with torch.autocast("cpu", halves, enabled=halves != torch.float32):
            loss = layer(images).float().sum() * TINY_LOSS
        (loss * factor).backward()
        return loss.detach()

    return pass_over


def test_gradients_that_float16_flushes_to_zero_are_there():
    torch.manual_seed(0)
    layer, images, scale = nn.Linear(8, 2), torch.randn(4, 8), LossScale()
    small_loss(layer, images, 1.0, torch.float32)()
    expected, layer.weight.grad = layer.weight.grad, None
    small_loss(layer, images, 1.0)()
    assert layer.weight.grad is not None
    assert not layer.weight.grad.any()
    layer.zero_grad()
    scale.add_gradients(list(layer.parameters()), small_loss(layer, images, scale.factor))
    torch.testing.assert_close(layer.weight.grad, expected, rtol=0.01, atol=0)


def test_the_scale_falls_at_an_overflow_and_grows_after_many_updates_without():
    scale, weight = LossScale(), nn.Parameter(torch.ones(2))

    def infinite():
        weight.grad = torch.tensor([1.0, torch.inf])
        return torch.tensor(0.25)

    with pytest.raises(GradientOverflow) as found:
        scale.add_gradients([weight], infinite)
    assert found.value.loss == 0.25
    assert scale.factor == FIRST / 2
    for _ in range(GROWS_AFTER - 1):
        scale.after_update()
    assert scale.factor == FIRST / 2
    scale.after_update()
    assert (scale.factor, scale.n_clean) == (FIRST, 0)


def first_update(config, digits):
    """Return the gradients of the weights in the first update, joined."""
    parts = build_components(config, digits)
    parts.network.train()
    begin_step(parts, 0)
    update(parts, parts.batches.batch(0), 0)
    gradients = [weight.grad for weight in parts.network.parameters() if weight.ndim > 1]
    return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


@pytest.mark.parametrize("rule", sorted(STEP_RULES))
@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_are_those_of_float32_but_for_rounding(short_config, three_digits, rule, accumulate):
    """A rule that divides by the norm of a gradient, or adds two, would go elsewhere if it saw the scale."""
    step_rule = {"name": rule} if rule == "plain" else {"name": rule, "params": {"rho": 0.5}}
    found = {
        name: first_update(
            short_config(step_rule=own, train={"steps": 6, "accumulate": accumulate, "precision": precision}),
            three_digits,
        )
        for name, own, precision in (
            ("float32", step_rule, "fp32"),
            ("float16", step_rule, "fp16"),
            ("plain", {"name": "plain"}, "fp32"),
        )
    }
    off = (found["float16"] - found["float32"]).norm() / found["float32"].norm()
    assert 0 < off < 0.08
    if rule != "plain":
        assert off < 0.1 * (found["plain"] - found["float32"]).norm() / found["float32"].norm()


def test_an_update_that_overflows_changes_nothing(short_config, three_digits, monkeypatch):
    monkeypatch.setattr(loss_scale, "FIRST", 2.0**80)
    parts = build_components(short_config(train={"steps": 6, "precision": "fp16"}), three_digits)
    parts.network.train()
    before = {name: value.clone() for name, value in parts.network.state_dict().items()}
    begin_step(parts, 0)
    loss = update(parts, parts.batches.batch(0), 0)
    assert torch.isfinite(loss)
    assert all(torch.equal(value, before[name]) for name, value in parts.network.state_dict().items())
    assert not parts.optimizer.state
    assert parts.loss_scale is not None
    assert parts.loss_scale.factor == 2.0**79


def test_gradients_that_overflow_without_a_scale_are_an_error(short_config, three_digits):
    parts = build_components(short_config(train={"steps": 6, "precision": "fp16"}), three_digits)
    parts.network.train()
    assert parts.loss_scale is not None
    parts.loss_scale.factor.fill_(1.0)
    parts.network.classifier.weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(NonFiniteLossError, match=r"step 1 without any scale.*precision=bf16"):
        update(parts, parts.batches.batch(0), 0)


def test_a_loss_that_is_not_finite_is_told_as_such(short_config, three_digits, monkeypatch):
    """Where no update reads its loss, as on a GPU, the overflow that it makes is the first that is seen."""
    parts = build_components(short_config(train={"steps": 6, "precision": "fp16"}), three_digits)

    def overflow(parameters, pass_over):
        raise GradientOverflow(torch.tensor(torch.nan))

    monkeypatch.setattr(parts.loss_scale, "add_gradients", overflow)
    with pytest.raises(NonFiniteLossError, match="loss became nan at step 1"):
        update(parts, parts.batches.batch(0), 0)


def test_the_scale_is_resumed_and_forked(short_config, three_digits, tmp_path, monkeypatch):
    monkeypatch.setattr(loss_scale, "FIRST", 2.0**20)  # overflows a few times
    plan = {"steps": 8, "eval_every": 4, "checkpoint_every": 1, "precision": "fp16"}
    config = resolve(short_config(train=plan, quantizer={"start_step": 4}), three_digits)
    whole, broken, forked = (RunFolder(tmp_path / name) for name in ("whole", "broken", "forked"))
    expected = run(config, three_digits, whole)["model_sha256"]
    with pytest.raises(Interrupted):
        run(config, three_digits, broken, callbacks=RunCallbacks(StopAfter(3)))
    assert run(config, three_digits, broken, resume=True)["model_sha256"] == expected
    point = train_fork_point(config, three_digits, RunFolder(tmp_path / "point"))
    assert float(point.tensors["objective"]["loss_scale.factor"]) < 2.0**20
    assert run(config, three_digits, forked, fork_from=point)["model_sha256"] == expected


def test_objectives_that_take_gradients_through_the_network_are_refused(short_config, digits):
    own = [name for name in OBJECTIVES if OBJECTIVES[name].OWN_GRADIENTS]
    assert own == ["ccfp"]
    with pytest.raises(ConfigError, match="'ccfp' takes gradients"):
        build_components(short_config(objective={"name": "ccfp"}, train={"precision": "fp16"}), digits)
