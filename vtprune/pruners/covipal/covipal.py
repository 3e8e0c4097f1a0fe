"""CoViPAL: a small trained module scores vision tokens before the decoder reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from vtprune.errors import VTPruneError
from vtprune.method.answers import Selection
from vtprune.method.checks import check_scores
from vtprune.method.choosing import top
from vtprune.method.facts import Work
from vtprune.method.registry import register
from vtprune.method.stages import BeforeDecoder, Guided
from vtprune.method.views import DecoderLayer, VisionStream
from vtprune.pruners.covipal.module import (
    log_soft_top,
    module_flops,
    new_module,
    scores_of,
)
from vtprune.pruners.parts.attending import check_attending, snapped
from vtprune.pruners.parts.checks import check_choice, check_count, is_number
from vtprune.pruners.parts.prompt_attention import attention_to_image
from vtprune.pruners.parts.staged import scaled_layers

STAGES = ("task", "guide")
RELAXATIONS = ("hard", "soft")
QUERIES = ("text", "last")


def guide_attention(layer: DecoderLayer, queries: str) -> Tensor:
    """(N,) fp32 the share of each token in the image's attention from the text after it ("text": the mean over its
    tokens, "last": its last one), averaged over heads; from the row's last token where no text follows."""
    rows = layer.text[layer.text > layer.vision.max().to(layer.text.device)]
    if not len(rows):
        rows = torch.tensor([layer.last])
    received = attention_to_image(layer, rows[-1:] if queries == "last" else rows).mean(dim=0)
    return received / received.sum().clamp(min=torch.finfo(received.dtype).tiny)


