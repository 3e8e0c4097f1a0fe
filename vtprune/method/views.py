"""What a pruner sees: the vision tokens of one image, an encoder layer, a decoder layer, or a row of the cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange, reduce
from torch import Tensor

from vtprune.method.answers import Routes
from vtprune.method.choosing import best_columns, best_of_each
from vtprune.method.deferred import deferring, later
from vtprune.method.kinds import IMAGE
from vtprune.tensors.attention import attention_received, attention_received_and_given, attention_rows


@dataclass(frozen=True)
class Rectangle:
    """One of several rectangles that the tokens of one image form.

    grid: (t, h, w) in vision tokens; pixels, picture: as in `VisionStream`, of it alone where the method looks at
    them.
    """

    grid: tuple[int, int, int]
    pixels: Tensor
    picture: Tensor | None

    @property
    def tokens(self) -> int:
        """How many it has."""
        return self.grid[0] * self.grid[1] * self.grid[2]


@dataclass(frozen=True)
class VisionStream:
    """The vision tokens of one image, or of one video, on their way into the decoder.

    features: (N, D) decoder-width vectors, in raster order, frame by frame.
    grid: (t, h, w) of the whole image in vision tokens, t * h * w == total; t: its frames, 1 of an image.
    indices: (N,) the place of each token in the whole image (0 .. total - 1); all of them unless an
        encoder stage dropped some.
    total: vision tokens of the whole image, before anything was dropped.
    budget: tokens to keep at the most, 1 <= budget; where the method decides, those that it was asked for.
    signals: q, k and v of the encoder layer whose output the decoder reads, for these N tokens, or None if
        the pruner does not ask for them (`Read.ENCODER`).
    pixels: the image as the encoder got it: (C, H, W), or (patches, C * t * p * p) on Qwen.
    text: (T, D) decoder embeddings of the text tokens of this row, in order.
    text_after: how many of them, the last ones, stand after the image.
    text_ids: (T,) their ids, or None if the caller handed in embeddings.
    last_signals: as `signals`, of the vision tower's last layer (`Read.LAST_LAYER`).
    picture: (t, 3, H, W) the image in [0, 1] as the encoder saw it (`Read.PICTURE`), else None.
    memory: what the pruner's own `remember` answered, for these N tokens.
    source: the folder or hub id that the model came from, "" if it is not known.
    probe: the decoder layer that the method asks for (`BeforeDecoder.probe_layer`), else None.
    module: what `Trained.make_module` made, with its weights as they are now, else None; a method that has one is not
        shown text that the forward's labels mark as an answer.
    training: whether that module is being trained: it is in training mode, and gradients are recorded.
    kind: "image" or "video".
    rectangles: of an image whose tokens form several (a picture cut into crops), each of these, in the order of its
        tokens, for a method that reads rows and columns, which is shown one of them at a time; `grid` is then one row
        of all tokens.
    """

    features: Tensor
    grid: tuple[int, int, int]
    indices: Tensor
    total: int
    budget: int
    signals: LayerSignals | None
    pixels: Tensor
    text: Tensor
    text_ids: Tensor | None = None
    last_signals: LayerSignals | None = None
    picture: Tensor | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    text_after: int = 0
    probe: DecoderLayer | None = None
    module: Any = None
    training: bool = False
    kind: str = IMAGE
    rectangles: tuple[Rectangle, ...] = ()

    @property
    def frames(self) -> Tensor:
        """(N,) the frame of each token."""
        return self.indices // (self.grid[1] * self.grid[2])


@dataclass(frozen=True)
class EncoderLayer:
    """One vision-encoder layer after it ran, for a batch of B images, or frames of videos, padded to the same length.
    Before the first one (index -1) there are hidden states alone, and query, key and value are empty.

    query, key, value: (B, H, P + N * group, d), layout as in `LayerSignals`.
    valid: (B, N) bool, False where a row is padding (images in one batch may have fewer tokens left).
    total: (B,) tokens of each whole image; budget: (B,) tokens to keep at the most.
    index: 0-based layer index; depth: how many layers feed the features (layers 0 .. depth - 1 count: the
        features are the output of layer depth - 1).
    memory: a dict of this encoding, for scores that accumulate over layers; after a drop the core compacts
        every (B, N) tensor in it along with the tokens.
    sizes: (B, N) how many tokens each one stands for: 1 until something merges.
    grids: (t, h, w) of each whole image in vision tokens.
    alive, budgets: (B,) tokens of each image that are left, and `budget`, on the host (read back where not given).
    unseen: (B,) tokens of its grid that the decoder never sees (padding around an image that is cut into crops), which
        are not `valid`; () for none.
    hidden: (B, P + N * group, D) hidden states after the layer (before its MLP for a method that merges there),
        laid out as query, key and value; None if no method asks (`Read.HIDDEN`).
    bias: (B, P + N * group) what its attention added to the logits of each key for the tokens that this stands for;
        None where it added nothing, or that is not at hand (it is the logarithm of `sizes`).
    module: what `Trained.make_module` made, with its weights as they are now, else None; teach: where that module is
        being trained, takes a loss, a scalar, that is added to the forward's, else None.
    columns: (B,) how many of its first columns hold a token of the image, one that the decoder never sees included;
        `alive` where not given.
    merged: whether any token may stand for several.
    blank: hands out (B, 1 + N) bool, all True behind a leading False, to be written into (`marks`).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    valid: Tensor
    total: Tensor
    budget: Tensor
    index: int
    depth: int
    scale: float
    prefix: int
    group: int
    memory: dict[str, Tensor]
    sizes: Tensor
    grids: tuple[tuple[int, int, int], ...]
    hidden: Tensor | None = None
    alive: tuple[int, ...] = ()
    budgets: tuple[int, ...] = ()
    unseen: tuple[int, ...] = ()
    bias: Tensor | None = None
    columns: tuple[int, ...] = ()
    module: Any = None
    teach: Callable[[Tensor], None] | None = None
    merged: bool = True
    blank: Callable[[], Tensor] | None = None

    def __post_init__(self) -> None:
        if not self.alive:
            object.__setattr__(self, "alive", tuple(self.valid.sum(dim=1).tolist()))
            object.__setattr__(self, "budgets", tuple(self.budget.tolist()))
        if not self.columns:
            object.__setattr__(self, "columns", self.alive)

    @property
    def full(self) -> bool:
        """Whether no image is padded."""
        return min(self.alive) == self.valid.shape[1]

    def marks(self) -> Tensor:
        """(B, 1 + N) bool, all True behind a leading False, for the method to write into."""
        if self.blank is not None:
            return self.blank()
        marks = torch.ones_like(self.valid)
        return torch.nn.functional.pad(marks, (1, 0), value=False)


