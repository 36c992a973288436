"""What works around an attached model: each row of the table in docs/api/attach.md is a test here."""

# attributes of modules and options that are not there are what is tested
# pyright: reportArgumentType=false, reportCallIssue=false, reportPrivateImportUsage=false

import copy
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from qtdog.conversion.attach import attach, attached
from qtdog.conversion.load import load_into
from qtdog.conversion.save import save
from qtdog.core.errors import ConfigError, ModelError


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return str(server.getsockname()[1])


def begin(rank: int, world: int, port: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    dist.init_process_group("gloo", rank=rank, world_size=world)


def one_batch(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(4, 6, generator=generator), torch.randint(3, (4,), generator=generator)


def train_ddp(rank: int, folder: Path) -> None:
    model = make()
    handle = attach(model, bits=4)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)  # step sizes take no part until enabled
    optimizer = torch.optim.Adam(handle.param_groups(lr=1e-2))
    for step in range(6):
        if step == 3:
            handle.enable()
        x, y = one_batch(rank, step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(wrapped(x), y).backward()
        optimizer.step()
    save(wrapped, folder / f"{rank}.safetensors")


def refuse_fsdp(folder: Path) -> None:
    with pytest.raises(ConfigError, match="'FSDPSequential' is sharded"):
        attach(fully_shard_(make()))
    model = make()
    handle = attach(model)
    fully_shard_(model)
    with pytest.raises(ConfigError, match="is sharded"):
        handle.enable()
    with pytest.raises(ConfigError, match="is sharded"):
        save(model, folder / "m")
    with pytest.raises(ConfigError, match="'OldStyle' is sharded"):
        attach(OldStyle(make(), device_id=torch.device("cpu")))
    (folder / "refused").touch()


class OldStyle(FullyShardedDataParallel):
    """A class of somebody's own that shards."""


def fully_shard_(model: nn.Module) -> nn.Module:
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    return model


def in_each(rank: int, port: str, folder: Path) -> None:
    """Do in each of two processes what the tests look at."""
    begin(rank, 2, port)
    train_ddp(rank, folder)
    refuse_fsdp(folder / str(rank))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    """Start two processes once for all tests, and return the folder in which they write."""
    folder = tmp_path_factory.mktemp("two")
    for rank in range(2):
        (folder / str(rank)).mkdir()
    root = str(Path(__file__).parents[2])  # the new processes import this file by its name below the root
    sys.path.insert(0, root)
    try:
        torch.multiprocessing.start_processes(in_each, args=(free_port(), folder), nprocs=2, start_method="spawn")
    finally:
        sys.path.remove(root)
    return folder


def test_ddp_of_two_processes_trains_one_model_that_is_that_of_the_joined_batch(two_processes):
    first, second = ((two_processes / f"{rank}.safetensors").read_bytes() for rank in range(2))
    assert first == second
    model = make()
    handle = attach(model, bits=4)
    optimizer = torch.optim.Adam(handle.param_groups(lr=1e-2))
    for step in range(6):
        if step == 3:
            handle.enable()
        optimizer.zero_grad()
        for rank in range(2):
            x, y = one_batch(rank, step)
            (nn.functional.cross_entropy(model(x), y) / 2).backward()
        optimizer.step()
    x = torch.randn(5, 6)
    loaded = load_into(two_processes / "0.safetensors", make())
    torch.testing.assert_close(loaded(x), model.eval()(x), rtol=0, atol=1e-4)


def test_fsdp_is_refused_before_and_after_attach(two_processes):
    assert all((two_processes / str(rank) / "refused").exists() for rank in range(2))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models_follow_enable_and_train_alike(backend):
    torch._dynamo.reset()
    x = torch.randn(4, 6)
    results = []
    for compiled in (False, True):
        model = make()
        handle = attach(model, bits=4)
        runs = torch.compile(model, backend=backend) if compiled else model
        optimizer = torch.optim.SGD(handle.param_groups(lr=1e-2))
        for step in range(4):
            if step == 2:
                handle.enable()
            optimizer.zero_grad()
            runs(x).square().mean().backward()
            optimizer.step()
        results.append(runs(x).detach())
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)


def test_gradient_checkpointing_gives_the_same_gradients():
    model, x = make(), torch.randn(4, 6)
    attach(model, bits=4).enable()
    model(x).square().mean().backward()
    expected = [value.grad.clone() for value in model.parameters() if value.grad is not None]
    model.zero_grad()
    checkpoint(model, x, use_reentrant=False).square().mean().backward()
    found = [value.grad for value in model.parameters() if value.grad is not None]
    assert len(found) == len(expected) == 6
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_transformer_encoder_answers_as_its_file(tmp_path):
    def encoder() -> nn.Module:
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)

    model, x = encoder(), torch.randn(2, 5, 16)
    attach(model, bits=4).enable()
    save(model.eval(), tmp_path / "m")
    plain = load_into(tmp_path / "m", encoder())
    assert torch.equal(plain(x), model(x))
    with torch.no_grad():  # torch's fused kernel, for plain encoders alone
        torch.testing.assert_close(plain(x), model(x), rtol=0, atol=1e-5)


