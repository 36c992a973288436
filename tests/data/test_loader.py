import threading
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from qtdog.core.errors import ConfigError, DataError
from qtdog.data.augment import normalize
from qtdog.data.augment_policies import POLICIES
from qtdog.data.decoded_cache import DecodedCache, open_cache
from qtdog.data.image_folder import open_folder
from qtdog.data.loader import Batch, TrainBatches, draw, eval_batches

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


class Setting:
    """A small cache and what belongs to it."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.dataset = open_folder(root)
        self.cache = open_cache(self.dataset, 12, folder=folder)
        self.pools = {domain: self.dataset.indices(domain)[::2] for domain in ("outdoor", "indoor")}

    def batches(self, **changes: Any) -> TrainBatches:
        augment: Literal["domainbed", "none"] = "domainbed"
        options = {"batch_size": 6, "seed": 3, "augment": augment, "mean": MEAN, "std": STD, "workers": 2} | changes
        return TrainBatches(self.cache, self.dataset.class_index, self.pools, **options)


@pytest.fixture
def setting(image_tree: Path, tmp_path: Path) -> Setting:
    return Setting(image_tree, tmp_path / "cache")


def assert_equal(first: Batch, second: Batch) -> None:
    assert first.images.equal(second.images)
    assert first.labels.equal(second.labels)
    assert (first.domains, first.sizes) == (second.domains, second.sizes)


def batch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_shapes_types_and_order_of_domains(setting: Setting) -> None:
    batch = setting.batches().batch(0)
    assert batch.images.shape == (12, 3, 12, 12)
    assert batch.images.dtype == torch.float32
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.dtype == torch.int64
    assert batch.domains == ("outdoor", "indoor")
    assert batch.sizes == (6, 6)


def test_without_augmentation_it_is_the_drawn_images_normalized(setting: Setting) -> None:
    batch = setting.batches(augment="none").batch(5)
    drawn = np.concatenate([draw(3, 5, domain, pool, 6) for domain, pool in setting.pools.items()])
    assert batch.images.equal(normalize(setting.cache.gather(drawn), MEAN, STD))
    assert batch.labels.tolist() == setting.dataset.class_index[drawn].tolist()


@pytest.mark.parametrize("augment", ["domainbed", "none", *POLICIES])
def test_a_batch_is_a_function_of_seed_and_step(setting: Setting, augment: str) -> None:
    one, other = setting.batches(augment=augment), setting.batches(augment=augment)
    other.batch(3)
    assert_equal(one.batch(7), other.batch(7))
    assert not one.batch(7).images.equal(one.batch(8).images)
    assert not one.batch(7).images.equal(setting.batches(augment=augment, seed=4).batch(7).images)


@pytest.mark.parametrize("name", list(POLICIES))
def test_a_policy_gives_views_beside_clean_images(setting: Setting, name: str) -> None:
    plain, viewed = setting.batches(augment=name).batch(2), setting.batches(augment=name, n_views=2).batch(2)
    assert plain.views == ()
    assert len(viewed.views) == 2
    assert viewed.views[0].equal(plain.images)
    assert not viewed.views[1].equal(plain.images)
    assert not viewed.images.equal(plain.images)
    shares = [setting.batches(augment=name, n_views=2, rank=rank, world=2).batch(2) for rank in (0, 1)]
    assert torch.cat([share.views[1] for share in shares]).equal(
        viewed.views[1][[0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11]]
    )


def test_views_and_hyper_parameters_are_for_policies(setting: Setting) -> None:
    with pytest.raises(ConfigError, match="augmentation 'domainbed' has no views"):
        setting.batches(n_views=2)
    with pytest.raises(ConfigError, match="augmentation 'none' has no hyper-parameter 'n_ops'"):
        setting.batches(augment="none", augment_params={"n_ops": 2})
    with pytest.raises(ConfigError, match=r"unknown data\.augment 'randaugmnt'; did you mean 'randaugment'"):
        setting.batches(augment="randaugmnt")


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_stream_gives_the_same_batches_wherever_it_starts(setting: Setting, workers: int) -> None:
    train = setting.batches(workers=workers)
    inline = setting.batches(workers=0)
    held = list(train.stream(4, 9))  # all kept at once: none may be overwritten by a later one
    assert len(held) == 5
    for step, batch in enumerate(held, start=4):
        assert_equal(batch, inline.batch(step))
    assert not batch_threads()


def test_an_empty_stream(setting: Setting) -> None:
    assert list(setting.batches().stream(5, 5)) == []


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("augment", ["domainbed", "none"])
def test_processes_share_one_global_batch(setting: Setting, world: int, augment: str) -> None:
    whole = setting.batches(augment=augment).batch(2)
    images, labels = whole.images.unflatten(0, (2, 6)), whole.labels.unflatten(0, (2, 6))
    for rank in range(world):
        part = setting.batches(augment=augment, rank=rank, world=world).batch(2)
        assert part.sizes == (6 // world,) * 2
        assert part.images.equal(images[:, rank::world].flatten(0, 1))
        assert part.labels.equal(labels[:, rank::world].flatten())


def test_a_batch_that_cannot_be_shared_is_refused(setting: Setting) -> None:
    with pytest.raises(ConfigError, match=r"data\.batch_size 6 cannot be shared evenly by 4 processes"):
        setting.batches(world=4)


def test_an_empty_domain_is_refused(setting: Setting) -> None:
    setting.pools["outdoor"] = np.empty(0, dtype=np.int64)
    with pytest.raises(DataError, match="no training images in outdoor"):
        setting.batches()
    setting.pools.clear()
    with pytest.raises(DataError, match="no source domain"):
        setting.batches()


def test_an_error_in_a_thread_is_raised_and_threads_end(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    train = setting.batches()
    stream = train.stream(0, 100)
    next(stream)

    def fail(*_: object) -> None:
        raise DataError("gone")

    monkeypatch.setattr(DecodedCache, "gather", fail)
    with pytest.raises(DataError, match="gone"):
        list(stream)
    assert not batch_threads()


def test_closing_a_stream_early_ends_its_threads(setting: Setting) -> None:
    stream = setting.batches().stream(0, 10**9)
    next(stream)
    assert batch_threads()
    stream.close()
    assert not batch_threads()


def test_worker_threads_leave_the_callers_thread_count_alone(setting: Setting) -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    stream = setting.batches().stream(0, 10)
    next(stream)
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    stream.close()
    assert seen == [before]
    assert torch.get_num_threads() == before


def test_evaluation_is_in_order_and_complete(setting: Setting) -> None:
    indices = np.arange(0, 54, 5)
    parts = list(eval_batches(setting.cache, indices, setting.dataset.class_index, batch_size=4, mean=MEAN, std=STD))
    assert [len(labels) for _, labels in parts] == [4, 4, 3]
    images = torch.cat([images for images, _ in parts])
    assert images.equal(normalize(setting.cache.gather(indices), MEAN, STD))
    assert torch.cat([labels for _, labels in parts]).tolist() == setting.dataset.class_index[indices].tolist()


def test_a_focus_gets_half_of_each_batch_and_the_processes_share_it(setting: Setting) -> None:
    whole = setting.batches(batch_size=8, focus="indoor").batch(3)
    assert whole.sizes == (8, 8)  # of two domains, half is an equal share
    setting.pools["third"] = setting.pools["outdoor"]
    whole = setting.batches(batch_size=8, focus="indoor").batch(3)
    assert whole.sizes == (6, 12, 6)
    halves = [setting.batches(batch_size=8, focus="indoor", rank=rank, world=2).batch(3) for rank in (0, 1)]
    assert [half.sizes for half in halves] == [(3, 6, 3)] * 2
    for domain in range(3):
        parts = [half.images.split(half.sizes)[domain] for half in halves]
        together = whole.images.split(whole.sizes)[domain]
        torch.testing.assert_close(torch.stack(parts, 1).flatten(0, 1), together, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "match"),
    [({"focus": "indor"}, "did you mean 'indoor'"), ({"focus": "indoor", "batch_size": 1, "world": 2}, "evenly")],
)
def test_a_focus_that_cannot_be_is_refused(setting: Setting, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        setting.batches(**changes)
