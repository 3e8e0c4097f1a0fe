"""The sizes of a model that its cost depends on, and the arithmetic of a layer, written once.

Nothing here knows a model or a config: an adapter says the sizes of its family (`Adapter.sizes`).
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from vtprune.errors import VTPruneError

Grid = tuple[int, int, int]
# Lengths of the runs of tokens that attend to each other in one encoder layer.
Segments = Sequence[int]
# Patches alive in one encoder layer, or its attention segments where a count does not say enough.
Alive = int | Segments


# Tokens that the gated delta rule reads at once; a shorter rest is padded.
CHUNK = 64
# Bytes of a number of its recurrent state, which is fp32 whatever the model runs in.
STATE_BYTES = 4


@dataclass(frozen=True)
class DeltaCost:
    """The sizes that the cost of a gated delta layer (linear attention) depends on.

    heads: of the values, for each of which there is a state of key_size x value_size; key_heads: of queries and of
    keys; kernel: tokens that the convolution before it sees.
    """

    heads: int
    key_heads: int
    key_size: int
    value_size: int
    kernel: int

    @property
    def channels(self) -> int:
        """Of queries, keys and values together, each of which is convolved by itself."""
        return 2 * self.key_heads * self.key_size + self.heads * self.value_size

    def macs(self, width: int, tokens: int) -> int:
        """Multiply-accumulates of mixing `tokens` of a row, with all projections from and to `width`: the rule runs on
        whole chunks."""
        if not tokens:
            return 0
        values = self.heads * self.value_size
        projections = width * (self.channels + 2 * values + 2 * self.heads)
        convolution = (tokens + self.kernel - 1) * self.kernel * self.channels
        inside = CHUNK * CHUNK * (2 * self.key_size + self.value_size)
        chunk = inside + 3 * CHUNK * self.key_size * self.value_size
        return tokens * projections + convolution + -(-tokens // CHUNK) * self.heads * chunk

    def state_bytes(self, itemsize: int) -> int:
        """Bytes of a row's window of the convolution, at `itemsize` a number, and of its recurrent state."""
        recurrent = self.heads * self.key_size * self.value_size
        return self.kernel * self.channels * itemsize + STATE_BYTES * recurrent


