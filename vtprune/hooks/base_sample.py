"""Which base model some weights were trained on: a few of the base's own numbers, kept beside them and compared."""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

# Numbers of each tensor, evenly spread over it.
PER_TENSOR = 4
# Where PEFT leaves a base's own weight, and what its adapters are called.
WRAPPED, ADAPTER = ".base_layer", ".lora_"
# Half the distance of neighbouring numbers, relative to them, in the types that a base may have been rounded to.
ROUNDING = ((torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11))
# fp16 has nothing smaller.
TINY = 2.0**-24


@dataclass(frozen=True)
class BaseSample:
    """Numbers out of every tensor of a base model.

    names: a digest of the tensors' names and their order; values: (K,) fp32, NaN where a tensor cannot be read (it is
    offloaded, or quantised); adapted: whether PEFT adapters were on the model.
    """

    names: str
    values: Tensor
    adapted: bool

    def metadata(self) -> dict[str, str]:
        """As texts, which a safetensors file keeps in its header."""
        numbers = base64.b64encode(self.values.numpy().astype("<f4").tobytes()).decode()
        return {"base_names": self.names, "base_values": numbers, "base_adapted": str(self.adapted)}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str]) -> BaseSample | None:
        """Reads `metadata` back; None where there is nothing of it."""
        try:
            numbers = base64.b64decode(metadata["base_values"], validate=True)
            values = torch.frombuffer(bytearray(numbers), dtype=torch.float32)
            return cls(metadata["base_names"], values, metadata["base_adapted"] == "True")
        except (KeyError, ValueError):
            return None

    def matches(self, other: BaseSample) -> bool | None:
        """Whether both are of one base, whichever types it was held in; None where nothing can be compared.

        Numbers are equal up to the rounding of the types that they fit into: those of a base in fp32 and of the same
        base in bfloat16 match, those of two bases in fp32 only if they are the same.
        """
        if self.names != other.names or self.values.shape != other.values.shape:
            return None
        both = self.values.isfinite() & other.values.isfinite()
        if not both.any():
            return None
        own, others = self.values[both], other.values[both]
        size = torch.maximum(own.abs(), others.abs())
        return bool(((own - others).abs() <= (_rounding(own) + _rounding(others)) * size + TINY).all())


def sample_base(core: Any, brought: str) -> BaseSample:
    """The sample of a model; brought: the name of the submodule with what methods brought, which is left out."""
    weights = {
        name.replace(WRAPPED, ""): weight
        for name, weight in core.named_parameters()
        if not name.startswith(f"{brought}.") and ADAPTER not in name
    }
    adapted = any(ADAPTER in name for name, _ in core.named_parameters())
    names = sorted(weights)
    values = torch.cat([_numbers(weights[name]) for name in names])
    return BaseSample(sha256("\n".join(names).encode()).hexdigest()[:16], values, adapted)


def _numbers(weight: Tensor) -> Tensor:
    """(PER_TENSOR,) fp32 on the CPU."""
    if weight.is_meta or not weight.is_floating_point() or weight.dtype.itemsize < 2 or not weight.numel():
        return torch.full((PER_TENSOR,), math.nan)
    places = [weight.numel() * (2 * one + 1) // (2 * PER_TENSOR) for one in range(PER_TENSOR)]
    return weight.detach().reshape(-1)[torch.tensor(places, device=weight.device)].float().cpu()


def _rounding(values: Tensor) -> float:
    """The rounding of the coarsest type that holds all the values."""
    return next((error for dtype, error in ROUNDING if torch.equal(values.to(dtype).float(), values)), 0.0)
