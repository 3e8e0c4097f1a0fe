"""Cutting a filled cache head by head: who is watched, how much attention its entries get, and what is left of it.

While a prompt with images is read, the columns of the attention maps are summed, entry by entry. The first forward
that brings no new image (a decode step, or a turn of text) adds its own rows and attends to everything; afterwards the
method says what each head goes on with. All that is remembered in between lies with the cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtprune.adapters.base import Adapter
from vtprune.cache.adopting import all_slots
from vtprune.cache.books import CacheLayer, books, entry_layers
from vtprune.cache.layer import PrunedLayer
from vtprune.cache.names import CUTS, DENSITY, IMAGES, MERGED, SCORES, STATE
from vtprune.decoder.outline import Bools, Ints
from vtprune.decoder.prompt import ImageSpan, numbers_in_rows
from vtprune.decoder.run import DecoderRun, LayerView, Observer
from vtprune.errors import UnsupportedModelError, VTPruneError
from vtprune.method.answers import Eviction
from vtprune.method.asking import Array, read_back
from vtprune.method.checks import check_scores
from vtprune.method.plan import Plans
from vtprune.method.pruner import Pruner
from vtprune.method.stages import InCache
from vtprune.method.views import CachedRow, CacheEntries
from vtprune.tensors.attention import CausalSight, Sight, SightByPlaces, attention_sums, full_precision, rows_at_once
from vtprune.tensors.taps import tapped


class Evictor:
    """The hooks' work for the one method of a list that cuts caches, if there is one."""

    def __init__(self, adapter: Adapter, pruners: list[Pruner], plans: Plans) -> None:
        found = [pruner for pruner in pruners if isinstance(pruner, InCache) and pruner.evict_layers()]
        self.pruner = found[0] if found else None
        self.cut: tuple[int, ...] = self.pruner.evict_layers() if self.pruner else ()
        self.dense = frozenset(self.pruner.density_layers()) if self.pruner else frozenset()
        self.watched = self.dense | frozenset(self.cut)
        self.adapter = adapter
        self.plans, self.order = plans, pruners.index(found[0]) if found else -1
        if self.pruner is not None and self.pruner.keep_video is not None:
            raise VTPruneError(
                f"{self.pruner.name} cuts a cache in which images and videos are not told apart; give keep alone"
            )
        if self.pruner is not None and adapter.windows:
            raise UnsupportedModelError(
                f"{self.pruner.name} cannot cut the caches of a decoder with sliding-window layers: their masks would "
                "differ from head to head once heads keep different entries"
            )

    def open(self, run: DecoderRun) -> Watch | None:
        """Notes the new images, and answers who watches the rows of this forward that have images to be cut."""
        pruner, prompt = self.pruner, run.prompt
        if pruner is None or run.layers is None:
            return None
        aux = books(run.layers).aux
        new = [span for span in run.spans if self.plans.of(span.shown).evicts(self.order)]
        if not new and IMAGES not in aux:
            return None
        known = Known.of(run, run.layers, sorted(self.dense))
        images = _numbered(known.images, new)
        if new:
            aux[IMAGES] = torch.from_numpy(images).to(prompt.device)
        asking = images.any(axis=1) & known.real[:, -prompt.length :].any(axis=1)
        rows = np.flatnonzero(asking).tolist()
        if not rows:
            return None
        prompts = {span.row for span in run.spans} & set(rows)
        if CUTS in aux:
            begun = torch.tensor(sorted(prompts), dtype=torch.long, device=aux[CUTS].device)
            aux[CUTS] = aux[CUTS].index_fill(0, begun, 0)
        else:
            aux[CUTS] = torch.zeros(prompt.batch, 1, device=prompt.device)
        known = replace(known, images=images)
        return Watch(of=self, pruner=pruner, rows=rows, prompts=prompts, known=known, device=prompt.device)


