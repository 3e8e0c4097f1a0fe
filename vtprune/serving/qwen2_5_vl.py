"""Qwen2.5-VL in vLLM, images alone, at the positions of the whole prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from vllm.model_executor.models import qwen2_5_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtprune.errors import VTPruneError
from vtprune.method.views import LayerSignals
from vtprune.serving.engine import Batch, Pruning, check_engine, in_order, span_of
from vtprune.serving.places import planned, replaced, without_places
from vtprune.serving.processing import PrunedProcessor
from vtprune.serving.settings import Settings
from vtprune.serving.tapping import Outlet, Tap


class Info(qwen2_5_vl.Qwen2_5_VLProcessingInfo):
    """vLLM's, for images alone."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Images: videos are refused by vLLM by name."""
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int] | None:
        """Those of a whole image, which the encoder makes."""
        return {"image": self.get_max_image_tokens()}


class Processor(PrunedProcessor, qwen2_5_vl.Qwen2_5_VLMultiModalProcessor):
    """vLLM's, with fewer placeholders."""

    def image_token(self) -> int:
        """The config's."""
        token: int = self.info.get_hf_config().image_token_id
        return token

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """As for all, and raises VTPruneError for a prompt that ends inside an image."""
        if inputs.prompt and inputs.prompt[-1] == self.image_token():
            raise VTPruneError("a prompt of Qwen2.5-VL ends behind an image with <|vision_end|> at the least")
        return super().apply(inputs, timing_ctx)

    def grid(self, images: Any, item: int) -> tuple[int, int, int]:
        """What the processor cut the image into."""
        size = self.info.get_hf_config().vision_config.spatial_merge_size
        return grid_of(images["image"][item]["image_grid_thw"].data, size)


def grid_of(patches: Tensor, size: int) -> tuple[int, int, int]:
    """(t, h, w) in vision tokens of one in patches."""
    frames, height, width = patches.tolist()
    return frames, height // size, width // size


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder)
class PrunedQwen25VL(Pruning, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    """vLLM's Qwen2.5-VL, whose images lose tokens behind the merger."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        settings = Settings.of(vllm_config.model_config.hf_config)
        if settings.positions != "original":
            raise VTPruneError("Qwen2.5-VL is served with positions='original' alone")
        check_engine(vllm_config, settings)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.prepare(vllm_config, settings)
        attention = self.visual.blocks[-1].attn
        self._tap = Tap(attention.attn, attention.num_attention_heads_per_partition)
        self._scale = attention.hidden_size_per_attention_head**-0.5
        # A block's own call, and the merger's, are vLLM's compiler's; the merger begins with a norm of each patch.
        self._outlet = Outlet(reader=self.visual.merger.ln_q)

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        """What goes on of each image. With several ranks each encodes all images: the attention of one that encodes
        some is nobody else's."""
        patches, pixels = kwargs["image_grid_thw"], kwargs["pixel_values"]
        size, group = self.visual.spatial_merge_size, self.visual.spatial_merge_unit
        metadata = self.visual.prepare_encoder_metadata(patches.tolist())
        counts = patches.prod(-1).tolist()
        # The tower has its groups of patches in the order of its windows.
        order = metadata["reverse_indices"]
        batch = Batch.of(kwargs, [grid_of(one, size) for one in patches])

        def signals() -> list[LayerSignals]:
            grouped = (rearrange(one[0], "h (n g) d -> h n g d", g=group) for one in self._tap.by_head(noted))
            states = (rearrange(one[:, order], "h n g d -> h (n g) d") for one in grouped)
            whole = zip(*(one.split(counts, dim=1) for one in states), strict=True)
            return [LayerSignals(q, k, v, scale=self._scale, prefix=0, group=group) for q, k, v in whole]

        def chosen(states: Tensor) -> Tensor:
            grouped = rearrange(states, "(n g) 1 d -> n g d", g=group)
            whole = rearrange(grouped[order], "n g d -> (n g) d").split(counts)
            left = rearrange(torch.cat(batch.choose(whole, signals)), "(n g) d -> n g d", g=group)
            windows = torch.empty_like(grouped)
            windows[order] = left
            return rearrange(windows, "n g d -> (n g) 1 d")

        with self._tap.listening() as noted, self._outlet.changed(chosen if batch.encoded else None):
            features = self.visual(pixels, grid_thw=patches.tolist(), encoder_metadata=metadata)
        return self.pruned(
            features.split([count // group for count in counts]),
            batch,
            # vLLM may leave it to the tower to make colours of bytes.
            pixels=self.visual.input_norm(pixels, self.visual.dtype).split(counts),
            signals=signals(),
        )

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Before anything is encoded."""
        size = self.config.vision_config.spatial_merge_size
        spans = [span_of(one, max(grid_of(one.data["image_grid_thw"].data, size))) for one in in_order(mm_features)]
        return planned(len(input_tokens), spans)

    def recompute_mrope_positions(
        self,
        input_ids: Any,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[list[Tensor], Tensor, int]:
        """For the images, or parts of them, that are read now: their vectors, all positions, and what those of new
        tokens are ahead of their index. The row of an image's frames has its first place already."""
        ids = torch.as_tensor(input_ids, device=mrope_positions.device)
        parts = [without_places(one) for one in multimodal_embeddings]
        found = mrope_positions
        if parts:
            images = ids == self.config.image_token_id
            places = [(row, column) for _, row, column in parts]
            found = replaced(images, places, mrope_positions, start=num_computed_tokens)
        return [vectors for vectors, _, _ in parts], found, int(found[0, -1]) + 1 - len(ids)