@dataclass(frozen=True)
class TransformerCost:
    """The sizes that the cost of a stack of transformer layers depends on.

    heads: of the queries; query_width, kv_width: heads x head size of queries and of keys; mlp_matrices: 3 if gated,
    else 2; experts: of a mixture, among which a router chooses those whose widths make up the `mlp_width` of a token,
    and one more where an expert of all tokens has a gate; gated: whether a gate as wide as the queries is projected
    beside them; delta: of the layers `states`, which have it in place of attention, if there are any.
    """

    width: int
    heads: int
    query_width: int
    kv_width: int
    mlp_width: int
    mlp_matrices: int
    layers: int
    experts: int = 0
    gated: bool = False
    delta: DeltaCost | None = None
    states: frozenset[int] = frozenset()

    @property
    def head_size(self) -> int:
        """The width of one head's queries and keys."""
        return self.query_width // self.heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.kv_width // self.head_size

    def layer_macs(self, segments: Segments, mlp_tokens: int | None = None) -> int:
        """Multiply-accumulates of one layer with attention; causal attention is counted in full. mlp_tokens: tokens
        that go through its MLP, None for all."""
        projections = self.width * (self._asking_width + self.query_width + 2 * self.kv_width)
        scores_and_values = 2 * self.query_width * sum(n * n for n in segments)
        through = sum(segments) if mlp_tokens is None else mlp_tokens
        return sum(segments) * projections + through * self._mlp + scores_and_values

    def macs_at(self, layer: int, tokens: int, read: int = 0, *, values: bool = True) -> int:
        """Multiply-accumulates of layer `layer` for a row of `tokens`, which also attend to `read` others: these cost
        a layer with attention their keys and, unless these are 0, `values`, and nothing else."""
        if layer not in self.states:
            made = self.width * self.kv_width * (1 + values)
            return self.layer_macs((tokens,)) + read * (made + 2 * tokens * self.query_width)
        assert self.delta is not None
        return self.delta.macs(self.width, tokens) + tokens * self._mlp

    def planned_macs(self, text: int, vision: int, plan: PlannedTokens) -> int:
        """Multiply-accumulates of a layer with attention that computes `vision` tokens by a plan beside `text`."""
        share, size = self.heads // self.kv_heads, self.head_size
        heads = self.kv_heads if plan.heads is None else plan.heads
        reading = heads * share * size
        keys = text + vision + plan.past
        projections = text * self.width * 2 * (self.query_width + self.kv_width)
        projections += vision * self.width * (2 * reading + self.kv_width + heads * size)
        own = sum(tokens * seen for tokens, seen in plan.seen) if plan.seen else vision * keys
        attention = 2 * reading * (text * keys + own) + 2 * (self.query_width - reading) * text * keys
        whole = plan.mlp_width is None or plan.mlp_width == self.mlp_width
        mlp = self._mlp if whole else self.width * self.mlp_matrices * (plan.mlp_width or 0)
        return projections + attention + text * self._mlp + vision * mlp

    @property
    def _asking_width(self) -> int:
        """What the projection of queries puts out."""
        return self.query_width * (1 + self.gated)

    @property
    def _mlp(self) -> int:
        """Multiply-accumulates of a token's way through the MLP."""
        return self.width * (self.mlp_matrices * self.mlp_width + self.experts)

    def state_bytes(self, itemsize: int) -> int:
        """Bytes of all states of one row, whatever it holds; 0 without linear attention."""
        return 0 if self.delta is None else len(self.states) * self.delta.state_bytes(itemsize)

    def probe_macs(self, layer: int, tokens: int, past: Sequence[int]) -> int:
        """Multiply-accumulates of running `tokens` through the layers before `layer`, each with its `past` entries in
        the cache, and of one query and all keys of that layer."""
        attention_to_past = 2 * self.query_width * tokens * sum(past[:layer])
        read = self.width * (self._asking_width + tokens * self.kv_width)
        return sum(self.macs_at(index, tokens) for index in range(layer)) + attention_to_past + read


@dataclass(frozen=True)
class PlannedTokens:
    """What one decoder layer does with the vision tokens that it computes.

    heads: how many of its key-value heads read vision, None for all: in the others vision tokens have keys alone;
    mlp_width: how many channels of its MLP they go through, None for all. seen: for each image whose tokens attend to
    a window, its tokens and the keys that each of them attends to (what stands before the image, and the window);
    () where they attend as the model has it. past: entries of the cache that all tokens of the layer attend to.
    """

    heads: int | None = None
    mlp_width: int | None = None
    seen: tuple[tuple[int, int], ...] = ()
    past: int = 0

    def check(self, decoder: TransformerCost, layer: int, vision: int) -> None:
        """Raises VTPruneError for a plan that decoder layer `layer`, which computes `vision` tokens, cannot have."""
        if not 0 <= layer < decoder.layers or layer in decoder.states or decoder.gated:
            raise VTPruneError(
                f"planned takes layers of 0 to {decoder.layers - 1} with attention that has no gate, got {layer}"
            )
        for name, given, most in (
            ("heads", self.heads, decoder.kv_heads),
            ("mlp_width", self.mlp_width, decoder.mlp_width),
        ):
            if given is not None and count(f"planned[{layer}].{name}", given) > most:
                raise VTPruneError(f"planned[{layer}].{name} is at most {most} on this decoder, got {given}")
        if self.mlp_width not in (None, decoder.mlp_width) and decoder.experts:
            raise VTPruneError(f"planned[{layer}].mlp_width is of one MLP, and this decoder has experts; leave it out")
        own = [count(f"planned[{layer}].seen", number) for pair in self.seen for number in pair][::2]
        if self.seen and sum(own) != vision:
            raise VTPruneError(
                f"planned[{layer}].seen tells of {sum(own)} tokens, and the layer computes {vision} of vision"
            )
        count(f"planned[{layer}].past", self.past)


