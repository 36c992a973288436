"""Text backbones: real loading code, from folders that hold what the hub would give."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from qtdog.core.errors import ModelError
from qtdog.models import text_backbones
from qtdog.models.backbones import create_network
from qtdog.models.network import Network
from qtdog.models.text_backbones import TEXT_BACKBONES, hashed, make_tokenizer

NAME = "distilbert-base-uncased"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "book", "##s", ",", "a"]
SIZES: dict[str, Any] = {"vocab_size": len(WORDS), "dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder as the hub would give it, and let the name mean it."""
    torch.manual_seed(5)
    transformers.DistilBertModel(transformers.DistilBertConfig(**SIZES)).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "DistilBertTokenizer", "do_lower_case": true}')
    known = replace(TEXT_BACKBONES[NAME], hub_name=str(tmp_path), sizes=SIZES)
    monkeypatch.setitem(TEXT_BACKBONES, NAME, known)
    return tmp_path


def create(name: str, weights: str) -> Network:
    return create_network(name, n_classes=5, channels=3, image_size=224, weights=weights, freeze_bn=True, seed=0)


def test_words_become_the_numbers_of_the_vocabulary(hub: Path):
    tokens = make_tokenizer(NAME, 8)(["A GOOD book, books", "bad", ""])
    assert tokens.dtype == np.int32
    assert tokens.tolist() == [
        [2, 10, 5, 7, 9, 7, 8, 3],
        [2, 6, 3, 0, 0, 0, 0, 0],
        [2, 3, 0, 0, 0, 0, 0, 0],
    ]


def test_long_texts_are_cut_and_still_end(hub: Path):
    assert make_tokenizer(NAME, 4)(["good bad good bad"]).tolist() == [[2, 5, 6, 3]]


@torch.no_grad()
def test_pretrained_weights_and_their_features(hub: Path):
    network = create(NAME, "imagenet").eval()
    assert network.pretraining == f"english wikipedia and bookcorpus (Hugging Face: {hub})"
    theirs = transformers.DistilBertModel.from_pretrained(hub).eval()
    tokens = torch.tensor([[2, 5, 3, 0], [2, 6, 7, 3]])
    expected = theirs(input_ids=tokens, attention_mask=(tokens != 0).long()).last_hidden_state[:, 0]
    assert torch.equal(network.features(tokens), expected)


@torch.no_grad()
def test_padding_changes_nothing(hub: Path):
    network = create(NAME, "none").eval()
    longer = network(torch.tensor([[2, 5, 3, 0, 0, 0]]))
    torch.testing.assert_close(network(torch.tensor([[2, 5, 3]])), longer, rtol=0, atol=1e-6)


def test_weights_from_a_file_of_a_model_with_heads(hub: Path, tmp_path: Path):
    model = transformers.DistilBertForMaskedLM.from_pretrained(hub)
    torch.save(model.state_dict(), tmp_path / "mlm.pth")
    network = create(NAME, str(tmp_path / "mlm.pth"))
    mine = network.featurizer.state_dict()["encoder.embeddings.word_embeddings.weight"]
    assert torch.equal(mine, model.state_dict()["distilbert.embeddings.word_embeddings.weight"])


def test_what_cannot_be_had_says_what_to_do(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ModelError, match=r"there are no pretrained weights for 'distilbert-mini'.*--weights none"):
        create("distilbert-mini", "imagenet")
    gone = replace(TEXT_BACKBONES[NAME], hub_name=str(tmp_path / "gone"))
    monkeypatch.setitem(TEXT_BACKBONES, NAME, gone)
    with pytest.raises(ModelError, match=r"the weights of 'distilbert-base-uncased' could not be had.*HF_HOME"):
        create(NAME, "imagenet")
    with pytest.raises(ModelError, match=r"the vocabulary of 'distilbert-base-uncased' could not be had.*HF_HOME"):
        make_tokenizer(NAME, 8)


def test_without_transformers_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match=r"pip install 'qtdog\[text\]'"):
        create("distilbert-mini", "none")


def test_a_vocabulary_that_fills_up_with_another_number_is_refused(hub: Path):
    (hub / "vocab.txt").write_text("\n".join([WORDS[1], WORDS[0], *WORDS[2:]]))
    with pytest.raises(ModelError, match="fills up with 1, the network takes 0"):
        make_tokenizer(NAME, 8)


@given(st.text(), st.integers(2, 20))
def test_hashed_words_stay_in_their_range(given_text: str, n: int):
    row = hashed(given_text, 50, n)
    n_words = min(n, 1 + len(text_backbones.WORD.findall(given_text.lower())))
    assert row.shape == (n,)
    assert row[0] == text_backbones.START_ID
    assert ((row[1:n_words] > text_backbones.START_ID) & (row[1:n_words] < 50)).all()
    assert (row[n_words:] == text_backbones.PAD_ID).all()


def test_hashed_words_do_not_look_at_case():
    assert hashed("Good Book", 8192, 6).tolist() == hashed("good BOOK", 8192, 6).tolist()
    assert hashed("good", 8192, 6).tolist() != hashed("bad", 8192, 6).tolist()
