"""What was kept, computed and cached: the report of a generation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from vtprune.cost import FlopsBreakdown


@dataclass(frozen=True)
class MergeReport:
    """Vectors of `members` flowed into token `into` with `weights`.

    stage: "decoder": before decoder layer `layer`; "encoder": inside the vision encoder, at its layer `layer` for
    the last time (weights are then products over the layers). Weights sum to 1 unless the method says else.
    """

    into: int
    members: list[int]
    weights: list[float]
    layer: int
    stage: str = "decoder"


@dataclass(frozen=True)
class ImageStep:
    """One forward on the cache, for one image whose tokens may return: the tokens that each decoder layer attended to,
    and those of them that it computed in this step."""

    attended_per_layer: list[list[int]]
    computed_per_layer: list[list[int]]


@dataclass(frozen=True)
class StageReport:
    """One pruner of the list: where it acts, what it was asked to keep, and the tokens an image that it left (the
    mean over images; where it acts more than once, the last time)."""

    method: str
    stage: str
    asked_keep: int | float
    tokens_left: float


@dataclass(frozen=True)
class ImageReport:
    """One image of one row: indices count its own vision tokens, 0 .. tokens - 1, in raster order.

    grid: (t, h, w) in vision tokens; kept: tokens that enter the decoder; kept_per_layer: tokens that each
    decoder layer processes; cached_per_layer: tokens in each layer's cache after the prefill; merged: what flowed
    into what; cls: the token in whose place the encoder's CLS token stands, -1 for none; notes: what methods said;
    published_tokens: what was kept as the last method's paper counts it, None where it counts as this report does;
    steps: every forward on the cache after the one that brought the image, where its tokens may return;
    cached_per_head: the tokens that each key-value head of a layer's cache holds now, by layer, [] for a layer whose
    heads all hold what they held after the prefill; achieved_tokens: what was kept, counted as the last method counts
    `keep`.
    """

    grid: tuple[int, int, int]
    tokens: int
    kept: list[int]
    kept_per_layer: list[list[int]]
    merged: list[MergeReport]
    cached_per_layer: list[list[int]] = field(default_factory=list)
    cls: int = -1
    notes: list[str] = field(default_factory=list)
    published_tokens: float | None = None
    steps: list[ImageStep] = field(default_factory=list)
    cached_per_head: list[list[list[int]]] = field(default_factory=list)
    achieved_tokens: float = 0.0


@dataclass(frozen=True)
class SampleReport:
    """One row of the (expanded) batch."""

    images: list[ImageReport]
    text_tokens: int


@dataclass(frozen=True)
class StepReport:
    """One forward: the prefill, or a later one on its cache.

    tokens_per_layer[layer][row]: vision tokens processed; kv_tokens_per_layer[layer][row]: vision and text entries in
    the cache after it, padding left out (no layers without a cache); kv_bytes: what they take.
    """

    tokens_per_layer: list[list[int]]
    kv_tokens_per_layer: list[list[int]]
    kv_bytes: int


@dataclass(frozen=True)
class Report:
    """The last generation or forward: tokens, FLOPs of the prefill (two a multiply-accumulate), KV bytes.

    tokens_per_layer[layer][row]: vision tokens processed in the prefill; kv_tokens_per_layer[layer][row]:
    vision and text entries in the cache now, padding left out; steps: forwards on the cache since the prefill.
    asked_keep: what each pruner was asked for; achieved_keep: mean over images of kept over all tokens, counted
    as `keep` is; stages: each pruner of the list. flops sums the rows, each as if it ran alone; flops_full is the
    same unpruned. kv_bytes is logical (now; `_prefill`: right after the prompt; `_full`: had nothing been dropped),
    kv_bytes_allocated the cache's tensors with padding; all 0 without a cache. aux_bytes: hidden states that wait
    beside the cache, as allocated, where tokens may return. history: the prefill and each later forward, as rows
    stand now.
    """

    method: str
    samples: list[SampleReport]
    tokens_per_layer: list[list[int]]
    kv_tokens_per_layer: list[list[int]]
    steps: int
    asked_keep: int | float | list[int | float]
    achieved_keep: float
    kept_tokens: float
    flops: int
    flops_full: int
    flops_breakdown: FlopsBreakdown
    kv_bytes_prefill: int
    kv_bytes_prefill_full: int
    kv_bytes: int
    kv_bytes_full: int
    kv_bytes_allocated: int
    stages: list[StageReport] = field(default_factory=list)
    history: list[StepReport] = field(default_factory=list)
    aux_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)
