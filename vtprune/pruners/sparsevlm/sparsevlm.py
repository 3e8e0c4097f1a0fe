"""SparseVLM: the words that look at an image rate its tokens in the decoder; the best of the others are recycled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtprune.errors import VTPruneError
from vtprune.method import schedules
from vtprune.method.answers import Selection
from vtprune.method.asking import Asking, asking, started
from vtprune.method.checks import check_scores
from vtprune.method.facts import Work
from vtprune.method.pruner import Counted, Tunable
from vtprune.method.registry import register
from vtprune.method.stages import NOTHING, Read
from vtprune.method.views import DecoderLayer, VisionStream
from vtprune.pruners.parts.checks import check_choice, check_factor
from vtprune.pruners.parts.prompt_attention import attention_to_image, text_behind
from vtprune.pruners.parts.staged import Staged
from vtprune.pruners.sparsevlm.raters import choose_raters, debiased_scores, relevance
from vtprune.pruners.sparsevlm.recycling import (
    cluster_count,
    direct_count,
    pool_size,
    recycle,
)

PUBLISHED = "published"
PUBLISHED_TOKENS = 576
# Tokens that stay as they are at the three stages, in the settings for 192, 128, 96 and 64 tokens, by version.
PUBLISHED_STAGES = {
    1: ((300, 200, 110), (303, 110, 36), (238, 48, 26), (66, 30, 17)),
    2: ((300, 200, 118), (238, 108, 60), (246, 54, 28), (66, 34, 20)),
}
# Tokens that stay for each rank of the raters' attention, in the released scripts.
RANK_SCALE, RANK_BIAS = 13.5, 0.0


@register(
    "sparsevlm",
    paper="SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference",
    arxiv="2410.04417",
    licence="Apache-2.0",
    needs="the embeddings of the text after the image; its attention to the image, and hidden states, in the decoder "
    "layers before which tokens drop",
    variants=("paper", "released"),
)
@dataclass(frozen=True)
class SparseVLM(Staged):
    """SparseVLM: Visual Token Sparsification (ICML 2025, arXiv 2410.04417), and SparseVLM+ (`version=2`).

    Raters are the words after the image to which, in a softmax over the words of their embeddings' products with an
    image token's, the image gives more than to the average word. Before decoder `layers` (3, 7 and 16 of 32 as
    fractions of the depth) the tokens stay that the raters attended to most in the layer before, as a mean over heads.
    Of the others the best 30% are recycled (`recycle`, by default in version 1): they form a tenth as many clusters by
    the peaks of their density, and the mean of each takes part in what follows. Version 2 divides attention by the
    logits that the rotary embedding alone gives (it turns vectors of ones), keeps the 14 heads in which that sums up
    to most, and recycles nothing.

    `keep` counts the mean over decoder layers of the tokens that they process, clusters included; the shares of the
    stages lie between those of the published settings (schedule="published"). None is the setting that the paper calls
    192 of 576 tokens: it counts the layers after which tokens drop as if they had dropped already, 206.5 are processed
    (`published_count`; the report has both). Clusters take half of a stage's places at most. `adaptive_rank` is the
    paper's rank-based ratio (version 1): of the tokens at a stage, `scale` times the rank of the raters' attention to
    them, plus `bias`, stay as they are (13.5 and 0), at least one of them is dropped, and a `keep` is never exceeded.

    Reference: Gumpest/SparseVLMs, Apache-2.0; `adaptive_rank` follows its first release. Departures from the code:
    kept tokens keep their positions (version 1 of the code renumbers them after every drop: variant="released", where
    positions are 1-D); a cluster stands at the place of its first member (the code: after the kept tokens, which
    variant="released" does not follow, since tokens stay in raster order); its vector is the exact mean (the code:
    divided by 1e-6 more); equal densities are told apart by the order of attention (the code: by random noise); every
    image of a prompt has raters of its own, text alone; where no word is above the mean all are raters, and without
    text after an image the last prompt token rates it. Only the raters' rows of attention are computed (the code: the
    whole map in every layer).
    """

    schedule: str = PUBLISHED
    version: int = 1
    recycle: bool | None = None
    adaptive_rank: bool = False
    scale: float | None = None
    bias: float | None = None
    variant: str = "paper"

    published_layers: ClassVar[tuple[int, ...]] = (3, 7, 16)
    schedule_names: ClassVar[tuple[str, ...]] = (PUBLISHED, *schedules.NAMES)
    # The layer after which tokens drop counts, in the paper, as if they had dropped already.
    published = Counted.AHEAD_OF_DROPS

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.name, "version", self.version, (1, 2))
        check_choice(self.name, "recycle", self.recycle, (None, True, False))
        check_choice(self.name, "adaptive_rank", self.adaptive_rank, (True, False))
        for option, value in (("scale", self.scale), ("bias", self.bias)):
            if value is None:
                continue
            check_factor(self.name, option, value)
            if not self.adaptive_rank:
                raise VTPruneError(f"{self.name}: {option} belongs to adaptive_rank; set adaptive_rank=True too")
        if self.adaptive_rank and self.version != 1:
            raise VTPruneError(f"{self.name}: adaptive_rank is the ratio of version 1, got version {self.version!r}")
        if self.adaptive_rank and self.schedule not in (PUBLISHED, "steps"):
            raise VTPruneError(
                f"{self.name}: adaptive_rank decides at each of the layers within schedule {PUBLISHED!r} or 'steps', "
                f"got {self.schedule!r}"
            )

    @property
    def default_keep(self) -> int | float | None:
        """The mean of the published setting for 192 tokens; None where the rank alone decides."""
        return None if self.adaptive_rank else super().default_keep

    @property
    def recycles(self) -> bool:
        """`recycle`, or whether the version does."""
        return self.version == 1 if self.recycle is None else self.recycle

    @property
    def renumbers(self) -> bool:
        """True for variant="released" of version 1."""
        return self.variant == "released" and self.version == 1

    @property
    def layer_reads(self) -> frozenset[Read]:
        """Hidden states, where tokens are recycled."""
        return frozenset({Read.HIDDEN}) if self.recycles else NOTHING

    @property
    def decides(self) -> bool:
        """Whether the rank, or the entropy, decides how many stay."""
        whole = isinstance(self.keep, float) and self.keep == 1
        return super().decides or (self.adaptive_rank and not whole)

    def search_space(self, tokens: float) -> dict[str, Tunable]:
        """How the budget is spread over the layers, whether tokens are recycled, and how much a rank is worth."""
        space = super().search_space(tokens)
        if self.adaptive_rank:
            space["schedule"] = Tunable(choices=(PUBLISHED, "steps"))
            space["scale"] = Tunable(0.5, 50.0, log=True)
        return {**space, "recycle": Tunable(choices=(True, False))}

    def settings(self) -> list[tuple[float, ...]]:
        """The shares of the tokens that the published settings leave at the three stages, clusters included."""
        return [stage_shares(stages, recycles=self.recycles) for stages in PUBLISHED_STAGES[self.version]]

    def own_ratios(self, layers: tuple[int, ...]) -> schedules.Ratios:
        """The published setting for 192 tokens, or its mean spread by another schedule."""
        depth = self.model.decoder_depth
        own = schedules.stage_ratios(depth, layers, self.settings()[0])
        if self.schedule == PUBLISHED:
            return own
        return schedules.fitted(self.schedule, depth, layers, schedules.mean(own))

    def ratios(self, share: float | None = None) -> schedules.Ratios:
        """The share of the tokens that each layer processes: between those of the published settings."""
        if share is None or self.schedule != PUBLISHED:
            return super().ratios(share)
        return schedules.between(self.model.decoder_depth, self.places(share), share, self.settings())

    @asking
    def remember(self, stream: VisionStream) -> Asking[dict[str, Any]]:
        """The raters, counted from the end of the row's text; raises ScoreError for NaN."""
        after = stream.text_after
        if not after:
            return {"raters": ()}
        scores = check_scores(relevance(stream.features, stream.text[-after:].to(stream.features.device)), self.name)
        raters = yield from started(choose_raters, scores)
        return {"raters": tuple(word - after for word in raters)}

    def rows(self, layer: DecoderLayer) -> Tensor:
        """(T,) places of the raters, or of the last prompt token if no text follows the image."""
        raters, text = list(layer.memory["raters"]), text_behind(layer)
        if not raters:
            return layer.vision.new_tensor([layer.last])
        # They are counted from the end.
        return layer.text[raters] if text is None else layer.vision.new_tensor([text[one] for one in raters])

    def scores(self, layer: DecoderLayer) -> Tensor:
        """The raters' attention, in version 2 without what the rotary embedding adds: (N,)."""
        rows = self.rows(layer)
        return debiased_scores(layer, rows) if self.version == 2 else attention_to_image(layer, rows).mean(dim=0)

    def prune_decoder(self, layer: DecoderLayer) -> Selection | None:
        """Keeps the best and recycles what is next; raises ScoreError for NaN."""
        alive, room = layer.vision.numel(), self._room(layer)
        if room >= alive and not self.decides:
            return None
        if self.adaptive_rank:
            attention = check_scores(attention_to_image(layer, self.rows(layer)), self.name)
            scores, most = attention.mean(dim=0), self.rank_count(attention)
        else:
            scores, most = check_scores(self.scores(layer), self.name, still=True), alive
            room = self.entropy_count(layer, scores) if self.decides else room
        direct = min(most, direct_count(alive, room) if self.recycles else room)
        left = direct + (min(cluster_count(alive - direct), room - direct) if self.recycles else 0)
        if left >= alive:
            return None
        if not self.recycles:
            return Selection.best(scores, direct)
        assert layer.hidden is not None
        return recycle(layer.hidden.index_select(0, layer.vision.to(layer.hidden.device)), scores, direct, left)

    def _room(self, layer: DecoderLayer) -> int:
        """The most tokens that may be left: the budget's, but where it is the rank alone that decides."""
        if self.adaptive_rank and self.keep is not None:
            return self.counts(layer.total, layer.entered)[layer.index + 1]
        return layer.vision.numel() if self.decides else layer.budget

    def rank_count(self, attention: Tensor) -> int:
        """How many tokens stay as they are by the rank of the raters' attention (T, N) to them; all of them where the
        rank is full, and all but one at the most otherwise."""
        tokens, rank = attention.shape[1], int(torch.linalg.matrix_rank(attention))
        scale, bias = RANK_SCALE if self.scale is None else self.scale, RANK_BIAS if self.bias is None else self.bias
        return tokens if rank == tokens else max(1, min(int(rank * scale + bias), tokens - 1))

    def flops(self, work: Work) -> int:
        """The raters' choice; at each stage their rows of attention, the positional kernel of these, and at most the
        distances and means of what is recycled."""
        raters, width = max(1, len(work.memory.get("raters", ()))), work.decoder_width
        total = 2 * work.tokens * work.text_after * width
        for row, image in zip(work.decoder_tokens, work.image_tokens, strict=True):
            total += 2 * raters * row * work.attention_width
            if self.version == 2:
                total += 2 * raters * image * work.attention_width // work.decoder_heads
            if self.recycles:
                total += 2 * pool_size(image) * (pool_size(image) + cluster_count(image)) * width
        return total


def stage_shares(stages: tuple[int, ...], *, recycles: bool) -> tuple[float, ...]:
    """The shares of 576 tokens that are left at each stage where `stages` stay as they are."""
    found, alive = [], PUBLISHED_TOKENS
    for direct in stages:
        alive = direct + (cluster_count(alive - direct) if recycles else 0)
        found.append(alive / PUBLISHED_TOKENS)
    return tuple(found)
