"""Cutting a filled cache head by head: who is watched, how much attention its entries get, and what is left of it.

While a prompt with images is read, the columns of the attention maps are summed, entry by entry. The first forward
that brings no new image (a decode step, or a turn of text) adds its own rows and attends to everything; afterwards the
method says what each head goes on with. All that is remembered in between lies with the cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from vtprune.adapters.base import Adapter
from vtprune.cache.adopting import all_slots
from vtprune.cache.layer import PrunedLayer
from vtprune.decoder.prompt import ImageSpan
from vtprune.decoder.run import DecoderRun
from vtprune.errors import UnsupportedModelError
from vtprune.method.answers import Eviction
from vtprune.method.choosing import check_scores
from vtprune.method.pruner import Pruner
from vtprune.method.stages import InCache
from vtprune.method.views import CachedRow, CacheEntries
from vtprune.tensors.attention import attention_sums, full_precision

# Aux tensors of a cache. Of layer 0: the number of the image at each place, 0 for none and for those that were cut
# (places after the last one hold no image); and how often a row was cut since its prompt. Of each layer: its density.
IMAGES, CUTS, DENSITY = "images to cut", "cuts", "density"
# Of each layer, followed by a name: what the method remembers.
STATE = "eviction: "
# Values of a cache's entries.
SCORES, MERGED = "scores", "merged"


@dataclass
class Watch:
    """The rows whose attention in this forward decides what leaves their caches.

    rows: with images that are to be cut; prompts: those of them to which this forward brings images; real and images:
    (B, offset + length) which places are not padding, and the number of the image at each, 0 for none.
    """

    rows: list[int]
    prompts: set[int]
    real: Tensor
    images: Tensor


class Evictor:
    """The hooks' work for the one method of a list that cuts caches, if there is one."""

    def __init__(self, adapter: Adapter, pruners: list[Pruner]) -> None:
        found = [pruner for pruner in pruners if isinstance(pruner, InCache) and pruner.evict_layers()]
        self.pruner = found[0] if found else None
        self.cut: tuple[int, ...] = self.pruner.evict_layers() if self.pruner else ()
        self._dense = frozenset(self.pruner.density_layers()) if self.pruner else frozenset()
        self.watched = self._dense | frozenset(self.cut)
        self._adapter = adapter
        if self.pruner is not None and adapter.windows:
            raise UnsupportedModelError(
                f"{self.pruner.name} cannot cut the caches of a decoder with sliding-window layers: their masks would "
                "differ from head to head once heads keep different entries"
            )

    def open(self, run: DecoderRun) -> None:
        """Notes the new images, and which rows this forward is to be watched for."""
        pruner, prompt = self.pruner, run.prompt
        if pruner is None or run.layers is None:
            return
        aux = run.layers[0].aux
        new = [span for span in run.spans if pruner.budget(span.image.total) < span.image.total]
        if not new and IMAGES not in aux:
            return
        images = _numbered(aux.get(IMAGES), new, prompt.batch, prompt.offset + prompt.length, prompt.device)
        if new:
            aux[IMAGES] = images
        real = prompt.real_so_far()
        asking = images.any(dim=1) & real[:, -prompt.length :].any(dim=1)
        rows = asking.nonzero().flatten().tolist()
        if not rows:
            return
        prompts = {span.row for span in run.spans} & set(rows)
        run.watch = Watch(rows, prompts, real, images)
        cuts = aux.get(CUTS, torch.zeros(prompt.batch, 1, device=prompt.device)).clone()
        cuts[sorted(prompts)] = 0
        aux[CUTS] = cuts

    @torch.no_grad()
    def watch(self, run: DecoderRun, index: int, embeddings: tuple[Tensor, Tensor]) -> None:
        """Adds the attention of this forward in decoder layer `index` to what the cache's entries got before."""
        watch = run.watch
        if watch is None or run.layers is None or self.pruner is None or index not in self.watched:
            return
        layer, offset = run.layers[index], run.prompt.offset
        assert layer.keys is not None
        query = self._adapter.decoder_query(run.taps, embeddings)
        slots, asked = _slots(layer), run.layout(index).places
        if asked is None:
            asked = all_slots(run.prompt.length, run.prompt.batch, slots.device)
        scores = layer.values_of(SCORES)
        density = layer.aux.get(DENSITY, torch.zeros(len(slots), 1, device=query.device)).clone()
        for row in watch.rows:
            columns = _real(slots[row], watch.real[row])
            queries = _real(torch.where(asked[row] < 0, -1, asked[row] + offset), watch.real[row])
            places = slots[row, columns].to(query.device)
            sums = attention_sums(
                query[row][:, queries.to(query.device)], layer.keys[row][:, columns.to(query.device)],
                asked[row, queries].to(query.device) + offset, places, self._adapter.decoder_scale,
            )  # fmt: skip
            sums = rearrange(sums, "(k g) n -> k g n", k=layer.keys.shape[1])
            if row in watch.prompts and index in self._dense:
                density[row] = self.pruner.density(check_scores(sums[..., places >= offset], self.pruner.name))
            scores[row][:, columns.to(query.device)] += sums.sum(dim=1)
        layer.aux[DENSITY] = density
        if index in self.cut:
            layer.entries[SCORES] = scores

    def close(self, run: DecoderRun) -> None:
        """Cuts the caches of the rows to which this forward brought no image."""
        watch = run.watch
        if watch is None or run.layers is None or self.pruner is None:
            return
        self._guard(run, watch)
        rows = [row for row in watch.rows if row not in watch.prompts]
        if not rows:
            return
        with full_precision(run.prompt.device):
            answers = {row: self.pruner.evict(self._row(run.layers, watch, row)) for row in rows}
        for order, index in enumerate(self.cut):
            self._apply(run.layers[index], watch.real, {row: answer[order] for row, answer in answers.items()})
        aux = run.layers[0].aux
        aux[CUTS][rows] += 1
        if self.pruner.evicts_again:
            return
        aux[IMAGES] = aux[IMAGES].clone()
        aux[IMAGES][rows] = 0
        if not bool(aux[IMAGES].any()):
            # Nothing is left to cut: later steps are those of any other cache.
            del aux[IMAGES]
            for index in self.cut:
                run.layers[index].entries.pop(SCORES, None)

    def _guard(self, run: DecoderRun, watch: Watch) -> None:
        assert run.layers is not None
        assert self.pruner is not None
        first = 0 if self.pruner.evicts_again else int(watch.images.any(dim=0).nonzero()[0])
        end = run.prompt.offset + run.prompt.length
        for layer in run.layers:
            layer.guard = (first if layer.guard is None else min(first, layer.guard[0]), end)

    def _row(self, layers: list[PrunedLayer], watch: Watch, row: int) -> CachedRow:
        images = watch.images[row]
        numbers = images[images > 0].unique().tolist()
        return CachedRow(
            tuple(_entries(layers[index], watch, row, index) for index in self.cut),
            {index: float(layers[index].aux[DENSITY][row]) for index in sorted(self._dense)},
            {number: int((images == number).sum()) for number in numbers},
            int(layers[0].aux[CUTS][row]) == 0,
        )

    def _apply(self, layer: PrunedLayer, real: Tensor, answers: dict[int, Eviction | None]) -> None:
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
            columns, answer = _real(_slots(layer)[row], real[row]).to(device), answers.get(row)
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