@dataclass(frozen=True)
class VisionCost(ABC):
    """A vision tower: its layers, and `patch_macs`, the multiply-accumulates of embedding one patch."""

    blocks: TransformerCost
    patch_macs: int

    @abstractmethod
    def grids(self, images: int | Sequence[Sequence[int]]) -> list[Grid]:
        """The images as grids of decoder tokens; raises VTPruneError where they do not fit the tower."""

    @abstractmethod
    def patches(self, grid: Grid) -> int:
        """Patches that are embedded for one image."""

    @abstractmethod
    def features(self, grid: Grid) -> int:
        """Tokens of one image that go through the projector."""

    @abstractmethod
    def segments(self, grid: Grid, layer: int) -> Segments:
        """Attention segments of one image in one layer when nothing is dropped."""

    @abstractmethod
    def alive_segments(self, grid: Grid, layer: int, patches: int) -> Segments:
        """Attention segments when `patches` are left; raises VTPruneError if that does not determine them."""

    def pooling_macs(self, tokens: int) -> int:
        """Multiply-accumulates of a head over the last layer's `tokens`, of one run of them."""
        return 0

    def image_macs(self, grid: Grid, alive: Sequence[Alive] | None, mlp: Sequence[int] | None = None) -> int:
        """Multiply-accumulates of the tower for one image; `alive` and `mlp` (tokens through the MLP) hold one entry
        a layer."""
        macs = self.patches(grid) * self.patch_macs
        segments: Segments = self.segments(grid, 0)
        for layer in range(self.blocks.layers):
            segments = self._layer_segments(grid, layer, None if alive is None else alive[layer])
            macs += self.blocks.layer_macs(segments, mlp[layer] if mlp else None)
        return macs + sum(map(self.pooling_macs, segments))

    def _layer_segments(self, grid: Grid, layer: int, alive: Alive | None) -> Segments:
        full = self.segments(grid, layer)
        if alive is None:
            return full
        if isinstance(alive, Sequence):
            given = [count("encoder_tokens_per_layer", n) for n in alive]
        else:
            given = list(self.alive_segments(grid, layer, count("encoder_tokens_per_layer", alive)))
        if sum(given) > sum(full):
            raise VTPruneError(f"encoder layer {layer} has {sum(full)} tokens for grid {grid}, got {sum(given)}")
        return given


@dataclass(frozen=True)
class FixedVisionCost(VisionCost):
    """A tower with one image size (CLIP, SigLIP), for images, crops or frames.

    side: patches of an image's height and width; extra: CLS tokens; dropped: tokens that the feature
    selection cuts; pooling: whether an attention-pooling head runs.
    """

    side: tuple[int, int]
    extra: int
    dropped: int
    pooling: bool

    def grids(self, images: int | Sequence[Sequence[int]]) -> list[Grid]:
        if not isinstance(images, Sequence):
            return [(1, *self.side)] * count("images", images)
        grids = _grids(images)
        for grid in grids:
            if math.prod(grid[1:]) not in {math.prod(self.side), self._features}:
                raise VTPruneError(
                    f"every image of this model is a grid (1, {self.side[0]}, {self.side[1]}), or (n, "
                    f"{self.side[0]}, {self.side[1]}) for n crops or frames, got {grid}"
                )
        return grids

    @property
    def _features(self) -> int:
        return math.prod(self.side) + self.extra - self.dropped

    def patches(self, grid: Grid) -> int:
        return grid[0] * math.prod(self.side)

    def features(self, grid: Grid) -> int:
        return grid[0] * self._features

    def segments(self, grid: Grid, layer: int) -> Segments:
        return (math.prod(self.side) + self.extra,) * grid[0]

    def alive_segments(self, grid: Grid, layer: int, patches: int) -> Segments:
        if grid[0] == 1:
            return (patches + self.extra,)
        if patches == self.patches(grid):
            return self.segments(grid, layer)
        raise VTPruneError(
            f"{patches} patches in encoder layer {layer} lie in {grid[0]} crops or frames: encoder_tokens_per_layer "
            "takes their lengths there, with the CLS token of each, a list in place of a count"
        )

    def pooling_macs(self, tokens: int) -> int:
        if not self.pooling:
            return 0
        width = self.blocks.width
        # One probe attends to all tokens: q and o once, k and v and both products a token, then the MLP once.
        attention = 2 * width * width + 2 * tokens * width * width + 2 * tokens * width
        return attention + self.blocks.mlp_matrices * width * self.blocks.mlp_width


