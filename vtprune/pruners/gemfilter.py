"""GemFilter: the first decoder layers read the whole prompt to choose the tokens that all layers then read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, avg_pool2d

from vtprune.errors import VTPruneError
from vtprune.method.answers import Selection
from vtprune.method.checks import check_scores
from vtprune.method.facts import Work
from vtprune.method.pruner import Tunable
from vtprune.method.registry import register
from vtprune.method.stages import NOTHING, BeforeDecoder, Read
from vtprune.method.views import DecoderLayer, VisionStream
from vtprune.pruners.parts.attending import check_attending, snapped
from vtprune.pruners.parts.checks import check_choice
from vtprune.pruners.parts.staged import scaled_layers

POOLINGS = ("sequence", "grid")


def last_logits(layer: DecoderLayer) -> Tensor:
    """(n,) fp32 sum over heads of the last token's query times each key of the row's tokens, padding left out: no
    scale, no softmax."""
    keys = layer.key[:, layer.first : layer.last + 1].float()
    return torch.einsum("hqd,hnd->n", layer.last_query.float(), keys)


def pool_sequence(scores: Tensor) -> Tensor:
    """(n,) mean over 5 neighbours of a sequence, zeros beyond its ends."""
    return avg_pool1d(scores[None], kernel_size=5, stride=1, padding=2)[0]


def pool_grid(scores: Tensor, indices: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """(N,) mean over those of the 3 x 3 neighbours in the same frame that are self.

    scores: (N,) of the tokens at `indices` (N,) of the raster grid (t, h, w).
    """
    place = indices.to(scores.device)
    frames, height, width = grid
    planes = scores.new_zeros(2, frames * height * width)
    planes.index_copy_(1, place, torch.stack([scores, torch.ones_like(scores)]))
    sums = avg_pool2d(planes.view(2, frames, height, width), kernel_size=3, stride=1, padding=1).flatten(1)
    own, members = sums.index_select(1, place)
    return own / members


@register(
    "gemfilter",
    paper="Discovering the Gems in Early Layers: Accelerating Long-Context LLMs with 1000x Input Token Reduction",
    arxiv="2409.17422",
    licence="Apache-2.0",
    needs="the last prompt token's query, and all keys, of an early decoder layer: the layers before it run twice",
    variants=("paper", "released"),
    unserved="chooses by decoder layers that have to run first",
)
@dataclass(frozen=True)
class GemFilter(BeforeDecoder):
    """GemFilter: Discovering the Gems in Early Layers (arXiv 2409.17422).

    The decoder layers before `layer` (counted from 0; by default 13 of 32 as a fraction of the depth, the published
    one of Llama-3.1-8B; 19 of 40 for Mistral-Nemo, 19 of 32 for Phi-3.5-mini) read the whole prompt and keep nothing
    of it. By the query and the keys that `layer` would compute, every token gets the last prompt token's logit: the
    sum over heads, unscaled, without softmax, averaged over 5 neighbours in the prompt (zeros beyond its ends). The
    best vision tokens and all text then go through the whole decoder as the prompt, so that every layer's cache is
    short; `keep` counts them. pooling="grid" averages over the 3 x 3 neighbours in the image instead (an own variant:
    a sequence of tokens breaks at every line of an image).

    Reference: SalesforceAIResearch/GemFilter. The method is one for text: the budget there (1024 tokens of 100K, text
    and all) says nothing of images, `default_keep` 0.25 is this project's. Departures from it: only vision tokens are
    dropped, text never is, with any variant (the code keeps a template's or a question's token only if its score is
    high); kept tokens keep their positions (paper and code number them anew: variant="released", where positions are
    1-D); a batch may hold many rows, and a prompt many images, each with its own budget; `layer` itself computes its
    keys and one query alone (the code runs it whole); in a later turn the tokens of that turn are neighbours of each
    other only, while the layers before see all turns.
    """

    layer: int | None = None
    pooling: str = "sequence"
    variant: str = "paper"

    published_layer: ClassVar[int] = 13

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.name, "pooling", self.pooling, POOLINGS)
        if self.layer is not None and (type(self.layer) is not int or self.layer < 0):
            raise VTPruneError(f"{self.name}: layer is an int of at least 0, got {self.layer!r}")

    def resolve(self) -> dict[str, Any]:
        """Nothing; raises VTPruneError for a layer that the decoder does not have."""
        if self.layer is not None and self.layer >= self.model.decoder_depth:
            raise VTPruneError(
                f"{self.name}: the decoder's layers are 0 to {self.model.decoder_depth - 1}, got layer={self.layer}"
            )
        check_attending(self.name, "layer", () if self.layer is None else (self.layer,), self.model.attention_layers)
        return {}

    @property
    def renumbers(self) -> bool:
        """True for variant="released"."""
        return self.variant == "released"

    @property
    def input_reads(self) -> frozenset[Read]:
        """Rows and columns, where scores are averaged over a grid."""
        return frozenset({Read.GRID}) if self.pooling == "grid" else NOTHING

    def search_space(self, tokens: float) -> dict[str, Tunable]:
        """Over which neighbours scores are averaged."""
        return {"pooling": Tunable(choices=POOLINGS)}

    def probe_layer(self) -> int:
        """`layer`, or the published one as a fraction of the depth, or the next one with attention."""
        scaled = scaled_layers((self.published_layer,), self.model.decoder_depth) or (0,)
        return snapped(scaled, self.model.attention_layers)[0] if self.layer is None else self.layer

    def scores(self, stream: VisionStream) -> Tensor:
        """(N,) fp32, pooled; raises ScoreError for NaN."""
        layer = stream.probe
        assert layer is not None
        logits = last_logits(layer)
        vision = layer.vision.to(logits.device) - layer.first
        if self.pooling == "grid":
            return check_scores(pool_grid(logits[vision], stream.indices, stream.grid), self.name)
        return check_scores(pool_sequence(logits)[vision], self.name)

    def select(self, stream: VisionStream) -> Selection:
        """Keeps the tokens with the highest scores."""
        return Selection.best(self.scores(stream), stream.budget)

    def flops(self, work: Work) -> int:
        """One row of logits; what the probe itself computes is counted with its layers."""
        return 2 * work.probed * work.attention_width