def _numbered(known: Tensor | None, new: list[ImageSpan], batch: int, length: int, device: torch.device) -> Tensor:
    """(B, length) the number of the image at each place, the new ones after those that are known."""
    images = torch.zeros(batch, length, dtype=torch.long, device=device)
    if known is not None:
        width = min(length, known.shape[1])
        images[:, :width] = known[:, :width].to(device)
    for span in new:
        images[span.row, span.offset + span.places] = int(images[span.row].max()) + 1
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


def _entries(layer: PrunedLayer, watch: Watch, row: int, index: int) -> CacheEntries:
    assert layer.keys is not None
    assert layer.values is not None
    columns = _real(_slots(layer)[row], watch.real[row])
    images = watch.images[row].to(columns.device)[_slots(layer)[row, columns]]
    columns = columns.to(layer.keys.device)
    state = {name.removeprefix(STATE): float(aux[row]) for name, aux in layer.aux.items() if name.startswith(STATE)}
    return CacheEntries(
        layer.keys[row][:, columns], layer.values[row][:, columns], layer.values_of(SCORES)[row][:, columns],
        images.to(columns.device), index, {name: value for name, value in state.items() if not math.isnan(value)},
    )  # fmt: skip


def _remember(layer: PrunedLayer, row: int, state: dict[str, float]) -> None:
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
