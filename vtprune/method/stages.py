"""The kinds of stage: where a method acts on an image's tokens, each a small class over `Pruner`.

A method derives from the stages that it acts in, one or several; `vtprune list` reads them off. Flags are class
constants of one line; where one depends on a hyper-parameter, a property of the same name takes its place. A budget of
None means that the method decides how many stay; one that cannot be met is raised as `CannotCut`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from vtprune.method.answers import EncoderSelection, Eviction, Routes, Selection, VisionPlan
from vtprune.method.growth import Growth
from vtprune.method.kinds import IMAGE
from vtprune.method.pruner import Pruner
from vtprune.method.views import CachedRow, DecoderLayer, EncoderLayer, RoutedTokens, VisionStream


class Read(Enum):
    """What a stage looks at beyond the tokens themselves; nothing else is gathered for it."""

    # q, k and v of the encoder layer that feeds the decoder; FLOWS: and gradients go through them, since vectors that
    # `select` answers are weighed by them. Anything else that a method reads of attention is a constant to gradients.
    ENCODER = auto()
    ENCODER_FLOWS = auto()
    # q, k and v of the vision tower's last layer, which may lie past the one that feeds the decoder; FLOWS: as above.
    LAST_LAYER = auto()
    LAST_LAYER_FLOWS = auto()
    # The image's real colours; its pixels as the encoder got them, laid out by its grid.
    PICTURE = auto()
    PIXELS = auto()
    # Every token of the image's grid, so that no stage may leave tokens out before this one.
    WHOLE_GRID = auto()
    # Rows and columns: an image whose tokens form several rectangles is shown as one of them after the other.
    GRID = auto()
    # Hidden states of the layer that ran.
    HIDDEN = auto()
    # Each of `drop_layers` up to the last one that drops something, where the budget leaves all as well: what
    # `prune_decoder` notes there in `layer.memory` it finds in later layers.
    EVERY_LAYER = auto()


class Query(Enum):
    """Whose queries `prune_decoder` scores by."""

    # All tokens' of the layer that ran.
    ALL = auto()
    # The last prompt token's, and no values.
    LAST = auto()
    # The last prompt token's and all keys that the *next* layer would compute.
    NEXT_LAYER = auto()
    # Nobody's: it goes by what it remembers, or by hidden states, and layers without attention do as well.
    NOBODY = auto()


NOTHING: frozenset[Read] = frozenset()


@dataclass(frozen=True)
class Growing(Pruner):
    """Runs another method at rising budgets until an answer is sure enough (auto). It stands alone, and is never
    bound: what meets the model is the other method."""

    @abstractmethod
    def growth(self) -> Growth:
        """The other method, its levels, and when an answer is given; raises VTPruneError where nothing says that."""

    @abstractmethod
    def at(self, folder: Path) -> Growing:
        """The same with what it goes by in this folder, where it says none itself."""


@dataclass(frozen=True)
class InEncoder(Pruner):
    """Drops or merges tokens inside the vision encoder (FlowCut, Turbo, VisionZip, VisPruner, VScan and others)."""

    # Whether `prune_encoder` is called, and carried out, between attention and MLP of an encoder layer.
    before_mlp: ClassVar[bool] = False
    # Whether it may answer an EncoderSelection in which something flows.
    merges: ClassVar[bool] = False

    @property
    def encoder_reads(self) -> frozenset[Read]:
        """HIDDEN, or nothing beyond q, k and v."""
        return NOTHING

    @property
    def weighs_keys(self) -> bool:
        """Whether encoder attention weighs merged tokens by the number of tokens that they stand for."""
        return False

    @abstractmethod
    def encoder_layers(self) -> tuple[int, ...]:
        """Encoder layers (of those that feed the features, counted from 0; -1 is before the first one) after which
        `prune_encoder` is called."""

    def encoder_budget(self, tokens: int) -> int:
        """Vision tokens of an image of `tokens` that the stage leaves; images within it are left alone."""
        return self.budget(tokens)

    @abstractmethod
    def prune_encoder(self, layer: EncoderLayer) -> Tensor | EncoderSelection | None:
        """Which tokens go on to the next encoder layer: (B, N) bool, or None for all, or an EncoderSelection that
        also says what flows into them."""


@dataclass(frozen=True)
class BeforeDecoder(Pruner):
    """Chooses the tokens that enter the decoder (FoPru, HoloV, DivPrune, CDPruner, PruMerge, GemFilter, CoViPAL, EVS,
    DyCoke, baselines)."""

    # Whether it compares frames: images then stay whole.
    videos_only: ClassVar[bool] = False

    @property
    def input_reads(self) -> frozenset[Read]:
        """ENCODER, LAST_LAYER (or FLOWS of either), PICTURE, WHOLE_GRID, GRID; nothing by default."""
        return NOTHING

    def probe_layer(self) -> int | None:
        """The decoder layer whose last query and keys `select` finds in `stream.probe`, or None; the layers before it
        run on the prompt once more, which the report counts."""
        return None

    def input_budget(self, tokens: int) -> int | None:
        """Vision tokens of an image of `tokens` that enter the decoder; None: the method decides."""
        return self.budget(tokens)

    @abstractmethod
    def select(self, stream: VisionStream) -> Selection | None:
        """Which tokens enter the decoder, or None for all; called where the budget is below N or left to it."""


@dataclass(frozen=True)
class BetweenLayers(Pruner):
    """Drops tokens between decoder layers (FastV, DART, PyramidDrop, SparseVLM, LazyLLM, VFlowOpt, VScan,
    MustDrop, SpAtten)."""

    # Whose queries `prune_decoder` looks at.
    query: ClassVar[Query] = Query.ALL

    @property
    def layer_reads(self) -> frozenset[Read]:
        """HIDDEN, EVERY_LAYER, for `prune_decoder`; ENCODER, LAST_LAYER, PICTURE, GRID, for `remember`; nothing by
        default."""
        return NOTHING

    @property
    def revives(self) -> bool:
        """Whether what `prune_decoder` left out may return: later forwards on the cache then choose anew after each
        layer, as many of an image's tokens as the prefill kept there, by the attention of their last token."""
        return False

    @abstractmethod
    def drop_layers(self) -> tuple[int, ...]:
        """Decoder layers (counted from 0, never the last) after which tokens may drop during prefill."""

    def drop_budget(self, tokens: int, layer: int, entered: int) -> int | None:
        """Vision tokens of an image of `tokens`, `entered` of which entered the decoder, that go on after decoder
        layer `layer`; None: the method decides."""
        return self.budget(tokens)

    def remember(self, stream: VisionStream) -> dict[str, Any]:
        """Values of the tokens, tensors of (N, ...), that `select` finds in `stream.memory` and `prune_decoder` in
        `layer.memory`, cut to the tokens that are left; what is no tensor stays as it is. Called once for every
        image, before `select`."""
        return {}

    @abstractmethod
    def prune_decoder(self, layer: DecoderLayer) -> Selection | None:
        """Which tokens of one image go on to the next decoder layer, or None for all; called where the budget is below
        what the image still has, or left to it, and for EVERY_LAYER."""

    def cut_caches(self) -> tuple[int, ...]:
        """Decoder layers whose cache is cut, after the prefill, to the vision tokens that the last layer left."""
        return ()