@dataclass(frozen=True)
class Known:
    """What the host has to know of a cache that is to be cut: read back at once, before the layers run.

    images and real: (B, offset + length) the number of the image at each place, 0 for none, and which places are not
    padding; cuts: (B,) how often each row was cut since its last prompt; densities: (B,) by layer; states: (B,) what
    the method remembers, by layer and name, NaN for nothing.
    """

    images: Ints
    real: Bools
    cuts: Array
    densities: dict[int, Array]
    states: dict[tuple[int, str], Array]

    @classmethod
    def of(cls, run: DecoderRun, layers: list[CacheLayer], dense: list[int]) -> Known:
        """Of the cache before this forward; a first prompt has left nothing to read."""
        prompt, aux = run.prompt, books(layers).aux
        images = np.zeros((prompt.batch, prompt.offset + prompt.length), dtype=np.int64)
        if IMAGES not in aux and not prompt.offset:
            return cls(images, prompt.outline.number >= 0, cuts=np.zeros(prompt.batch), densities={}, states={})
        values: dict[Any, Tensor] = {"real": prompt.real_so_far()}
        values.update({name: aux[name] for name in (IMAGES, CUTS) if name in aux})
        values.update({index: run.entries(index).aux[DENSITY] for index in dense if DENSITY in run.entries(index).aux})
        for index, layer in enumerate(layers):
            if not isinstance(layer, PrunedLayer):
                continue
            own = {(index, name): value for name, value in layer.aux.items() if name.startswith(STATE)}
            values.update(own)
        found = dict(zip(values, read_back(list(values.values())), strict=True))
        if IMAGES in found:
            width = min(images.shape[1], found[IMAGES].shape[1])
            images[:, :width] = found[IMAGES][:, :width]
        return cls(
            images,
            found["real"],
            cuts=found[CUTS][:, 0] if CUTS in found else np.zeros(prompt.batch),
            densities={index: found[index][:, 0] for index in dense if index in found},
            states={key: value[:, 0] for key, value in found.items() if isinstance(key, tuple)},
        )


@dataclass(frozen=True)
class Held:
    """The columns (n,) of a layer that hold a row's tokens, `at` on the host, and their places, `known` there; whole:
    whether these are all columns."""

    at: Ints
    known: Ints
    whole: bool
    device: torch.device

    @cached_property
    def columns(self) -> Tensor:
        """(n,) `at`, on the device."""
        return torch.from_numpy(self.at).to(self.device)

    @cached_property
    def places(self) -> Tensor:
        """(n,) `known`, on the device."""
        return torch.from_numpy(self.known).to(self.device)

    def of(self, values: Tensor) -> Tensor:
        """(H, n, ...) in these columns, of values (H, K, ...)."""
        return values if self.whole else values.index_select(1, self.columns.to(values.device))


@dataclass(frozen=True)
class _Layer:
    """What is looked at of a layer that ran, as in `LayerView`."""

    index: int
    taps: dict[str, Tensor]
    embeddings: tuple[Tensor, Tensor]
    places: Tensor | None


