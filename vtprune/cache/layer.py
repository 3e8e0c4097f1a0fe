"""KV-cache layers that know which tokens of the prompt they hold; all decode state lives in them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from vtprune.cache.slots import Slots
from vtprune.cache.waiting import VisionLog, Waiting
from vtprune.errors import VTPruneError
from vtprune.tensors.compaction import gather_tokens


class PrunedLayer(DynamicLayer):
    """A dynamic cache layer whose entries may skip places of the sequence.

    places: the logical place of each entry in the unpruned sequence, -1 where an entry is padding, or None while entry
    i is place i. ragged: whether some entries may be padding. length: logical length; this is what `get_seq_length`
    answers.
    aux: (B, n) tensors that belong to the rows, by name: a value for each of the first n places, the last one
    holding on (the M-RoPE delta, the shift of renumbered positions), or one for the row (n = 1).
    Where vision tokens may return: waiting: those that were left out before this layer; log: all of them (the first
    layer has it); since: (K,) how long the sequence was before the forward that computed an entry of an earlier place,
    0 for every other entry.
    heads: (B, Hkv, K) the place of each head's own entries, once heads were cut to different ones, else None. Heads of
    a row hold equally many, in columns that agree on what is padding; `places` are then those of head 0, and what came
    to these since came to every head.
    entries: (B, Hkv, k) values of the first k entries, by name; 0 for those after them. guard: crop may not end
    between these two places, as what the queries after the first one decided cannot be undone, or None.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: Slots | None = None
        self.ragged = False
        self.length = 0
        self.aux: dict[str, Tensor] = {}
        self.waiting: Waiting | None = None
        self.log: VisionLog | None = None
        self.since: Tensor | None = None
        self.heads: Tensor | None = None
        self.entries: dict[str, Tensor] = {}
        self.guard: tuple[int, int] | None = None
        self._announced = False

    @classmethod
    def adopt(cls, layer: DynamicLayer) -> PrunedLayer:
        """A PrunedLayer with the keys and values of an ordinary dynamic layer."""
        new = cls()
        if layer.is_initialized and layer.keys is not None and layer.values is not None:
            new.lazy_initialization(layer.keys, layer.values)
            new.keys, new.values = layer.keys, layer.values
            new.length = 0 if layer.keys.numel() == 0 else layer.keys.shape[-2]
        return new

    def twin(self) -> PrunedLayer:
        """The same entries in a layer of its own: appending makes new tensors, so the original does not change."""
        new = copy.copy(self)
        new.aux = dict(self.aux)
        return new

    @property
    def slots(self) -> Tensor | None:
        """(B, K) `places` as a tensor; layers that share the one share the other."""
        return None if self.places is None else self.places.tensor

    @property
    def head_slots(self) -> Tensor | None:
        """(B, Hkv, K) the place of each entry of each head, None while all heads hold the same."""
        return None if self.heads is None or self.places is None else self.places.after(self.heads)

    def announce(
        self, places: Slots | None, new_length: int, *, ragged: bool = False, since: Tensor | None = None
    ) -> None:
        """Says which places the next `update` brings: those of all entries after it, or None; `ragged`: whether there
        may be padding among the new ones; since: (K,) as in the class, once entries may have one."""
        heads = self.head_slots if places is None or not places.extends(self.places) else None
        if heads is not None:
            assert places is not None
            new = places.tensor[:, None, heads.shape[2] :].expand(-1, heads.shape[1], -1)
            self.heads = torch.cat([heads, new.to(heads.device)], dim=2)
        self.places, self.since = places, since
        self.ragged = self.ragged or ragged
        self.length = new_length
        self._announced = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends (B, H, q, d) keys and values; raises VTPruneError for a pruned layer outside a wrapped model."""
        if not self._announced:
            if self.places is not None:
                raise VTPruneError(
                    "this KV cache was filled by a model wrapped with vtprune and holds a pruned prompt; continue "
                    "with the wrapped model, or start a new cache after unwrap()"
                )
            self.length += key_states.shape[-2]
        self._announced = False
        return super().update(key_states, value_states, *args, **kwargs)

    @property
    def expects(self) -> bool:
        """Whether an `update` was announced that did not come: the layer ran without this cache."""
        return self._announced

    def at_end(self, name: str) -> Tensor | None:
        """(B, 1) the value of an aux tensor that holds after the last place."""
        values = self.aux.get(name)
        return None if values is None else values[:, -1:]

    def extend(self, name: str, values: Tensor, offset: int) -> None:
        """Appends (B, q) values of the places from `offset` on to an aux tensor."""
        past = self.aux.get(name)
        if past is None:
            past = torch.zeros_like(values[:, :1])
        if offset:
            places = torch.arange(offset, device=past.device).clamp(max=past.shape[1] - 1)
            values = torch.cat([past[:, places].to(values.device), values], dim=1)
        self.aux[name] = values

    def values_of(self, name: str) -> Tensor:
        """(B, Hkv, K) the values of all entries, fp32."""
        assert self.keys is not None
        known = self.entries.get(name)
        missing = self.keys.shape[2] - (0 if known is None else known.shape[2])
        if known is not None and not missing:
            return known
        if known is None:
            return torch.zeros(*self.keys.shape[:2], missing, device=self.keys.device)
        return torch.nn.functional.pad(known, (0, missing))

    def cut_heads(
        self, keys: Tensor, values: Tensor, heads: Tensor, *, entries: dict[str, Tensor], real: Sequence[int]
    ) -> None:
        """Holds these (B, Hkv, K, d) keys and values of the places `heads` (B, Hkv, K) instead, with the values
        `entries` of theirs; `real` (B,) of each row are no padding."""
        self.keys, self.values, self.heads, self.entries = keys, values, heads, entries
        self.places = Slots(heads[:, 0])
        self.places.real = real[0] if len(real) == 1 else torch.tensor(real, device=heads.device)
        self.ragged = self.ragged or len(heads) > 1

    def add(self, name: str, values: Tensor) -> None:
        """Adds values (B, length) of all places to an aux tensor, which is 0 where nothing is known."""
        past = self.aux.get(name, torch.zeros_like(values[:, :1]))
        places = torch.arange(values.shape[1], device=past.device).clamp(max=past.shape[1] - 1)
        self.aux[name] = past[:, places] + values.to(past)

    def cut(self, places: Slots, columns: Tensor) -> None:
        """Keeps only the entries at `columns` (B, K) (-1: padding), whose places are `places`."""
        assert self.keys is not None
        assert self.values is not None

        def taken(states: Tensor) -> Tensor:
            if len(columns) == 1:
                # A row alone has no padding.
                return states.index_select(2, columns[0].to(states.device))
            return gather_tokens(states.transpose(1, 2), columns).transpose(1, 2)

        for name in self.entries:
            self.entries[name] = taken(self.values_of(name))
        self.keys, self.values = taken(self.keys), taken(self.values)
        heads, self.places = self.head_slots, places
        if heads is not None:
            self.heads = taken(heads).masked_fill((columns < 0).to(heads.device)[:, None], -1)
        # Rows of one length need no padding; asking the device whether these are would cost a wait.
        self.ragged = self.ragged or len(columns) > 1

    def get_seq_length(self) -> int:
        """The logical length: tokens of the sequence so far, dropped ones included."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks are built over logical places; each layer's own mask is cut from them."""
        return self.length + query_length, 0

    def reset(self) -> None:
        """Empties the layer."""
        super().reset()
        self.places, self.ragged, self.length, self.aux, self._announced = None, False, 0, {}, False
        self.waiting = self.log = self.since = None
        self.heads, self.entries, self.guard = None, {}, None

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` logical places; tokens that returned since are left out again."""
        if tokens_to_remove > 0:
            raise ValueError("crop takes a negative number of tokens to remove")
        if tokens_to_remove == 0:
            return
        self._check_crop(max(0, self.length + tokens_to_remove))
        self.length = max(0, self.length + tokens_to_remove)
        self.aux = {name: values[:, : max(1, self.length)] for name, values in self.aux.items()} if self.length else {}
        self.waiting = self.waiting.crop(self.length) if self.waiting is not None and self.length else None
        self.log = self.log.crop(self.length) if self.log is not None and self.length else None
        if self.keys is None or self.values is None:
            # A routed layer may have computed nothing so far.
            return
        if self.places is None:
            self.keys, self.values = self.keys[..., : self.length, :], self.values[..., : self.length, :]
            return
        heads, slots = self.head_slots, self.places.tensor
        slots = slots.masked_fill(slots >= self.length, -1)
        if self.since is not None:
            slots = slots.masked_fill(self.since >= self.length, -1)
        used = (slots >= 0).any(dim=0)
        self.since = None if self.since is None else self.since[used]
        self.places = self.places.changed(self.length, lambda: Slots(slots[:, used]))
        self.ragged = self.ragged or len(slots) > 1
        columns = used.nonzero().flatten().to(self.keys.device)
        if heads is not None:
            self.heads = heads.masked_fill(heads >= self.length, -1).index_select(2, columns)
        self.entries = {name: self.values_of(name).index_select(2, columns) for name in self.entries}
        self.keys, self.values = self.keys.index_select(-2, columns), self.values.index_select(-2, columns)

    def _check_crop(self, length: int) -> None:
        if self.guard is None:
            return
        first, last = self.guard
        if first < length < last:
            raise VTPruneError(
                f"this KV cache cannot be cropped to {length} places: the attention of all {last} tokens decides, or "
                f"has decided, which entries from place {first} on stay; crop to at least {last} or at most {first} "
                "places, or start a new cache"
            )
        if length <= first:
            # All that was scored or cut is gone; the entries before it are the same in every head.
            self.guard, self.heads, self.entries = None, None, {}

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Takes the rows `beam_idx`, as beam search does."""
        if self.keys is not None:
            super().reorder_cache(beam_idx)
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)), beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        if self.keys is not None:
            super().batch_repeat_interleave(repeats)
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0), repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the given rows."""
        if self.keys is not None:
            super().batch_select_indices(indices)
        self._map_rows(lambda rows: rows[indices], indices)

    def _map_rows(self, change: Callable[[Tensor], Tensor], key: object) -> None:
        places = self.places
        if places is not None:
            self.places = places.changed(key, lambda: places.of_rows(change))
        if self.heads is not None:
            self.heads = change(self.heads)
        self.entries = {name: change(value) for name, value in self.entries.items()}
        self.aux = {name: change(value) for name, value in self.aux.items()}
        self.waiting = None if self.waiting is None else self.waiting.rows(change)
        self.log = None if self.log is None else self.log.rows(change)