@dataclass(frozen=True)
class InLayers(Pruner):
    """Routes tokens: decoder layers compute some of them, the others skip (p-MoD, gamma-MoD, MuE, random-LTD)."""

    # Whether `route` is asked in forwards that bring no image, too.
    routes_text: ClassVar[bool] = False
    # Whether it routes while a model is trained, and in use only where an option says so.
    for_training: ClassVar[bool] = False

    @property
    def skips_text(self) -> bool:
        """Whether `route` may leave text out, as only released code does."""
        return False

    @property
    def keys_alone(self) -> bool:
        """Whether tokens that skip a layer and are still read have keys there and values of 0, so that what they are
        given of attention is lost."""
        return False

    @abstractmethod
    def routed_layers(self) -> tuple[int, ...]:
        """Decoder layers (from 1 on) that `route` is asked about."""

    @abstractmethod
    def routed_budget(self, tokens: int, layer: int, entered: int) -> int | None:
        """Vision tokens of an image of `tokens`, `entered` of which entered the decoder, that a routed layer computes
        at the most; None: the method decides."""

    @abstractmethod
    def route(self, tokens: RoutedTokens) -> Routes:
        """Which tokens a routed layer computes."""

    def row_flops(self, tokens: int) -> int:
        """FLOPs of the matrix products that routing adds for each row whose forward brings `tokens` to the decoder,
        with images or without."""
        return 0


@dataclass(frozen=True)
class InAttention(Pruner):
    """Narrows what decoder layers do with vision while a prompt is read: heads, neighbours, channels of the MLP
    (YOPO, SpAtten)."""

    @abstractmethod
    def planned_layers(self) -> tuple[int, ...]:
        """Decoder layers that do less with vision than the model's own."""

    @abstractmethod
    def vision_plan(self, layer: int) -> VisionPlan:
        """What one of them does; the same for all images and prompts, but for the heads that `rank_heads` chooses."""

    def watched_layers(self) -> tuple[int, ...]:
        """Decoder layers of which `rank_heads` is told what their heads put out; none by default."""
        return ()

    def rank_heads(self, given: Tensor) -> Tensor:
        """(B, H) how much each key-value head matters in each row, asked before a layer whose plan has a lower `count`
        than there are heads left; those that were left out before stay so.

        given: (l, B, H) what each head put out in each of the watched layers so far, before the output projection: the
        magnitudes, summed over the tokens of the prompt, the channels, and the query heads that share it.
        """
        return given.sum(dim=0)