@register(
    "covipal",
    paper="CoViPAL: Layer-wise Contextualized Visual Token Pruning for Large Vision-Language Models",
    arxiv="2508.17243",
    licence="unknown (no code was at hand)",
    needs="a pruning module, trained with the model frozen; the text's embeddings",
    serves="text",
)
@dataclass(frozen=True)
class CoViPAL(BeforeDecoder, Guided):
    """CoViPAL: Layer-wise Contextualized Visual Token Pruning (EMNLP 2025 Findings, arXiv 2508.17243).

    A plug-and-play module scores an image's tokens by their decoder-width vectors and the text's embeddings; those
    with the highest scores enter the decoder, in order and at their own positions. It is trained with the model
    frozen, `stage` by stage, whenever it is in training mode and gradients are recorded; otherwise it selects:

    "guide": nothing is dropped, and the scores learn the attention that decoder layer `guide` (None: 18 of 32 as a
    fraction of the depth; the paper wants it deeper than the pruning) pays to each token. "task": the loss of the
    answers reaches the scores through attention. Train one, save, and go on from these weights with the other.

    Abstract and summaries were all that was at hand, so what follows is this project's own choice. Module: LayerNorm
    and a linear map to `width` for vision and text; `blocks` of self-attention, cross-attention to the text (`heads`)
    and an MLP of ratio 2; a LayerNorm and one number a token. It has no positions of its own: the encoder's vectors
    carry theirs, and the text is a set of words. An untrained module always has the same weights. Guide: the attention
    of the text after the image, the mean over its tokens (`queries="last"`: its last token), over heads, normalised
    over the image; the loss is KL(attention || softmax(scores / `temperature`)). Task: p = sigmoid((score - t) /
    `temperature`), with t such that p sums to the budget, so that no further loss has to keep it; log p is added to
    the attention logits of each token as a key in every layer. `relaxation="soft"` does just that and drops nothing
    (p = 0 is removal); "hard" drops what inference would drop, and gives the tokens kept log p's gradient without its
    value. Every score has a gradient, with "hard" those of dropped tokens through t alone. "hard" is the default
    because it trains what is then run, at less cost; in one short run each from the same weights it came out ahead on
    the bundled model. One module before the decoder (the paper may place more, between shallow layers). `keep` None
    is 0.25.

    Text that the labels of a forward (or `vtprune.mark_answers`) mark as an answer is not shown to the module, nor
    among the guide's queries; without them it cannot be told from the question. `keep` 1.0 leaves nothing to train.
    "task" needs attn_implementation="sdpa" or "eager".
    """

    guide: int | None = None
    stage: str = "task"
    relaxation: str = "hard"
    queries: str = "text"
    width: int = 512
    heads: int = 8
    blocks: int = 1
    temperature: float = 1.0

    published_guide: ClassVar[int] = 18
    untrained: ClassVar[str] = (
        "its module ranks tokens by random weights, at the full cost of its scoring, so it is of no use; random and "
        "grid do as well for nothing"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.name, "stage", self.stage, STAGES)
        check_choice(self.name, "relaxation", self.relaxation, RELAXATIONS)
        check_choice(self.name, "queries", self.queries, QUERIES)
        for option in ("width", "heads", "blocks"):
            check_count(self.name, option, getattr(self, option))
        if self.width % self.heads:
            raise VTPruneError(f"{self.name}: width is a multiple of heads ({self.heads}), got {self.width}")
        if not is_number(self.temperature) or self.temperature <= 0:
            raise VTPruneError(f"{self.name}: temperature is a finite number above 0, got {self.temperature!r}")
        if self.guide is not None and (type(self.guide) is not int or self.guide < 1):
            raise VTPruneError(
                f"{self.name}: guide is a decoder layer deeper than the pruning, an int of at least 1, got "
                f"{self.guide!r}"
            )

    def resolve(self) -> dict[str, Any]:
        """Nothing; raises VTPruneError for a guide that the decoder does not have."""
        depth = self.model.decoder_depth
        guide = self.guide_layer(depth)
        if (guide is None and self.stage == "guide") or (guide is not None and guide >= depth):
            raise VTPruneError(
                f"{self.name}: guide is one of the decoder's layers 1 to {depth - 1}, got {self.guide!r}"
            )
        if self.stage == "guide":
            given = () if self.guide is None else (self.guide,)
            check_attending(self.name, "guide", given, self.model.attention_layers)
        return {}

    def guide_layer(self, depth: int) -> int | None:
        """`guide`, or the default as a fraction of the depth (or the next layer with attention); None where no layer
        is deep enough."""
        found = snapped(scaled_layers((self.published_guide,), depth), self.model.attention_layers)
        return next(iter(found), None) if self.guide is None else self.guide

    def learns_from(self) -> int | None:
        """The guide layer, in its stage."""
        return self.guide_layer(self.model.decoder_depth) if self.stage == "guide" else None

    def make_module(self) -> nn.Module:
        """The pruning module, untrained."""
        return new_module(self.model.decoder_width, self.width, self.heads, self.blocks)

    def scores(self, stream: VisionStream) -> Tensor:
        """(N,) fp32, of the module; raises ScoreError for NaN."""
        return check_scores(scores_of(stream.module, stream.features, stream.text), self.name)

    def select(self, stream: VisionStream) -> Selection:
        """Keeps the tokens with the highest scores; in training, what the stage learns by."""
        scores = self.scores(stream)
        if not stream.training:
            return Selection.best(scores.detach(), stream.budget)
        everything = torch.arange(scores.numel(), device=scores.device)
        if self.stage == "guide":
            return Selection(everything, scores=scores, sound=True)
        log_shares = log_soft_top(scores, stream.budget, self.temperature)
        if self.relaxation == "soft":
            return Selection(everything, bias=log_shares, sound=True)
        kept = top(scores.detach(), stream.budget)
        return Selection(kept, bias=(log_shares - log_shares.detach())[kept], sound=True)

    def lesson(self, scores: Tensor, layer: DecoderLayer) -> Tensor:
        """The divergence of softmaxed scores (N,) from the guide's attention."""
        target = guide_attention(layer, self.queries).to(scores.device).detach()
        return kl_div((scores / self.temperature).log_softmax(dim=0), target, reduction="sum")

    def flops(self, work: Work) -> int:
        """All products of the module."""
        return module_flops(
            work.shown, work.text, decoder_width=work.decoder_width, width=self.width, blocks=self.blocks
        )
