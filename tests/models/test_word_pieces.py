"""The tokenizer that a model file carries: the numbers of transformers' own, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from qtdog.models.text_backbones import MAX_LETTERS, MAX_WORDS, check_words, word_pieces

SIGNS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SIGNS, "good", "book", "##s", "##ing", "e", "##e", "a", "b", "##b", ",", "!", "'", "中", "é"]
N_TOKENS = 12


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("hub")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "DistilBertTokenizer", "do_lower_case": true}')
    (folder / "config.json").write_text('{"model_type": "distilbert"}')
    return transformers.AutoTokenizer.from_pretrained(folder)


@given(
    st.lists(
        st.text(
            st.sampled_from("goodbaks ,!'É中[]MASKéß\n\u0130\u0301\u200b\x00PADSEP")
            | st.characters(exclude_categories=["Cs"])
        ),
        min_size=1,
        max_size=4,
    )
)
def test_the_numbers_are_those_of_transformers(theirs, texts):
    how = {"max_length": N_TOKENS, "truncation": True, "padding": "max_length", "return_tensors": "np"}
    mine = word_pieces(WORDS, N_TOKENS)(texts)
    assert mine.dtype == np.int32
    assert np.array_equal(mine, theirs(texts, **how)["input_ids"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["[PAD]", "good"], r"has no \[UNK\]"),
        ([*SIGNS[1:], SIGNS[0]], "fills up with 4, the network takes 0"),
        ([*SIGNS, "good", "good"], "appears twice"),
        ([*SIGNS, ""], "is empty or has more than"),
        ([*SIGNS, "a" * (MAX_LETTERS + 1)], "is empty or has more than 200 letters"),
        ([*SIGNS, *(str(i) for i in range(MAX_WORDS))], "at most 65536 can be numbered"),
    ],
)
def test_what_is_no_vocabulary_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        check_words(words)


def test_a_sound_one_is_not():
    check_words(WORDS)
