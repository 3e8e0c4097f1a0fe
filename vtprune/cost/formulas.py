"""FLOPs and KV-cache bytes of one prefill, from the sizes of a model alone: no weights, no forward.

cost.md says line by line what is counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from vtprune.cost.sizes import Alive, ModelCost, PlannedTokens, TransformerCost, count
from vtprune.errors import VTPruneError

# Matrices of the MLP in the two published formulas for a decoder layer, n(4d^2) + 2n^2 d + matrices * ndm.
CONVENTIONS = {"exact": None, "2ndm": 2, "3ndm": 3}


@dataclass(frozen=True)
class FlopsBreakdown:
    """FLOPs of one row's prefill by part: 2 per multiply-accumulate ("2ndm" and "3ndm" count 1)."""

    vision_tower: int
    projector: int
    decoder: int
    head: int
    scoring: int

    @property
    def total(self) -> int:
        """The sum of the parts."""
        return self.vision_tower + self.projector + self.decoder + self.head + self.scoring

    def to_dict(self) -> dict[str, int]:
        """The parts and `total` as plain JSON."""
        return {**asdict(self), "total": self.total}


def _per_layer(name: str, value: int | Sequence[int], layers: int) -> list[int]:
    """One count a layer, from a sequence of that length or one int for all."""
    if not isinstance(value, Sequence):
        return [count(name, value)] * layers
    if len(value) != layers:
        raise VTPruneError(f"{name} takes one int or {layers} of them, one a decoder layer, got {len(value)}")
    return [count(name, n) for n in value]


def _published(decoder: TransformerCost, lengths: Sequence[int], matrices: int) -> int:
    """The papers' formula: multiply-accumulates, every head with its own keys, `matrices` in the MLP."""
    d, m = decoder.width, decoder.mlp_width
    return sum(4 * n * d * d + 2 * n * n * d + matrices * n * d * m for n in lengths)


def prefill_flops(
    model: ModelCost,
    tokens_per_layer: int | Sequence[int],
    *,
    text_tokens: int | Sequence[int],
    images: int | Sequence[Sequence[int]],
    convention: str = "exact",
    encoder_tokens_per_layer: Sequence[Sequence[Alive]] | None = None,
    encoder_mlp_tokens_per_layer: Sequence[Sequence[int]] | None = None,
    projector_tokens: int | None = None,
    plane_tokens: int | None = None,
    read_tokens_per_layer: int | Sequence[int] = 0,
    keys_alone: bool = False,
    planned: Mapping[int, PlannedTokens] | None = None,
    scoring: int = 0,
    logits: int = 1,
) -> FlopsBreakdown:
    """`vtprune.flops` of a model whose sizes are known."""
    if convention not in CONVENTIONS:
        raise VTPruneError(f"convention is one of {', '.join(CONVENTIONS)}, got {convention!r}")
    decoder = model.decoder
    vision = _per_layer("tokens_per_layer", tokens_per_layer, decoder.layers)
    text = _per_layer("text_tokens", text_tokens, decoder.layers)
    lengths = [v + t for v, t in zip(vision, text, strict=True)]
    read = _per_layer("read_tokens_per_layer", read_tokens_per_layer, decoder.layers)
    if any(read[layer] for layer in decoder.states):
        raise VTPruneError("read_tokens_per_layer is 0 in layers of linear attention, which have no keys to be read")
    planned = planned or {}
    for layer, plan in planned.items():
        plan.check(decoder, layer, vision[layer] if 0 <= layer < decoder.layers else 0)
    matrices = CONVENTIONS[convention]
    if matrices is not None:
        if planned:
            raise VTPruneError(
                f"convention {convention!r} is a formula for layers that treat all tokens alike, and some have "
                "plans; use 'exact'"
            )
        if any(read):
            raise VTPruneError(
                f"convention {convention!r} is a formula for tokens that a layer computes, and some of these are only "
                "read; use 'exact'"
            )
        if decoder.states:
            raise VTPruneError(
                f"convention {convention!r} is a formula for attention in every layer, and this decoder has linear "
                "attention in most of them; use 'exact'"
            )
        published = _published(decoder, lengths, matrices)
        return FlopsBreakdown(vision_tower=0, projector=0, decoder=published, head=0, scoring=0)
    grids = model.vision.grids(images)
    alive = _alive(encoder_tokens_per_layer, len(grids), model.vision.blocks.layers)
    none: list[None] = [None] * len(grids)
    mlp: Sequence[Sequence[int] | None] = encoder_mlp_tokens_per_layer or none
    if projector_tokens is None:
        projector_tokens = sum(model.vision.features(grid) for grid in grids)
    if plane_tokens is None:
        plane_tokens = model.planes * sum(model.vision.features(grid) for grid in grids)
    projected = count("projector_tokens", projector_tokens) + count("plane_tokens", plane_tokens)
    return FlopsBreakdown(
        vision_tower=2 * sum(model.vision.image_macs(g, a, m) for g, a, m in zip(grids, alive, mlp, strict=True)),
        projector=2 * model.projector_macs * projected,
        decoder=2
        * sum(
            decoder.planned_macs(text[layer], vision[layer], planned[layer])
            if layer in planned
            else decoder.macs_at(layer, lengths[layer], read[layer], values=not keys_alone)
            for layer in range(decoder.layers)
        ),
        head=2 * model.head_macs * count("logits", logits),
        scoring=count("scoring", scoring),
    )


def _alive(given: Sequence[Sequence[Alive]] | None, images: int, layers: int) -> Sequence[Sequence[Alive] | None]:
    """One entry an image: None, or what is alive in each encoder layer."""
    if given is None:
        return [None] * images
    if len(given) != images or any(len(image) != layers for image in given):
        raise VTPruneError(
            f"encoder_tokens_per_layer takes {images} lists (one an image) of {layers} entries (one an "
            f"encoder layer), got {[len(image) for image in given]} entries"
        )
    return given


def cache_bytes(decoder: TransformerCost, kv_tokens_per_layer: int | Sequence[int], dtype: torch.dtype | str) -> int:
    """`vtprune.kv_bytes` of a decoder whose sizes are known."""
    kind = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(kind, torch.dtype):
        raise VTPruneError(f"dtype is a torch dtype or its name, such as 'float16' or 'bfloat16', got {dtype!r}")
    entries = _per_layer("kv_tokens_per_layer", kv_tokens_per_layer, decoder.layers)
    wrong = [layer for layer in sorted(decoder.states) if entries[layer]]
    if wrong and isinstance(kv_tokens_per_layer, Sequence):
        raise VTPruneError(
            f"kv_tokens_per_layer is 0 in layers of linear attention, whose state does not grow, got "
            f"{entries[wrong[0]]} in layer {wrong[0]}"
        )
    held = sum(n for layer, n in enumerate(entries) if layer not in decoder.states)
    return 2 * decoder.kv_width * held * kind.itemsize + decoder.state_bytes(kind.itemsize)
