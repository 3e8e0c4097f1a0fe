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
# Names of what is noted from layer to layer: which images have stopped, and what is answered once all have; which
# tokens are whose, and how many; and how long the states were that the last layer was asked about.
STOPPED, SETTLED, OTHERS, HELD, LENGTHS = "stopped", "settled", "others", "held", "lengths"


def outside(image: Tensor, count: int) -> Tensor:
    """(B, count, n) which tokens are none of each image's; image: (B, n) the number of each token's, -1 for text."""
    return image[:, None, :] != torch.arange(count, device=image.device)[:, None]


def image_lengths(states: Tensor, others: Tensor) -> Tensor:
    """(B, I) the length of the states (B, n, D) of each image, tokens and channels as one vector; others: (B, I, n)
    which tokens are none of it."""
    lengths = torch.linalg.vector_norm(states.float(), dim=-1)
    return torch.linalg.vector_norm(lengths[:, None].masked_fill(others, 0.0), dim=-1)


def cosines_of(states: Tensor, before: Tensor, others: Tensor, lengths: Tensor) -> Tensor:
    """(B, I) the cosine, of each image, between states (B, n, D) and those `before`; lengths: (B, I) the products of
    both lengths. 0 for an image of no tokens."""
    products = torch.linalg.vecdot(states.float(), before.float())
    sums = products[:, None].masked_fill(others, 0.0).sum(dim=-1)
    return sums / lengths.clamp(min=torch.finfo(torch.float32).tiny)


def image_cosines(states: Tensor, before: Tensor, image: Tensor, count: int) -> Tensor:
    """(B, count) the cosine, of each image, between its states (B, n, D) after a layer and `before` it, tokens and
    channels as one vector; image: (B, n) the number of each token's image, -1 for text. 0 for an image of no tokens.
    """
    others = outside(image, count)
    return cosines_of(states, before, others, image_lengths(states, others) * image_lengths(before, others))


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
        stopped = check_scores(self._cosines(tokens), self.name, still=True) > self.threshold
        before: Tensor | None = tokens.memory.get(STOPPED)
        stopped = stopped if before is None else stopped | before
        tokens.memory[STOPPED] = stopped
        image, held = tokens.memory.get(HELD, (None, None))
        if image is tokens.image:
            known = yield stopped
        else:
            # How many tokens each image has, and how many columns are none: known from the first question on.
            inside = (~tokens.memory[OTHERS][1]).sum(dim=2)
            told = yield torch.cat([stopped, inside, tokens.text.sum(dim=1, keepdim=True)], dim=1)
            known, held = told[:, : stopped.shape[1]].astype(bool), told[:, stopped.shape[1] :]
            tokens.memory[HELD] = tokens.image, held
        if not known.any():
            return Routes(read=True)
        running = held[:, :-1] * ~known
        counts = tuple((running.sum(axis=1) + held[:, -1]).tolist())
        routes = Routes(self._kept(tokens, stopped), counts=counts, read=True)
        if not running.any():
            tokens.memory[SETTLED] = routes
        return routes

    @staticmethod
    def _cosines(tokens: RoutedTokens) -> Tensor:
        """`image_cosines`, with what is known from the layer before: whose tokens are which, and how long the states
        were that are now those before."""
        assert tokens.before is not None
        memory = tokens.memory
        image, others = memory.get(OTHERS, (None, None))
        if image is not tokens.image:
            others = outside(tokens.image, tokens.totals.shape[1])
            memory[OTHERS] = tokens.image, others
        states, length = memory.get(LENGTHS, (None, None))
        if image is not tokens.image or states is not tokens.before:
            length = image_lengths(tokens.before, others)
        now = image_lengths(tokens.hidden, others)
        memory[LENGTHS] = tokens.hidden, now
        return cosines_of(tokens.hidden, tokens.before, others, now * length)

    @staticmethod
    def _kept(tokens: RoutedTokens, stopped: Tensor) -> Tensor:
        """(B, n) what is computed where images (B, I) have stopped."""
        return tokens.text | ~stopped.gather(1, tokens.image.clamp(min=0))