@deferring(("value", "text", "rotary", "text_after", "after"))
@dataclass(frozen=True)
class DecoderLayer:
    """One decoder layer during prefill after it ran, for the vision tokens of one image in one row.

    query: (H, n, d) and key, value: (H, n, d) of all n tokens of the row at that layer, rotary embedding
        applied, key-value heads repeated to H. For a method that reads no other query or scores by the next layer
        (`Query.LAST`, `Query.NEXT_LAYER`), query is that of the last prompt token alone, (H, 1, d), and
        value is empty.
    vision: (N,) places in 0 .. n - 1 of this image's tokens; last: place of the last prompt token.
    scale: softmax scale.
    total: tokens of the whole image; indices: (N,) the place of each in the whole image.
    budget: tokens to keep at the most from here on; N where the method decides.
    index: 0-based index of the layer that ran; depth: number of decoder layers.
    text: (T,) places in 0 .. n - 1 of the row's text tokens.
    memory: what the pruner's own `remember` answered, for these N tokens; what `prune_decoder` puts there is found in
        later layers, tensors of (N, ...) cut to the tokens that are left then.
    entered: tokens of the image that entered the decoder; processed: the sum over layers 0 .. index of the tokens of
        the image that they processed.
    hidden: (n, D) hidden states after the layer, if the method asks for them (`Read.HIDDEN`); final_norm: the norm
        behind the decoder's last layer, of any (..., D), beside them.
    rotary: cosines and sines (n, d) that the layer turned queries and keys by.
    first: place of the row's first token; what stands before it is padding.
    text_after: how many of `text`, the last ones, stand after the image; after: the place after its last token
        (both read back where not given).
    value, text, rotary, text_after and after may be worked out when they are first read
        (`vtprune.method.deferred.later`). Keys and values may be those of the cache: nobody writes into them.

    In `VisionStream.probe` it is the layer `index` itself that has not run: query and value are as for
    `Query.NEXT_LAYER`, and n counts the tokens of this turn that are left.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    vision: Tensor
    last: int
    scale: float
    total: int
    indices: Tensor
    budget: int
    index: int
    depth: int
    text: Tensor
    memory: dict[str, Any]
    entered: int = 0
    processed: int = 0
    hidden: Tensor | None = None
    final_norm: Callable[[Tensor], Tensor] | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    first: int = 0
    text_after: int = -1
    after: int = -1

    def __post_init__(self) -> None:
        if vars(self)["after"] == -1:
            object.__setattr__(self, "after", later(lambda: int(self.vision[-1]) + 1))
            object.__setattr__(self, "text_after", later(lambda: int((self.text >= self.after).sum())))

    @property
    def last_query(self) -> Tensor:
        """(H, 1, d) the query of the last prompt token."""
        return self.query if self.query.shape[1] == 1 else self.query[:, self.last, None]


@dataclass(frozen=True)
class RoutedTokens:
    """The tokens of a batch before one decoder layer that a method routes.

    hidden: (B, n, D) hidden states; norm: the layer's own input norm. real: (B, n) which columns hold a token. image:
        (B, n) the number of the image that a token belongs to among those that its row brings, -1 for text.
    totals: (B, I) tokens of each whole image, 0 where a row has fewer images; budgets: (B, I) those that the layer is
        to compute at the most, all of an image where the method decides; spared: (B,) how many these budgets leave
        out, on the host, () where the method decides. text: (B, n) which columns
        hold no vision token. whole: whether every column is known to hold a token.
    index: 0-based index of the layer; depth: number of decoder layers.
    module: what `Trained.make_module` made, with its weights as they are now; training: whether the decoder is in
        training mode. continues: whether these tokens follow what is in the cache, without a new image.
    before: (B, n, D) what `hidden` was before the layer before this one. memory: what the method notes for its next
        layers in this forward.
    """

    hidden: Tensor
    norm: Callable[[Tensor], Tensor]
    real: Tensor
    image: Tensor
    text: Tensor
    totals: Tensor
    budgets: Tensor
    index: int
    depth: int
    module: Any
    training: bool
    continues: bool = False
    spared: tuple[int, ...] = ()
    whole: bool = False
    before: Tensor | None = None
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def vision(self) -> Tensor:
        """(B, n) which columns hold a vision token."""
        return ~self.text

    @property
    def counts(self) -> tuple[int, ...] | None:
        """(B,) how many tokens a layer computes that computes all text and the budgets, where that is known."""
        return tuple(self.text.shape[1] - spared for spared in self.spared) or None

    @property
    def complete(self) -> bool:
        """Whether the budgets leave nothing out, so that scores choose nothing."""
        return bool(self.spared) and max(self.spared) == 0

    def best(self, scores: Tensor) -> Routes:
        """All text, and of each image its budget of the tokens with the highest scores (B, n), ties to the lowest
        index."""
        counts = self.counts
        if self.complete:
            return Routes(counts=counts)
        if counts is not None and self.budgets.shape[1] == 1 and min(counts) == max(counts):
            return Routes(columns=best_columns(scores, self.text, counts[0]), counts=counts)
        return Routes(best_of_each(scores, self.image, self.budgets) | self.text, counts=counts)


@dataclass(frozen=True)
class CacheEntries:
    """What one decoder layer's cache holds of one row, in the order of the sequence, without padding.

    key, value: (Hkv, n, d), as the layer attends to them. scores: (Hkv, n) fp32, the attention that each entry has got
    from every token since the prompt began, summed over the query heads that share the key-value head. images: (n,)
    int64 on the host, the number of the image that an entry belongs to, 0 for what is not to be cut as an image.
    index: 0-based decoder layer. state: what the method's last `Eviction` of this row and layer told it to remember.
    """

    key: Tensor
    value: Tensor
    scores: Tensor
    images: npt.NDArray[np.int64]
    index: int
    state: dict[str, float]


@dataclass(frozen=True)
class CachedRow:
    """One row's cache after a forward that brought no image, for the layers that a method may cut.

    layers: the layers of `InCache.evict_layers`, in order; densities: `InCache.densities` of the layers that were
    asked, by index; totals: tokens of each whole image that is to be cut, by its number; first: whether nothing of the
    row was cut since its last prompt with an image.
    """

    layers: tuple[CacheEntries, ...]
    densities: dict[int, float]
    totals: dict[int, int]
    first: bool


@dataclass(frozen=True)
class LayerSignals:
    """Queries, keys and values of one vision-encoder layer, for the tokens of one image or video.

    query, key, value: (H, P + N * group, d) with P = `prefix` leading tokens (1 with a CLS token, else 0),
    then the patches; `group` consecutive patches (4 for Qwen's 2x2 merge) form one vision token. Patches
    stand in raster order of the vision tokens. Queries and keys carry their rotary embedding, if any.
    lengths: tokens of each unit (a frame, a crop) where there are several, which follow each other, each with its own
    leading tokens; attention never leaves a unit, so that the tokens of a video are scored frame by frame.
    sources: (N, k) the patches that each token is made of, counted through the units without leading tokens, where
    tokens do not stand in the order of their patches (a picture cut into crops) or are means of them; lengths then
    count patches. weights: (N, k) the share of each of them, None for a plain mean.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    prefix: int
    group: int
    lengths: tuple[int, ...] = ()
    sources: Tensor | None = None
    weights: Tensor | None = None

    @property
    def tokens(self) -> int:
        """N."""
        if self.sources is not None:
            return self.sources.shape[0]
        return (self.query.shape[1] - self.prefix * max(1, len(self.lengths))) // self.group

    @property
    def units(self) -> tuple[LayerSignals, ...]:
        """Those of each unit, without units that have no token left."""
        if not self.lengths:
            return (self,)
        sizes = [self.prefix + tokens * self.group for tokens in self.lengths]
        cut = zip(*(states.split(sizes, dim=1) for states in (self.query, self.key, self.value)), strict=True)
        return tuple(
            replace(self, query=query, key=key, value=value, lengths=(), sources=None, weights=None)
            for tokens, (query, key, value) in zip(self.lengths, cut, strict=True)
            if tokens
        )

    @property
    def has_cls(self) -> bool:
        """Whether the first token is a CLS token."""
        return self.prefix > 0

    def pool(self, patch_scores: Tensor) -> Tensor:
        """Mean of patch scores (N * group, ...), unit by unit, over each vision token's patches: (N, ...)."""
        if self.sources is not None:
            scores = patch_scores[self.sources]
            if self.weights is None:
                return scores.mean(dim=1)
            return torch.einsum("nk...,nk->n...", scores, self.weights.to(scores))
        if self.group == 1:
            return patch_scores
        return reduce(patch_scores, "(n g) ... -> n ...", "mean", g=self.group)

    def token_keys(self) -> Tensor:
        """The keys of each vision token, mean over its patches, heads side by side: (N, H * d) fp32."""

        def keys(query: Tensor, key: Tensor) -> tuple[Tensor]:
            return (rearrange(key[..., self.prefix :, :].float(), "... h n d -> ... n (h d)"),)

        return self.pool(self._by_unit(keys)[0])

    def cls_attention(self) -> Tensor:
        """Mean over heads of the CLS row, softmaxed over all tokens, CLS column dropped: (N,)."""

        def row(query: Tensor, key: Tensor) -> tuple[Tensor]:
            rows = attention_rows(query[..., :1, :], key, self.scale)
            return (rows[..., 0, self.prefix :].mean(dim=-2),)

        return self.pool(self._by_unit(row)[0])

    def received_attention(self) -> Tensor:
        """Mean over heads and patch queries of the attention that each vision token receives: (N,)."""

        def received(query: Tensor, key: Tensor) -> tuple[Tensor]:
            return (attention_received(query, key, self.scale, skip=self.prefix),)

        return self.pool(self._by_unit(received)[0])

    def received_and_given(self, *, softmax: bool = True) -> tuple[Tensor, Tensor]:
        """The same, and the mean attention that each token's patches give to all patches, both (N,); softmax: False
        for means of the scaled logits."""

        def both(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
            return attention_received_and_given(query, key, self.scale, skip=self.prefix, softmax=softmax)

        received, given = self._by_unit(both)
        return self.pool(received), self.pool(given)

    def saliency(self) -> Tensor:
        """CLS attention where the encoder has a CLS token, received attention where it has none: (N,)."""
        return self.cls_attention() if self.has_cls else self.received_attention()

    def _by_unit(self, score: Callable[[Tensor, Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Scores (N * group, ...) of queries and keys (..., H, n, d), unit by unit; those of one length together."""
        if not self.lengths:
            return score(self.query, self.key)
        if min(self.lengths) == max(self.lengths):
            query, key = (
                rearrange(states, "h (u n) d -> u h n d", u=len(self.lengths)) for states in (self.query, self.key)
            )
            return tuple(part.flatten(0, 1) for part in score(query, key))
        return tuple(map(torch.cat, zip(*(score(unit.query, unit.key) for unit in self.units), strict=True)))

    def cut(self, tokens: Tensor) -> LayerSignals:
        """The signals of some of an image's tokens, by their indices in the order wanted; in several units, that of
        the units."""
        if self.sources is not None:
            return self._cut_sources(self.sources, tokens)
        lengths = self.lengths
        if lengths:
            return self._cut_patches(tokens)
        patches = tokens[:, None] * self.group + torch.arange(self.group, device=tokens.device)
        rows = torch.cat([torch.arange(self.prefix, device=tokens.device), self.prefix + patches.flatten()])
        return self._of_rows(rows)

    def _cut_patches(self, tokens: Tensor) -> LayerSignals:
        """Of several units, only `tokens`, ascending, and the tokens that lead each unit."""
        lengths, group, prefix, device = self.lengths, self.group, self.prefix, tokens.device
        ends = torch.tensor(lengths, device=device).cumsum(0)
        unit = torch.searchsorted(ends, tokens, right=True)
        left = torch.zeros(len(lengths), dtype=torch.long, device=device).index_add_(0, unit, torch.ones_like(unit))
        patches = tokens[:, None] * group + torch.arange(group, device=device) + prefix * (unit + 1)[:, None]
        rows = patches.flatten()
        if prefix:
            starts = (ends - torch.tensor(lengths, device=device)) * group + prefix * torch.arange(
                len(lengths), device=device
            )
            leading = starts[:, None] + torch.arange(prefix, device=device)
            rows = torch.cat([leading.flatten(), rows]).sort().values
        return self._of_rows(rows, lengths=tuple(left.tolist()))

    def _of_rows(self, rows: Tensor, **changes: Any) -> LayerSignals:
        """With the queries, keys and values (H, n, d) of some `rows` (m,) alone."""
        states = {name: getattr(self, name).index_select(1, rows) for name in ("query", "key", "value")}
        return replace(self, **states, **changes)

    def _cut_sources(self, sources: Tensor, tokens: Tensor) -> LayerSignals:
        """Of tokens that are made of patches, only `tokens`: without the patches that only others were made of. What
        no token is made of (padding around the picture) stays, as the tower attended to it."""
        own, whole = sources[tokens.to(sources.device)], sum(self.lengths)
        stays = torch.ones(whole, dtype=torch.bool, device=sources.device)
        stays[sources.flatten()] = False
        stays[own.flatten()] = True
        cut = replace(self, sources=None, weights=None)._cut_patches(stays.nonzero().flatten())
        weights = None if self.weights is None else self.weights[tokens.to(self.weights.device)]
        return replace(cut, sources=(stays.cumsum(0) - 1)[own], weights=weights)
