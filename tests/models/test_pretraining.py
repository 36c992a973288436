import pytest
import timm

from qtdog.models.backbones import KNOWN_BACKBONES
from qtdog.models.weights import corpora, pretraining_of


@pytest.mark.parametrize(
    ("backbone", "saw"),
    [
        ("resnet50.tv_in1k", "imagenet-1k (timm: resnet50.tv_in1k)"),
        ("tf_efficientnet_lite0", "imagenet-1k (timm: tf_efficientnet_lite0.in1k)"),
        (
            "resnext50_32x4d.fb_swsl_ig1b_ft_in1k",
            "instagram-1b, then imagenet-1k (timm: resnext50_32x4d.fb_swsl_ig1b_ft_in1k)",
        ),
        ("regnety_160.swag_lc_in1k", "instagram-3.6b (timm: regnety_160.swag_lc_in1k)"),
        ("regnety_160.swag_ft_in1k", "instagram-3.6b, then imagenet-1k (timm: regnety_160.swag_ft_in1k)"),
        ("vit_base_patch16_clip_224.openai", "openai-400m pairs (timm: vit_base_patch16_clip_224.openai)"),
        (
            "distilbert-base-uncased",
            "english wikipedia and bookcorpus (Hugging Face: distilbert/distilbert-base-uncased)",
        ),
        ("distilbert-mini", ""),
        ("digits_cnn", ""),
        ("ecaresnext50t_32x4d", ""),  # timm calls its tag "untrained"
    ],
)
def test_what_the_weights_of_a_name_were_trained_on(backbone: str, saw: str):
    assert pretraining_of(backbone) == saw


def test_a_classifier_trained_alone_is_not_in_the_featurizer():
    assert corpora("swag_lc_in1k") == "instagram-3.6b"
    assert corpora("lc_in1k") == "imagenet-1k"


def test_every_known_backbone_with_weights_names_what_they_saw():
    named = {name: pretraining_of(name) for name in KNOWN_BACKBONES}
    assert {name for name, saw in named.items() if not saw} == {"distilbert-mini", "mnist_cnn", "digits_cnn"}
    assert not [name for name, saw in named.items() if saw.startswith("unnamed")]


def test_known_timm_names_have_weights():
    pretrained = set(timm.list_pretrained())
    timms = [name for name in KNOWN_BACKBONES if "distilbert" not in name and not name.endswith("_cnn")]
    assert [name for name in timms if name not in pretrained and f"{name}.in1k" not in pretrained] == []
