"""The record of one generation, from which its report is made when somebody asks."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from vtprune.cache.books import CacheLayer, books
from vtprune.cache.waiting import VisionLog
from vtprune.cost.formulas import FlopsBreakdown, cache_bytes, prefill_flops
from vtprune.cost.sizes import ModelCost, PlannedTokens
from vtprune.method.answers import KEPT_WHOLE
from vtprune.method.facts import Work
from vtprune.method.plan import Plans
from vtprune.method.pruner import Pruner
from vtprune.method.stages import (
    BeforeDecoder,
    InAttention,
    InLayers,
    drop_layers,
    encoder_layers,
    evict_layers,
    planned_layers,
    probe_layer,
    routed_layers,
)
from vtprune.report.heads import (
    Heads,
    eviction_notes,
    mean_held,
    tokens_per_head,
)
from vtprune.report.history import (
    CacheNote,
    Held,
    image_steps,
    origins,
)
from vtprune.report.report import (
    ImageReport,
    MergeReport,
    Report,
    SampleReport,
    StageReport,
    StepReport,
)
from vtprune.report.trail import ImageTrail, Trail, still_there


@dataclass
class Generation:
    """What a prefill and the forwards after it leave behind; `build` turns it into a Report when asked.

    plans: what the methods were to do with each image; asked: what each was asked to keep; trail: of the images that
    this turn brought; earlier: those of earlier turns that are still in the cache. texts:
    text tokens of this turn's prompt in each row, by conversation; offset: places that the cache held before it;
    steps: forwards on the cache since.
    """

    cost: ModelCost
    plans: Plans
    facts: Any
    depth: int
    dtype: torch.dtype
    asked: list[int | float | None]
    trail: Trail
    texts: list[list[int]]
    earlier: list[ImageTrail] = field(default_factory=list)
    offset: int = 0
    steps: int = 0
    _notes: list[CacheNote] = field(default_factory=list)
    _mask: Tensor | None = None
    _cache: weakref.ReferenceType[Cache] | None = None
    _log: VisionLog | None = None
    _heads: list[Heads] = field(default_factory=list)
    # What the cache held after each forward and holds now: known once a report is asked for.
    _history: list[Held] = field(default_factory=list)
    _now: Held = field(default_factory=Held)

    @property
    def images(self) -> list[ImageTrail]:
        """Every image in the cache, those of earlier turns first."""
        return [*self.earlier, *self.trail.images]

    @property
    def pruners(self) -> tuple[Pruner, ...]:
        """The methods, bound to the model."""
        return self.plans.pruners

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return len(self.texts)

    @property
    def text(self) -> list[int]:
        """Text tokens of this turn's prompt in each row."""
        return [sum(row) for row in self.texts]

    def note_cache(
        self, cache: Cache | None, layers: list[CacheLayer] | None, mask: Tensor | None, *, padded: bool = True
    ) -> None:
        """Remembers what the cache holds after a forward, `mask` (B, length) saying what is no padding (None: all);
        padded: whether any may be. Nothing is counted until a report is asked for."""
        if cache is None or layers is None:
            return
        self._mask = mask
        self._cache = weakref.ref(cache)
        self._notes.append(CacheNote.of(layers, mask if padded else None, full=mask is not None and not padded))
        self._log, self._heads = books(layers).log, [Heads.of(layer) for layer in layers]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None}

    def origins(self, rows: Tensor | None) -> list[int]:
        """Which row of the prompt each row of the cache is: they are reordered, repeated and dropped."""
        return list(range(self.rows)) if rows is None else rows[:, 0].tolist()

    def build(self, cache: Cache | None = None) -> Report:
        """The report as of now; `cache`: the one that this generation filled, or a copy of it."""
        if cache is None and self._cache is not None:
            cache = self._cache()
        return self._as_of_now(cache)._build()

    def _as_of_now(self, cache: Any) -> Generation:
        """This generation with the rows, images and entries that the cache has now."""
        layers = cache.layers if cache is not None else []
        noted = [self.origins(note.rows) for note in self._notes]
        rows = self.origins(origins(layers)) if layers else noted[-1] if noted else list(range(self.rows))
        length = books(layers).length if layers else 0
        # Of rows that were reordered since, the past is that of the row that each came from.
        past = [[own.index(row) for row in rows] for own in noted]
        history = [note.held(at) for note, at in zip(self._notes, past, strict=True)]
        now = history[-1] if history else Held()
        if layers:
            note = CacheNote.of(layers, None if self._mask is None else self._mask[past[-1]])
            now = note.held(range(len(rows)))
        return replace(
            self,
            trail=self.trail.of_rows(rows, length),
            earlier=still_there(self.earlier, rows, length),
            texts=[self.texts[row] for row in rows],
            _history=history,
            _now=now,
            _log=books(layers).log if layers else self._log,
            _heads=[Heads.of(layer) for layer in layers] or self._heads,
        )

    def _build(self) -> Report:
        tokens = self._tokens(self.images)
        flops = self._flops()
        breakdown, full = (_sum([row[which] for row in flops]) for which in (0, 1))
        kv = self._now.entries
        kept = [self._achieved_tokens(image) for image in self.images]
        achieved = [tokens / image.total for tokens, image in zip(kept, self.images, strict=True)]
        requested = self.asked
        history = self._steps()
        before = self._history[0] if self._history else Held()
        return Report(
            method="+".join(pruner.name for pruner in self.pruners),
            samples=[self._sample(row, flops[row], before) for row in range(self.rows)],
            tokens_per_layer=tokens,
            kv_tokens_per_layer=kv,
            steps=self.steps,
            asked_keep=requested[0] if len(requested) == 1 else requested,
            achieved_keep=sum(achieved) / len(achieved) if achieved else 1.0,
            kept_tokens=sum(kept) / len(kept) if kept else 0.0,
            flops=breakdown.total,
            flops_full=full.total,
            flops_breakdown=breakdown,
            kv_bytes_prefill=history[0].kv_bytes,
            kv_bytes=self._bytes_of(kv),
            kv_bytes_full=self._bytes_of(self._now.unpruned),
            kv_bytes_allocated=self._now.allocated,
            stages=[self._stage(index) for index in range(len(self.pruners))],
            history=history,
            aux_bytes=self._now.waiting,
            kv_bytes_prefill_full=self._bytes_of(before.unpruned),
        )

    def _steps(self) -> list[StepReport]:
        """The prefill and every forward after it, which vision tokens go through only where they return."""
        prefill, none = self._tokens(self.trail.images), [[0] * self.rows for _ in range(self.depth)]
        return [
            StepReport(held.with_returned(none if step else prefill), held.entries, self._bytes_of(held.entries))
            for step, held in enumerate(self._history or [Held()])
        ]

    def _tokens(self, images: list[ImageTrail]) -> list[list[int]]:
        tokens = [[0] * self.rows for _ in range(self.depth)]
        for image in images:
            for layer in range(self.depth):
                tokens[layer][image.row] += int(image.kept_at(layer).numel())
        return tokens

    def _achieved_tokens(self, image: ImageTrail) -> float:
        """An image's tokens that were kept, counted as the last pruner counts its `keep`."""
        last = self.pruners[-1]
        evicting = evict_layers(last)
        return mean_held(self._heads, image, evicting) if evicting else last.counted.of(_counts(image, self.depth))

    def _stage(self, index: int) -> StageReport:
        pruner = self.pruners[index]
        left: list[float] = [image.left_by(index) for image in self.images]
        if evict_layers(pruner):
            left = [self._achieved_tokens(image) for image in self.images]
        mean = sum(left) / len(left) if left else 0.0
        layers = sorted({layer for image in self.images for layer in image.asked.get(index, ())})
        return StageReport(
            pruner.name, acts_at(pruner, layers), self.asked[index], mean, asked_keep_video=pruner.keep_video
        )

    def _bytes_of(self, kv: list[list[int]]) -> int:
        return sum(self._bytes_of_row(kv, row) for row in range(self.rows))

    def _bytes_of_row(self, kv: list[list[int]], row: int) -> int:
        return cache_bytes(self.cost.decoder, [layer[row] for layer in kv], self.dtype) if kv else 0

    def _sample(self, row: int, flops: tuple[FlopsBreakdown, FlopsBreakdown], before: Held) -> SampleReport:
        images = [
            ImageReport(
                grid=image.encoded.grid,
                tokens=image.total,
                kept=image.kept_at(0).tolist(),
                kept_per_layer=[image.kept_at(layer).tolist() for layer in range(self.depth)],
                merged=_merged(image),
                cached_per_layer=[self._cached(image, layer) for layer in range(self.depth)],
                cls=_cls_tokens(image)[0],
                cls_tokens=[token for token in _cls_tokens(image) if token >= 0],
                notes=self._notes_of(image),
                published_tokens=_published(self.pruners[-1], _counts(image, self.depth)),
                steps=image_steps(self._log, image, self.depth),
                cached_per_head=tokens_per_head(self._heads, image),
                achieved_tokens=self._achieved_tokens(image),
                kind=image.encoded.kind,
                kept_per_part=image.kept_per_part(),
                parts=[part.grid for part in image.encoded.parts],
                structural=image.encoded.structural,
                structural_left=image.encoded.structural - image.newlines_gone,
            )
            for image in self.images
            if image.row == row
        ]
        return SampleReport(
            images,
            self.text[row],
            flops=flops[0].total,
            flops_full=flops[1].total,
            scoring_flops=flops[0].scoring,
            encoder_flops=flops[0].vision_tower + flops[0].projector,
            kv_bytes_prefill=self._bytes_of_row(before.entries, row),
            kv_bytes_prefill_full=self._bytes_of_row(before.unpruned, row),
            kv_bytes=self._bytes_of_row(self._now.entries, row),
            kv_bytes_full=self._bytes_of_row(self._now.unpruned, row),
        )

    def _cached(self, image: ImageTrail, layer: int) -> list[int]:
        return [] if layer in self.cost.decoder.states else image.cached_at(layer).tolist()

    def _notes_of(self, image: ImageTrail) -> list[str]:
        last = self.pruners[-1]
        evicted = eviction_notes(self._heads, image, last.name)
        published = _published_notes(_counts(image, self.depth), last)
        plan, entered = self.plans.of(image.shown), int(image.kept_at(0).numel())
        unmet = [plan.whole(order, entered) for order in range(len(self.pruners))]
        whole = [f"{KEPT_WHOLE}{reason}" for reason in unmet if reason]
        return [*image.notes, *whole, *evicted, *published, *self._end_notes(image), *self._idle_notes(image)]

    def _idle_notes(self, image: ImageTrail) -> list[str]:
        """That a method which routes while a model is trained did nothing here."""
        plan = self.plans.of(image.shown)
        skipped = any(image.kept_at(layer).numel() < image.kept_at(0).numel() for layer in range(self.depth))
        idle = [
            one.name
            for order, one in enumerate(plan.pruners)
            if isinstance(one, InLayers) and one.for_training and plan.acts(order) and not skipped
        ]
        return [f"{name} routes in training alone: here every layer computed everything" for name in idle]

    def _end_notes(self, image: ImageTrail) -> list[str]:
        """That an answer starts from a token before the prompt's end, where that end is an image whose last token was
        dropped."""
        left = image.alive_at(self.depth)
        ends = image.text_after == 0 and [one for one in self.images if one.key == image.key][-1] is image
        if not ends or (left.numel() and int(left[-1]) == image.total - 1):
            return []
        if not left.numel():
            return ["the prompt ends with this image, which left: the answer starts from the text before it"]
        return [
            "the prompt ends with this image, and its last token was dropped: the answer starts from token "
            f"{int(left[-1])}, the last one kept"
        ]

    def _flops(self) -> list[tuple[FlopsBreakdown, FlopsBreakdown]]:
        """FLOPs of each row's prefill in this turn, pruned and unpruned: the sum over its conversations, each for
        itself."""
        pruned: list[list[FlopsBreakdown]] = [[] for _ in range(self.rows)]
        full: list[list[FlopsBreakdown]] = [[] for _ in range(self.rows)]
        held = self._history[0] if self._history else Held()
        encoded: set[int] = set()
        for key in self._keys():
            images = self._new(key)
            # Rows of one sample under beams share its images: the tower ran on each of them once.
            fresh = [image for image in images if id(image.encoded) not in encoded]
            encoded.update(id(image.encoded) for image in images)
            grids = [image.encoded.encoded for image in fresh]
            text, whole = self._text_of(key), sum(image.total for image in images)
            words, own, past = self._text_per_layer(key), self._own(key, held), self._past(key, held)
            planned = {layer: one for layer, one in self._planned(key, past).items() if own[layer]}
            alone = prefill_flops(
                self.cost,
                own,
                text_tokens=words,
                images=grids,
                encoder_tokens_per_layer=_segments(fresh),
                encoder_mlp_tokens_per_layer=_mlp_tokens(fresh),
                projector_tokens=sum(image.encoded.projected for image in fresh),
                plane_tokens=sum(sum(image.encoded.planes) for image in fresh),
                read_tokens_per_layer=self._read(key),
                keys_alone=any(isinstance(pruner, InLayers) and pruner.keys_alone for pruner in self.pruners),
                planned=planned,
                scoring=sum(self._scoring(images, place) for place in range(len(images)))
                + self._probes(key, past)
                + sum(pruner.row_flops(own[0] + words[0]) for pruner in self.pruners if isinstance(pruner, InLayers)),
            )
            unpruned = prefill_flops(
                self.cost,
                whole,
                text_tokens=text,
                images=grids,
                projector_tokens=sum(image.encoded.projects for image in fresh),
            )
            if any(past):
                before = held.whole[key[0]] - whole - text
                # A planned layer counts what it attends to in the cache itself.
                queries = [0 if n in planned else own[n] + words[n] for n in range(self.depth)]
                alone = self._attend(alone, queries, past)
                unpruned = self._attend(unpruned, [whole + text] * self.depth, self._in_entries([before] * self.depth))
            pruned[key[0]].append(alone)
            full[key[0]].append(unpruned)
        return [(_sum(own), _sum(whole)) for own, whole in zip(pruned, full, strict=True)]

    def _planned(self, key: tuple[int, int], past: list[int]) -> dict[int, PlannedTokens]:
        """What planned layers do with the vision tokens that this turn brought to a conversation."""
        decoder, found = self.cost.decoder, {}
        for pruner in self.pruners:
            for layer in planned_layers(pruner):
                assert isinstance(pruner, InAttention)
                plan = pruner.vision_plan(layer)
                own = [image for image in self._new(key) if layer in image.seen]
                found[layer] = PlannedTokens(
                    heads=plan.reading(decoder.kv_heads),
                    mlp_width=decoder.mlp_width if plan.mlp is None else plan.mlp,
                    seen=tuple((int(one.kept_at(layer).numel()), one.seen[layer] + past[layer]) for one in own),
                    past=past[layer],
                )
        return found

    def _keys(self) -> list[tuple[int, int]]:
        """Row and number of every conversation of this turn."""
        return [(row, talk) for row, texts in enumerate(self.texts) for talk in range(len(texts))]

    def _new(self, key: tuple[int, int]) -> list[ImageTrail]:
        """The images that this turn brought to a conversation."""
        return [image for image in self.trail.images if image.key == key]

    def _text_of(self, key: tuple[int, int]) -> int:
        return self.texts[key[0]][key[1]]

    def _text_left(self, key: tuple[int, int]) -> int:
        """The same without newlines that were dropped."""
        return self._text_of(key) - sum(image.newlines_gone for image in self._new(key))

    def _own(self, key: tuple[int, int], held: Held) -> list[int]:
        """Vision tokens of a conversation that each layer computed in the prefill."""
        row = key[0]
        tokens = [sum(int(image.kept_at(layer).numel()) for image in self._new(key)) for layer in range(self.depth)]
        return [tokens[layer] + (held.returned[layer][row] if held.returned else 0) for layer in range(self.depth)]

    def _read(self, key: tuple[int, int]) -> list[int]:
        """Tokens of a conversation that each layer only had keys and values of in the prefill."""
        images, whole = self._new(key), self._text_left(key)
        words, text = self._text_per_layer(key), self.trail.routed_text
        return [
            sum(int(image.held_at(layer).numel() - image.kept_at(layer).numel()) for image in images)
            + (whole - words[layer] if layer in text and text[layer].read else 0)
            for layer in range(self.depth)
        ]

    def _past(self, key: tuple[int, int], held: Held) -> list[int]:
        """Entries that each layer's cache held of a row before this turn."""
        if not held.entries or not self.offset:
            return [0] * self.depth
        own = zip(self._own(key, held), self._text_per_layer(key), self._read(key), strict=True)
        return self._in_entries([layer[key[0]] - sum(new) for layer, new in zip(held.entries, own, strict=True)])

    def _in_entries(self, counts: list[int]) -> list[int]:
        """The counts of the layers that hold entries, 0 of those that hold a state."""
        return [0 if layer in self.cost.decoder.states else count for layer, count in enumerate(counts)]

    def _text_per_layer(self, key: tuple[int, int]) -> list[int]:
        """Text tokens of a conversation that each layer computed in the prefill."""
        whole, routed = self._text_left(key), self.trail.routed_text
        found = {layer: text.counts.get(key[1]) for layer, text in routed.items()}
        # A conversation without any text has nothing to be counted.
        return [(found[layer] or [0] * self.rows)[key[0]] if layer in found else whole for layer in range(self.depth)]

    def _attend(self, cost: FlopsBreakdown, queries: list[int], past: list[int]) -> FlopsBreakdown:
        """Adds the attention of this turn's tokens to what the cache held before."""
        pairs = sum(q * p for q, p in zip(queries, past, strict=True))
        return replace(cost, decoder=cost.decoder + 4 * pairs * self.cost.decoder.query_width)

    def _probed(self, index: int, key: tuple[int, int]) -> int:
        """Tokens of a conversation that a pruner's probe saw, 0 if it made none."""
        seen = [image.probed.get(index, 0) for image in self._new(key)]
        return self._text_of(key) + sum(seen) if any(seen) else 0

    def _probes(self, key: tuple[int, int], past: list[int]) -> int:
        """FLOPs of the layers that were run to select by, beside those of the pass that counts."""
        decoder, total = self.cost.decoder, 0
        for index, pruner in enumerate(self.pruners):
            layer, tokens = probe_layer(pruner), self._probed(index, key)
            if layer is not None and tokens:
                total += 2 * decoder.probe_macs(layer, tokens, past)
        return total

    def _pairs(self, key: tuple[int, int]) -> tuple[int, ...]:
        """Queries times keys of this turn's attention in each decoder layer, padding left out; () without a cache."""
        if not self._history:
            return ()
        own = [tokens + self._text_left(key) for tokens in self._own(key, Held())]
        held = [n + read for n, read in zip(own, self._read(key), strict=True)]
        keys = [layer[key[0]] for layer in self._history[0].entries] if self.offset else held
        return tuple(n * k for n, k in zip(own, keys, strict=True))

    def _scoring(self, images: list[ImageTrail], place: int) -> int:
        """What all methods add for one of the images of a conversation."""
        image, key = images[place], images[place].key
        words, left = self._text_of(key), self._text_left(key)
        text = words - sum(one.encoded.structural for one in images)
        blocks, decoder = self.cost.vision.blocks, self.cost.decoder
        # Of everything that the encoder attends within: tokens may be means of patches, and some patches padding.
        patches, units = math.prod(image.encoded.encoded) * self.facts.group, image.encoded.shown.units
        alive = [sum(layer) for layer in image.encoded.segments]
        alive = alive or [patches + units * self.facts.has_cls] * blocks.layers
        total = 0
        for index in range(len(self.pruners)):
            plan = self.plans.of(image.shown)
            if not plan.acts(index):
                continue
            scored = image.asked.get(index, [])
            known = {layer for other in images[:place] for layer in other.asked.get(index, ())}
            work = Work(
                patches=patches,
                tokens=image.total,
                shown=int(image.encoded.alive.numel()),
                kept=int(image.kept_at(0).numel()),
                encoder_width=blocks.width,
                encoder_heads=blocks.heads,
                decoder_width=decoder.width,
                decoder_query_width=decoder.query_width,
                decoder_heads=decoder.heads,
                prompt=words + sum(one.total for one in self.images if one.key == key),
                text=text,
                text_after=image.text_after,
                units=units,
                decoder_kv_width=decoder.kv_width,
                decoder_pairs=self._pairs(key),
                images=sum(self.plans.of(one.shown).acts(index) for one in images),
                encoder_patches=tuple(alive),
                encoder_layers=image.encoded.scored,
                decoder_layers=tuple(scored),
                decoder_tokens=tuple(left + sum(one.kept_at(n).numel() for one in images) for n in scored),
                first_asked=tuple(layer not in known for layer in scored),
                has_cls=self.facts.has_cls,
                image_tokens=tuple(int(image.kept_at(layer).numel()) for layer in scored),
                memory=image.memories.get(index, {}),
                probed=self._probed(index, key),
            )
            total += plan.pruners[index].flops(work)
        return total


