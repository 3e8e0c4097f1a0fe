"""What a decoder with linear-attention layers makes of padding: their states fold in whatever stands after a token."""

from __future__ import annotations

import numpy as np

from vtprune.cache.books import CacheLayer, entry_layers
from vtprune.cache.states import StateLayer
from vtprune.decoder.outline import Bools
from vtprune.decoder.prompt import PromptInfo
from vtprune.errors import VTPruneError

CURE = "pad batches on the left, and give each conversation of several turns a cache of its own"


def check_padding(prompt: PromptInfo, layers: list[CacheLayer] | None, *, drops: bool) -> None:
    """Raises VTPruneError where padding would be part of the states of tokens after it; drops: whether this input's
    images lose tokens.

    Padding before a row's first token changes no state; such between tokens fades it and moves the window of the
    convolution, in the unpruned model too, whose answer is then not that of the row alone. Where nothing is dropped
    nothing is refused: the model does what it does unwrapped.
    """
    if not drops and all(layer.places is None for layer in entry_layers(layers or ())):
        return
    states = [layer for layer in layers or () if isinstance(layer, StateLayer)]
    if any(layer.folded for layer in states):
        raise VTPruneError(
            "this prompt was padded on the right, so the states of linear-attention layers hold padding behind its "
            f"last token, and nothing can follow it; {CURE}"
        )
    if prompt.mask is None or (prompt.offset and prompt.length == 1):
        return
    real = prompt.outline.number >= 0
    if _within(real, continues=prompt.offset > 0):
        raise VTPruneError(
            "padding stands between tokens of a row, where it would become part of the state of linear-attention "
            f"layers; {CURE}"
        )
    for layer in states:
        layer.folded = not bool(real[:, -1].all())


def _within(real: Bools, *, continues: bool) -> bool:
    """Whether padding stands before a token of its row, and, unless the row `continues`, after one."""
    before = np.logical_or.accumulate(real, axis=1) | continues
    after = np.logical_or.accumulate(real[:, ::-1], axis=1)[:, ::-1]
    return bool((~real & before & after).any())
