"""The part of vLLM that makes a request's inputs: how many placeholders an image gets, and what its cache goes by."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageEmbeddingItems
from vllm.multimodal.processing import PromptReplacement

from vtprune.errors import VTPruneError
from vtprune.method.config import from_dict
from vtprune.method.pruner import Pruner
from vtprune.serving.settings import KEY, Settings

# Beside `KEY`, the ids of the prompt's text, for methods that read it: then an image's cache is the question's, too.
TEXT = "vtprune_text"


class PrunedProcessor(ABC):
    """A mixin over vLLM's processor of a model. Nothing is kept between calls.

    The method, the positions and, for a method that reads it, the text become part of what vLLM hashes an image by, so
    that no cache mixes them. A subclass says which token stands for an image and what its grid is.
    """

    @abstractmethod
    def image_token(self) -> int:
        """The id that stands for an image in a prompt."""

    @abstractmethod
    def grid(self, images: Any, item: int) -> tuple[int, int, int]:
        """(t, h, w) of one of the images that vLLM's processor has made inputs of."""

    def apply(self: Any, inputs: Any, timing_ctx: Any) -> Any:
        """vLLM's own, with the method among what the images are processed by; raises VTPruneError for one that cannot
        be served, and for what no method prunes."""
        settings = Settings.of(self.info.get_hf_config())
        given = dict(inputs.hf_processor_mm_kwargs)
        given.pop(TEXT, None)
        pruner = settings.asked_for(given.get(KEY))
        given[KEY] = {**pruner.to_dict(), "positions": settings.positions}
        images = inputs.mm_data_items.get("image")
        if isinstance(images, ImageEmbeddingItems):
            raise VTPruneError("images that come as embeddings are not pruned; send them as pictures")
        if pruner.info.serves == "text":
            given[TEXT] = [token for token in inputs.prompt if token != self.image_token()]
        return super().apply(replace(inputs, hf_processor_mm_kwargs=given), timing_ctx)  # type: ignore[misc]

    def get_dummy_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        """vLLM's own, at the most that a request may keep."""
        found = super().get_dummy_inputs(*args, **kwargs)  # type: ignore[misc]
        largest = Settings.of(self.info.get_hf_config()).largest()
        return replace(found, hf_processor_mm_kwargs={**found.hf_processor_mm_kwargs, KEY: largest.to_dict()})

    def _apply_hf_processor_main(self: Any, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        found = super()._apply_hf_processor_main(mm_items, bare(hf_kwargs))  # type: ignore[misc]
        count = mm_items.get_all_counts().get("image", 0)
        if count:
            found[KEY] = coded(hf_kwargs[KEY]).repeat(count, 1)
            found[TEXT] = torch.tensor(hf_kwargs.get(TEXT, ()), dtype=torch.long).repeat(count, 1)
        return found

    def _get_mm_fields_config(self: Any, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        fields = dict(super()._get_mm_fields_config(hf_inputs, bare(hf_processor_mm_kwargs)))  # type: ignore[misc]
        own = {
            KEY: MultiModalFieldConfig.batched("image", keep_on_cpu=True),
            TEXT: MultiModalFieldConfig.batched("image"),
        }
        return fields | own

    def _get_prompt_updates(
        self: Any, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        settings, token = Settings.of(self.info.get_hf_config()), self.image_token()
        pruner = pruner_of(hf_processor_mm_kwargs[KEY])

        def placeholders(item: int) -> list[int]:
            return [token] * settings.count(pruner, self.grid(out_mm_kwargs, item))

        return [PromptReplacement("image", [token], placeholders)]


def bare(kwargs: Mapping[str, object]) -> dict[str, object]:
    """What transformers' processor is given: none of vtprune's."""
    return {name: value for name, value in kwargs.items() if name not in (KEY, TEXT)}


def pruner_of(told: Any) -> Pruner:
    """The method of what `apply` made of a request."""
    found = from_dict({name: value for name, value in told.items() if name != "positions"})
    assert isinstance(found, Pruner)
    return found


def coded(told: Any) -> Tensor:
    """(1, n) bytes of JSON: what travels beside pixels has to be a tensor."""
    return torch.tensor(list(json.dumps(told, sort_keys=True).encode()), dtype=torch.uint8)[None]


def decoded(given: Any) -> list[Pruner]:
    """The method of each image of a batch."""
    return [pruner_of(json.loads(bytes(one.tolist()))) for one in given]