def test_functional_calls_and_their_vectorised_ensembles():
    model, other, x = make(), make(), torch.randn(4, 6)
    with torch.no_grad():
        other[0].bias.add_(1)
    for one in (model, other):
        attach(one, bits=4).enable()
        one.eval()
    assert torch.equal(torch.func.functional_call(model, dict(other.named_parameters()), (x,)), other(x))
    latent = {name: value for name, value in model.named_parameters() if value.requires_grad}
    loss = lambda p: torch.func.functional_call(model, p, (x,)).square().mean()  # noqa: E731
    gradients = torch.func.grad(loss)(latent)
    model(x).square().mean().backward()
    for name, value in latent.items():
        torch.testing.assert_close(gradients[name], value.grad, rtol=1e-4, atol=1e-6)
    parameters, buffers = torch.func.stack_module_state([model, other])
    call = lambda p, b: torch.func.functional_call(model, (p, b), (x,))  # noqa: E731
    torch.testing.assert_close(
        torch.stack([model(x), other(x)]), torch.vmap(call)(parameters, buffers), rtol=0, atol=1e-5
    )


def test_a_copy_in_another_process_form_is_saved_as_the_model_inside(tmp_path):
    model, x = make(), torch.randn(4, 6)
    attach(model, bits=4).enable()
    expected = model.eval()(x)
    wrappers = [AveragedModel(model), ModelEmaV3(model), nn.DataParallel(model), torch.compile(model)]
    for index, wrapper in enumerate([*wrappers, AveragedModel(torch.compile(model))]):
        save(wrapper, tmp_path / str(index))
        assert torch.equal(load_into(tmp_path / str(index), make())(x), expected)


@pytest.mark.parametrize("names", [("module",), ("_orig_mod",), ("module", "_orig_mod"), ("other",)])
def test_prefixes_of_unknown_wrappers_are_dropped_or_named(tmp_path, names):
    model, x = make(), torch.randn(4, 6)
    attach(model, bits=4).enable()
    wrapped = model
    for name in names:
        outer = nn.Module()
        outer.add_module(name, wrapped)
        wrapped = outer
    save(wrapped, tmp_path / "m")
    if "other" in names:
        with pytest.raises(ModelError, match="is not in the model"):
            load_into(tmp_path / "m", make())
    elif names == ("module",):
        assert torch.equal(load_into(tmp_path / "m", make())(x), model.eval()(x))
        with pytest.raises(ModelError, match="prefix module"):
            load_into(tmp_path / "m", nn.Linear(6, 8))
        save(model, tmp_path / "m")
        with pytest.raises(ModelError, match="prefix module"):
            load_into(tmp_path / "m", nn.DataParallel(make()))


@pytest.mark.parametrize("enabled", [False, True])
def test_export_of_an_attached_model_says_what_to_export(enabled):
    model = make()
    handle = attach(model, bits=4)
    if enabled:
        handle.enable()
    x = torch.randn(4, 6)
    exports = [
        lambda: torch.export.export(model.eval(), (x,)),
        lambda: torch.onnx.export(model.eval(), (x,), dynamo=True, verbose=False),
    ]
    for run in exports:
        with pytest.raises(ModelError, match="load the file into a plain model"):
            run()
    twin = copy.deepcopy(model)
    assert attached(twin).enabled is enabled
