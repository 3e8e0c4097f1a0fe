"""The record of one generation, from which its report is made when somebody asks."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from vtprune.cost import FlopsBreakdown, flops, kv_bytes
from vtprune.decoding import DecoderRun, ImageSpan
from vtprune.holdings import Holding, real_entries
from vtprune.model_cost import model_cost
from vtprune.pruner import ModelFacts, Pruner, ScoringWork
from vtprune.report import ImageReport, MergeReport, Report, SampleReport, StageReport
from vtprune.state import ROWS


@dataclass
class Generation:
    """What a prefill and the forwards after it leave behind; `build` turns it into a Report when asked.

    spans: every image in the cache; the first `earlier` of them came with earlier turns. text: text tokens of
    this turn's prompt in each row; offset: places that the cache held before it.
    """

    config: Any
    pruners: list[Pruner]
    facts: Any
    depth: int
    dtype: torch.dtype
    spans: list[ImageSpan]
    text: list[int]
    earlier: int = 0
    offset: int = 0
    steps: int = 0
    _prefill: list[Holding] = field(default_factory=list)
    _layers: list[Holding] = field(default_factory=list)
    _mask: Tensor | None = None
    _noted: list[int] = field(default_factory=list)
    _cache: weakref.ReferenceType[Cache] | None = None

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return len(self.text)

    def note_cache(self, run: DecoderRun) -> None:
        """Remembers what the cache holds after a forward; nothing is computed until a report is asked for."""
        mask = run.prompt.mask
        self._mask = mask if mask is not None and mask.ndim == 2 else None
        self._noted = list(range(self.rows))
        if run.cache is None or run.layers is None:
            return
        self._cache = weakref.ref(run.cache)
        self._layers = [Holding.of(layer) for layer in run.layers]
        self._noted = self.origins(run.layers)
        self._prefill = self._prefill or self._layers

    def origins(self, layers: list[Any]) -> list[int]:
        """Which row of the prompt each row of the cache is: they are reordered, repeated and dropped."""
        rows = layers[0].aux.get(ROWS) if layers else None
        return list(range(self.rows)) if rows is None else rows[:, 0].tolist()

    def live_spans(self, origins: list[int], length: int) -> list[ImageSpan]:
        """The images that are still in the cache, as rows stand now."""
        return [
            replace(span, row=row)
            for span in self.spans
            for row, origin in enumerate(origins)
            if span.row == origin and (span.end <= length or not length)
        ]

    def _as_of_now(self, cache: Any) -> Generation:
        """This generation with the rows, images and entries that the cache has now."""
        layers = cache.layers if cache is not None else []
        origins = self.origins(layers) if layers else self._noted
        length = layers[0].length if layers else 0
        noted = [self._noted.index(origin) for origin in origins]
        earlier = replace(self, spans=self.spans[: self.earlier]).live_spans(origins, length)
        return replace(
            self,
            spans=self.live_spans(origins, length),
            earlier=len(earlier),
            text=[self.text[origin] for origin in origins],
            _layers=[Holding.of(layer) for layer in layers] if layers else self._layers,
            _prefill=[layer.rows(origins) for layer in self._prefill],
            _mask=None if self._mask is None else self._mask[noted],
        )

    def _kv_tokens(self, layers: list[Holding]) -> list[list[int]]:
        """Entries in the cache, [layer][row], padding left out."""
        return [real_entries(layer.slots, layer.length, self._mask, self.rows) for layer in layers]

    def _unpruned(self, layers: list[Holding]) -> list[list[int]]:
        """The entries that these layers would hold if nothing were pruned."""
        return [real_entries(None, layer.length, self._mask, self.rows) for layer in layers]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None}

    def build(self, cache: Cache | None = None) -> Report:
        """The report as of now; `cache`: the one that this generation filled, or a copy of it."""
        if cache is None and self._cache is not None:
            cache = self._cache()
        return self._as_of_now(cache)._build()

    def _build(self) -> Report:
        tokens = self._tokens(self.spans)
        breakdown, full = self._flops()
        live = self._layers
        kv = self._kv_tokens(live)
        achieved = [self._achieved(span) for span in self.spans]
        kept = [a * span.image.total for a, span in zip(achieved, self.spans, strict=True)]
        asked = [pruner.asked_keep for pruner in self.pruners]
        return Report(
            method="+".join(pruner.name for pruner in self.pruners),
            samples=[self._sample(row) for row in range(self.rows)],
            tokens_per_layer=tokens,
            kv_tokens_per_layer=kv,
            steps=self.steps,
            asked_keep=asked[0] if len(asked) == 1 else asked,
            achieved_keep=sum(achieved) / len(achieved) if achieved else 1.0,
            kept_tokens=sum(kept) / len(kept) if kept else 0.0,
            flops=breakdown.total,
            flops_full=full.total,
            flops_breakdown=breakdown,
            kv_bytes_prefill=self._bytes_of(self._kv_tokens(self._prefill)),
            kv_bytes_prefill_full=self._bytes_of(self._unpruned(self._prefill)),
            kv_bytes=self._bytes_of(kv),
            kv_bytes_full=self._bytes_of(self._unpruned(live)),
            kv_bytes_allocated=sum(layer.size for layer in live),
            stages=[self._stage(index) for index in range(len(self.pruners))],
        )

    def _tokens(self, spans: list[ImageSpan]) -> list[list[int]]:
        tokens = [[0] * self.rows for _ in range(self.depth)]
        for span in spans:
            for layer in range(self.depth):
                tokens[layer][span.row] += int(span.kept_at(layer).numel())
        return tokens

    def _achieved(self, span: ImageSpan) -> float:
        """The share of an image's tokens that was kept, counted as the last pruner counts its `keep`."""
        last = self.pruners[-1]
        evicting = last.evict_layers(self.depth)
        if not evicting:
            counts = [int(span.kept_at(layer).numel()) for layer in range(self.depth)]
            return last.achieved(counts) / span.image.total
        held = [self._held(span, layer) for layer in evicting]
        return sum(sum(map(len, heads)) / len(heads) for heads in held) / len(held) / span.image.total

    def _held(self, span: ImageSpan, layer: int) -> list[list[int]]:
        """The tokens of an image that each head of a layer's cache holds; one list for all while they agree."""
        held = self._layers[layer].tokens(span) if self._layers else None
        return [span.cached_at(layer).tolist()] if held is None else held

    def _per_head(self, span: ImageSpan) -> list[list[list[int]]]:
        return [layer.tokens(span) or [] for layer in self._layers]

    def _notes(self, span: ImageSpan) -> list[str]:
        """What pruners said of an image, and what became of the entries that left its cache head by head."""
        notes, heads = list(span.notes), self._per_head(span)
        evicted = sum(len(of) * span.cached_at(layer).numel() - sum(map(len, of)) for layer, of in enumerate(heads))
        if evicted:
            merged = sum(layer.merged_into(span) for layer in self._layers)
            name = next(pruner.name for pruner in self.pruners if pruner.evict_layers(self.depth))
            notes.append(f"{name}: {merged} entries merged of {evicted} evicted, summed over layers and heads")
        return notes

    def _stage(self, index: int) -> StageReport:
        pruner = self.pruners[index]
        left: list[float] = [span.left.get(index, int(span.image.alive.numel())) for span in self.spans]
        if pruner.evict_layers(self.depth):
            left = [self._achieved(span) * span.image.total for span in self.spans]
        mean = sum(left) / len(left) if left else 0.0
        return StageReport(pruner.name, acts_at(pruner, self.facts), pruner.asked_keep, mean)

    def _bytes_of(self, kv: list[list[int]]) -> int:
        if not kv:
            return 0
        return sum(kv_bytes(self.config, [layer[row] for layer in kv], self.dtype) for row in range(self.rows))

    def _total(self, row: int) -> int:
        return sum(span.image.total for span in self.spans if span.row == row)

    def _sample(self, row: int) -> SampleReport:
        images = [
            ImageReport(
                grid=span.image.grid,
                tokens=span.image.total,
                kept=span.kept_at(0).tolist(),
                kept_per_layer=[span.kept_at(layer).tolist() for layer in range(self.depth)],
                merged=_merged(span),
                cached_per_layer=[span.cached_at(layer).tolist() for layer in range(self.depth)],
                cls=span.image.cls,
                cached_per_head=self._per_head(span),
                notes=self._notes(span),
            )
            for span in self.spans
            if span.row == row
        ]
        return SampleReport(images, self.text[row])

    def _flops(self) -> tuple[FlopsBreakdown, FlopsBreakdown]:
        """FLOPs of this turn's prefill, pruned and unpruned."""
        pruned, full = [], []
        new = self.spans[self.earlier :]
        tokens = self._tokens(new)
        entries = self._kv_tokens(self._prefill)
        encoded: set[int] = set()
        for row in range(self.rows):
            spans = [span for span in new if span.row == row]
            # Rows of one sample under beams share its images: the tower ran on each of them once.
            fresh = [span for span in spans if id(span.image) not in encoded]
            encoded.update(id(span.image) for span in spans)
            grids = [span.image.grid for span in fresh]
            text, whole = self.text[row], sum(span.image.total for span in spans)
            own = [layer[row] for layer in tokens]
            alone = flops(
                self.config,
                own,
                text_tokens=text,
                images=grids,
                encoder_tokens_per_layer=_segments(fresh),
                encoder_mlp_tokens_per_layer=_mlp_tokens(fresh),
                projector_tokens=sum(int(span.image.alive.numel()) for span in fresh),
                scoring=sum(self._scoring(span, row) for span in spans),
            )
            unpruned = flops(self.config, whole, text_tokens=text, images=grids)
            if entries and self.offset:
                past = [layer[row] - vision - text for layer, vision in zip(entries, own, strict=True)]
                before = real_entries(None, self.offset, self._mask, self.rows)[row]
                alone = self._attend(alone, [v + text for v in own], past)
                unpruned = self._attend(unpruned, [whole + text] * self.depth, [before] * self.depth)
            pruned.append(alone)
            full.append(unpruned)
        return _sum(pruned), _sum(full)

    def _attend(self, cost: FlopsBreakdown, queries: list[int], past: list[int]) -> FlopsBreakdown:
        """Adds the attention of this turn's tokens to what the cache held before."""
        text = self.config.get_text_config()
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        pairs = sum(q * p for q, p in zip(queries, past, strict=True))
        return replace(cost, decoder=cost.decoder + 4 * pairs * head_dim * text.num_attention_heads)

    def _pairs(self, row: int) -> tuple[int, ...]:
        """Queries times keys of this turn's attention in each decoder layer, padding left out; () without a cache."""
        if not self._prefill:
            return ()
        own = [layer[row] + self.text[row] for layer in self._tokens(self.spans[self.earlier :])]
        keys = [layer[row] for layer in self._kv_tokens(self._prefill)] if self.offset else own
        return tuple(n * k for n, k in zip(own, keys, strict=True))

    def _scoring(self, span: ImageSpan, row: int) -> int:
        config, text = self.config.vision_config, self.config.get_text_config()
        heads = getattr(config, "num_attention_heads", None) or config.num_heads
        blocks = model_cost(self.config).vision.blocks
        patches = span.image.total * self.facts.group
        alive = [sum(layer) for layer in span.image.segments] or [patches + self.facts.has_cls] * blocks.layers
        new = self.spans[self.earlier :]
        total = 0
        for index, pruner in enumerate(self.pruners):
            if pruner.budget(span.image.total) >= span.image.total:
                continue
            work = ScoringWork(
                patches=patches,
                tokens=span.image.total,
                kept=int(span.kept_at(0).numel()),
                encoder_width=blocks.width,
                encoder_heads=heads,
                decoder_width=text.hidden_size,
                decoder_heads=text.num_attention_heads,
                prompt=self.text[row] + self._total(row),
                text=self.text[row],
                text_after=span.text_after,
                decoder_kv_width=model_cost(self.config).decoder.kv_width,
                decoder_pairs=self._pairs(row),
                images=sum(pruner.budget(n) < n for n in (s.image.total for s in new if s.row == row)),
                encoder_patches=tuple(alive),
                encoder_layers=span.image.scored,
                decoder_layers=tuple(span.asked.get(index, ())),
                has_cls=self.facts.has_cls,
            )
            total += pruner.scoring_flops(work)
        return total


