import json
import os

import pytest
import torch
from safetensors.torch import save_file

from qtdog.core.errors import FormatError, RunError
from qtdog.training.checkpoint import (
    Checkpoint,
    checkpoint_folders,
    latest_checkpoint,
    put_aside_broken,
    read_checkpoint,
    warn_of_threads,
    write_checkpoint,
)


def sample(step: int) -> Checkpoint:
    tensors = {"network": {"w": torch.arange(6.0).reshape(2, 3) + step}, "optimizer": {"0.step": torch.tensor(step)}}
    return Checkpoint(step, tensors, {"lines": [{"step": step}], "loss_sum": 0.1})


def test_round_trip_is_exact(tmp_path):
    back = read_checkpoint(write_checkpoint(tmp_path, sample(7)))
    assert (back.step, back.state) == (7, sample(7).state)
    assert torch.equal(back.tensors["network"]["w"], sample(7).tensors["network"]["w"])


def test_the_last_two_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        write_checkpoint(tmp_path, sample(step))
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["step-00000003", "step-00000010"]


def test_same_step_again_replaces(tmp_path):
    write_checkpoint(tmp_path, sample(1))
    again = Checkpoint(1, {}, {"other": True})
    write_checkpoint(tmp_path, again)
    found = latest_checkpoint(tmp_path, print)
    assert found is not None
    assert found.state == {"other": True}


def test_same_step_again_keeps_the_old_one_if_it_cannot_be_written(tmp_path):
    write_checkpoint(tmp_path, sample(1))
    broken = Checkpoint(1, {"network": {"w": "no tensor"}}, {})  # pyright: ignore[reportArgumentType]
    with pytest.raises(AttributeError):
        write_checkpoint(tmp_path, broken)
    found = latest_checkpoint(tmp_path, print)
    assert found is not None
    assert found.state == sample(1).state


def test_a_full_disk_names_the_place_and_keeps_what_was_there(tmp_path):
    def full(tensors, file):
        if file.name == "optimizer.safetensors":
            raise OSError(28, "No space left on device")
        save_file(tensors, file)

    write_checkpoint(tmp_path, sample(2))
    with pytest.raises(RunError, match=r"step-00000004.*the disk is full.*--resume"):
        write_checkpoint(tmp_path, sample(4), save=full)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    found = latest_checkpoint(tmp_path, print)
    assert found is not None
    assert found.step == 2


@pytest.mark.parametrize("name", ["network.safetensors", "optimizer.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_broken_one_is_named_and_the_one_before_is_used(tmp_path, name, damage):
    write_checkpoint(tmp_path, sample(1))
    file = write_checkpoint(tmp_path, sample(2)) / name
    content = bytearray(file.read_bytes())
    if damage == "truncate":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[-3] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    warnings: list[str] = []
    found = latest_checkpoint(tmp_path, warnings.append)
    assert found is not None
    assert found.step == 1
    assert "step-00000002 is broken" in warnings[0]


def test_no_whole_checkpoint_is_none(tmp_path):
    assert latest_checkpoint(tmp_path, print) is None
    (write_checkpoint(tmp_path, sample(1)) / "checkpoint.json").write_text("[]")
    warnings: list[str] = []
    assert latest_checkpoint(tmp_path, warnings.append) is None
    assert len(warnings) == 1


def test_altered_numbers_in_the_json_are_noticed(tmp_path):
    file = write_checkpoint(tmp_path, sample(4)) / "checkpoint.json"
    document = json.loads(file.read_text())
    document["body"]["step"] = 5
    file.write_text(json.dumps(document))
    with pytest.raises(FormatError, match="checksum"):
        read_checkpoint(file.parent)


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path):
    folder = write_checkpoint(tmp_path, sample(1))
    assert {file.suffix for file in folder.iterdir()} == {".safetensors", ".json"}


def test_a_weight_of_two_names_comes_back_under_both(tmp_path):
    weight = torch.arange(6.0).reshape(2, 3)
    tensors = {"encoder.weight": weight, "decoder.weight": weight, "part": weight[1], "none": torch.zeros(0)}
    back = read_checkpoint(write_checkpoint(tmp_path, Checkpoint(1, {"network": tensors}, {})))
    assert back.tensors["network"].keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(back.tensors["network"][name], value), name


def test_broken_ones_do_not_push_out_new_whole_ones(tmp_path):
    for step in (100, 200):
        (write_checkpoint(tmp_path, sample(step)) / "network.safetensors").write_bytes(b"")
    assert latest_checkpoint(tmp_path, lambda text: None) is None
    put_aside_broken(tmp_path, None)
    for step in (60, 120, 130):
        write_checkpoint(tmp_path, sample(step))
        newest = latest_checkpoint(tmp_path, pytest.fail)
        assert newest is not None
        assert newest.step == step
        there = sorted(path.name for path in tmp_path.iterdir())
        aside = ["broken-step-00000100", "broken-step-00000200"]
        assert there[:2] == aside if step == 60 else all(name.startswith("step-") for name in there)
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["step-00000120", "step-00000130"]


def test_a_whole_one_before_a_broken_one_is_kept(tmp_path):
    write_checkpoint(tmp_path, sample(40))
    (write_checkpoint(tmp_path, sample(50)) / "checkpoint.json").unlink()
    whole = latest_checkpoint(tmp_path, lambda text: None)
    assert whole is not None
    put_aside_broken(tmp_path, whole.step)
    write_checkpoint(tmp_path, sample(60))
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["step-00000040", "step-00000060"]


def test_a_checkpoint_in_another_steps_folder_or_with_files_elsewhere_is_broken(tmp_path):
    path = write_checkpoint(tmp_path, sample(5))
    path.rename(tmp_path / "step-00000006")
    with pytest.raises(FormatError, match="it says that it is of step 5"):
        read_checkpoint(tmp_path / "step-00000006")
    (tmp_path / "step-00000006").rename(path)
    (path / "network.safetensors").rename(tmp_path / "network.safetensors")
    (path / "network.safetensors").symlink_to(tmp_path / "network.safetensors")
    with pytest.raises(FormatError, match="is a link"):
        read_checkpoint(path)


@pytest.mark.parametrize("mask", [0o077, 0o022])
def test_others_may_read_it_as_the_umask_says(tmp_path, mask):
    before = os.umask(mask)
    try:
        path = write_checkpoint(tmp_path, sample(1))
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o666 & ~mask}


def test_another_number_of_threads_is_told(tmp_path):
    warnings: list[str] = []
    for state in ({}, {"n_threads": torch.get_num_threads()}, {"n_threads": 77}):
        warn_of_threads(Checkpoint(9, {}, state), warnings.append)
    (text,) = warnings
    assert "with 77 thread(s) until step 9" in text
    assert "OMP_NUM_THREADS=77" in text


def test_what_a_kill_left_of_an_old_one_is_removed(tmp_path):
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, sample(step))
    (tmp_path / "step-00000001").mkdir()  # a kill while it was removed
    (tmp_path / "step-00000001" / "network.safetensors").write_bytes(b"")
    put_aside_broken(tmp_path, 3)
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["step-00000002", "step-00000003"]
