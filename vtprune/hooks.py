"""The hooks of one wrapped model: from the encoder's layers to the decoder's, for one call at a time a thread."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache

from vtprune.adapters.base import Adapter
from vtprune.cache import PrunedLayer, adopt_cache, logical_length, unsupported_reason
from vtprune.compaction import fill_index
from vtprune.decoding import DecoderRun, ImageSpan, PromptInfo
from vtprune.encoding import EncodedImage, Encoding
from vtprune.errors import UnsupportedCacheError, VTPruneError
from vtprune.pruner import ModelFacts, Pruner
from vtprune.report import Generation
from vtprune.selection import Selection
from vtprune.stream import DecoderLayer, EncoderLayer, VisionStream
from vtprune.taps import Taps

RUN = "vtprune_run"
RECORD = "_vtprune_image"
GENERATION = "_vtprune"


@dataclass
class Frame:
    """One forward of the multimodal model: its inputs, and its images once they are encoded."""

    inputs: dict[str, Any]
    images: list[EncodedImage] = field(default_factory=list)


class ThreadState(threading.local):
    """What is under way in this thread: forwards, the encoding, and the layers being run."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.encoding: Encoding | None = None
        self.runs: list[Encoding | DecoderRun | None] = []
        self.decoder: list[DecoderRun | None] = []


