"""What a backbone is fed: decoded images or tokenised texts, and whether the two go together."""

from __future__ import annotations

from collections.abc import Sequence

from qtdog.core.config import Config
from qtdog.core.errors import ConfigError
from qtdog.core.progress import Progress
from qtdog.data.dataset import DomainDataset
from qtdog.data.decoded_cache import DecodedCache, open_cache
from qtdog.data.text import TextDomains, open_tokens
from qtdog.models.text import TEXT_BACKBONES, make_tokeniser, vocabulary, vocabulary_id

MIXES_PIXELS = ("mixup",)


def check_input(config: Config, dataset: DomainDataset) -> None:
    """Refuse a configuration that wants images of texts, or texts of images.

    Raises:
        ConfigError: the backbone is for the other kind of data, or a method works on pixels and there are none.
    """
    check_reads(config.model.backbone, dataset)
    if not isinstance(dataset, TextDomains):
        return
    name = dataset.sheet.name
    if config.data.augment != "none":
        raise ConfigError(f"{name} is text, which data.augment={config.data.augment} cannot change: set it to none")
    for kind, member, is_bad in (
        ("objective", config.objective.name, config.objective.name in MIXES_PIXELS),
        ("feature layer", config.model.feature_layer, config.model.feature_layer != "none"),
    ):
        if is_bad:
            raise ConfigError(f"{kind} '{member}' works on images, and {name} is text: take another")


def check_reads(backbone: str, dataset: DomainDataset) -> None:
    """Refuse to show texts to a backbone for images, or images to one for text.

    Raises:
        ConfigError: naming what fits.
    """
    reads_text, name = backbone in TEXT_BACKBONES, dataset.sheet.name
    if reads_text and not isinstance(dataset, TextDomains):
        raise ConfigError(f"backbone '{backbone}' reads text, and {name} is of images: take another")
    if isinstance(dataset, TextDomains) and not reads_text:
        known = ", ".join(TEXT_BACKBONES)
        raise ConfigError(f"{name} is text, which backbone '{backbone}' cannot read; use one of {known}")


def open_inputs(
    dataset: DomainDataset,
    backbone: str,
    *,
    image_size: int,
    max_tokens: int,
    words: Sequence[str] = (),
    progress: Progress = None,
) -> DecodedCache:
    """Return the data set as a backbone takes it, decoded or tokenised now unless that was done before.

    Args:
        dataset: images or texts.
        backbone: whose vocabulary numbers the words.
        image_size: of images, pixels.
        max_tokens: of texts.
        words: the vocabulary that a model file holds; empty for the backbone's own.
        progress: of what takes long.

    Raises:
        DataError: an image cannot be read.
        ModelError: the vocabulary cannot be had.
        RunError: the cache folder cannot be written.
    """
    if not isinstance(dataset, TextDomains):
        return open_cache(dataset, image_size, progress=progress)
    words = words or vocabulary(backbone)
    tokenise = make_tokeniser(backbone, max_tokens, words)
    name = f"{backbone} {vocabulary_id(words)}" if words else backbone
    return open_tokens(dataset, tokenise, name=name, length=max_tokens, progress=progress)