@dataclass(frozen=True)
class InCache(Pruner):
    """Cuts the cache that the prompt left, head by head, in the first forward that brings no image (D2O)."""

    @property
    def evicts_again(self) -> bool:
        """Whether `evict` is called after every later forward, too."""
        return False

    @abstractmethod
    def evict_layers(self) -> tuple[int, ...]:
        """Decoder layers whose cache `evict` may cut."""

    def density_layers(self) -> tuple[int, ...]:
        """Decoder layers of which `evict` needs the density."""
        return self.evict_layers()

    def densities(self, sums: Tensor) -> Tensor:
        """(l,) a number for the attention of one row in each of l layers, which `evict` finds in
        `CachedRow.densities`.

        sums: (l, Hkv, G, n) what each token of the prompt got from all of its tokens, by query head, G of which share
        a key-value head.
        """
        return sums.new_zeros(len(sums))

    @abstractmethod
    def evict(self, row: CachedRow) -> list[Eviction | None]:
        """What the cache of each of `row.layers` goes on with, None for all of it."""


@dataclass(frozen=True)
class Trained(Pruner):
    """Brings weights of its own, which are to be trained (p-MoD, gamma-MoD, CoViPAL, IA-RED^2)."""

    # What the method does before they are trained, as a message tells it.
    untrained: ClassVar[str] = ""

    @abstractmethod
    def make_module(self) -> nn.Module:
        """The weights that the method brings to the model that it is bound to, as they are before training; `wrap`
        puts them on the model, where the method's stages and the optimizer find them."""


@dataclass(frozen=True)
class Guided(Trained):
    """Learns from a decoder layer (CoViPAL)."""

    @abstractmethod
    def learns_from(self) -> int | None:
        """The decoder layer that teaches `Selection.scores` in training, or None."""

    @abstractmethod
    def lesson(self, scores: Tensor, layer: DecoderLayer) -> Tensor:
        """The loss, a scalar, of the scores (N,) of one image by that layer; the mean over images is added."""


def acts(pruner: Pruner) -> bool:
    """Whether a pruner has any stage; one without prunes nothing."""
    return isinstance(pruner, InEncoder | BeforeDecoder | BetweenLayers | InLayers | InAttention | InCache)


def spares(pruner: Pruner, kind: str) -> bool:
    """Whether a pruner leaves what is of this kind whole: an image, where it compares frames."""
    return kind == IMAGE and isinstance(pruner, BeforeDecoder) and pruner.videos_only


def encoder_layers(pruner: Pruner) -> tuple[int, ...]:
    """The encoder layers that a pruner acts in, () for one without that stage."""
    return pruner.encoder_layers() if isinstance(pruner, InEncoder) else ()


def drop_layers(pruner: Pruner) -> tuple[int, ...]:
    """The decoder layers after which a pruner may drop tokens."""
    return pruner.drop_layers() if isinstance(pruner, BetweenLayers) else ()


def read_layers(pruner: Pruner) -> tuple[int, ...]:
    """The decoder layers whose queries and keys a pruner reads between layers."""
    if not isinstance(pruner, BetweenLayers) or pruner.query is Query.NOBODY:
        return ()
    return tuple(layer + (pruner.query is Query.NEXT_LAYER) for layer in pruner.drop_layers())


def cut_caches(pruner: Pruner) -> tuple[int, ...]:
    """The decoder layers whose cache a pruner cuts after the prefill."""
    return pruner.cut_caches() if isinstance(pruner, BetweenLayers) else ()


def routed_layers(pruner: Pruner) -> tuple[int, ...]:
    """The decoder layers that a pruner routes."""
    return pruner.routed_layers() if isinstance(pruner, InLayers) else ()


def planned_layers(pruner: Pruner) -> tuple[int, ...]:
    """The decoder layers that a pruner plans."""
    return pruner.planned_layers() if isinstance(pruner, InAttention) else ()


def evict_layers(pruner: Pruner) -> tuple[int, ...]:
    """The decoder layers whose cache a pruner cuts head by head."""
    return pruner.evict_layers() if isinstance(pruner, InCache) else ()


def probe_layer(pruner: Pruner) -> int | None:
    """The decoder layer that a pruner selects by, if it does."""
    return pruner.probe_layer() if isinstance(pruner, BeforeDecoder) else None


def revives(pruner: Pruner) -> bool:
    """Whether what a pruner leaves out may return."""
    return isinstance(pruner, BetweenLayers) and pruner.revives


def skips_text(pruner: Pruner) -> bool:
    """Whether a pruner may leave text out of a layer."""
    return isinstance(pruner, InLayers) and pruner.skips_text


def by_rectangle(pruner: Pruner) -> bool:
    """Whether a pruner reads rows and columns, so that it is shown one rectangle of an image at a time."""
    return bool(reads(pruner) & {Read.GRID, Read.WHOLE_GRID})


def reads(pruner: Pruner) -> frozenset[Read]:
    """What a pruner reads before the decoder begins."""
    found = pruner.input_reads if isinstance(pruner, BeforeDecoder) else NOTHING
    return (found | pruner.layer_reads) if isinstance(pruner, BetweenLayers) else found
