"""Selection: what a pruner answers, for the tokens of one image."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from vtprune.errors import VTPruneError
from vtprune.method.choosing import top

# How the note on an image begins that a method cannot cut to its budget.
KEPT_WHOLE = "kept whole: "


@dataclass(frozen=True)
class Merge:
    """Vectors of `members` flow into the token `into` with `weights` (which sum to 1 unless a method says else)."""

    into: int
    members: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Selection:
    """The tokens of one image that go on, and what flows into them.

    kept: (K,) int64 indices into the N tokens that the pruner was shown, ascending and distinct.
    vectors: (K, D) new vectors for the kept tokens, or None to leave them as they are.
    merges: for each token with a new vector, where the vector came from; or a function that says so, which is called
    when a report is asked for.
    note: what the report should say of this choice, "" for nothing.
    bias: (K,) what every decoder layer adds to the attention logits of each kept token as a key, or None; scores: (N,)
    what the layer of `Guided.learns_from` is to teach. Both are for training, carry gradients, and lift the budget.
    sound: that the indices are ascending, distinct and inside N by the way they were made, so that the device need not
    be asked. mix: what made `vectors`, for other values (N, D) that belong to the same tokens (what a decoder adds to
    them between its layers); None: as the merges say, with constant weights. ranking: (N,) the scores that the choice
    was made by, where it is one of the best. withdraws: that no token is kept on purpose.
    """

    kept: Tensor
    vectors: Tensor | None = None
    merges: tuple[Merge, ...] | Callable[[], tuple[Merge, ...]] = field(default=())
    note: str = ""
    bias: Tensor | None = None
    scores: Tensor | None = None
    sound: bool = False
    mix: Callable[[Tensor], Tensor] | None = None
    ranking: Tensor | None = None
    withdraws: bool = False

    @classmethod
    def best(cls, scores: Tensor, count: int) -> Selection:
        """The `count` tokens with the highest of (N,) scores; ties go to the lowest index."""
        return cls(top(scores, count), sound=True, ranking=scores)

    @classmethod
    def nothing(cls, like: Tensor) -> Selection:
        """No token at all: the image leaves the decoder. For stages between layers alone; like: any tensor of it."""
        return cls(torch.empty(0, dtype=torch.long, device=like.device), sound=True, withdraws=True)

    def merged(self) -> tuple[Merge, ...]:
        """The merges themselves."""
        return self.merges() if callable(self.merges) else self.merges

    @property
    def learns(self) -> bool:
        """Whether this is a choice that weights are trained by."""
        return self.bias is not None or self.scores is not None

    def check(self, tokens: int) -> None:
        """Raises VTPruneError unless the indices are ascending, distinct and inside `tokens`."""
        kept = self.kept
        if self.withdraws and kept.numel() == 0:
            return
        if kept.ndim != 1 or kept.numel() == 0:
            raise VTPruneError(f"a selection keeps at least one token of {tokens}, got shape {tuple(kept.shape)}")
        if not self.sound:
            found = kept.tolist()
            rising = all(one < two for one, two in itertools.pairwise(found))
            if not rising or found[0] < 0 or found[-1] >= tokens:
                raise VTPruneError(f"kept indices must be ascending, distinct and below {tokens}, got {found}")
        if self.vectors is not None and self.vectors.shape[0] != kept.numel():
            raise VTPruneError(f"{self.vectors.shape[0]} merged vectors for {kept.numel()} kept tokens")
        if self.bias is not None and self.bias.shape != kept.shape:
            raise VTPruneError(f"a bias of shape {tuple(self.bias.shape)} for {kept.numel()} kept tokens")
        if self.scores is not None and self.scores.shape != (tokens,):
            raise VTPruneError(f"scores of shape {tuple(self.scores.shape)} for {tokens} tokens")


@dataclass(frozen=True)
class Routes:
    """Which tokens of a batch a routed decoder layer computes, and what it makes of them.

    kept: (B, n) bool, the others skip the layer; or columns: (B, m), ascending, of those that are kept, where each row
    keeps equally many; neither: all. gate: (B, n) what the output of the layer's MLP is multiplied by, for
    kept tokens; scale: (B, n) what a skipped token's hidden state is multiplied by; branch: (B, n) what all that the
    layer adds to a kept token's hidden state is multiplied by. None leaves them as they are. loss: what the routing
    adds to the loss in training, a scalar. counts: (B,) how many are kept, where the method knows; else the device is
    asked. read: whether the layer has keys and values of a skipped token, too, made of its state as it is, so that the
    tokens that it computes still attend to it, and later forwards do.
    """

    kept: Tensor | None = None
    gate: Tensor | None = None
    scale: Tensor | None = None
    branch: Tensor | None = None
    loss: Tensor | None = None
    counts: tuple[int, ...] | None = None
    columns: Tensor | None = None
    read: bool = False

    def computed(self, states: Tensor) -> Computed:
        """Which of the tokens (B, n, ...) the layer computes."""
        kept = None if self.kept is None else self.kept.detach()
        return Computed(kept, self.columns, shape=(states.shape[0], states.shape[1]), device=states.device)


@dataclass(frozen=True)
class Computed:
    """Which tokens a routed layer computes of those of `shape` (B, n): `kept` (B, n) bool, or the `columns` (B, m) of
    those; neither: all."""

    kept: Tensor | None
    columns: Tensor | None
    shape: tuple[int, int]
    device: torch.device

    @cached_property
    def mask(self) -> Tensor:
        """(B, n) bool."""
        if self.kept is not None:
            return self.kept
        mask = torch.full(self.shape, self.columns is None, device=self.device)
        return mask if self.columns is None else mask.scatter_(1, self.columns, True)

    def of_rows(self, rows: list[int]) -> Computed:
        """Of some rows, in this order."""
        kept, columns = (None if one is None else one[rows] for one in (self.kept, self.columns))
        return Computed(kept, columns, (len(rows), self.shape[1]), self.device)


@dataclass(frozen=True)
class VisionPlan:
    """What one decoder layer does with the vision tokens of a prompt; text is computed as ever.

    heads: the key-value heads, ascending, that read vision, with the query heads that share each; None: all. For the
    others vision tokens have neither queries nor values, but keys: what text gives them there is lost, as in a
    softmax whose values are 0. window: vision tokens attend to those of their own image whose row and column are each
    at most (window - 1) // 2 away, and to everything before the image; None: as the model attends. causal: whether
    they see no later token of the image even so. mlp: how many of the first channels of the MLP vision tokens go
    through; None: all. count: how many key-value heads read vision, where `rank_heads` says which while the prompt is
    read, for each row by itself; in place of `heads`.
    """

    heads: tuple[int, ...] | None = None
    window: int | None = None
    causal: bool = False
    mlp: int | None = None
    count: int | None = None

    @property
    def attends(self) -> bool:
        """Whether it changes the layer's attention."""
        return self.heads is not None or self.count is not None or self.window is not None

    def reading(self, heads: int) -> int:
        """How many of so many key-value heads read vision."""
        if self.count is not None:
            return self.count
        return heads if self.heads is None else len(self.heads)


