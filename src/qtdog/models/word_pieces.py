"""From a list of word pieces to the tokeniser of BERT without capitals: all that a model file needs to read text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qtdog.core.errors import extra

Tokens = npt.NDArray[np.int32]
Tokeniser = Callable[[Sequence[str]], Tokens]
"""Texts to token numbers, int32 (n, max_tokens), filled up with 0."""

PAD, UNKNOWN, START, END, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
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
    for sign in (PAD, UNKNOWN, START, END):
        if sign not in known:
            raise ValueError(f"the vocabulary has no {sign}")
    if words[0] != PAD:
        raise ValueError(f"the vocabulary fills up with {list(words).index(PAD)}, the network takes 0")


def word_pieces(words: Sequence[str], max_tokens: int) -> Tokeniser:
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
    found = tokenizers.Tokenizer(models.WordPiece(number, unk_token=UNKNOWN, max_input_chars_per_word=100))
    found.normalizer = normalizers.BertNormalizer(lowercase=True)
    found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    found.post_processor = processors.BertProcessing((END, number[END]), (START, number[START]))
    found.add_special_tokens([sign for sign in (PAD, UNKNOWN, START, END, MASK) if sign in number])
    found.enable_truncation(max_tokens)
    found.enable_padding(pad_id=number[PAD], pad_token=PAD, length=max_tokens)
    return found


def vocabulary_id(words: Sequence[str]) -> str:
    """Return 16 hex digits that tell a vocabulary from others.

    Example:
        >>> vocabulary_id(["a", "b"]) != vocabulary_id(["ab"])
        True
    """
    return hashlib.sha256("\n".join(words).encode(errors="surrogatepass")).hexdigest()[:16]
