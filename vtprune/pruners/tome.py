"""ToMe: in every encoder layer, tokens that are alike become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vtprune.errors import VTPruneError
from vtprune.method.answers import EncoderSelection
from vtprune.method.registry import register
from vtprune.method.views import EncoderLayer
from vtprune.pruners.parts.bipartite import Bipartite, flowing
from vtprune.pruners.parts.checks import check_choice, check_count, is_number


def schedule(r: int | Sequence[int], inflect: float, layers: int) -> tuple[int, ...]:
    """How many tokens merge in each of `layers` layers: `r` on average, or those of a list, and none behind its end.

    inflect: 1 begins with none and ends with 2 r, -1 is the other way round, 0 the same everywhere.
    """
    if not isinstance(r, int):
        return (*r, *[0] * (layers - len(r)))[:layers]
    first = int(r * (1 - inflect))
    step = 2 * (r - first) / max(1, layers - 1)
    return tuple(int(first + step * layer) for layer in range(layers))


@register(
    "tome",
    paper="Token Merging: Your ViT But Faster (ToMe)",
    arxiv="2210.09461",
    licence="CC BY-NC 4.0",
    needs="k of every encoder layer; attention that takes a bias for each key (not FlashAttention)",
)
@dataclass(frozen=True)
class ToMe(Bipartite):
    """ToMe: Token Merging: Your ViT But Faster (ICLR 2023, arXiv 2210.09461).

    r: tokens that merge in each layer, as released, instead of `keep`; a tuple has a number for each layer, and none
    merge in those behind its end. inflect: from -1 to 1, how r changes with depth: 1 from none to 2 r, -1 from 2 r to
    none. layers: only the first so many of the encoder layers that feed the decoder merge, None is all. proportional:
    whether keys weigh the tokens that they stand for; the authors leave that out where a model was trained with
    merging, and on MAE's. `default_keep` is a quarter: the paper classifies pictures, and has no setting for this.

    Between attention and MLP of each layer every second token (the CLS token's place is the first, it never merges)
    may flow into the one of the others with the most similar head-mean key; the pairs that are most alike (cosine) do.
    Vectors are means weighted by the tokens that each one stands for, and these weigh keys in the layers that follow
    (log size). Turbo is the same with a semantic term.

    Reference: facebookresearch/ToMe (CC BY-NC 4.0; not copied). Departures from it: `keep` is met exactly, N - keep
    spread evenly over the layers, earlier layers merging more where later ones, which halve the tokens at most, could
    not catch up; tokens stay in raster order, so in each layer neighbours part (the code puts the destinations last)
    and a merged one takes the place of its lowest member. With r a layer merges half of its tokens at most, as there.

    Nothing of it needs a CLS token. On Qwen (not in the paper) whole merge groups flow patch by patch, and keys (with
    their rotary embedding) are averaged over them; tokens of different windows may merge.
    """

    r: int | tuple[int, ...] | None = None
    inflect: float = 0.0
    layers: int | None = None
    proportional: bool = True

    @property
    def default_keep(self) -> float | None:
        """A quarter; None where `r` decides."""
        return None if self.r is not None else 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.name, "proportional", self.proportional, (True, False))
        if self.layers is not None:
            check_count(self.name, "layers", self.layers)
        if isinstance(self.r, tuple):
            if not self.r or not all(type(one) is int and one >= 0 for one in self.r):
                raise VTPruneError(
                    f"tome: r is an int of at least 1, or ints of at least 0 in a tuple, got {self.r!r}"
                )
        elif self.r is not None:
            check_count(self.name, "r", self.r)
        if not is_number(self.inflect) or not -1 <= self.inflect <= 1:
            raise VTPruneError(f"tome: inflect is a number from -1 to 1, got {self.inflect!r}")
        if self.inflect and not isinstance(self.r, int):
            raise VTPruneError(f"tome: inflect={self.inflect} bends a schedule of r, an int, got r={self.r!r}")
        self.check_rates(self.r)

    def rates(self, layers: int) -> tuple[int, ...] | None:
        """The schedule that `r` gives."""
        return None if self.r is None else schedule(self.r, self.inflect, layers)

    def resolve(self) -> dict[str, Any]:
        """`layers` resolved; raises VTPruneError where the encoder has fewer, or cannot get to a share that low."""
        found = super().resolve()
        if isinstance(self.r, tuple) and len(self.r) > found["layers"]:
            raise VTPruneError(f"tome: r has {len(self.r)} numbers, but only {found['layers']} encoder layers merge")
        return found

    @property
    def weighs_keys(self) -> bool:
        """`proportional`."""
        return self.proportional

    def prune_encoder(self, layer: EncoderLayer) -> EncoderSelection:
        """What merges in this layer; raises ScoreError for NaN, VTPruneError for a budget out of reach."""
        return flowing(layer, *self.matched(layer))