@dataclass(frozen=True)
class EncoderSelection:
    """Which tokens of a batch of images go on after an encoder layer, and what flows into them.

    keep: (B, N) bool. into: (B, N) int64, the column that each token's vector flows into: its own for a kept
    token, that of a kept token for one that is merged, -1 for one that is dropped. weights: (B, N) the share of
    each token in that vector. Both are None where nothing flows. cls: (B,) int64, the kept column whose vector the CLS
    token's own vector replaces, -1 for none. counts: how many of each image are kept, where the method knows; flows:
    whether anything flows into another token, is rescaled, or takes a token's place, where it knows; sound: that
    `into` names itself for a kept token and a kept one or nothing for any other by the way it was made; lossless: that
    nothing is dropped, and no image padded; keeps_names: that what flows together has the index and the position of
    the kept token, not those of the one with the largest share (ties: the lowest). What is not known the device is
    asked for.
    """

    keep: Tensor
    into: Tensor | None = None
    weights: Tensor | None = None
    cls: Tensor | None = None
    counts: tuple[int, ...] | None = None
    flows: bool | None = None
    sound: bool = False
    lossless: bool = False
    keeps_names: bool = False

    @classmethod
    def drop(cls, keep: Tensor, counts: tuple[int, ...] | None = None) -> EncoderSelection:
        """Nothing flows: what (B, N) `keep` leaves out is dropped; counts: how many of each image it keeps."""
        return cls(keep, counts=counts, flows=False, sound=True)

    @cached_property
    def order(self) -> Tensor:
        """(B, N') the columns that are kept, ascending, in front of what pads the shorter rows."""
        counts = self.keep.sum(dim=1).tolist() if self.counts is None else self.counts
        places = torch.sort(self.keep.to(torch.uint8), dim=1, descending=True, stable=True).indices
        return places[:, : max(counts)]

    @cached_property
    def targets(self) -> Tensor:
        """(B, N) `into`, made where it is None."""
        if self.into is not None:
            return self.into
        column = torch.arange(self.keep.shape[1], device=self.keep.device).expand_as(self.keep)
        return column.masked_fill(~self.keep, -1)

    @cached_property
    def landed(self) -> Tensor:
        """(B, N) the column, among those that are kept, that each token flows into, where nothing is dropped."""
        return (self.keep.cumsum(dim=1) - 1).gather(1, self.targets)

    @cached_property
    def shares(self) -> Tensor:
        """(B, N) `weights`, made where they are None."""
        return torch.ones(self.keep.shape, device=self.keep.device) if self.weights is None else self.weights

    def settled(self) -> EncoderSelection:
        """The same with `counts` and `flows`, for which the device is asked once."""
        if self.counts is not None and self.flows is not None:
            return self
        counts = self.keep.sum(dim=1)
        if self.flows is not None:
            return replace(self, counts=tuple(counts.tolist()))
        found = torch.cat([counts, self._flows().long()[None]]).tolist()
        return replace(self, counts=tuple(found[:-1]), flows=bool(found[-1]))

    def _flows(self) -> Tensor:
        moved = (self.targets >= 0) & ~self.keep
        rescaled = self.keep & (self.shares != 1)
        found = (moved | rescaled).any()
        return found if self.cls is None else found | (self.cls >= 0).any()

    def unseen(self, hidden: Tensor) -> EncoderSelection:
        """The same without the tokens `hidden` (B, N)."""
        flows = self.into is not None
        return EncoderSelection(
            self.keep & ~hidden,
            self.targets.masked_fill(hidden, -1) if flows else None,
            self.shares if flows else None,
            self.cls,
            counts=self.counts,
            flows=self.flows,
            sound=self.sound,
            keeps_names=self.keeps_names,
        )

    def sparing(self, spared: Sequence[bool], valid: Tensor, alive: Sequence[int]) -> EncoderSelection:
        """The same but for the rows that are `spared` (B,), which keep every `valid` (B, N) token, `alive` (B,) of
        them, as it is."""
        whole = torch.tensor(spared, device=valid.device)
        rows = whole[:, None]
        column = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
        flows = self.into is not None
        return EncoderSelection(
            torch.where(rows, valid, self.keep & valid),
            torch.where(rows, column, self.targets).masked_fill(~valid, -1) if flows else None,
            torch.where(rows, 1.0, self.shares.float()) if flows else None,
            None if self.cls is None else self.cls.masked_fill(whole, -1),
            counts=self.counts
            and tuple(n if spare else own for spare, n, own in zip(spared, alive, self.counts, strict=True)),
            flows=self.flows,
            sound=self.sound,
            keeps_names=self.keeps_names,
        )


