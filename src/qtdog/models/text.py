"""Backbones that read text: DistilBERT, and how words become the numbers that it takes."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qtdog.core.errors import ModelError, extra
from qtdog.models.word_pieces import Tokeniser, Tokens, check_words, word_pieces

PAD, START = 0, 1  # what fills a short text up; what a hashed text begins with
N_WORDS = 30_522  # of DistilBERT's vocabulary
WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class TextBackbone:
    """A transformer that reads text.

    Attributes:
        hub_name: where weights and vocabulary lie on the Hugging Face hub (or a local folder); None if nobody
            pretrained it: its words are then numbered by a hash, and there is no vocabulary.
        corpus: what it was pretrained on.
        sizes: of `transformers.DistilBertConfig`, where they differ from its defaults.
    """

    hub_name: str | None
    corpus: str = ""
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def n_words(self) -> int:
        """Rows of its word table."""
        return self.sizes.get("vocab_size", N_WORDS)


_MINI = {"vocab_size": 8192, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 2}
TEXT_BACKBONES = {
    "distilbert-base-uncased": TextBackbone("distilbert/distilbert-base-uncased", "english wikipedia and bookcorpus"),
    "distilbert-mini": TextBackbone(None, sizes=_MINI),
}


class TextFeaturizer(nn.Module):
    """DistilBERT, of which the first token's last state is the feature (as in WILDS).

    Source: Sanh et al., *DistilBERT, a distilled version of BERT*, 2019; Koh et al., *WILDS*, ICML 2021, appendix E.

    Attributes:
        encoder: a `transformers.DistilBertModel`.
        n_features: d, its width.

    Shapes:
        tokens, int64 (n, length), 0 where the text has ended → features (n, d)
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        config: Any = encoder.config
        self.n_features = int(config.dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the features (n, d) of tokens (n, length)."""
        mask = (tokens != PAD).to(torch.int64)
        return self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state[:, 0]


def build_text_featurizer(name: str, *, pretrained: bool = False) -> TextFeaturizer:
    """Return a featurizer for text, its random start from torch's global state.

    Args:
        name: a name in `TEXT_BACKBONES`.
        pretrained: fetch its weights from the Hugging Face hub.

    Raises:
        ModelError: transformers is not installed, or the weights cannot be had.
    """
    library, backbone = _transformers(name), TEXT_BACKBONES[name]
    if not pretrained:
        return TextFeaturizer(library.DistilBertModel(library.DistilBertConfig(**backbone.sizes)))
    hub_name = _hub_name(name)
    try:
        return TextFeaturizer(library.DistilBertModel.from_pretrained(hub_name))
    except Exception as error:  # the hub's clients raise errors of many libraries
        raise _not_had(f"the weights of '{name}'", hub_name, error) from error


def make_tokeniser(name: str, max_tokens: int, words: Sequence[str] = ()) -> Tokeniser:
    """Return the function from texts to the token numbers that a backbone takes; longer texts are cut.

    Args:
        name: a name in `TEXT_BACKBONES`.
        max_tokens: length of each row, at most 512.
        words: its vocabulary, as a model file holds it; empty to have it from the hub.

    Raises:
        ModelError: the vocabulary cannot be had.

    Example:
        >>> make_tokeniser("distilbert-mini", 4)(["Good, good"]).tolist()
        [[1, 5956, 4600, 5956]]
    """
    backbone = TEXT_BACKBONES[name]
    if backbone.hub_name is None:
        n_words = backbone.n_words
        return lambda texts: np.stack([hashed(text, n_words, max_tokens) for text in texts])
    return word_pieces(words or vocabulary(name), max_tokens)


def vocabulary(name: str) -> tuple[str, ...]:
    """Return the word pieces of a backbone in the order of their numbers; none if its words are numbered by a hash.

    Args:
        name: a name in `TEXT_BACKBONES`.

    Raises:
        ModelError: transformers is not installed, or the vocabulary cannot be had.

    Example:
        >>> vocabulary("distilbert-mini")
        ()
    """
    hub_name = TEXT_BACKBONES[name].hub_name
    return () if hub_name is None else _from_hub(name, hub_name)


@lru_cache(maxsize=4)
def _from_hub(name: str, hub_name: str) -> tuple[str, ...]:
    """Return a vocabulary of the hub; once per process, so that the end of a run needs no connection."""
    try:
        numbers: dict[str, int] = _transformers(name).AutoTokenizer.from_pretrained(hub_name).get_vocab()
    except ModelError:
        raise
    except Exception as error:  # as above
        raise _not_had(f"the vocabulary of '{name}'", hub_name, error) from error
    words = tuple(sorted(numbers, key=numbers.__getitem__))
    try:
        check_words(words)
    except ValueError as error:
        raise ModelError(f"'{name}': {error}") from error
    return words


def hashed(text: str, n_words: int, max_tokens: int) -> Tokens:
    """Return the words of a text as numbers, int32 (max_tokens,): a start sign, then crc32 of each lower-case word.

    Example:
        >>> hashed("", 100, 3).tolist()
        [1, 0, 0]
    """
    row = np.zeros(max_tokens, dtype=np.int32)
    words = WORD.findall(text.lower())[: max_tokens - 1]
    row[: len(words) + 1] = [START, *(START + 1 + zlib.crc32(word.encode()) % (n_words - START - 1) for word in words)]
    return row


def _hub_name(name: str) -> str:
    hub_name = TEXT_BACKBONES[name].hub_name
    if hub_name is None:
        raise ModelError(f"there are no pretrained weights for '{name}': use --weights none, or a file.")
    return hub_name


def _not_had(what: str, hub_name: str, error: Exception) -> ModelError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ModelError(
        f"{what} could not be had from the Hugging Face hub ({hub_name}): {reason}. Check the connection and try "
        "again, or fetch it once elsewhere and copy that machine's HF_HOME folder here."
    )


def _transformers(name: str) -> ModuleType:
    with extra("text", f"backbone '{name}' needs transformers"):
        import transformers
    return transformers