@dataclass(frozen=True)
class PackedVisionCost(VisionCost):
    """A tower with dynamic resolution (Qwen's): attention inside a frame, and inside windows in some layers.

    merge: side of the square of patches that forms one decoder token; window: side of a window in decoder
    tokens, None without windows; full_layers: layers without windows.
    """

    merge: int
    window: int | None
    full_layers: frozenset[int]

    def grids(self, images: int | Sequence[Sequence[int]]) -> list[Grid]:
        if isinstance(images, Sequence):
            return _grids(images)
        if count("images", images) == 0:
            return []
        raise VTPruneError(
            "this model's encoder cost depends on the image sizes: images takes a list of grids (t, h, w) in "
            f"decoder tokens, such as [(1, 18, 24)], got {images}"
        )

    def patches(self, grid: Grid) -> int:
        return math.prod(grid) * self.merge**2

    def features(self, grid: Grid) -> int:
        return math.prod(grid)

    def segments(self, grid: Grid, layer: int) -> Segments:
        frames, height, width = grid
        if self.window is None or layer in self.full_layers:
            return (height * width * self.merge**2,) * frames
        rows, columns = _tiles(height, self.window), _tiles(width, self.window)
        return tuple(r * c * self.merge**2 for r in rows for c in columns) * frames

    def alive_segments(self, grid: Grid, layer: int, patches: int) -> Segments:
        full = self.segments(grid, layer)
        if patches == sum(full):
            return full
        if len(full) == 1:
            return (patches,)
        raise VTPruneError(
            f"{patches} patches in encoder layer {layer} lie in up to {len(full)} attention segments: "
            "encoder_tokens_per_layer takes their lengths there, a list in place of a count"
        )


@dataclass(frozen=True)
class ModelCost:
    """One model: its tower, its decoder, and the multiply-accumulates of projector and head a token; planes: how many
    modules like the projector make values that the decoder adds between its layers."""

    vision: VisionCost
    projector_macs: int
    decoder: TransformerCost
    head_macs: int
    planes: int = 0


def count(name: str, value: object) -> int:
    """`value` as an int of at least 0; raises VTPruneError otherwise."""
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if number < 0:
        raise VTPruneError(f"{name} takes counts (ints of at least 0), got {value!r}")
    return number


def _grids(images: Sequence[Sequence[int]]) -> list[Grid]:
    """The grids as tuples of three positive ints; raises VTPruneError otherwise."""
    grids: list[Grid] = []
    for image in images:
        sizes = tuple(count("images", n) for n in image) if isinstance(image, Sequence) else ()
        if len(sizes) != 3 or 0 in sizes:
            raise VTPruneError(f"images takes grids (t, h, w) in decoder tokens, each size at least 1, got {image!r}")
        grids.append((sizes[0], sizes[1], sizes[2]))
    return grids


def _tiles(length: int, window: int) -> list[int]:
    """Sizes of the windows along one side: the last one is ragged."""
    full, rest = divmod(length, window)
    return [window] * full + ([rest] if rest else [])
