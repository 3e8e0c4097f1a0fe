"""Images of one size as a padded batch, as CLIP and SigLIP towers take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtprune.encoder.encoding import Call, Encoding
from vtprune.encoder.merging import Averaging, Change
from vtprune.errors import VTPruneError
from vtprune.method.answers import EncoderSelection, Means
from vtprune.tensors.attention import split_heads
from vtprune.tensors.taps import tapped


@dataclass(frozen=True)
class Cut:
    """How a layer's inputs differ from the output of the one before: what changes, which tokens (B, P + N) are not
    padding (None: all), and what attention adds to their logits (None: nothing)."""

    change: Change | Averaging | None
    valid: Tensor | None
    bias: Tensor | None


class PaddedEncoding(Encoding):
    """Images of one size as a (B, P + N, D) batch, as CLIP and SigLIP towers take them.

    Where images keep different counts, shorter rows are padded on the right and the padding is masked.
    """

    def __init__(self, *args: Any, flash: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.flash = flash
        self._change: Change | Averaging | None = None
        self._cuts: dict[int, Cut] = {}
        # What happened before the MLP of a layer, and to how many tokens.
        self._inside: dict[int, tuple[Change | Averaging, int]] = {}

    def states(self, kwargs: dict[str, Any], places: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (split_heads(tapped(self.taps, name), self.heads) for name in ("q", "k", "v"))
        return query, key, value

    def key_bias(self, index: int) -> Tensor | None:
        return self._cuts[index].bias

    def hidden(self, states: Tensor) -> Tensor:
        return states

    def compact(self, selection: EncoderSelection, cls: Tensor | None) -> None:
        self._change = Change(selection.order, selection if selection.flows else None, cls)

    def average(self, change: Averaging, means: Means) -> None:
        self._change = change

    def layer_inputs(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        if index not in self._cuts:
            self._cuts[index] = self._new_cut(index)
        cut = self._cuts[index]
        states = self._changed(cut.change, args[0])
        if cut.valid is None and cut.bias is None:
            return (states, *args[1:]), kwargs
        mask = self._mask(states, cut.valid, cut.bias)
        if len(args) > 1:
            return (states, mask, *args[2:]), kwargs
        return (states,), {**kwargs, "attention_mask": mask}

    def _changed(self, change: Change | Averaging | None, states: Tensor) -> Tensor:
        """The input of a layer, cut to the tokens alive."""
        if change is None:
            # What runs past the features' layer is given what that one put out, which the projector will be, too.
            return states
        found, self._sum = self.added(states), None
        return self._apply(change, states) if found is None else found

    def _apply(self, change: Change | Averaging | None, states: Tensor) -> Tensor:
        if change is None:
            return states
        if isinstance(change, Averaging) and self.prefix == 1:
            return change.apply(states, led=True)
        return self._behind(states, self._patches(change, states[:, self.prefix :]))

    def _patches(self, change: Change | Averaging, states: Tensor) -> Tensor:
        """The same of (B, N, D) patches alone."""
        return change.apply(states, led=False) if isinstance(change, Averaging) else change.apply(states)

    def _new_cut(self, index: int) -> Cut:
        if index >= self.depth:
            # These layers run on what the features' layer gave; the features are not made from their output.
            features = self._cuts[self.depth - 1]
            return Cut(None, features.valid, features.bias)
        change, self._change = self._change, None
        valid, bias = None, self.size_bias(led=True)
        if not self.full:
            valid = torch.cat([self.valid.new_ones(self.valid.shape[0], self.prefix), self.valid], dim=1)
        if bias is not None:
            if self.flash:
                raise VTPruneError(
                    "FlashAttention cannot weigh keys by the tokens that they stand for; load the model with "
                    "attn_implementation='sdpa'"
                )
            bias = torch.nn.functional.pad(bias, (self.prefix - 1, 0)) if self.prefix > 1 else bias
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
            self._inside[index] = self._change, states.shape[1] - self.prefix

    def averages(self, index: int) -> bool:
        return index in self._inside and isinstance(self._inside[index][0], Averaging)

    def mlp_input(self, index: int, states: Tensor) -> Tensor:
        return self._apply(self._inside[index][0], states) if index in self._inside else states

    def mlp_output(self, index: int, states: Tensor) -> Tensor:
        if index not in self._inside:
            return states
        change, tokens = self._inside[index]
        if isinstance(change, Averaging) and self.prefix == 1:
            return change.spread(states, led=True)
        patches = states[:, self.prefix :]
        if isinstance(change, Averaging):
            patches = change.spread(patches, led=False)
        else:
            patches = change.spread(patches, tokens)
        return self._behind(states, patches)

    def _behind(self, states: Tensor, patches: Tensor) -> Tensor:
        """(B, P + N, D) patches (B, N, D) behind what leads `states`."""
        return torch.cat([states[:, : self.prefix], patches], dim=1) if self.prefix else patches

    def projector_input(self, states: Tensor) -> Tensor:
        if self._change is None:
            return states
        added = self.added(states)
        return self._patches(self._change, states) if added is None else added

    def projector_output(self, states: Tensor) -> Tensor:
        if not self.dropped:
            return states
        # Padding is written to an extra place that nobody reads.
        full = states.new_zeros(states.shape[0], max(self.totals) + 1, *states.shape[2:])
        names = self.names() if self.full else self.names().masked_fill(~self.valid, max(self.totals))
        if len(names) == 1:
            return full.index_copy_(1, names[0].to(states.device), states)[:, :-1]
        rows = torch.arange(states.shape[0], device=states.device)[:, None].expand(names.shape)
        return full.index_put_((rows, names.to(states.device)), states)[:, :-1]

    def layer_segments(self, kwargs: dict[str, Any]) -> list[list[int]]:
        return [[self.prefix + tokens] for tokens in self.computed()]

    def computed(self) -> list[int]:
        # The crops of one image run together, padded to the longest of them.
        return [max(own) for own in self.of_units(self.counts) for _ in own]
