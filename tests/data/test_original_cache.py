"""Crops of the original: the statistics of torchvision's per-image pipeline, whatever the aspect of the images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import resized_crop

from qtdog.core.errors import DataError, RunError
from qtdog.data.augment import augment, draw_parameters
from qtdog.data.decode import to_shorter_side
from qtdog.data.decoded_cache import IMAGES
from qtdog.data.image_folder import FileDataset, open_folder
from qtdog.data.loader import TrainBatches
from qtdog.data.original_cache import OriginalCache, kept_side, open_originals

SIZE = 24
SHAPES = ((60, 90), (90, 60), (50, 50), (20, 30), (200, 40), (120, 160))


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains with two classes, each with one image of every shape: smooth areas with a sharp grain."""
    root, rng = tmp_path_factory.mktemp("uneven"), np.random.default_rng(0)
    for place in ("a/x", "a/y", "b/x", "b/y"):
        (root / place).mkdir(parents=True)
        for i, (height, width) in enumerate(SHAPES):
            coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((width, height))
            pixels = np.asarray(coarse).astype(int) + rng.integers(-30, 31, (height, width, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / place / f"{i}.png")
    return root


def batches(root: Path, folder: Path, **how) -> TrainBatches:
    dataset = open_folder(root)
    originals = open_originals(dataset, SIZE, folder=folder)
    pools = {domain: dataset.indices(domain) for domain in dataset.domains}
    fixed = {"batch_size": 4, "seed": 0, "augment": "domainbed", "mean": [0.0], "std": [1.0], "workers": 0}
    return TrainBatches(originals, dataset.class_index, pools, originals=originals, **fixed, **how)  # type: ignore[arg-type]


def test_images_keep_their_aspect_and_are_never_enlarged(uneven: Path, tmp_path: Path) -> None:
    dataset = open_folder(uneven)
    cache = open_originals(dataset, SIZE, folder=tmp_path)
    side = kept_side(SIZE)
    assert side == 34
    found = [tuple(image.shape[:2]) for image in cache.gather(range(6))]
    assert found == [(34, 51), (51, 34), (34, 34), (20, 30), (68, 34), (34, 45)]  # of 200 x 40 the central 80 x 40
    for i, image in enumerate(cache.gather([5, 3, 0])):
        assert np.array_equal(image.numpy(), to_shorter_side(dataset.read([5, 3, 0][i]), side))


def test_no_crop_takes_what_a_long_image_loses() -> None:
    shapes = torch.tensor([[200, 40], [40, 200], [41, 81]])
    crops = draw_parameters(torch.Generator().manual_seed(0), 3000, shapes.repeat(1000, 1)).crop.view(1000, 3, 4)
    top, left, height, width = crops.unbind(2)
    assert (top[:, 0] >= 60).all()
    assert (top[:, 0] + height[:, 0] <= 140).all()
    assert (left[:, 1] >= 60).all()
    assert (left[:, 1] + width[:, 1] <= 140).all()
    assert (width[:, 2] <= 81).all()


@pytest.mark.parametrize("shape", [(267, 400), (400, 267), (300, 300), (100, 180), (90, 300)])
def test_crops_of_any_shape_are_distributed_as_torchvisions(shape: tuple[int, int]) -> None:
    height, width = shape
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    n, n_theirs = 10_000, 1500
    theirs = [RandomResizedCrop.get_params(image, [0.7, 1.0], [3 / 4, 4 / 3]) for _ in range(n_theirs)]
    expected = torch.tensor(theirs).double()
    sizes = torch.tensor([shape]).repeat(n, 1)
    crops = draw_parameters(torch.Generator().manual_seed(0), n, sizes).crop
    assert ((crops[:, :2] >= 0).all(), (crops[:, :2] + crops[:, 2:] <= sizes).all()) == (True, True)
    ours = crops.double()
    spread = expected.std(dim=0) * (1 / n_theirs + 1 / n) ** 0.5
    assert torch.all((ours.mean(dim=0) - expected.mean(dim=0)).abs() <= 5 * spread)
    assert torch.allclose(ours.std(dim=0), expected.std(dim=0), rtol=0.1)


def test_draws_of_one_size_for_all_are_those_of_a_number() -> None:
    one, many = (draw_parameters(torch.Generator().manual_seed(3), 50, s) for s in (96, torch.full((50, 2), 96)))
    assert one.crop.equal(many.crop)
    assert one.factors.equal(many.factors)


def test_crops_are_as_sharp_as_crops_of_the_original(uneven: Path, tmp_path: Path) -> None:
    dataset = open_folder(uneven)
    cache = open_originals(dataset, SIZE, folder=tmp_path)
    ratios = []
    for i in (0, 1, 2, 5):
        original = dataset.read(i)
        parameters = draw_parameters(torch.Generator().manual_seed(i), 40, torch.tensor([original.shape[:2]] * 40))
        scale = torch.tensor([cache.sizes[i].tolist()] * 40) / torch.tensor(original.shape[:2])
        crops = (parameters.crop * scale.repeat(1, 2)).round().long()
        plain = {"factors": torch.tensor([[1.0, 1, 1, 0]] * 40), "grey": torch.zeros(40, dtype=torch.bool)}
        plain |= {"order": parameters.order, "flip": torch.zeros(40, dtype=torch.bool)}
        ours = augment(cache.gather([i] * 40), type(parameters)(crop=crops, **plain), size=SIZE)
        image = torch.tensor(original).permute(2, 0, 1)
        theirs = torch.stack(
            [resized_crop(image, *crop, size=[SIZE, SIZE], antialias=True) for crop in parameters.crop.tolist()]
        )
        ratios.append(sharpness(ours) / sharpness(theirs.float() / 255))
    assert np.mean(ratios) == pytest.approx(1, abs=0.05)  # crops of the cached square: 0.7


def sharpness(images: torch.Tensor) -> float:
    """Mean difference of neighbours."""
    return ((images.diff(dim=2).abs().mean() + images.diff(dim=3).abs().mean()) / 2).item()


def test_batches_are_functions_of_the_step_and_have_the_networks_size(uneven: Path, tmp_path: Path) -> None:
    first, again = (batches(uneven, tmp_path).batch(7).images for _ in range(2))
    assert first.shape == (8, 3, SIZE, SIZE)
    assert first.equal(again)
    assert not first.equal(batches(uneven, tmp_path).batch(8).images)


def test_two_processes_see_the_batch_of_one(uneven: Path, tmp_path: Path) -> None:
    whole = batches(uneven, tmp_path).batch(3).images
    parts = [batches(uneven, tmp_path, rank=rank, world=2).batch(3).images for rank in range(2)]
    for rank, part in enumerate(parts):
        torch.testing.assert_close(part, whole[rank::2], rtol=0, atol=0)


def test_only_new_images_are_decoded_again(tmp_path: Path, uneven: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    root = tmp_path / "mine"
    shutil.copytree(uneven, root)
    open_originals(open_folder(root), SIZE, folder=tmp_path / "cache")
    (root / "a" / "x" / "0.png").unlink()
    shutil.copy(uneven / "b" / "y" / "1.png", root / "a" / "x" / "new.png")
    Image.new("RGB", (70, 80), "red").save(root / "b" / "x" / "other.png")
    decoded: list[str] = []
    read_hashed = FileDataset.read_hashed

    def count(self: FileDataset, i: int, *rest):
        decoded.append(self.keys[i])
        return read_hashed(self, i, *rest)

    monkeypatch.setattr(FileDataset, "read_hashed", count)
    dataset = open_folder(root)
    cache = open_originals(dataset, SIZE, folder=tmp_path / "cache")
    assert decoded == ["b/x/other.png"]
    for i, image in enumerate(cache.gather(range(len(dataset)))):
        assert np.array_equal(image.numpy(), to_shorter_side(dataset.read(i), kept_side(SIZE)))
    assert len(list((tmp_path / "cache" / "originals").iterdir())) == 1  # the old version is gone


def test_a_damaged_cache_is_built_again(uneven: Path, tmp_path: Path) -> None:
    whole = open_originals(open_folder(uneven), SIZE, folder=tmp_path)
    expected = whole.gather([3])[0]
    content = whole.path.read_bytes()
    whole.path.write_bytes(content[:-5])
    with pytest.raises(DataError, match="cut short"):
        OriginalCache(whole.path.parent, 3, SIZE)
    again = open_originals(open_folder(uneven), SIZE, folder=tmp_path)
    assert again.path.name == IMAGES
    assert again.path.stat().st_size == len(content)
    assert again.gather([3])[0].equal(expected)


def test_broken_images_are_named_and_nothing_is_left(uneven: Path, tmp_path: Path) -> None:
    import shutil

    root = tmp_path / "mine"
    shutil.copytree(uneven, root)
    (root / "a" / "x" / "2.png").write_bytes(b"no image")
    with pytest.raises((DataError, RunError), match=r"a/x/2\.png cannot be read as an image"):
        open_originals(open_folder(root), SIZE, folder=tmp_path / "cache")
    assert not list((tmp_path / "cache" / "originals").iterdir())
