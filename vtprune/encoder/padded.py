"""Images of one size as a padded batch, as CLIP and SigLIP towers take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtprune.encoder.encoding import Call, Encoding
from vtprune.encoder.merging import Change
from vtprune.errors import VTPruneError
from vtprune.method.answers import EncoderSelection
from vtprune.tensors.attention import split_heads
from vtprune.tensors.taps import tapped


@dataclass(frozen=True)
class Cut:
    """How a layer's inputs differ from the output of the one before: what changes, which tokens (B, P + N) are not
    padding (None: all), and what attention adds to their logits (None: nothing)."""

    change: Change | None
    valid: Tensor | None
    bias: Tensor | None


class PaddedEncoding(Encoding):
    """Images of one size as a (B, P + N, D) batch, as CLIP and SigLIP towers take them.

    Where images keep different counts, shorter rows are padded on the right and the padding is masked.
    """

    def __init__(self, *args: Any, flash: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.flash = flash
        self._change: Change | None = None
        self._cuts: dict[int, Cut] = {}
        # What happened before the MLP of a layer, and to how many tokens.
        self._inside: dict[int, tuple[Change, int]] = {}

    def states(self, kwargs: dict[str, Any], places: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (split_heads(tapped(self.taps, name), self.heads) for name in ("q", "k", "v"))
        return query, key, value

    def key_bias(self, index: int) -> Tensor | None:
        return self._cuts[index].bias

    def hidden(self, states: Tensor) -> Tensor:
        return states

    def compact(self, selection: EncoderSelection, order: Tensor, cls: Tensor | None) -> None:
        self._change = Change(order, selection if selection.flows else None, cls)

    def layer_inputs(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        states = args[0]
        if index not in self._cuts:
            self._cuts[index] = self._new_cut(index)
        cut = self._cuts[index]
        states = self._apply(cut.change, states)
        if cut.valid is None and cut.bias is None:
            return (states, *args[1:]), kwargs
        mask = self._mask(states, cut.valid, cut.bias)
        if len(args) > 1:
            return (states, mask, *args[2:]), kwargs
        return (states,), {**kwargs, "attention_mask": mask}

    def _apply(self, change: Change | None, states: Tensor) -> Tensor:
        if change is None:
            return states
        return torch.cat([states[:, : self.prefix], change.apply(states[:, self.prefix :])], dim=1)

    def _new_cut(self, index: int) -> Cut:
        if index >= self.depth:
            # These layers run on what the features' layer gave; the features are not made from their output.
            features = self._cuts[self.depth - 1]
            return Cut(None, features.valid, features.bias)
        change, self._change = self._change, None
        valid, bias = None, self.size_bias()
        if not self.full:
            valid = torch.cat([self.valid.new_ones(self.valid.shape[0], self.prefix), self.valid], dim=1)
        if bias is not None:
            if self.flash:
                raise VTPruneError(
                    "FlashAttention cannot weigh keys by the tokens that they stand for; load the model with "
                    "attn_implementation='sdpa'"
                )
            bias = torch.nn.functional.pad(bias, (self.prefix, 0))
        return Cut(change, valid, bias)

    def _mask(self, states: Tensor, valid: Tensor | None, bias: Tensor | None) -> Tensor:
        if self.flash and valid is not None:
            return valid.to(states.device)
        if bias is None:
            mask = torch.zeros(states.shape[:2], dtype=states.dtype, device=states.device)
        else:
            mask = bias.to(states)
        if valid is not None:
            mask = mask.masked_fill(~valid.to(mask.device), torch.finfo(states.dtype).min)
        return mask[:, None, None, :].expand(-1, 1, states.shape[1], -1)

    def open_mlp(self, index: int, states: Tensor) -> None:
        self._note_mlp(index)
        if self._change is not None:
            # The layer's own output is still of the old length: the next layer changes it once more.
            self._inside[index] = (self._change, states.shape[1] - self.prefix)

    def mlp_input(self, index: int, states: Tensor) -> Tensor:
        if index not in self._inside:
            return states
        return self._apply(self._inside[index][0], states)

    def mlp_output(self, index: int, states: Tensor) -> Tensor:
        if index not in self._inside:
            return states
        change, tokens = self._inside[index]
        return torch.cat([states[:, : self.prefix], change.spread(states[:, self.prefix :], tokens)], dim=1)

    def projector_input(self, states: Tensor) -> Tensor:
        return states if self._change is None else self._change.apply(states)

    def projector_output(self, states: Tensor) -> Tensor:
        if not self.dropped:
            return states
        # Padding is written to an extra place that nobody reads.
        full = states.new_zeros(states.shape[0], max(self.totals) + 1, *states.shape[2:])
        rows = torch.arange(states.shape[0], device=states.device)[:, None].expand(self.alive.shape)
        names = self.names() if self.full else self.names().masked_fill(~self.valid, max(self.totals))
        return full.index_put((rows, names.to(states.device)), states)[:, :-1]

    def layer_segments(self, kwargs: dict[str, Any]) -> list[list[int]]:
        return [[self.prefix + tokens] for tokens in self.computed()]

    def computed(self) -> list[int]:
        # The crops of one image run together, padded to the longest of them.
        return [max(own) for own in self.of_units(self.counts) for _ in own]
