"""How small the codes of a model could be: their entropy, the bound that no code for single symbols goes below."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from qtdog.core.quantized import QuantizedTensor


@dataclass(frozen=True)
class CodeEntropy:
    """What codes must cost.

    Attributes:
        n_codes: how many there are.
        bits_per_code: entropy of the codes, each tensor by its own frequencies, averaged over all codes; 0 without any.
    """

    n_codes: int
    bits_per_code: float

    @property
    def bytes(self) -> float:
        """Bytes of all codes at that price."""
        return self.n_codes * self.bits_per_code / 8


def entropy_bits(codes: Tensor) -> float:
    """Return the empirical entropy of integer codes in bits per code, -Σ p log2 p over their frequencies p.

    Source: Shannon, *A Mathematical Theory of Communication*, 1948, theorem 9: codes that are drawn independently
    cannot be stored in less. Codes of a Gaussian weight with a standard deviation of σ steps have log2(σ sqrt(2πe)).

    Args:
        codes: int8, any shape, at least one.

    Example:
        >>> entropy_bits(torch.tensor([1, 1, -1, 0], dtype=torch.int8))
        1.5
    """
    counts = torch.bincount(codes.reshape(-1).int() + 128)
    frequencies = counts[counts > 0].double() / codes.numel()
    return -(frequencies * frequencies.log2()).sum().item() + 0.0


def code_entropy(weights: Iterable[QuantizedTensor]) -> CodeEntropy:
    """Return the entropy of the codes of several weights, one under several names counted once.

    Example:
        >>> from qtdog.core.quantized import QuantSpec
        >>> codes = torch.tensor([[1, 1, -1, 0]], dtype=torch.int8)
        >>> code_entropy([QuantizedTensor(codes, torch.ones(1), QuantSpec(2))])
        CodeEntropy(n_codes=4, bits_per_code=1.5)
    """
    once = {id(weight): weight for weight in weights}.values()
    n_codes = sum(weight.codes.numel() for weight in once)
    n_bits = math.fsum(weight.codes.numel() * entropy_bits(weight.codes) for weight in once)
    return CodeEntropy(n_codes, n_bits / n_codes if n_codes else 0.0)
