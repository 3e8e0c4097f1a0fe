"""`select`: what a method would keep of features that somebody has already, without any model being wrapped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.errors import CannotCut, VTPruneError
from vtprune.method.answers import Merge, Selection
from vtprune.method.facts import ModelFacts
from vtprune.method.kinds import IMAGE, VIDEO
from vtprune.method.pruner import Pruner, checked_grid, form_for
from vtprune.method.resolving import resolve
from vtprune.method.stages import BeforeDecoder, InEncoder, Read, Trained, drop_layers, probe_layer, reads
from vtprune.method.views import LayerSignals, VisionStream

# The method that does nothing, and the one that draws by the pixels, which every stream has.
NOTHING, SEEDED = "none", "random"
# What a method may read, and the argument of `select` that holds it.
NEEDED = {
    Read.ENCODER: "signals",
    Read.ENCODER_FLOWS: "signals",
    Read.LAST_LAYER: "last_signals",
    Read.LAST_LAYER_FLOWS: "last_signals",
    Read.PICTURE: "picture",
    Read.PIXELS: "pixels",
}


@dataclass(frozen=True)
class Chosen:
    """What goes on of an image: kept (K,) indices of its tokens, ascending; features (K, D) of these, with what flowed
    into them; merges: what flowed into what; note: what the method says of its choice."""

    kept: Tensor
    features: Tensor
    merges: tuple[Merge, ...] = ()
    note: str = ""


def select(
    features: Tensor,
    pruner: Any,
    *,
    grid: Sequence[int],
    signals: LayerSignals | None = None,
    last_signals: LayerSignals | None = None,
    pixels: Tensor | None = None,
    picture: Tensor | None = None,
    text: Tensor | None = None,
    text_ids: Tensor | None = None,
    text_after: int | None = None,
    module: nn.Module | None = None,
    source: str = "",
    **options: Any,
) -> Chosen:
    """What a method keeps of the features (N, D) of one image or video, in raster order.

    pruner, options: one method, as `vtprune.wrap` takes it, that chooses before the decoder and by nothing else
    (`fopru`, `divprune`, `holov`, `grid`, `pool` and their like; `covipal` with its `module`). grid: (h, w), or
    (t, h, w) of a video; signals, last_signals, pixels, picture: what `VisionStream` says, for methods that read them;
    text: (T, D) embeddings of the prompt's text, the last `text_after` of which (None: all) stand after the image;
    text_ids: (T,) their ids, by which CDPruner tells the question from the chat template of the tokenizer in the
    folder `source`; module: a trained method's weights. Raises VTPruneError for a method that needs a model, and where
    something that it reads is missing, ScoreError for NaN. Where the method's `count` is known, so many are kept.
    """
    given = resolve(pruner, **options)
    if len(given) != 1:
        raise VTPruneError(f"select runs one method, got {len(given)}")
    shape = checked_grid(grid)
    if features.ndim != 2 or math.prod(shape) != features.shape[0]:
        raise VTPruneError(f"features of shape {tuple(features.shape)} are not (N, D) for a grid of {tuple(grid)}")
    given_signals = signals or last_signals
    facts = ModelFacts(
        has_cls=given_signals is not None and given_signals.has_cls,
        encoder_depth=2,
        decoder_depth=2,
        group=1 if given_signals is None else given_signals.group,
        decoder_width=features.shape[1],
        source=source,
    )
    kind = VIDEO if shape[0] > 1 else IMAGE
    if given[0].name == NOTHING:
        return Chosen(torch.arange(features.shape[0], device=features.device), features)
    method = form_for(_choosing(given[0], module).bind(facts), kind)
    assert isinstance(method, BeforeDecoder)
    own = {"signals": signals, "last_signals": last_signals, "picture": picture, "pixels": pixels}
    needed = [name for need, name in NEEDED.items() if need in reads(method)]
    needed += ["pixels"] * (method.name == SEEDED)
    for name in needed:
        if own[name] is None:
            raise VTPruneError(f"{method.name} reads {name}: give {name}=...")
    total = features.shape[0]
    try:
        budget = method.input_budget(total)
    except CannotCut as error:
        raise VTPruneError(f"{method.name}: {error}") from error
    everything = torch.arange(total, device=features.device)
    stream = VisionStream(
        features=features,
        grid=shape,
        indices=everything,
        total=total,
        budget=method.budget(total) if budget is None else budget,
        signals=signals,
        pixels=features.new_zeros(0) if pixels is None else pixels,
        text=features.new_zeros(0, features.shape[1]) if text is None else text,
        last_signals=last_signals,
        picture=picture,
        text_ids=text_ids,
        text_after=(0 if text is None else text.shape[0]) if text_after is None else text_after,
        module=module,
        source=source,
        kind=kind,
    )
    if (budget is not None and budget >= total) or (kind == IMAGE and method.videos_only):
        return Chosen(everything, features)
    selection = method.select(stream)
    if selection is None:
        return Chosen(everything, features)
    selection.check(total)
    return _carried_out(selection, features)


def _choosing(pruner: Pruner, module: nn.Module | None) -> Pruner:
    """Raises VTPruneError for a method that cannot choose by features alone, or by these and weights."""
    reasons = {
        "acts inside the encoder": isinstance(pruner, InEncoder),
        "acts inside the decoder": bool(drop_layers(pruner)) or not isinstance(pruner, BeforeDecoder),
        "chooses by a decoder layer": probe_layer(pruner) is not None,
        "chooses by trained weights (module=...)": isinstance(pruner, Trained) and module is None,
    }
    why = next((reason for reason, holds in reasons.items() if holds), None)
    if why is not None:
        raise VTPruneError(f"{pruner.name} {why}; select runs methods that choose by features alone")
    return pruner


def _carried_out(selection: Selection, features: Tensor) -> Chosen:
    vectors = features[selection.kept] if selection.vectors is None else selection.vectors.to(features)
    return Chosen(selection.kept, vectors, selection.merged(), selection.note)
