"""What was kept, computed and cached: the report of a generation."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from vtprune.cost.formulas import FlopsBreakdown
from vtprune.method.answers import KEPT_WHOLE


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
    """One pruner of the list: where it acts, what it was asked to keep (of a video, where that is another), and the
    tokens an image that it left (the mean over images; where it acts more than once, the last time)."""

    method: str
    stage: str
    asked_keep: int | float | None
    tokens_left: float
    asked_keep_video: int | float | None = None


@dataclass(frozen=True)
class ImageReport:
    """One image or video of one row: indices count its own vision tokens, 0 .. tokens - 1, in raster order, frame by
    frame.

    grid: (t, h, w) in vision tokens, one row of all of them where they form several rectangles; parts: (t, h, w) of
    each rectangle (frames, or the base crop of a picture and the grid that its other crops make); kind: "image" or
    "video"; kept_per_part: of `kept`, how many lie in each part; structural: the placeholders that are no vision
    tokens (newlines), and structural_left: those that enter the decoder; kept: tokens that enter the decoder;
    kept_per_layer: tokens that each decoder layer processes; cached_per_layer: tokens in each layer's cache after the
    prefill; merged: what flowed into what; cls: the token in whose place the encoder's CLS token stands, -1 for none,
    and cls_tokens: that of each crop that has one; notes: what methods said; published_tokens: what was kept as the
    last method's paper counts it, None where it counts as this report does; steps: every forward on the cache after
    the one that brought the image, where its tokens may return; cached_per_head: the tokens that each key-value head
    of a layer's cache holds now, by layer, [] for a layer whose heads all hold what they held after the prefill;
    achieved_tokens: what was kept, counted as the last method counts `keep`.
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
    kind: str = "image"
    kept_per_part: list[int] = field(default_factory=list)
    cls_tokens: list[int] = field(default_factory=list)
    parts: list[tuple[int, int, int]] = field(default_factory=list)
    structural: int = 0
    structural_left: int = 0

    @property
    def kept_whole(self) -> str:
        """Why the method could not cut the image to its budget, "" where it could."""
        found = (note.partition(KEPT_WHOLE)[2] for note in self.notes)
        return next((reason for reason in found if reason), "")


@dataclass(frozen=True)
class SampleReport:
    """One row of the (expanded) batch, and what it costs alone: FLOPs and bytes as in `Report`, which sums them up.

    Beams of one row share its images: the encoder's FLOPs are the first one's. encoder_flops: of `flops`, those of the
    tower and the projector. attempts: the keeps that were tried, where a method runs at several levels; the answer is
    that of the last one, of which counts and bytes are, while FLOPs are of all.
    """

    images: list[ImageReport]
    text_tokens: int
    flops: int = 0
    flops_full: int = 0
    scoring_flops: int = 0
    encoder_flops: int = 0
    attempts: list[int | float] = field(default_factory=list)
    kv_bytes_prefill: int = 0
    kv_bytes_prefill_full: int = 0
    kv_bytes: int = 0
    kv_bytes_full: int = 0


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

    `tokens_per_layer[layer][row]`: vision tokens processed in the prefill; `kv_tokens_per_layer[layer][row]`:
    vision and text entries in the cache now, padding left out; steps: forwards on the cache since the prefill.
    asked_keep: what each pruner was asked for, None where thresholds decide;
    achieved_keep: mean over images of kept over all tokens, counted
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
    asked_keep: int | float | list[int | float | None] | None
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

    def __str__(self) -> str:
        """Five lines: the method and where it acts, what was kept of each image, the tokens by layer, FLOPs, KV bytes
        (three of a vision encoder that stands alone); and how many images were kept whole, if any was."""
        images = [image for sample in self.samples for image in sample.images]
        whole = sum(image.tokens for image in images) / max(1, len(images))
        kinds = {image.kind for image in images}
        one = "image or video" if len(kinds) > 1 else next(iter(kinds), "image")
        several = "images and videos" if len(kinds) > 1 else f"{one}{'s' * (len(images) != 1)}"
        layers = [f"{sum(layer) / max(1, len(layer)):.4g}" for layer in self.tokens_per_layer]
        runs = [(tokens, len(list(run))) for tokens, run in itertools.groupby(layers)]
        shape = ", ".join(f"{count} x {tokens}" for tokens, count in runs)
        lines = [
            f"{self.method}: {'; then '.join(stage.stage for stage in self.stages) or 'nowhere'}",
            f"kept {self.kept_tokens:.4g} of {whole:.4g} tokens {'a' if one == 'video' else 'an'} {one} "
            f"({self.achieved_keep:.1%}), {len(images)} {several} in {len(self.samples)} "
            f"row{'s' * (len(self.samples) != 1)}",
        ]
        flops = f"FLOPs {_share(self.flops, self.flops_full)} of {self.flops_full:.3g}"
        if layers:
            lines += [
                f"decoder layers x vision tokens a row: {shape}",
                f"{flops} in the prefill",
                f"KV cache {_share(self.kv_bytes, self.kv_bytes_full)} of {self.kv_bytes_full / 2**20:.3g} MiB",
            ]
        else:
            lines.append(f"{flops} in the vision encoder")
        tried = Counter(sample.attempts[-1] for sample in self.samples if sample.attempts)
        if tried:
            rows = ", ".join(f"{count} at keep={keep}" for keep, count in sorted(tried.items()))
            lines.append(f"rows answered: {rows}")
        noted = sum(bool(image.kept_whole) for image in images)
        if noted:
            lines.append(f"kept whole: {noted} of {len(images)} {several}, see their notes")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "0%"
