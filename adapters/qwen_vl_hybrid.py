"""Qwen3.5 (and the later ones of its model type): Qwen3-VL's tower in front of a decoder with attention in few layers.

Most layers of the decoder are of linear attention: a gated delta rule folds every token into a state of constant size.
A token that was dropped before such a layer never enters its state, so that the tokens beside it close up there, while
in the layers with attention each keeps its own position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from vtprune.adapters.qwen_vl import Qwen3VLAdapter
from vtprune.adapters.seams import PIXELS
from vtprune.adapters.sizes import state_layers
from vtprune.errors import VTPruneError


class Qwen35Adapter(Qwen3VLAdapter):
    """`Qwen3_5ForConditionalGeneration`: no planes, a gate beside the queries of the layers with attention, and layers
    without."""

    name = "qwen3_5"
    models = ("Qwen3_5ForConditionalGeneration",)
    notes = "as qwen2_vl; a dropped token never enters the states of linear-attention layers; no method reads those"

    model_types = ("qwen3_5",)

    @property
    def state_layers(self) -> frozenset[int]:
        return state_layers(self.model.config.get_text_config())

    def projected_query(self, states: Tensor) -> Tensor:
        """The first half of each head; the second one is the gate of what its attention puts out."""
        heads = states.unflatten(-1, (-1, 2 * self.decoder_sizes.head_size))
        return heads[..., : self.decoder_sizes.head_size].flatten(-2)

    def overrides(self) -> list[tuple[Any, str, Callable[..., Any]]]:
        expand = _expanding(self.model._expand_inputs_for_generation)
        return [*super().overrides(), (self.model, "_expand_inputs_for_generation", expand)]

    @property
    def plane_mergers(self) -> tuple[nn.Module, ...]:
        return ()

    def change_planes(self, output: Any, change: Callable[[int, Sequence[Tensor]], Sequence[Tensor]]) -> None:
        return

    def take_planes(self, arguments: dict[str, Any]) -> tuple[list[Tensor], Tensor] | None:
        return None


class Qwen35MoeAdapter(Qwen35Adapter):
    """`Qwen3_5MoeForConditionalGeneration`: the same with a mixture of experts in each decoder layer."""

    name = "qwen3_5_moe"
    models = ("Qwen3_5MoeForConditionalGeneration",)
    notes = "as qwen3_5; a token that is dropped goes through no expert"

    model_types = ("qwen3_5_moe",)


def _expanding(original: Callable[..., Any]) -> Callable[..., Any]:
    """How `generate` repeats its inputs for beams and for several answers. Releases of transformers that have not
    encoded the images of this model by then repeat their patches one by one, which mixes them up."""

    def expand(expand_size: int = 1, **inputs: Any) -> Any:
        if expand_size > 1 and any(inputs.get(pixels) is not None for pixels in PIXELS.values()):
            raise VTPruneError(
                "this release of transformers would repeat each patch of an image for beams and for several answers, "
                "and the model would see other images; update transformers (5.24 is right), or ask for one answer "
                "without beams"
            )
        return original(expand_size=expand_size, **inputs)

    return expand
