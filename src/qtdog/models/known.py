"""The backbones of the published tables and small ones for a start: any other timm model works as well."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KnownBackbone:
    """A backbone that the project knows by name and tests.

    Attributes:
        name: as `--backbone` takes it, with the tag of its weights.
        about: what it is, and who uses it.
        extra: of pip, that brings what it needs; "" for none.

    Example:
        >>> KNOWN["resnet50.tv_in1k"].extra
        ''
    """

    name: str
    about: str
    extra: str = ""


_ALL = (
    KnownBackbone("resnet50.tv_in1k", "the published protocol's; torchvision's first weights (V1)"),
    KnownBackbone("resnet18.tv_in1k", "the small one of the field; torchvision's first weights (V1)"),
    KnownBackbone("resnext50_32x4d.fb_swsl_ig1b_ft_in1k", "EoA's larger pretraining; weights for non-commercial use"),
    KnownBackbone("deit_small_patch16_224.fb_in1k", "a transformer without a teacher's token"),
    KnownBackbone("vit_base_patch16_clip_quickgelu_224.openai", "CLIP's image tower exactly; takes model.head=text"),
    KnownBackbone("vit_base_patch16_clip_224.openai", "CLIP's image tower with an exact GELU; takes model.head=text"),
    KnownBackbone("regnety_160.swag_lc_in1k", "MIRO's largest; SWAG weights for non-commercial use"),
    KnownBackbone("mobilenetv3_large_100.ra_in1k", "for phones, with squeeze-and-excitation"),
    KnownBackbone("tf_efficientnet_lite0", "for microcontrollers and phones; no squeeze-and-excitation"),
    KnownBackbone("distilbert-base-uncased", "text; as WILDS trains on Amazon reviews", extra="text"),
    KnownBackbone("distilbert-mini", "text; two narrow layers, words by hash, random weights only", extra="text"),
    KnownBackbone("mnist_cnn", "digits; DomainBed's network, random weights only"),
    KnownBackbone("digits_cnn", "digits; the same at a quarter of the width"),
)
KNOWN = {backbone.name: backbone for backbone in _ALL}
