"""LazyLLM: the decoder drops tokens at a few layers, and every later step may take others up again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtprune.method import schedules
from vtprune.method.facts import Work
from vtprune.method.pruner import Tunable
from vtprune.method.registry import register
from vtprune.pruners.parts.checks import check_share
from vtprune.pruners.parts.staged import Stepped


@register(
    "lazyllm",
    paper="LazyLLM: Dynamic Token Pruning for Efficient Long Context LLM Inference",
    arxiv="2407.14057",
    licence="no code released",
    needs="the newest token's attention in the decoder layers before which tokens drop, at every step",
)
@dataclass(frozen=True)
class LazyLLM(Stepped):
    """LazyLLM: Dynamic Token Pruning for Efficient Long Context LLM Inference (arXiv 2407.14057).

    In the prefill, `ratio` (0.3) of the vision tokens alive drop before each of `layers` (after 9, 19 and 28 of 32
    layers, as fractions of the depth: figures 4 and 7 of the paper, which states no default): those that the last
    prompt token attends to least in the layer before (softmax over the whole prompt, mean over heads). `keep` instead
    counts the mean over decoder layers of the prefill and sets that share; where more than half would drop at once,
    the layers move towards the first ones. Explicit `layers` stay. What a layer is not given waits in its auxiliary
    cache, as the hidden state that the layer before put out.

    Each later forward on the cache begins with all tokens and chooses anew after the same layers: of the tokens that
    take part so far, as many of each image as in the prefill, by the attention of the last new token to everything
    that it attended to self. The new tokens attend to text and to the chosen ones. A chosen token without keys and
    values in the layers that follow comes out of the auxiliary cache, passes through them beside the new tokens, and
    its keys and values are appended; where it is cut again it waits self. Every layer computes a token once at the
    most. Positions are the original ones throughout.

    The paper is for text and has no released code. Own decisions: only vision tokens drop, ranked within their image;
    counts instead of a percentile over the whole prompt; a returning token attends to all that the layer's cache
    holds before its place, in use in this step or not, and to those that return with it (its keys stay for later
    steps, which may use them all); the hidden states of tokens that returned are kept, so that cropping the cache
    takes their return back; several new tokens share the choice of the last one (so assisted decoding, whose drafts
    should each choose, is refused); the images of a later turn are ranked by attention within that turn.
    """

    ratio: float | None = None

    published_layers: ClassVar[tuple[int, ...]] = (9, 19, 28)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.name, "ratio", self.ratio, self.keep)

    @property
    def revives(self) -> bool:
        """True where something drops."""
        return not (isinstance(self.keep, float) and self.keep == 1)

    @property
    def step(self) -> float:
        """What `ratio` leaves: 0.7."""
        return 1 - (0.3 if self.ratio is None else self.ratio)

    def search_space(self, tokens: float) -> dict[str, Tunable]:
        """How the budget is spread over the layers."""
        return {"schedule": Tunable(choices=schedules.NAMES)} if self.keep is not None else {}

    def flops(self, work: Work) -> int:
        """One row of attention a layer, in the prefill."""
        return len(work.decoder_layers) * 2 * work.prompt * work.attention_width