class Wrapping:
    """Everything that `wrap` puts on a model, and `remove` takes off again."""

    def __init__(self, adapter: Adapter, pruners: list[Pruner], facts: ModelFacts, *, compact: bool) -> None:
        self.adapter, self.pruners, self.facts, self.compact = adapter, pruners, facts, compact
        self.name = "+".join(pruner.name for pruner in pruners)
        self.last: Generation | None = None
        self.state = ThreadState()
        self._handles: list[RemovableHandle] = []
        self._overridden: list[tuple[Any, str]] = []
        self._signature = inspect.signature(adapter.inner.forward)
        self._features_signature = inspect.signature(adapter.inner.get_image_features)
        self._install()

    def _install(self) -> None:
        adapter = self.adapter
        self._override(adapter.inner, "get_image_features", self._image_features(adapter.inner.get_image_features))
        for owner, name, replacement in adapter.overrides():
            self._override(owner, name, replacement)
        self._before(adapter.inner, self._open_frame)
        self._after(adapter.inner, self._close_frame)
        self._before(adapter.vision_tower, self._open_encoder)
        encoder_layers = list(adapter.encoder_layers)
        for index, layer in enumerate(encoder_layers):
            self._before(layer, functools.partial(self._before_encoder_layer, index))
            self._after(layer, functools.partial(self._after_encoder_layer, index))
        self._before(adapter.projector, self._before_projector)
        self._after(adapter.projector, self._after_projector)
        self._before(adapter.language_model, self._open_decoder)
        self._after(adapter.language_model, self._close_decoder)
        decoder_layers = list(adapter.decoder_layers)
        for index, layer in enumerate(decoder_layers):
            self._before(layer, functools.partial(self._before_decoder_layer, index))
            self._after(layer, functools.partial(self._after_decoder_layer, index))
        self._depth = len(decoder_layers)
        self._install_taps(encoder_layers, decoder_layers)

    def _install_taps(self, encoder_layers: list[nn.Module], decoder_layers: list[nn.Module]) -> None:
        depth, adapter = self.facts.encoder_depth, self.adapter
        scored = {index for pruner in self.pruners for index in pruner.encoder_layers(depth)}
        if any(pruner.reads_encoder for pruner in self.pruners):
            scored.add(depth - 1)
        decoder = {index for pruner in self.pruners for index in pruner.decoder_layers(self._depth)}
        projections = [adapter.encoder_projections(encoder_layers[index]) for index in sorted(scored)]
        projections += [adapter.decoder_projections(decoder_layers[index]) for index in sorted(decoder)]
        self._taps = Taps([one.modules for one in projections], self._sink)

    def _sink(self) -> dict[str, Tensor] | None:
        run = self.state.runs[-1] if self.state.runs else None
        return None if run is None else run.taps

    def _override(self, owner: Any, name: str, replacement: Callable[..., Any]) -> None:
        owner.__dict__[name] = replacement
        self._overridden.append((owner, name))

    def _before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _after(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        # always_call: what a layer opened is closed again when something raises half-way.
        self._handles.append(module.register_forward_hook(hook, with_kwargs=True, always_call=True))

    def remove(self) -> None:
        """Takes every hook and override off."""
        self._taps.remove()
        for handle in self._handles:
            handle.remove()
        for owner, name in self._overridden:
            owner.__dict__.pop(name, None)

    # Encoder

    def _budget(self, tokens: int) -> int:
        return min(pruner.encoder_budget(tokens) for pruner in self.pruners)

    def _image_features(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def get_image_features(*args: Any, **kwargs: Any) -> Any:
            arguments = self._features_signature.bind(*args, **kwargs).arguments
            arguments = {**arguments, **arguments.pop("kwargs", {})}
            self._taps.refresh()
            encoding = self.adapter.start_encoding(arguments, self._budget)
            with self._encoding(encoding):
                output = original(*args, **kwargs)
            images = encoding.images(self.adapter.pixels(arguments))
            features = output[1] if isinstance(output, tuple) else output.pooler_output
            # Features may be expanded for beams or handed in later; their records travel with the tensors.
            for tensor, image in zip(features, images, strict=True):
                setattr(tensor, RECORD, image)
            if self.state.frames:
                self.state.frames[-1].images = images
            return output

        return get_image_features

    @contextmanager
    def _encoding(self, encoding: Encoding) -> Iterator[None]:
        outer, self.state.encoding = self.state.encoding, encoding
        try:
            yield
        finally:
            self.state.encoding = outer

    def _open_encoder(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.state.encoding is None:
            return None
        return args, {**kwargs, RUN: self.state.encoding}

    def _before_encoder_layer(self, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        encoding = kwargs.pop(RUN, None)
        self.state.runs.append(encoding)
        if encoding is None:
            return None
        args, kwargs = encoding.layer_inputs(index, args, kwargs)
        encoding.note_layer(index, kwargs)
        return args, kwargs

    def _after_encoder_layer(
        self, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        encoding = self.state.runs.pop() if self.state.runs else None
        if not isinstance(encoding, Encoding) or output is None or index >= self.facts.encoder_depth:
            return
        depth = self.facts.encoder_depth
        scoring = [pruner for pruner in self.pruners if index in pruner.encoder_layers(depth)]
        decide = functools.partial(self._decide_encoder, scoring) if scoring else None
        reads = any(pruner.reads_encoder for pruner in self.pruners)
        with torch.no_grad():
            encoding.after_layer(index, kwargs, decide, reads, self.adapter.encoder_scale)

    def _decide_encoder(self, scoring: list[Pruner], layer: EncoderLayer) -> Tensor | None:
        keep: Tensor | None = None
        for pruner in scoring:
            chosen = pruner.prune_encoder(layer)
            if chosen is not None:
                keep = chosen if keep is None else keep & chosen
        return keep

    def _before_projector(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.state.encoding is None or not args:
            return None
        return (self.state.encoding.projector_input(args[0]), *args[1:]), kwargs

    def _after_projector(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if self.state.encoding is None or output is None:
            return None
        return self.state.encoding.projector_output(output)

    # Multimodal forward

    def _open_frame(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        inputs = self._signature.bind(*args, **kwargs).arguments
        frame = Frame(inputs)
        self.state.frames.append(frame)
        given = inputs.get("mm_encoder_outputs") or {}
        if inputs.get("pixel_values_videos") is not None or given.get("video") is not None:
            raise VTPruneError("video inputs are not supported; pass images, or unwrap the model for videos")
        encoded = given.get("image")
        if encoded is not None:
            frame.images = [self._record(tensor) for tensor in encoded.pooler_output]

    def _record(self, tensor: Tensor) -> EncodedImage:
        image = getattr(tensor, RECORD, None)
        if image is None:
            raise VTPruneError(
                "these image features were not made by this wrapped model's get_image_features (or were cut by "
                "prefill_chunk_size, which is not supported); pass pixel_values instead"
            )
        return image

    def _close_frame(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self.state.frames:
            self.state.frames.pop()

    # Decoder

    def _open_decoder(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        self.state.decoder.append(None)
        frame = self.state.frames[-1] if self.state.frames else None
        if frame is None or kwargs.get("inputs_embeds") is None:
            return None
        if torch.compiler.is_compiling():
            raise VTPruneError("torch.compile cannot trace a wrapped model; compile the unwrapped one, or neither")
        embeds = kwargs["inputs_embeds"]
        cache = self._cache(module, kwargs)
        prompt = self._prompt(embeds, cache, kwargs)
        spans = self._spans(frame, embeds, prompt)
        layers = self._adopt(cache, spans)
        if layers is None and not spans:
            return None
        rotary = self.adapter.rotary if self.compact else None
        flash = "flash" in (self.adapter.language_model.config._attn_implementation or "")
        run = DecoderRun(prompt, spans, layers, cache=cache, flash=flash, rotary=rotary)
        self.state.decoder[-1] = run
        if layers is not None and (prompt.offset == 0 or spans):
            self.adapter.remember(layers, prompt)
        self._select(run, embeds)
        run.generation = self._generation(run)
        return args, {**kwargs, "past_key_values": cache, RUN: run}

    def _cache(self, module: Any, kwargs: dict[str, Any]) -> Cache | None:
        cache = kwargs.get("past_key_values")
        if module.training and getattr(module, "gradient_checkpointing", False):
            return None
        if cache is None:
            use_cache = kwargs.get("use_cache")
            use_cache = module.config.use_cache if use_cache is None else use_cache
            cache = self.adapter.new_cache() if use_cache else None
        return cache

    def _prompt(self, embeds: Tensor, cache: Cache | None, kwargs: dict[str, Any]) -> PromptInfo:
        mask = kwargs.get("attention_mask")
        if isinstance(mask, dict):
            mask = None
        positions = kwargs.get("position_ids")
        batch, length = embeds.shape[:2]
        return PromptInfo(batch, length, logical_length(cache), embeds.device, mask, positions)

    def _spans(self, frame: Frame, embeds: Tensor, prompt: PromptInfo) -> list[ImageSpan]:
        """Where each image of this forward stands: features fill placeholders in row-major order."""
        if not frame.images:
            return []
        marks = self.adapter.placeholders(frame.inputs.get("input_ids"), embeds)
        rows, places = marks.nonzero(as_tuple=True)
        spans, first = [], 0
        for image in frame.images:
            last = first + image.total
            if last > rows.numel() or int(rows[first]) != int(rows[last - 1]):
                raise VTPruneError(
                    f"the prompt has {rows.numel()} image placeholders, its images need "
                    f"{sum(one.total for one in frame.images)} in unbroken rows"
                )
            alive = image.alive.to(embeds.device)
            spans.append(ImageSpan(int(rows[first]), places[first:last], image, alive))
            first = last
        return spans

    def _adopt(self, cache: Cache | None, spans: list[ImageSpan]) -> list[PrunedLayer] | None:
        if cache is None:
            return None
        reason = unsupported_reason(cache)
        if reason is None:
            return adopt_cache(cache, self._depth)
        totals = [(span.image.total, pruner) for span in spans for pruner in self.pruners]
        if any(pruner.budget(total) < total for total, pruner in totals):
            raise UnsupportedCacheError(
                f"{reason} cannot hold layers of different lengths; pass a DynamicCache, or let generate() make "
                "one (cache_implementation=None)"
            )
        return None

    def _select(self, run: DecoderRun, embeds: Tensor) -> None:
        text = self._text(run, embeds) if run.spans else []
        for span in run.spans:
            run.mark(span)
            for pruner in self.pruners:
                budget = pruner.input_budget(span.image.total)
                if not pruner.selects or budget >= span.kept.numel():
                    continue
                places = span.places[span.kept]
                stream = VisionStream(
                    embeds[span.row, places], span.image.grid, span.kept, span.image.total, budget,
                    span.image.signals, span.image.pixels, text[span.row],
                )  # fmt: skip
                self._apply(run, span, pruner, pruner.select(stream), budget, 0)

    def _apply(
        self, run: DecoderRun, span: ImageSpan, pruner: Pruner, selection: Selection | None, budget: int, layer: int
    ) -> None:
        if selection is None:
            return
        selection.check(span.kept.numel())
        if selection.kept.numel() > budget:
            raise VTPruneError(f"{pruner.name} kept {selection.kept.numel()} tokens of a budget of {budget}")
        run.drop(span, selection, layer)

    def _text(self, run: DecoderRun, embeds: Tensor) -> list[Tensor]:
        """The embeddings of each row's text tokens, without padding and placeholders."""
        real = run.prompt.real().clone()
        for span in run.spans:
            real[span.row, span.places] = False
        return [row[keep] for row, keep in zip(embeds, real, strict=True)]

    def _generation(self, run: DecoderRun) -> Generation:
        """The record of this generation: the cache's own, unless this forward brings a prompt of its own."""
        cache, prompt = run.cache, run.prompt
        known = getattr(cache, GENERATION, None) if cache is not None else None
        if known is not None and prompt.offset > 0 and not run.spans:
            return known
        spans = list(run.spans)
        text = prompt.real().sum(dim=1)
        for span in run.spans:
            text[span.row] -= span.image.total
        if known is not None and prompt.offset > 0:
            spans = known.spans + spans
        generation = Generation(
            self.adapter.model.config, self.pruners, self.facts, self._depth, self._dtype, spans, text.tolist()
        )
        if cache is not None:
            setattr(cache, GENERATION, generation)
        return generation

    @property
    def _dtype(self) -> torch.dtype:
        return next(iter(self.adapter.language_model.parameters())).dtype

    def _before_decoder_layer(self, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        run = kwargs.pop(RUN, None)
        self.state.runs.append(run)
        if run is None:
            return None
        return run.layer_inputs(index, args, kwargs)

    def _after_decoder_layer(
        self, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        run = self.state.runs.pop() if self.state.runs else None
        if not isinstance(run, DecoderRun) or output is None or not run.spans or index <= run.decided:
            return
        run.decided = index
        scoring = [pruner for pruner in self.pruners if index in pruner.decoder_layers(self._depth)]
        spans = run.spans
        if any(p.decoder_budget(s.image.total, index) < s.kept.numel() for p in scoring for s in spans):
            with torch.no_grad():
                self._prune_decoder(run, index, scoring, kwargs["position_embeddings"])
        run.taps.clear()

    def _prune_decoder(
        self, run: DecoderRun, index: int, scoring: list[Pruner], embeddings: tuple[Tensor, Tensor]
    ) -> None:
        query, key, value = self.adapter.decoder_states(run.taps, embeddings)
        places = run.layout(index).places
        column = run.prompt.last_places()
        where = None if places is None else fill_index(places, run.prompt.length)
        for span in run.spans:
            row = span.row
            for pruner in scoring:
                budget = pruner.decoder_budget(span.image.total, index)
                if budget >= span.kept.numel():
                    continue
                vision, last = span.places[span.kept], column[row]
                if where is not None:
                    vision, last = where[row, vision], where[row, last]
                layer = DecoderLayer(
                    query[row], key[row], value[row], vision, int(last), self.adapter.decoder_scale,
                    span.image.total, span.kept, budget, index, self._depth,
                )  # fmt: skip
                self._apply(run, span, pruner, pruner.prune_decoder(layer), budget, index + 1)

    def _close_decoder(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        run = self.state.decoder.pop() if self.state.decoder else None
        if run is None or output is None:
            return None
        generation = run.generation
        if run.prompt.offset > 0 and not run.spans:
            generation.steps += 1
        generation.note_cache(run)
        self.last = generation
        states = run.restore(output[0], self._depth - 1)
        if states is output[0]:
            return None
        if isinstance(output, tuple):
            return (states, *output[1:])
        output.last_hidden_state = states
        return output
