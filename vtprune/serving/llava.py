"""LLaVA-1.5 in vLLM: positions of the pruned prompt, or those of the whole one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import llava
from vllm.model_executor.models.interfaces import SupportsMRoPE, SupportsMultiModalPruning
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtprune.errors import VTPruneError
from vtprune.method.views import LayerSignals
from vtprune.serving.engine import Batch, Pruning, check_engine, in_order, span_of
from vtprune.serving.places import planned, replaced, without_places
from vtprune.serving.processing import PrunedProcessor
from vtprune.serving.settings import KEY, Settings
from vtprune.serving.tapping import Outlet, Tap

# The tower's prefix in a checkpoint, as transformers has written it over time, and what vLLM wants to follow it.
TOWERS = ("model.vision_tower.", "vision_tower.")
INSIDE = "vision_model."


def grid_of(config: Any) -> tuple[int, int, int]:
    """(1, h, w) of every image; raises VTPruneError for a tower or a choice of layers that is not LLaVA-1.5's."""
    kind = config.vision_config.model_type
    if kind not in ("clip_vision_model", "siglip_vision_model"):
        raise VTPruneError(f"LLaVA is served with a CLIP or SigLIP tower, and this one is a {kind}")
    wanted = "default" if kind.startswith("clip") else "full"
    if not isinstance(config.vision_feature_layer, int) or config.vision_feature_select_strategy != wanted:
        raise VTPruneError(
            f"LLaVA is served with one feature layer and vision_feature_select_strategy={wanted!r} ({kind})"
        )
    side = config.vision_config.image_size // config.vision_config.patch_size
    return 1, side, side


class Processor(PrunedProcessor, llava.LlavaMultiModalProcessor):
    """vLLM's, with fewer placeholders."""

    def image_token(self) -> int:
        """The config's."""
        token: int = self.info.get_hf_config().image_token_index
        return token

    def grid(self, images: Any, item: int) -> tuple[int, int, int]:
        """That of every image."""
        return grid_of(self.info.get_hf_config())


def registered(cls: Any) -> Any:
    """The class with its processor known to vLLM."""
    return MULTIMODAL_REGISTRY.register_processor(
        Processor, info=llava.LlavaProcessingInfo, dummy_inputs=llava.LlavaDummyInputsBuilder
    )(cls)


@registered
class PrunedLlava(Pruning, llava.LlavaForConditionalGeneration):
    """vLLM's LLaVA, whose images lose tokens behind the projector. Positions follow the pruned prompt."""

    positions = "compact"

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        told = vllm_config.model_config
        settings, grid = Settings.of(told.hf_config), grid_of(told.hf_config)
        check_engine(vllm_config, settings)
        if settings.positions != self.positions:
            raise VTPruneError(f"this architecture is for positions={self.positions!r}, not {settings.positions!r}")
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.prepare(vllm_config, settings)
        self._grid, layer = grid, self.vision_tower.vision_model.encoder.layers[-1]
        attention = layer.self_attn
        self._tap, self._scale = Tap(attention.attn, attention.num_heads_per_partition), attention.scale
        self._outlet = Outlet(layer)

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        """What goes on of each image."""
        batch = Batch.of(kwargs, [self._grid] * len(kwargs[KEY]))
        prefix = int(self.config.vision_config.model_type.startswith("clip"))

        def signals() -> list[LayerSignals]:
            states = zip(*self._tap.by_head(noted), strict=True)
            return [LayerSignals(q, k, v, scale=self._scale, prefix=prefix, group=1) for q, k, v in states]

        def chosen(states: Tensor) -> Tensor:
            return torch.stack(batch.choose(states.unbind(), signals))

        with self._tap.listening() as noted, self._outlet.changed(chosen if batch.encoded else None):
            features = super().embed_multimodal(**kwargs)
        return self.pruned(features, batch, pixels=kwargs["pixel_values"], signals=signals())

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """vLLM's, which wants a level of names in the tower that recent releases of transformers leave out."""
        loaded: set[str] = super().load_weights(_renamed(weights))
        return loaded


def _renamed(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, weight in weights:
        tower = next((prefix for prefix in TOWERS if name.startswith(prefix)), None)
        if tower is not None and not name.startswith(tower + INSIDE):
            name = tower + INSIDE + name.removeprefix(tower)
        yield name, weight


@registered
class PrunedLlavaOriginal(PrunedLlava, SupportsMRoPE, SupportsMultiModalPruning):
    """The same with the positions of the whole prompt.

    vLLM numbers a prompt's tokens from 0 on, unless a model turns by several rows of positions. So the decoder is told
    that it does (`arguments.py`): two equal rows turn as one does, and a first one, which turns nothing, has the place
    of the image's first token.
    """

    positions = "original"

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Before anything is encoded."""
        total = self._grid[1] * self._grid[2]
        return planned(len(input_tokens), [span_of(one, total) for one in in_order(mm_features)])

    def recompute_mrope_positions(
        self, input_ids: Any, multimodal_embeddings: Any, mrope_positions: Tensor, num_computed_tokens: int
    ) -> tuple[list[Tensor], Tensor, int]:
        """For the images, or parts of them, that are read now: their vectors, all positions, and what those of new
        tokens are ahead of their index."""
        _, height, width = self._grid
        ids = torch.as_tensor(input_ids, device=mrope_positions.device)
        parts = [without_places(one) for one in multimodal_embeddings]
        found = mrope_positions
        if parts:
            places = [(row * width + column,) * 2 for _, row, column in parts]
            images = ids == self.config.image_token_index
            found = replaced(images, places, mrope_positions, start=num_computed_tokens)
        # The first row of a prompt that ends in an image has the image's first place last.
        ends_in_image = int(ids[-1]) == self.config.image_token_index
        end = int(found[0, -1]) + (height * width if ends_in_image else 1)
        return [vectors for vectors, _, _ in parts], found, end - len(ids)