def _sum(parts: list[FlopsBreakdown]) -> FlopsBreakdown:
    names = [f.name for f in fields(FlopsBreakdown)]
    return FlopsBreakdown(**{name: sum(getattr(part, name) for part in parts) for name in names})


def _segments(spans: list[ImageSpan]) -> list[list[list[int]]] | None:
    """Attention segments by image and encoder layer, or None where no pruner acts in the encoder."""
    return [span.image.segments for span in spans] if any(span.image.segments for span in spans) else None


def _mlp_tokens(spans: list[ImageSpan]) -> list[tuple[int, ...]] | None:
    return [span.image.mlp for span in spans] if any(span.image.segments for span in spans) else None


def _merged(span: ImageSpan) -> list[MergeReport]:
    inside = [(span.image.merged_at, merge, "encoder") for merge in span.image.merges()]
    later = [(layer, merge, "decoder") for layer, merge in span.merges]
    return [
        MergeReport(merge.into, list(merge.members), list(merge.weights), layer, stage)
        for layer, merge, stage in inside + later
    ]


def acts_at(pruner: Pruner, facts: ModelFacts) -> str:
    """Where a pruner acts on this model, in words."""
    layers = pruner.decoder_layers(facts.decoder_depth)
    places = ["encoder"] if pruner.encoder_layers(facts.encoder_depth) else []
    places += ["before decoder"] if pruner.selects else []
    evicted = pruner.evict_layers(facts.decoder_depth)
    places += [f"after decoder layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"] if layers else []
    places += [f"cache{'s' * (len(evicted) > 1)} of layers {', '.join(map(str, evicted))}"] if evicted else []
    return "; ".join(places) or "nowhere"
