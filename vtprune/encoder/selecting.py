"""`select_encoded`: what a method would keep of what a vision encoder puts out, without any model being wrapped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from vtprune.encoder.merging import Change, Origins, merges_of
from vtprune.errors import VTPruneError
from vtprune.method.answers import EncoderSelection
from vtprune.method.facts import ModelFacts
from vtprune.method.pruner import Pruner, checked_grid
from vtprune.method.resolving import resolve
from vtprune.method.selecting import Chosen
from vtprune.method.stages import BeforeDecoder, InEncoder, Trained, drop_layers
from vtprune.method.views import EncoderLayer, LayerSignals
from vtprune.tensors.attention import full_precision

# What a method is told of an encoder whose last layer is all that it asks for.
DEPTH = 2


def select_encoded(
    states: Tensor, pruner: Any, *, grid: Sequence[int], signals: LayerSignals, **options: Any
) -> Chosen:
    """What a method keeps of the states (P + N * group, D) that the encoder layer which feeds the decoder puts out.

    pruner, options: one method, as `vtprune.wrap` takes it, that acts after that layer and nowhere else (`visionzip`,
    `vispruner`). grid: (h, w) or (1, h, w) of one image in vision tokens, N in all; signals: q, k and v of that layer,
    which say how many states lead (P) and how many form a token (group). The answer's features (K * group, D) are the
    states of the kept tokens, one token after the other, with what flowed into them, as the projector is to be given
    them; a CLS token stands in the place that the method names. Raises VTPruneError for any other method, and for
    shapes that do not fit, ScoreError for NaN.
    """
    given = resolve(pruner, **options)
    if len(given) != 1:
        raise VTPruneError(f"select_encoded runs one method, got {len(given)}")
    shape, group, prefix = checked_grid(grid), signals.group, signals.prefix
    total = math.prod(shape)
    if states.ndim != 2 or len(states) != prefix + total * group or signals.query.shape[1] != len(states):
        raise VTPruneError(
            f"states of shape {tuple(states.shape)} and signals of {signals.query.shape[1]} patches are not "
            f"those of a grid of {tuple(grid)}, {group} patches a token, behind {prefix} leading ones"
        )
    method = _acting(given[0], signals)
    budget = method.encoder_budget(total)
    everything = torch.arange(total, device=states.device)
    if budget >= total:
        return Chosen(everything, states[prefix:])
    with full_precision(states.device):
        answer = method.prune_encoder(_layer(method, states, signals, shape=shape, budget=budget))
    if answer is None:
        return Chosen(everything, states[prefix:])
    selection = (EncoderSelection.drop(answer) if isinstance(answer, Tensor) else answer).settled()
    cls = states[None, 0] if selection.cls is not None and prefix else None
    change = Change(selection.order, selection if selection.flows else None, cls)
    left = change.apply(rearrange(states[prefix:], "(n g) d -> 1 n (g d)", g=group))[0]
    kept, merges = selection.order[0], []
    if selection.flows:
        # A token that others flowed into is called after the one with the largest share, as in a wrapped model.
        origins = Origins(everything[None])
        origins.follow(selection, DEPTH - 1, merges=True)
        kept = origins.heaviest(len(kept), None if origins.complete else kept[None])[0]
        column = origins.column[0]
        owner = kept[column.clamp(min=0)].masked_fill(column < 0, -1)
        merges = merges_of(owner, origins.share[0])
        kept, order = kept.sort()
        left = left[order]
    return Chosen(kept, rearrange(left, "n (g d) -> (n g) d", g=group), tuple(merges))


def _acting(pruner: Pruner, signals: LayerSignals) -> InEncoder:
    """The method, told of the encoder; raises VTPruneError for one that acts elsewhere, too."""
    if not isinstance(pruner, InEncoder) or isinstance(pruner, BeforeDecoder | Trained) or pruner.before_mlp:
        raise VTPruneError(f"{pruner.name} does not act after the encoder's last layer alone; try vtprune.select")
    facts = ModelFacts(has_cls=signals.has_cls, encoder_depth=DEPTH, decoder_depth=DEPTH, group=signals.group)
    method = pruner.bind(facts)
    assert isinstance(method, InEncoder)
    if method.encoder_layers() != (DEPTH - 1,) or drop_layers(method):
        raise VTPruneError(f"{pruner.name} acts in other layers, too, which no choice made behind the encoder can do")
    return method


def _layer(
    method: InEncoder, states: Tensor, signals: LayerSignals, *, shape: tuple[int, int, int], budget: int
) -> EncoderLayer:
    """The layer as a method sees it."""
    total = math.prod(shape)
    ones = torch.ones(1, total, device=states.device)
    return EncoderLayer(
        query=signals.query[None],
        key=signals.key[None],
        value=signals.value[None],
        valid=ones.bool(),
        total=torch.tensor([total], device=states.device),
        budget=torch.tensor([budget], device=states.device),
        index=DEPTH - 1,
        depth=DEPTH,
        scale=signals.scale,
        prefix=signals.prefix,
        group=signals.group,
        memory={},
        sizes=ones,
        grids=(shape,),
        hidden=states[None],
        alive=(total,),
        budgets=(budget,),
        merged=False,
    )
