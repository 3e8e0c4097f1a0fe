"""FlowCut: information flow through the vision encoder decides which tokens leave, layer by layer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtprune.errors import VTPruneError
from vtprune.pruner import ModelFacts, Pruner, ScoringWork, Tunable
from vtprune.pruners.checks import check_choice
from vtprune.pruners.flow import decoder_score, encoder_signals, prune_count, top_mask
from vtprune.registry import register
from vtprune.selection import Selection, check_scores, top
from vtprune.stream import DecoderLayer, EncoderLayer

DECODER_LAYER = 1
MEMORY = "flowcut.score"


@register(
    "flowcut",
    stage="encoder, decoder",
    paper="FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models",
    arxiv="2505.19536",
    licence="Apache-2.0",
    needs="q, k and v of every encoder layer; without a CLS token also of decoder layer 1",
    variants=("paper", "released"),
)
@dataclass(frozen=True)
class FlowCut(Pruner):
    """FlowCut: Rethinking Redundancy via Information Flow (NeurIPS 2025, arXiv 2505.19536).

    stages: 1 drops tokens in the vision encoder only, 2 leaves twice the budget there and the budget after
    decoder layer 1; None is the authors' choice: 1 for an encoder with CLS, 2 without. `default_keep` is
    their 64 of 576. Every encoder layer scores; every second one drops a share that grows as attention gets
    more focused; the last leaves exactly the stage's budget.

    Reference: TungChintao/FlowCut (Apache-2.0). The paper's own text was not at hand, so the default follows
    the released code where notes on the paper differ: semantic relevance is an unscaled softmax of value
    products with CLS (notes say cosine), the ratio divides by the root of the remaining layers (notes say
    all layers). Departures: the prune count is per image (`variant="released"` takes the largest of the
    batch, and renumbers positions); entropy takes 0 log 0 as 0; Qwen keeps whole merge groups, their four
    patches' scores averaged and the counts in groups, where the authors pruned single patches and gave the
    survivors the positions of the first ones; every crop of an anyres image gets its share of the budget.

    Encoders without CLS (SigLIP, Qwen): the mean query of all alive patches stands in for the CLS query, and
    there is no semantic term.
    """

    stages: int | None = None
    variant: str = "paper"

    default_keep: ClassVar[int | float] = 64 / 576

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.name, "stages", self.stages, (None, 1, 2))
        check_choice(self.name, "variant", self.variant, self.info.variants)

    @property
    def compact_positions(self) -> bool:
        """True for variant="released"."""
        return self.variant == "released"

    def search_space(self) -> dict[str, Tunable]:
        """The number of stages; two cost a little more than one at the same keep."""
        return {"stages": Tunable(choices=(1, 2))}

    def for_model(self, facts: ModelFacts) -> FlowCut:
        """`stages` resolved; raises VTPruneError where the encoder or the decoder is too shallow."""
        stages = self.stages or (1 if facts.has_cls else 2)
        if facts.has_cls and facts.encoder_depth < 2:
            raise VTPruneError(f"flowcut needs at least 2 encoder layers with CLS, got {facts.encoder_depth}")
        if stages == 2 and facts.decoder_depth < DECODER_LAYER + 2:
            raise VTPruneError(
                f"flowcut's second stage drops tokens after decoder layer {DECODER_LAYER}, so it needs at "
                f"least {DECODER_LAYER + 2} decoder layers, got {facts.decoder_depth}; stages=1 works"
            )
        return dataclasses.replace(self, stages=stages)

    def encoder_budget(self, tokens: int) -> int:
        """The budget, twice that where a second stage follows."""
        return min(tokens, self.budget(tokens) * (self.stages or 1))

    def input_budget(self, tokens: int) -> int:
        """What the encoder stage leaves."""
        return self.encoder_budget(tokens)

    def encoder_layers(self, depth: int) -> tuple[int, ...]:
        """All of them (with CLS the last one leaves everything as it is)."""
        return tuple(range(depth))

    def prune_encoder(self, layer: EncoderLayer) -> Tensor | None:
        """Accumulates the score; every second layer says which tokens go on. Raises ScoreError for NaN."""
        remaining = layer.depth - 1 - layer.index - (layer.prefix > 0)
        alive = layer.valid.sum(dim=-1)
        if remaining < 0 or not bool((alive > layer.budget).any()):
            return None
        attention, score = encoder_signals(layer)
        past = layer.memory.get(MEMORY)
        score = score if past is None else 0.5 * past + 0.5 * score
        layer.memory[MEMORY] = score
        if remaining % 2:
            return None
        if remaining == 0:
            return top_mask(score, layer.budget, layer.valid)
        count = prune_count(attention, alive, layer.budget, remaining)
        if self.variant == "released":
            count = count.max()
        return top_mask(score, (alive - count).maximum(layer.budget), layer.valid)

    def decoder_layers(self, depth: int) -> tuple[int, ...]:
        """Decoder layer 1 where there is a second stage."""
        return (DECODER_LAYER,) if self.stages == 2 else ()

    def achieved(self, counts: list[int]) -> float:
        """The tokens that are left in the end, whatever entered the decoder."""
        return float(counts[-1])

    def prune_decoder(self, layer: DecoderLayer) -> Selection | None:
        """Keeps the budget's best by the last prompt token; raises ScoreError for NaN."""
        if layer.vision.numel() <= layer.budget:
            return None
        return Selection(top(check_scores(decoder_score(layer), self.name), layer.budget))

    def scoring_flops(self, work: ScoringWork) -> int:
        """A row of attention a layer and, with CLS and in the decoder, a row of value products."""
        rows = 2 if work.has_cls else 1
        encoder = sum(work.encoder_patches[i] for i in work.encoder_layers) * rows * 2 * work.encoder_width
        return encoder + len(work.decoder_layers) * work.kept * 2 * 2 * work.decoder_width