@dataclass(frozen=True)
class Watch(Observer):
    """Watches the rows whose attention in this forward decides what leaves their caches, and cuts these in the end.

    rows: with images that are to be cut; prompts: those of them to which this forward brings images.
    """

    of: Evictor
    pruner: InCache
    rows: list[int]
    prompts: set[int]
    known: Known
    device: torch.device
    _held: dict[tuple[int, int, int], Held] = field(default_factory=dict)
    _slots: dict[int, tuple[Tensor, Ints]] = field(default_factory=dict)
    _images: dict[int, tuple[Held, Ints]] = field(default_factory=dict)
    # The layers that ran and were not looked at so far.
    _waiting: list[_Layer] = field(default_factory=list)
    # By row, the layers of which the method wants the density, and what tokens got in each.
    _sums: dict[int, list[tuple[int, Tensor]]] = field(default_factory=dict)
    _sights: dict[tuple[int, int, torch.device], tuple[Held, Held, Sight]] = field(default_factory=dict)

    def wants(self, index: int) -> bool:
        """Whether the attention of this layer counts."""
        return index in self.of.watched

    def after(self, run: DecoderRun, view: LayerView) -> LayerView:
        """Adds the attention of this forward in a layer to what the cache's entries got before: at once, or together
        with that of the next layers, as long as their queries are few."""
        if self._waiting and not self._waits_with(run, view):
            self._look(run)
        self._waiting.append(_Layer(view.index, view.taps, view.embeddings, view.places))
        if view.index == max(self.of.watched):
            self._look(run)
            self._note_densities(run)
        return view

    def _waits_with(self, run: DecoderRun, view: LayerView) -> bool:
        """Whether a layer is looked at together with those that wait: of one sequence, with the same tokens, and no
        more queries than are turned at once."""
        first, count = self._waiting[0], len(self._waiting)
        layer, other = run.entries(view.index), run.entries(first.index)
        query = tapped(view.taps, "q")
        if run.prompt.batch > 1 or view.places is not first.places or layer.places is not other.places:
            return False
        if view.embeddings[0] is not first.embeddings[0] or query.device != tapped(first.taps, "q").device:
            return False
        # What was tapped is held, and what is made of it.
        return count < rows_at_once(query.device, 2 * query.numel())

    @torch.no_grad()
    def _look(self, run: DecoderRun) -> None:
        """Adds the attention in the layers that wait, which have the same tokens: their queries are turned at once,
        their maps summed up one by one, each while it is in a processor's cache."""
        waiting, adapter, offset = list(self._waiting), self.of.adapter, run.prompt.offset
        self._waiting.clear()
        layers = [run.entries(one.index) for one in waiting]
        slots, asked = layers[0].slots, waiting[0].places
        with full_precision(run.prompt.device):
            taps = {"q": _joined([tapped(one.taps, "q") for one in waiting])}
            queries = adapter.decoder_query(taps, waiting[0].embeddings).chunk(len(waiting))
            found: list[dict[int, Tensor]] = [{} for _ in waiting]
            for row in self.rows:
                held, own = self._places(row, slots, 0), self._places(row, asked, offset)
                sight = self._sight(own, held, queries[0].device)
                later = None
                if offset and row in self.prompts:
                    later = torch.from_numpy((held.known >= offset).nonzero()[0]).to(queries[0].device)
                for one, layer, query, sums in zip(waiting, layers, queries, found, strict=True):
                    keys = _keys(layer)
                    own_sums = attention_sums(own.of(query[row]), held.of(keys[row]), sight, adapter.decoder_scale)
                    own_sums = own_sums.view(keys.shape[1], -1, own_sums.shape[1])
                    if row in self.prompts and one.index in self.of.dense:
                        new = own_sums if later is None else own_sums[..., later]
                        self._sums.setdefault(row, []).append((one.index, new))
                    shared = own_sums.shape[1] > 1
                    sums[row] = (own_sums.sum(dim=1) if shared else own_sums[:, 0]).float()
        for one, layer, sums in zip(waiting, layers, found, strict=True):
            if one.index in self.of.cut:
                layer.entries[SCORES] = self._scored(layer, sums)

    def _scored(self, layer: PrunedLayer, sums: dict[int, Tensor]) -> Tensor:
        """(B, Hkv, K) what the entries of a layer got so far and now; sums: (Hkv, n) of the tokens of some rows."""
        held = self._places(self.rows[0], layer.slots, 0)
        if len(sums) == len(_keys(layer)) == 1 and held.whole and SCORES not in layer.entries:
            return sums[0][None]
        scores = layer.values_of(SCORES)
        for row, own in sums.items():
            held = self._places(row, layer.slots, 0)
            if held.whole:
                scores[row].add_(own)
            else:
                scores[row].index_add_(1, held.columns.to(scores.device), own.to(scores))
        return scores

    @torch.no_grad()
    def _note_densities(self, run: DecoderRun) -> None:
        """Leaves with the caches of the layers how dense the attention of the prompts' rows was, of all layers at
        once; raises ScoreError for NaN."""
        if not self._sums:
            return
        with full_precision(run.prompt.device), run.checks.collecting():
            found = {row: self._densities([own for _, own in sums]) for row, sums in self._sums.items()}
        indices = [index for index, _ in next(iter(self._sums.values()))]
        batch, table = run.prompt.batch, _stacked(list(found.values()))[..., None]
        for index, own in zip(indices, table, strict=True):
            aux = run.entries(index).aux
            if len(found) < batch:
                # 0 where none was ever found.
                rows = torch.tensor(list(found), device=own.device)
                known = aux[DENSITY].to(own.device) if DENSITY in aux else own.new_zeros(batch, 1)
                own = known.index_copy(0, rows, own)
            aux[DENSITY] = own.to(_keys(run.entries(index)).device)

    def _densities(self, sums: list[Tensor]) -> Tensor:
        """(l,) of one row in l layers, by what its tokens got in each; raises ScoreError for NaN."""
        device, name = sums[0].device, self.pruner.name
        if len({own.shape for own in sums}) == 1:
            stacked = torch.stack([own.to(device) for own in sums])
            return self.pruner.densities(check_scores(stacked, name, still=True))
        return torch.cat([self.pruner.densities(check_scores(own[None], name)).to(device) for own in sums])

    def _sight(self, own: Held, held: Held, device: torch.device) -> Sight:
        """Which of the tokens `held` the input's `own` ones see; layers with the same ones share it."""
        key = id(own), id(held), device
        if key not in self._sights:
            if own is held:
                sight: Sight = CausalSight(device)
            else:
                seen = np.searchsorted(held.known, own.known, side="right").tolist()
                sight = SightByPlaces(own.places.to(device), held.places.to(device), seen)
            # Both are kept with it, so that their ids are not given to others.
            self._sights[key] = own, held, sight
        return self._sights[key][2]

    def _places(self, row: int, slots: Tensor | None, first: int) -> Held:
        """The columns of a row's slots (B, n) that hold a token, neither -1 nor padding of the prompt, and their
        places, which start from `first`; slots None: all from there on. Layers that share their slots share the
        answer."""
        key = row, id(slots), first
        if key not in self._held:
            real = self.known.real[row, first : self.known.images.shape[1]]
            if slots is None:
                own, at = np.arange(len(real)), real.nonzero()[0]
            else:
                if id(slots) not in self._slots:
                    # The slots are kept with what was read, so that their id is not given to others.
                    self._slots[id(slots)] = slots, read_back([slots])[0]
                own = self._slots[id(slots)][1][row]
                at = ((own >= 0) & real[np.maximum(own, 0)]).nonzero()[0]
            device = self.device if slots is None else slots.device
            self._held[key] = Held(at, own[at] + first, whole=len(at) == len(own), device=device)
        return self._held[key]

    def close(self, run: DecoderRun) -> None:
        """Cuts the caches of the rows to which this forward brought no image."""
        assert run.layers is not None
        if self._waiting:
            raise VTPruneError(
                f"decoder layer {max(self.of.watched)} ran without the hooks that {self.pruner.name} reads it by; "
                "wrap the model again after modules of it were replaced"
            )
        self._guard(run, entry_layers(run.layers))
        rows, cut = [row for row in self.rows if row not in self.prompts], self.of.cut
        if not rows:
            return
        with full_precision(run.prompt.device), run.checks.collecting():
            answers = {row: self.pruner.evict(self._row(run, row)) for row in rows}
        # Before anything is cut by them.
        run.checks.settle()
        left = self.known.images.copy()
        left[rows] = 0
        ends = not self.pruner.evicts_again and not left.any()
        for order, index in enumerate(cut):
            layer = run.entries(index)
            if ends:
                # Nothing is left to cut: later steps are those of any other cache.
                layer.entries.pop(SCORES, None)
            self._apply(layer, {row: answer[order] for row, answer in answers.items()})
        aux = books(run.layers).aux
        aux[CUTS][rows] += 1
        if ends:
            del aux[IMAGES]
        elif not self.pruner.evicts_again:
            aux[IMAGES] = torch.from_numpy(left).to(run.prompt.device)

    def _guard(self, run: DecoderRun, layers: list[PrunedLayer]) -> None:
        first = 0 if self.pruner.evicts_again else int(self.known.images.any(axis=0).argmax())
        end = run.prompt.offset + run.prompt.length
        for layer in layers:
            layer.guard = (first if layer.guard is None else min(first, layer.guard[0]), end)

    def _row(self, run: DecoderRun, row: int) -> CachedRow:
        images = self.known.images[row]
        numbers, totals = np.unique(images[images > 0], return_counts=True)
        return CachedRow(
            layers=tuple(self._entries(run.entries(index), row, index) for index in self.of.cut),
            densities={index: float(values[row]) for index, values in self.known.densities.items()},
            totals=dict(zip(numbers.tolist(), totals.tolist(), strict=True)),
            first=int(self.known.cuts[row]) == 0,
        )

    def _entries(self, layer: PrunedLayer, row: int, index: int) -> CacheEntries:
        assert layer.keys is not None
        assert layer.values is not None
        held = self._places(row, layer.slots, 0)
        if id(held) not in self._images:
            self._images[id(held)] = held, self.known.images[row][held.known]
        images = self._images[id(held)][1]
        state = {
            name.removeprefix(STATE): float(values[row])
            for (own, name), values in self.known.states.items()
            if own == index
        }
        return CacheEntries(
            key=held.of(layer.keys[row]),
            value=held.of(layer.values[row]),
            scores=held.of(layer.values_of(SCORES)[row]),
            images=images,
            index=index,
            state={name: value for name, value in state.items() if not math.isnan(value)},
        )

    def _apply(self, layer: PrunedLayer, answers: dict[int, Eviction | None]) -> None:
        """Leaves in a layer's cache what the method kept of the rows that it cut, all of the others, and no padding
        but what makes rows equally long."""
        if all(answer is None for answer in answers.values()):
            return
        assert layer.keys is not None
        assert layer.values is not None
        heads, device = layer.keys.shape[1], layer.keys.device
        kept = []
        for row in range(len(layer.keys)):
            held, answer = self._places(row, layer.slots, 0), answers.get(row)
            columns = held.columns.to(device)
            if answer is None:
                kept.append(columns.expand(heads, -1))
                continue
            answer.check(columns.numel())
            kept.append(answer.kept if held.whole else columns[answer.kept])
        if len(kept) == 1:
            self._apply_alone(layer, answers[0], kept[0])
            return
        columns, slots = _pad_left(kept), _head_slots(layer)
        index = columns.clamp(min=0)
        wide = index[..., None].expand(-1, -1, -1, layer.keys.shape[-1])
        keys, values = layer.keys.gather(2, wide), layer.values.gather(2, wide)
        entries = {name: layer.values_of(name).gather(2, index) for name in {*layer.entries, MERGED}}
        for row, answer in answers.items():
            if answer is not None:
                width = answer.kept.shape[1]
                keys[row, :, -width:], values[row, :, -width:] = answer.key.to(keys), answer.value.to(values)
                entries[MERGED][row, :, -width:] += answer.merged
                _remember(layer, row, answer.state)
        left = slots.gather(2, index).masked_fill(columns < 0, -1)
        layer.cut_heads(keys, values, left, entries=entries, real=[one.shape[1] for one in kept])

    def _apply_alone(self, layer: PrunedLayer, answer: Eviction | None, columns: Tensor) -> None:
        """The same for the one row of a cache, which needs no padding; columns: (H, m) of what stays."""
        assert answer is not None
        assert layer.keys is not None
        assert layer.values is not None
        entries = {name: layer.values_of(name).gather(2, columns[None]) for name in layer.entries}
        merged = answer.merged[None]
        entries[MERGED] = entries[MERGED] + merged if MERGED in entries else merged
        _remember(layer, 0, answer.state)
        keys, values = answer.key.to(layer.keys)[None], answer.value.to(layer.values)[None]
        # Where nothing was dropped so far, columns are places.
        heads = columns[None] if layer.places is None else _head_slots(layer).gather(2, columns[None])
        layer.cut_heads(keys, values, heads, entries=entries, real=[columns.shape[1]])


