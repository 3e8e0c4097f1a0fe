"""Hooks of a vision encoder in front of a decoder: its features come back at the full length, with their records."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.adapters.base import Adapter
from vtprune.adapters.seams import Source
from vtprune.encoder.encoding import EncodedImage, Encoding, arranged, joined
from vtprune.hooks.encoder import EncoderHooks
from vtprune.hooks.records import note_records
from vtprune.hooks.state import FRAME, ThreadState
from vtprune.hooks.taps import Taps
from vtprune.method.facts import ModelFacts
from vtprune.method.plan import Plans


class FeatureHooks(EncoderHooks):
    """The encoder's side of a wrapped model."""

    def __init__(
        self,
        adapter: Adapter,
        plans: Plans,
        facts: ModelFacts,
        *,
        state: ThreadState,
        taps: Taps,
        modules: Mapping[int, nn.Module],
    ) -> None:
        super().__init__(adapter, plans, facts, state=state, taps=taps, modules=modules)
        self.model = adapter

    def features(self, source: Source, original: Callable[..., Any]) -> Callable[..., Any]:
        """What stands for `original`, the method that encodes what `source` is: within it the tower's layers cut and
        merge, and each image's record goes along with its features."""
        signature = inspect.signature(original)

        @functools.wraps(original)
        def encode(*args: Any, **kwargs: Any) -> Any:
            kwargs.pop(FRAME, None)
            if self.state.encoding is not None:
                # Some models encode a video by the method for images: the records are those of the outer call.
                return original(*args, **kwargs)
            arguments = signature.bind(*args, **kwargs).arguments
            arguments = {**arguments, **arguments.pop("kwargs", {})}
            self.taps.refresh()
            encoding = self.model.start_encoding(source, arguments)
            encoding.proportional = self.sized
            frame = self.state.frame
            if frame is not None and frame.closed:
                # Of a forward that failed and is remembered by its traceback alone.
                frame = None
            if frame is not None:
                encoding.checks = frame.checks
            asked = kwargs.get("return_dict")
            as_tuple = not (self.model.returns_dicts if asked is None else asked)
            with self.under_way(encoding):
                output = original(*args, **{**kwargs, "return_dict": True} if as_tuple else kwargs)
            if frame is None:
                encoding.checks.settle()
            units = encoding.images(self.model.pixels(source, arguments, encoding), self.token)
            images = [joined(own, source.kind) for own in encoding.of_units(units)]
            if encoding.arrangements:
                images = [arranged(image, one) for image, one in zip(images, encoding.arrangements, strict=True)]
            if encoding.origins is not None and encoding.planes:
                self.model.change_planes(output, functools.partial(_combined, encoding, units))
            # Features may be expanded for beams or handed in later; their records travel with the tensors.
            note_records(output, images)
            if frame is not None:
                frame.encoded[source.kind] = images
            return output.to_tuple() if as_tuple else output

        return encode

    def before_projector(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Gives the projector the tokens that the encoder left."""
        if self.state.encoding is None or not args:
            return None
        return (self.state.encoding.projector_input(args[0]), *args[1:]), kwargs

    def after_plane(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """The same for what the decoder adds between its layers, made of what a layer of the tower put out."""
        if self.state.encoding is None or output is None:
            return None
        self.state.encoding.note_plane()
        return self.state.encoding.projector_output(output)

    def after_projector(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Brings what it put out to the full length."""
        if self.state.encoding is None or output is None:
            return None
        return self.state.encoding.projector_output(output)


def _combined(encoding: Encoding, units: Sequence[EncodedImage], plane: int, values: Sequence[Tensor]) -> list[Tensor]:
    """The values (n, D) of one plane, for each image or video, with those of tokens added up that flowed together in
    the tower."""
    pieces = torch.cat(list(values)).split(encoding.totals)
    found = [
        encoding.planes[plane].combined(row, own, unit)
        for row, (own, unit) in enumerate(zip(pieces, units, strict=True))
    ]
    return [torch.cat(list(own)) for own in encoding.of_units(found)]
