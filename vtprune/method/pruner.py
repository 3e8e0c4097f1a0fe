"""The base class of every method: a frozen dataclass of hyper-parameters with up to three stages."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar

from torch import Tensor, nn

from vtprune.errors import VTPruneError
from vtprune.method.answers import (
    EncoderSelection,
    Eviction,
    Routes,
    Selection,
)
from vtprune.method.catalogue import PrunerInfo
from vtprune.method.facts import ModelFacts, ScoringWork
from vtprune.method.views import (
    CachedRow,
    DecoderLayer,
    EncoderLayer,
    RoutedTokens,
    VisionStream,
)


@dataclass(frozen=True)
class Tunable:
    """The values that a search may give to a hyper-parameter: numbers from `low` to `high`, or `choices`.

    whole: only ints; log: equal ratios count as equal steps.
    """

    low: float = 0.0
    high: float = 1.0
    whole: bool = False
    log: bool = False
    choices: tuple[str | int | float | bool | None, ...] = ()


def check_keep(keep: object) -> None:
    """Raises VTPruneError unless `keep` is None, an int of at least 1, or a float in (0, 1]."""
    if keep is None:
        return
    hint = "keep takes a count of vision tokens per image (an int of at least 1) or a fraction (a float in (0, 1])"
    if isinstance(keep, bool) or not isinstance(keep, Integral | float):
        raise VTPruneError(f"{hint}, got {keep!r}")
    if isinstance(keep, Integral) and keep < 1:
        raise VTPruneError(f"{hint}, got {keep!r}")
    if isinstance(keep, float) and not (math.isfinite(keep) and 0 < keep <= 1):
        raise VTPruneError(f"{hint}, got {keep!r}")


def budget_of(keep: int | float, tokens: int) -> int:
    """How many of `tokens` a keep asks for: min(keep, tokens), or max(1, round(keep * tokens))."""
    if isinstance(keep, int):
        return min(keep, tokens)
    return min(tokens, max(1, round(keep * tokens)))


@dataclass(frozen=True)
class Pruner:
    """A method and its hyper-parameters; subclasses override the stages they act in.

    keep: vision tokens to keep per image, a count (int) or a fraction of the image's tokens (float in
    (0, 1]); None is the paper's own setting (`default_keep`).
    """

    keep: int | float | None = None

    info: ClassVar[PrunerInfo]
    default_keep: ClassVar[int | float] = 0.25
    # What a method with weights of its own does before they are trained, as a message tells it.
    untrained: ClassVar[str] = ""

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if isinstance(self.keep, Integral):
            object.__setattr__(self, "keep", int(self.keep))

    @property
    def name(self) -> str:
        """The registry name."""
        return self.info.name

    @property
    def asked_keep(self) -> int | float:
        """`keep`, or the paper's own setting where it is None."""
        return self.default_keep if self.keep is None else self.keep

    @property
    def thresholds_decide(self) -> bool:
        """Whether no share was asked for, but something else decides how many tokens stay: reports then say None."""
        return False

    @property
    def compact_positions(self) -> bool:
        """Whether the released code renumbers positions after dropping (only for variant="released")."""
        return False

    @property
    def reads_encoder(self) -> bool:
        """Whether `select` needs q, k and v of the encoder layer that feeds the decoder."""
        return False

    @property
    def weighs_by_encoder(self) -> bool:
        """Whether vectors that `select` answers are weighed by what it reads of the encoder: gradients then flow
        through these q, k and v. Anything else that a method reads of attention is a constant to them."""
        return False

    @property
    def reads_last_layer(self) -> bool:
        """Whether `remember` or `select` needs q, k and v of the vision tower's last layer, which may lie past
        the one that feeds the decoder."""
        return False

    @property
    def reads_picture(self) -> bool:
        """Whether `remember` or `select` needs the image's real colours."""
        return False

    @property
    def needs_whole_grid(self) -> bool:
        """Whether `select` cannot follow a stage that leaves tokens out in the encoder."""
        return False

    @property
    def adaptive(self) -> bool:
        """Whether thresholds decide how many tokens stay: decoder stages are then always asked, and their answer
        is not held against a budget."""
        return False

    def search_space(self) -> dict[str, Tunable]:
        """The hyper-parameters that a search may set, by field name, at this `keep`; none by default."""
        return {}

    def effective(self, tokens: float) -> Pruner:
        """This pruner with what its hyper-parameters stand for on images of `tokens`, where they are None and that is
        known; a search starts from there."""
        return self

    def for_model(self, facts: ModelFacts) -> Pruner:
        """This pruner with what depends on the model filled in; raises VTPruneError for a setting that the
        model cannot meet (a layer beyond the decoder, say). Called once, by `wrap`."""
        return self

    def budget(self, tokens: int) -> int:
        """Vision tokens of an image of `tokens` that are left in the end."""
        return budget_of(self.asked_keep, tokens)

    def drops(self, tokens: int, depth: int) -> bool:
        """Whether anything of an image of `tokens` is to go anywhere, by the budgets of a decoder of `depth` layers;
        the budget of a whole staged method is a mean, which may round to all of them."""
        budgets = [self.budget(tokens), self.input_budget(tokens)]
        budgets += [self.decoder_budget(tokens, layer, tokens) for layer in self.decoder_layers(depth)]
        budgets += [self.routed_budget(tokens, layer, tokens) for layer in self.routed_layers(depth)]
        return min(budgets) < tokens

    def unmet(self, tokens: int, entered: int) -> str:
        """Why an image of `tokens`, `entered` of which reach the method, cannot be cut to its budget, "" where it can:
        such an image is kept as it is, whatever others of the batch are cut to, and its report says so."""
        return ""

    def achieved(self, counts: list[int]) -> float:
        """What counts as kept, from the vision tokens that each decoder layer processed: those that enter the
        decoder, for a method that acts once."""
        return float(counts[0])

    def published_count(self, counts: list[int]) -> float | None:
        """What the method's paper would say that it keeps, from the vision tokens that each decoder layer processed;
        None where that is what `achieved` says."""
        return None

    def encoder_budget(self, tokens: int) -> int:
        """Vision tokens that the encoder stage leaves."""
        return self.budget(tokens)

    def input_budget(self, tokens: int) -> int:
        """Vision tokens that enter the decoder."""
        return self.budget(tokens)

    def decoder_budget(self, tokens: int, layer: int, entered: int) -> int:
        """Vision tokens of an image of `tokens`, `entered` of which entered the decoder, that go on after decoder
        layer `layer`."""
        return self.budget(tokens)

    def encoder_layers(self, depth: int) -> tuple[int, ...]:
        """Encoder layers (of 0 .. depth - 1) after which `prune_encoder` is called; depth counts the layers
        that feed the features."""
        return ()

    def prune_encoder(self, layer: EncoderLayer) -> Tensor | EncoderSelection | None:
        """Which tokens go on to the next encoder layer: (B, N) bool, or None for all, or an EncoderSelection that
        also says what flows into them."""
        return None

    @property
    def reads_hidden(self) -> bool:
        """Whether `prune_encoder` needs the hidden states."""
        return False

    @property
    def merges_in_encoder(self) -> bool:
        """Whether `prune_encoder` may answer an EncoderSelection."""
        return False

    @property
    def acts_before_mlp(self) -> bool:
        """Whether `prune_encoder` is called, and carried out, between attention and MLP of an encoder layer."""
        return False

    @property
    def proportional_attention(self) -> bool:
        """Whether encoder attention weighs merged tokens by the number of tokens that they stand for."""
        return False

    def remember(self, stream: VisionStream) -> dict[str, Any]:
        """Values of the tokens, tensors of (N, ...), that `select` finds in `stream.memory` and `prune_decoder` in
        `layer.memory`, cut to the tokens that are left; what is no tensor stays as it is. Called once for every
        image."""
        return {}

    @property
    def selects(self) -> bool:
        """Whether the method acts between encoder and decoder."""
        return type(self).select is not Pruner.select

    def probe_layer(self, depth: int) -> int | None:
        """The decoder layer (of 0 .. depth - 1) whose last query and keys `remember` and `select` find in
        `stream.probe`, or None; the layers before it run on the prompt once more, which the report counts."""
        return None

    def select(self, stream: VisionStream) -> Selection | None:
        """Which tokens enter the decoder, or None for all; called only where the budget is below N."""
        return None

    def learns_from(self, depth: int) -> int | None:
        """The decoder layer (of 0 .. depth - 1) that teaches `Selection.scores` in training, or None."""
        return None

    def lesson(self, scores: Tensor, layer: DecoderLayer) -> Tensor:
        """The loss, a scalar, of the scores (N,) of one image by that layer; the mean over images is added."""
        raise TypeError(f"{type(self).__name__} does not say what it learns from a layer")

    @property
    def reads_decoder_hidden(self) -> bool:
        """Whether `prune_decoder` needs the hidden states."""
        return False

    @property
    def reads_last_query(self) -> bool:
        """Whether `prune_decoder` needs, of all queries and values, no more than the query of the last prompt
        token."""
        return False

    @property
    def reads_next_layer(self) -> bool:
        """Whether `prune_decoder` scores by the query of the last prompt token and the keys that the *next* decoder
        layer would compute, instead of those of the layer that ran."""
        return False

    def decoder_layers(self, depth: int) -> tuple[int, ...]:
        """Decoder layers (of 0 .. depth - 2) after which `prune_decoder` is called during prefill."""
        return ()

    def acts_after(self, tokens: int, layer: int, entered: int) -> bool:
        """Whether a method without a budget (`adaptive`) is asked about an image of `tokens`, `entered` of which
        entered the decoder, after this one of its `decoder_layers`."""
        return True

    def prune_decoder(self, layer: DecoderLayer) -> Selection | None:
        """Which tokens of one image go on to the next decoder layer, or None for all."""
        return None

    @property
    def revives(self) -> bool:
        """Whether what `prune_decoder` left out may return: later forwards on the cache then choose anew after each
        layer, as many of an image's tokens as the prefill kept there, by the attention of their last token."""
        return False

    def cache_layers(self, depth: int) -> tuple[int, ...]:
        """Decoder layers whose cache is cut, after the prefill, to the vision tokens that the last layer left."""
        return ()

    def evict_layers(self, depth: int) -> tuple[int, ...]:
        """Decoder layers whose cache `evict` may cut, head by head, in forwards that bring no new image."""
        return ()

    def density_layers(self, depth: int) -> tuple[int, ...]:
        """Decoder layers of which `evict` needs the density."""
        return self.evict_layers(depth)

    @property
    def evicts_again(self) -> bool:
        """Whether `evict` is called after every forward that brings no image, not just after the first one that
        follows a prompt with images."""
        return False

    def density(self, sums: Tensor) -> float:
        """A number for the attention of one row in one layer, which `evict` finds in `CachedRow.densities`.

        sums: (Hkv, G, n) what each token of the prompt got from all of its tokens, by query head, G of which share a
        key-value head.
        """
        return 0.0

    def evict(self, row: CachedRow) -> list[Eviction | None]:
        """What the cache of each of `row.layers` goes on with, None for all of it."""
        return [None] * len(row.layers)

    def routed_layers(self, depth: int) -> tuple[int, ...]:
        """Decoder layers (of 1 .. depth - 1) that `route` is asked about: they compute some tokens, the others skip
        them."""
        return ()

    def routed_budget(self, tokens: int, layer: int, entered: int) -> int:
        """Vision tokens of an image of `tokens`, `entered` of which entered the decoder, that a routed layer computes
        at the most."""
        return entered

    @property
    def routes_text(self) -> bool:
        """Whether `route` is asked in forwards that bring no image, too."""
        return False

    @property
    def skips_text(self) -> bool:
        """Whether `route` may leave text out, as only released code does."""
        return False

    @classmethod
    def brings_weights(cls) -> bool:
        """Whether the method has weights of its own, which are to be trained."""
        return cls.make_module is not Pruner.make_module

    def make_module(self, facts: ModelFacts) -> nn.Module | None:
        """The weights that the method brings to a model, as they are before training, or None; `wrap` puts them on the
        model, where `route` and the optimizer find them."""
        return None

    def route(self, tokens: RoutedTokens) -> Routes:
        """Which tokens a routed layer computes."""
        raise TypeError(f"{type(self).__name__} does not say how it routes tokens")

    def scoring_flops(self, work: ScoringWork) -> int:
        """FLOPs (2 a multiply-accumulate) of the matrix products that the method adds for one image."""
        return 0

    def row_flops(self, tokens: int, facts: ModelFacts) -> int:
        """FLOPs of those that the method adds for each row whose forward brings `tokens` to the decoder, with images
        or without."""
        return 0

    def to_dict(self) -> dict[str, Any]:
        """The hyper-parameters as plain JSON types, with the method's name first."""
        return {"method": self.name, **dataclasses.asdict(self)}
