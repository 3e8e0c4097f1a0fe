"""Random tokens: the baseline that every method has to beat."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.errors import VTPruneError
from vtprune.method.answers import Selection
from vtprune.method.asking import Asking, asking, started
from vtprune.method.registry import register
from vtprune.method.stages import BeforeDecoder
from vtprune.method.views import VisionStream


@asking
def pixel_seed(pixels: Tensor, seed: int) -> Asking[int]:
    """A seed in 0 .. 2**63 - 1 from `seed` and an image's pixels (any shape).

    Of the pixels it reads which ones are above 0, where no rounding can take them across: the same in float32, float16
    and bfloat16, however often they were converted. (Rounding them to the coarsest type first would not be: a value
    that float16 has rounded to the middle between two bfloat16 ones may go either way.) Images whose pixels lie on the
    same sides of 0, which is the mean colour in what processors make, share a seed.
    """
    above = yield pixels.detach() > 0
    digest = hashlib.blake2b(above.tobytes(), digest_size=8, key=str(seed).encode())
    return int.from_bytes(digest.digest(), "little") >> 1


def random_tokens(tokens: int, count: int, seed: int) -> Tensor:
    """`count` of `tokens` indices without repeats, ascending: (count,) int64 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(tokens, generator=generator)[:count].sort().values


@register("random", paper="", licence="Apache-2.0", needs="pixels", serves="picture")
@dataclass(frozen=True)
class Random(BeforeDecoder):
    """Uniformly random tokens, seeded from (seed, the image's pixels: which ones are above 0).

    The same image keeps the same tokens in any batch, row and dtype; another `seed` draws others, and a smaller
    `keep` keeps a subset of a larger one's. `default_keep` 0.25.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or abs(self.seed) >= 2**63:
            raise VTPruneError(f"random: seed is an int of at most 63 bits, got {self.seed!r}")

    @asking
    def select(self, stream: VisionStream) -> Asking[Selection]:
        """Keeps `stream.budget` random tokens."""
        seed = yield from started(pixel_seed, stream.pixels, self.seed)
        kept = random_tokens(stream.features.shape[0], stream.budget, seed)
        return Selection(kept.to(stream.features.device), sound=True)