def _sum(parts: list[FlopsBreakdown]) -> FlopsBreakdown:
    names = [f.name for f in fields(FlopsBreakdown)]
    return FlopsBreakdown(**{name: sum(getattr(part, name) for part in parts) for name in names})


def _segments(images: list[ImageTrail]) -> list[list[list[int]]] | None:
    """Attention segments by image and encoder layer, or None where no pruner acts in the encoder."""
    return [image.encoded.segments for image in images] if any(image.encoded.segments for image in images) else None


def _mlp_tokens(images: list[ImageTrail]) -> list[tuple[int, ...]] | None:
    return [image.encoded.mlp for image in images] if any(image.encoded.segments for image in images) else None


def _cls_tokens(image: ImageTrail) -> list[int]:
    """The token in whose place the CLS token of each of an image's units stands, -1 for none."""
    places: list[int] = torch.as_tensor(image.encoded.cls).reshape(-1).tolist()
    return places


def _merged(image: ImageTrail) -> list[MergeReport]:
    inside = [(int(image.encoded.merged_at), merge, "encoder") for merge in image.encoded.merges()]
    later = [(layer, merge, "decoder") for layer, merge in image.merged()]
    return [
        MergeReport(
            into=merge.into, members=list(merge.members), weights=list(merge.weights), layer=layer, stage=stage
        )
        for layer, merge, stage in inside + later
    ]


