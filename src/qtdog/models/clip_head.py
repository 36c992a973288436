"""CLIP's text tower: a classifier out of the names of the classes."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from qtdog.core.errors import ModelError, extra, unknown
from qtdog.models.hub import reason_of, short_try

PROMPT = "a photo of a {}."
# timm's name of an image tower → open_clip's names of model and weights
TEXT_TOWERS = {
    "vit_base_patch16_clip_quickgelu_224.openai": ("ViT-B-16-quickgelu", "openai"),
    "vit_base_patch16_clip_224.openai": ("ViT-B-16-quickgelu", "openai"),
    "vit_base_patch16_clip_224.laion2b": ("ViT-B-16", "laion2b_s34b_b88k"),
}


def check_has_text_tower(backbone: str) -> None:
    """Refuse a backbone whose embeddings no text shares.

    Raises:
        ModelError: there is no text tower for it.
    """
    if backbone not in TEXT_TOWERS:
        text = unknown("backbone with a text tower", backbone, TEXT_TOWERS)
        raise ModelError(f"model.head=text takes the classes' names through CLIP: {text}")


@torch.no_grad()
def zero_shot_classifier(backbone: str, class_names: Sequence[str]) -> Tensor:
    """Return the weights of CLIP's zero-shot classifier, shape (n_classes, d).

    Formula: W_c = exp(τ) · t_c / ‖t_c‖, with t_c the embedding of "a photo of a CLASS." and exp(τ) CLIP's learned scale
    of the logits, so that W x / ‖x‖ are CLIP's logits for an image embedding x. Source: Radford et al., *Learning
    Transferable Visual Models From Natural Language Supervision*, ICML 2021, section 3.1; CLIPood (Shu et al., ICML
    2023) begins its fine-tuning there.

    Args:
        backbone: a name in `TEXT_TOWERS`.
        class_names: names of the classes; an underscore is read as a space.

    Raises:
        ModelError: open_clip is not installed, there is no text tower, or its weights cannot be had.
    """
    check_has_text_tower(backbone)
    library = _open_clip()
    model_name, weights = TEXT_TOWERS[backbone]
    with short_try() as is_there:
        try:
            model: Any = library.create_model(model_name, pretrained=weights).eval()
        except Exception as error:  # the hub's clients raise errors of many libraries
            reason = reason_of(error, is_there)
            text = f"the text tower of '{backbone}' (open_clip: {model_name}, {weights}) could not be had: {reason}"
            raise ModelError(f"{text}. Check the connection and try again, or use --set model.head=linear.") from error
    prompts = [PROMPT.format(name.replace("_", " ")) for name in class_names]
    embeddings = model.encode_text(library.get_tokenizer(model_name)(prompts))
    return model.logit_scale.exp() * normalize(embeddings.float(), dim=-1)


def _open_clip() -> ModuleType:
    with extra("clip", "model.head=text needs open_clip"):
        import open_clip
    return open_clip