def _keys(layer: PrunedLayer) -> Tensor:
    assert layer.keys is not None
    return layer.keys


def _joined(parts: list[Tensor]) -> Tensor:
    """The parts as one along their first dimension; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _stacked(parts: list[Tensor]) -> Tensor:
    """(l, B) of so many (l,); one alone is not copied."""
    return parts[0][:, None] if len(parts) == 1 else torch.stack(parts, dim=1)


def _numbered(known: Ints, new: list[ImageSpan]) -> Ints:
    """(B, length) the number of the image at each place: of the new ones after those `known`."""
    images, first = known.copy(), known.max(axis=1) + 1
    for span, number in zip(new, numbers_in_rows(new), strict=True):
        images[span.row, span.offset + span.stands] = first[span.row] + number
    return images


def _slots(layer: PrunedLayer) -> Tensor:
    assert layer.keys is not None
    if layer.slots is not None:
        return layer.slots
    return all_slots(layer.keys.shape[2], layer.keys.shape[0], layer.keys.device)


def _head_slots(layer: PrunedLayer) -> Tensor:
    assert layer.keys is not None
    if layer.head_slots is not None:
        return layer.head_slots
    return _slots(layer).to(layer.keys.device)[:, None].expand(-1, layer.keys.shape[1], -1)


def _remember(layer: PrunedLayer, row: int, state: dict[str, float | Tensor]) -> None:
    assert layer.keys is not None
    for name, value in state.items():
        known = layer.aux.get(STATE + name)
        if known is None:
            known = torch.full((layer.keys.shape[0], 1), math.nan, device=layer.keys.device)
        layer.aux[STATE + name] = known.clone()
        layer.aux[STATE + name][row] = value


def _pad_left(rows: list[Tensor]) -> Tensor:
    """(B, H, n) of rows (H, m), -1 on the left of the shorter ones."""
    width = max(row.shape[1] for row in rows)
    return torch.stack([torch.nn.functional.pad(row, (width - row.shape[1], 0), value=-1) for row in rows])