@dataclass(frozen=True, kw_only=True)
class Means(EncoderSelection):
    """The same where no image is padded, equally many tokens of each are kept, and all others flow into these, which
    become means weighted by the tokens that each member stands for.

    landing: (B, 1 + N) int64, behind a leading 0: which of the kept tokens, counted from 1, each one flows into.
    sizes: (B, N) those that the layer was shown. `into` and `weights` follow from both, where somebody asks for them.
    """

    landing: Tensor
    sizes: Tensor

    def __post_init__(self) -> None:
        for name in ("into", "weights"):
            # What the base class noted stands in front of what is made below.
            self.__dict__.pop(name)

    @cached_property  # type: ignore[misc]
    def into(self) -> Tensor:
        """(B, N) the column that each token flows into."""
        return self.order.gather(1, self.landed)

    @cached_property  # type: ignore[misc]
    def weights(self) -> Tensor:
        """(B, N) the share of each token in what it flows into."""
        sums = torch.zeros_like(self.sizes).scatter_add_(1, self.landed, self.sizes)
        return self.sizes / sums.gather(1, self.landed)

    @cached_property
    def landed(self) -> Tensor:
        """(B, N) `landing`, counted from 0."""
        return self.landing[:, 1:] - 1


@dataclass(frozen=True)
class Eviction:
    """What a layer's cache goes on with, of one row.

    kept: (Hkv, m) int64, the entries that stay, ascending in each head; the heads may keep different ones. key, value:
    (Hkv, m, d) what they are from now on; merged: (Hkv, m) how many evicted entries flowed into each. state: numbers
    to remember until the next call; sound: that the entries are ascending, distinct and inside the cache by the way
    they were chosen.
    """

    kept: Tensor
    key: Tensor
    value: Tensor
    merged: Tensor
    state: dict[str, float | Tensor] = field(default_factory=dict)
    sound: bool = False

    def check(self, entries: int) -> None:
        """Raises VTPruneError unless the entries are ascending, distinct and inside `entries` in every head."""
        kept, shapes = self.kept, {tuple(part.shape[:2]) for part in (self.kept, self.key, self.value, self.merged)}
        if kept.ndim != 2 or kept.numel() == 0 or len(shapes) != 1:
            raise VTPruneError(f"an eviction keeps equally many entries in every head, got shapes {sorted(shapes)}")
        if self.sound:
            return
        found = kept.tolist()
        rising = all(one < two for head in found for one, two in itertools.pairwise(head))
        if not rising or min(map(min, found)) < 0 or max(map(max, found)) >= entries:
            raise VTPruneError(f"kept entries must be ascending, distinct and below {entries} in every head")
