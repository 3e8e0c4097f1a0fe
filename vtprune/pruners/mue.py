"""MuE: the vision tokens of an image stop being computed once a decoder layer hardly turns them any more."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.errors import CannotCut, VTPruneError
from vtprune.method.answers import Routes
from vtprune.method.asking import Asking, asking
from vtprune.method.checks import check_scores
from vtprune.method.pruner import Counted, budget_of
from vtprune.method.registry import register
from vtprune.method.stages import InLayers
from vtprune.method.views import RoutedTokens
from vtprune.pruners.parts.checks import is_number

# Of the image, where the authors caption.
THETA = 0.99
# Names of what is noted from layer to layer: which images have stopped, and what is answered once all have.
STOPPED, SETTLED = "stopped", "settled"


def image_cosines(states: Tensor, before: Tensor, image: Tensor, count: int) -> Tensor:
    """(B, count) the cosine, of each image, between its states (B, n, D) after a layer and `before` it, tokens and
    channels as one vector; image: (B, n) the number of each token's image, -1 for text. 0 for an image of no tokens.
    """
    states, before = states.float(), before.float()
    products = torch.stack(
        [torch.linalg.vecdot(one, two) for one, two in ((states, before), (states, states), (before, before))]
    )
    own = image[:, None, :] == torch.arange(count, device=image.device)[:, None]
    sums = torch.where(own, products[:, :, None, :], 0.0).sum(dim=-1)
    lengths = sums[1:].sqrt().prod(dim=0).clamp(min=torch.finfo(torch.float32).tiny)
    return sums[0] / lengths


@register(
    "mue",
    paper="You Need Multiple Exiting: Dynamic Early Exiting for Accelerating Unified Vision Language Model",
    arxiv="2211.11152",
    licence="Apache-2.0",
    needs="hidden states of decoder layers",
)
@dataclass(frozen=True)
class MuE(InLayers):
    """MuE: multiple exiting (CVPR 2023, arXiv 2211.11152), for the vision tokens of a decoder.

    After each decoder layer the states of an image's tokens, as one vector, are compared with those before the layer;
    once the cosine is above `theta` (default 0.99, what the authors' script gives the image for captions), the
    image stops: no later layer computes its tokens. They are still read: each later layer has keys and values of
    their last states, by its own norm and projections, so text attends to them as before, and the cache is as long as
    that of the unpruned model. What is saved are their queries, attention and MLPs. Images of one batch stop each by
    themselves; `theta=1` stops none, bit for bit.

    The threshold decides how many layers compute an image. With a `keep`, which is no part of the paper, no cosine is
    read: every image stops after the same layer, the last one with which the mean over decoder layers is at most
    `keep`. At least layer 0 computes everything, and an image whose budget is less is kept whole.

    Departures. The authors exit from an encoder-decoder (OFA) whose encoder takes image and text one after the other;
    here the stack that is left is the decoder, by the same rule. Their code flattens the whole batch into the vector;
    here it is one image, as where the batch is one. Where the authors' decoder stops, layers above are handed the keys
    and values of the last one that ran; here each makes its own of the states, since the tokens of the text, which run
    on, ask with queries of each layer. Text never stops. The authors train every layer's output to be the
    last one (a loss a layer); a model that was not trained so loses more. Cosines are sums over elements, which
    FLOPs of matrix products leave out. Reference: OFA-Sys/OFA, branch feature/MuE.
    """

    theta: float | None = None

    counted = Counted.MEAN_OF_LAYERS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.theta is None:
            return
        if not is_number(self.theta) or not -1 <= self.theta <= 1:
            raise VTPruneError(f"{self.name}: theta is a cosine, a number from -1 to 1, got {self.theta!r}")
        if self.keep is not None or self.keep_video is not None:
            raise VTPruneError(f"{self.name}: keep and theta contradict each other; give one of them")

    @property
    def threshold(self) -> float:
        """The cosine above which an image stops."""
        return THETA if self.theta is None else self.theta

    @property
    def default_keep(self) -> None:
        """A threshold decides."""
        return None

    def routed_layers(self) -> tuple[int, ...]:
        """All but the first one, whose states before and after it are the first to be compared."""
        return tuple(range(1, self.model.decoder_depth))

    def routed_budget(self, tokens: int, layer: int, entered: int) -> int | None:
        """All or nothing of an image; raises CannotCut where layer 0 alone exceeds the budget."""
        if self.keep is None:
            return entered if self.threshold == 1 else None
        depth = self.model.decoder_depth
        run = budget_of(self.keep, tokens) * depth // entered
        if run < 1:
            raise CannotCut(
                f"{self.name} cannot keep {budget_of(self.keep, tokens)} of {tokens} tokens on average: the first of "
                f"{depth} layers computes all {entered}; raise keep, or combine with a method that prunes before the "
                "decoder"
            )
        return entered if layer < run else 0

    @asking
    def route(self, tokens: RoutedTokens) -> Asking[Routes]:
        """All text, and the tokens of the images that have not stopped; raises ScoreError for NaN."""
        if tokens.spared:
            return Routes(None if tokens.complete else self._kept(tokens, tokens.budgets < 1), read=True,
                          counts=tokens.counts)  # fmt: skip
        settled: Routes | None = tokens.memory.get(SETTLED)
        if settled is not None:
            return settled
        assert tokens.before is not None
        cosines = image_cosines(tokens.hidden, tokens.before, tokens.image, tokens.totals.shape[1])
        stopped = check_scores(cosines, self.name) > self.threshold
        before: Tensor | None = tokens.memory.get(STOPPED)
        stopped = stopped if before is None else stopped | before
        tokens.memory[STOPPED] = stopped
        known = yield stopped
        if not known.any():
            return Routes(read=True)
        kept = self._kept(tokens, stopped)
        *counts, running = (yield torch.cat([kept.sum(dim=1), (~stopped & (tokens.totals > 0)).sum()[None]])).tolist()
        routes = Routes(kept, counts=tuple(counts), read=True)
        if not running:
            tokens.memory[SETTLED] = routes
        return routes

    @staticmethod
    def _kept(tokens: RoutedTokens, stopped: Tensor) -> Tensor:
        """(B, n) what is computed where images (B, I) have stopped."""
        return tokens.text | ~stopped.gather(1, tokens.image.clamp(min=0))
