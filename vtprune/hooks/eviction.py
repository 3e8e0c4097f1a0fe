"""Cutting a filled cache head by head: who is watched, how much attention its entries get, and what is left of it.

While a prompt with images is read, the columns of the attention maps are summed, entry by entry. The first forward
that brings no new image (a decode step, or a turn of text) adds its own rows and attends to everything; afterwards the
method says what each head goes on with. All that is remembered in between lies with the cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

from vtprune.adapters.base import Adapter
from vtprune.cache.adopting import all_slots
from vtprune.cache.layer import PrunedLayer
from vtprune.cache.names import CUTS, DENSITY, IMAGES, MERGED, SCORES, STATE
from vtprune.decoder.prompt import ImageSpan, numbers_in_rows
from vtprune.decoder.run import DecoderRun, LayerView, Observer
from vtprune.errors import UnsupportedModelError
from vtprune.method.answers import Eviction
from vtprune.method.checks import check_scores
from vtprune.method.plan import Plans
from vtprune.method.pruner import Pruner
from vtprune.method.stages import InCache
from vtprune.method.views import CachedRow, CacheEntries
from vtprune.tensors.attention import attention_sums, full_precision


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
        aux = run.layers[0].aux
        new = [span for span in run.spans if self.plans.of(span.image.total).evicts(self.order)]
        if not new and IMAGES not in aux:
            return None
        images = torch.zeros(prompt.batch, prompt.offset + prompt.length, dtype=torch.long, device=prompt.device)
        images = _numbered(images, aux.get(IMAGES), new)
        if new:
            aux[IMAGES] = images
        real = prompt.real_so_far()
        asking = images.any(dim=1) & real[:, -prompt.length :].any(dim=1)
        rows = asking.nonzero().flatten().tolist()
        if not rows:
            return None
        prompts = {span.row for span in run.spans} & set(rows)
        cuts = aux.get(CUTS, torch.zeros(prompt.batch, 1, device=prompt.device)).clone()
        cuts[sorted(prompts)] = 0
        aux[CUTS] = cuts
        return Watch(of=self, pruner=pruner, rows=rows, prompts=prompts, real=real, images=images)


@dataclass(frozen=True)
class Watch(Observer):
    """Watches the rows whose attention in this forward decides what leaves their caches, and cuts these in the end.

    rows: with images that are to be cut; prompts: those of them to which this forward brings images; real and images:
    (B, offset + length) which places are not padding, and the number of the image at each, 0 for none.
    """

    of: Evictor
    pruner: InCache
    rows: list[int]
    prompts: set[int]
    real: Tensor
    images: Tensor
    _known: dict[tuple[int, int, int], tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=dict)

    def wants(self, index: int) -> bool:
        """Whether the attention of this layer counts."""
        return index in self.of.watched

    @torch.no_grad()
    def after(self, run: DecoderRun, view: LayerView) -> LayerView:
        """Adds the attention of this forward in a layer to what the cache's entries got before."""
        assert run.layers is not None
        with full_precision(view.hidden.device), run.checks.collecting():
            self._add(run, view, run.layers[view.index])
        return view

    def _add(self, run: DecoderRun, view: LayerView, layer: PrunedLayer) -> None:
        index, offset, adapter = view.index, run.prompt.offset, self.of.adapter
        assert layer.keys is not None
        query = adapter.decoder_query(view.taps, view.embeddings)
        slots, asked = layer.slots, view.places
        scores = layer.values_of(SCORES)
        density = layer.aux.get(DENSITY, torch.zeros(run.prompt.batch, 1, device=query.device)).clone()
        for row in self.rows:
            columns, places = self._places(row, slots, 0)
            queries, when = self._places(row, asked, offset)
            sums = attention_sums(
                query=query[row][:, queries.to(query.device)],
                key=layer.keys[row][:, columns.to(query.device)],
                asked=when.to(query.device),
                places=places.to(query.device),
                scale=adapter.decoder_scale,
            )
            sums = rearrange(sums, "(k g) n -> k g n", k=layer.keys.shape[1])
            if row in self.prompts and index in self.of.dense:
                new = sums if not offset else sums[..., places.to(query.device) >= offset]
                density[row] = self.pruner.density(check_scores(new, self.pruner.name))
            scores[row].index_add_(1, columns.to(query.device), sums.sum(dim=1))
        layer.aux[DENSITY] = density
        if index in self.of.cut:
            layer.entries[SCORES] = scores

    def _places(self, row: int, slots: Tensor | None, first: int) -> tuple[Tensor, Tensor]:
        """The columns of a row's slots (B, n) that hold a token, and their places, which start from `first`; slots
        None: all from there on. Layers that share their slots share the answer."""
        key = row, id(slots), first
        if key not in self._known:
            own = torch.arange(self.real.shape[1] - first, device=self.real.device) if slots is None else slots[row]
            columns = _real(torch.where(own < 0, -1, own + first), self.real[row])
            # The slots are kept with the answer, so that their id is not given to others.
            self._known[key] = columns, own[columns] + first, slots
        return self._known[key][:2]

    def close(self, run: DecoderRun) -> None:
        """Cuts the caches of the rows to which this forward brought no image."""
        assert run.layers is not None
        self._guard(run, run.layers)
        rows, cut = [row for row in self.rows if row not in self.prompts], self.of.cut
        if not rows:
            return
        with full_precision(run.prompt.device), run.checks.collecting():
            answers = {row: self.pruner.evict(self._row(run.layers, row)) for row in rows}
        for order, index in enumerate(cut):
            self._apply(run.layers[index], {row: answer[order] for row, answer in answers.items()})
        aux = run.layers[0].aux
        aux[CUTS][rows] += 1
        if self.pruner.evicts_again:
            return
        aux[IMAGES] = aux[IMAGES].clone()
        aux[IMAGES][rows] = 0
        if not bool(aux[IMAGES].any()):
            # Nothing is left to cut: later steps are those of any other cache.
            del aux[IMAGES]
            for index in cut:
                run.layers[index].entries.pop(SCORES, None)

    def _guard(self, run: DecoderRun, layers: list[PrunedLayer]) -> None:
        first = 0 if self.pruner.evicts_again else int(self.images.any(dim=0).nonzero()[0])
        end = run.prompt.offset + run.prompt.length
        for layer in layers:
            layer.guard = (first if layer.guard is None else min(first, layer.guard[0]), end)

    def _row(self, layers: list[PrunedLayer], row: int) -> CachedRow:
        images = self.images[row]
        numbers = images[images > 0].unique().tolist()
        dense = sorted(self.of.dense)
        densities: list[float] = torch.stack([layers[index].aux[DENSITY][row, 0] for index in dense]).tolist()
        return CachedRow(
            layers=tuple(self._entries(layers[index], row, index) for index in self.of.cut),
            densities=dict(zip(dense, densities, strict=True)),
            totals={number: int((images == number).sum()) for number in numbers},
            first=int(layers[0].aux[CUTS][row]) == 0,
        )

    def _entries(self, layer: PrunedLayer, row: int, index: int) -> CacheEntries:
        assert layer.keys is not None
        assert layer.values is not None
        columns, places = self._places(row, layer.slots, 0)
        key = row, id(columns), -1
        if key not in self._known:
            self._known[key] = columns, self.images[row].to(places.device)[places].to(layer.keys.device), None
        images, columns = self._known[key][1], columns.to(layer.keys.device)
        state = {
            name.removeprefix(STATE): float(aux[row]) for name, aux in layer.aux.items() if name.startswith(STATE)
        }
        return CacheEntries(
            key=layer.keys[row][:, columns],
            value=layer.values[row][:, columns],
            scores=layer.values_of(SCORES)[row][:, columns],
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
        slots = _head_slots(layer)
        kept = []
        for row in range(len(slots)):
            columns, answer = self._places(row, layer.slots, 0)[0].to(device), answers.get(row)
            if answer is not None:
                answer.check(columns.numel())
            kept.append(columns.expand(heads, -1) if answer is None else columns[answer.kept])
        columns = _pad_left(kept)
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
        layer.cut_heads(keys, values, slots.gather(2, index).masked_fill(columns < 0, -1), entries)


def _numbered(images: Tensor, known: Tensor | None, new: list[ImageSpan]) -> Tensor:
    """(B, length) the number of the image at each place of the empty `images`: the new ones' after those `known`."""
    if known is not None:
        width = min(images.shape[1], known.shape[1])
        images[:, :width] = known[:, :width].to(images.device)
    first = images.amax(dim=1) + 1
    for span, number in zip(new, numbers_in_rows(new), strict=True):
        images[span.row, span.offset + span.places] = first[span.row] + number
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


def _real(places: Tensor, real: Tensor) -> Tensor:
    """The columns of `places` (n,) that hold a token: neither -1 nor padding of the prompt."""
    real = real.to(places.device)
    return ((places >= 0) & real[places.clamp(min=0)]).nonzero().flatten()


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