def acts_at(pruner: Pruner, asked: list[int]) -> str:
    """Where a pruner acts on its model, in words; asked: the decoder layers after which it was, if any."""
    layers = asked or drop_layers(pruner)
    places = ["encoder"] if encoder_layers(pruner) else []
    probed, evicted, routed = probe_layer(pruner), evict_layers(pruner), routed_layers(pruner)
    if isinstance(pruner, BeforeDecoder):
        places.append("before decoder" if probed is None else f"before decoder, by decoder layer {probed}")
    places += [f"in decoder layers {', '.join(map(str, routed))}, routed"] if routed else []
    planned = planned_layers(pruner)
    places += [f"in decoder layers {planned[0]} to {planned[-1]}, attention and MLP"] if planned else []
    places += [f"after decoder layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"] if layers else []
    places += [f"cache{'s' * (len(evicted) > 1)} of layers {', '.join(map(str, evicted))}"] if evicted else []
    return "; ".join(places) or "nowhere"


def _counts(image: ImageTrail, depth: int) -> list[int]:
    """Tokens of an image that each decoder layer processes."""
    return [int(image.kept_at(layer).numel()) for layer in range(depth)]


def _published_notes(counts: list[int], last: Pruner) -> list[str]:
    """Both counts of what an image kept, where the last pruner's paper counts otherwise."""
    published, achieved = _published(last, counts), last.counted.of(counts)
    if published is None or published == achieved:
        return []
    return [f"{last.name}: {published:.1f} tokens as its paper counts, {achieved:.1f} processed"]


def _published(pruner: Pruner, counts: list[int]) -> float | None:
    """What an image kept as the pruner's paper counts it, None where it counts as `keep` does."""
    return None if pruner.published is None else pruner.published.of(counts)
