"""Backbones that read text: DistilBERT, and the word pieces that its tokenizer knows."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from qtdog.core.errors import ModelError, extra
from qtdog.models.hub import reason_of, short_try

Tokens = npt.NDArray[np.int32]
Tokenizer = Callable[[Sequence[str]], Tokens]
"""Texts to token numbers, int32 (n, max_tokens), filled up with 0."""

PAD_PIECE, UNKNOWN_PIECE, START_PIECE, END_PIECE, MASK_PIECE = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
MAX_WORDS = 1 << 16  # token numbers are kept as 16 bits
MAX_LETTERS = 200  # of one piece


def check_words(words: Sequence[str]) -> None:
    """Refuse what cannot be the vocabulary of a model file.

    Args:
        words: the pieces in the order of their numbers.

    Raises:
        ValueError: too many or too long pieces, one twice, a sign that is needed is missing, or 0 is not [PAD].

    Example:
        >>> check_words(["[PAD]", "good"])
        Traceback (most recent call last):
        ...
        ValueError: the vocabulary has no [UNK]
    """
    if len(words) > MAX_WORDS:
        raise ValueError(f"the vocabulary has {len(words)} words; at most {MAX_WORDS} can be numbered")
    if any(not word or len(word) > MAX_LETTERS for word in words):
        raise ValueError(f"a word of the vocabulary is empty or has more than {MAX_LETTERS} letters")
    known = set(words)
    if len(known) != len(words):
        raise ValueError("a word of the vocabulary appears twice")
    for sign in (PAD_PIECE, UNKNOWN_PIECE, START_PIECE, END_PIECE):
        if sign not in known:
            raise ValueError(f"the vocabulary has no {sign}")
    if words[0] != PAD_PIECE:
        raise ValueError(f"the vocabulary fills up with {list(words).index(PAD_PIECE)}, the network takes 0")


def word_pieces(words: Sequence[str], max_tokens: int) -> Tokenizer:
    """Return the function from texts to the numbers of their word pieces, a start and an end sign around them.

    Letters are made small, accents are dropped, signs stand alone; then the longest known beginning of a word is taken
    again and again, as BERT does it. Source: Devlin et al., *BERT*, NAACL 2019.

    Args:
        words: the vocabulary (`check_words`).
        max_tokens: length of each row; longer texts are cut.

    Raises:
        ModelError: tokenizers is not installed.

    Example:
        >>> words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "book", "##s"]
        >>> word_pieces(words, 6)(["Good books"]).tolist()
        [[2, 4, 5, 6, 3, 0]]
    """
    tokenizer = _tokenizer(list(words), max_tokens)
    return lambda texts: np.array([row.ids for row in tokenizer.encode_batch(list(texts))], dtype=np.int32)


def _tokenizer(words: list[str], max_tokens: int) -> Any:
    with extra("text", "a model of text needs tokenizers"):
        import tokenizers
        from tokenizers import models, normalizers, pre_tokenizers, processors
    number = {word: place for place, word in enumerate(words)}
    found = tokenizers.Tokenizer(models.WordPiece(number, unk_token=UNKNOWN_PIECE, max_input_chars_per_word=100))
    found.normalizer = normalizers.BertNormalizer(lowercase=True)
    found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    found.post_processor = processors.BertProcessing((END_PIECE, number[END_PIECE]), (START_PIECE, number[START_PIECE]))
    found.add_special_tokens(
        [sign for sign in (PAD_PIECE, UNKNOWN_PIECE, START_PIECE, END_PIECE, MASK_PIECE) if sign in number]
    )
    found.enable_truncation(max_tokens)
    found.enable_padding(pad_id=number[PAD_PIECE], pad_token=PAD_PIECE, length=max_tokens)
    return found


def vocabulary_id(words: Sequence[str]) -> str:
    """Return 16 hex digits that tell a vocabulary from others.

    Example:
        >>> vocabulary_id(["a", "b"]) != vocabulary_id(["ab"])
        True
    """
    return hashlib.sha256("\n".join(words).encode(errors="surrogatepass")).hexdigest()[:16]


PAD_ID, START_ID = 0, 1  # what fills a short text up; what a hashed text begins with
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
        mask = (tokens != PAD_ID).to(torch.int64)
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
    with short_try() as is_there:
        try:
            return TextFeaturizer(library.DistilBertModel.from_pretrained(hub_name))
        except Exception as error:  # the hub's clients raise errors of many libraries
            raise _not_had(f"the weights of '{name}'", hub_name, reason_of(error, is_there)) from error


def make_tokenizer(name: str, max_tokens: int, words: Sequence[str] = ()) -> Tokenizer:
    """Return the function from texts to the token numbers that a backbone takes; longer texts are cut.

    Args:
        name: a name in `TEXT_BACKBONES`.
        max_tokens: length of each row, at most 512.
        words: its vocabulary, as a model file holds it; empty to have it from the hub.

    Raises:
        ModelError: the vocabulary cannot be had.

    Example:
        >>> make_tokenizer("distilbert-mini", 4)(["Good, good"]).tolist()
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
    library = _transformers(name)
    with short_try() as is_there:
        try:
            numbers: dict[str, int] = library.AutoTokenizer.from_pretrained(hub_name).get_vocab()
        except Exception as error:  # as above
            raise _not_had(f"the vocabulary of '{name}'", hub_name, reason_of(error, is_there)) from error
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
    row[: len(words) + 1] = [
        START_ID,
        *(START_ID + 1 + zlib.crc32(word.encode()) % (n_words - START_ID - 1) for word in words),
    ]
    return row


def _hub_name(name: str) -> str:
    hub_name = TEXT_BACKBONES[name].hub_name
    if hub_name is None:
        raise ModelError(f"there are no pretrained weights for '{name}': use --weights none, or a file.")
    return hub_name


def _not_had(what: str, hub_name: str, reason: str) -> ModelError:
    return ModelError(
        f"{what} could not be had from the Hugging Face hub ({hub_name}): {reason}. Check the connection and try "
        "again, or fetch it once elsewhere and copy that machine's HF_HOME folder here."
    )


def _transformers(name: str) -> ModuleType:
    with extra("text", f"backbone '{name}' needs transformers"):
        import transformers
    return transformers
