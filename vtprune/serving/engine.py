"""What an engine's model checks when it is made, and what the models of all families share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vtprune.errors import VTPruneError
from vtprune.method.views import LayerSignals
from vtprune.serving.choosing import Shown, choose
from vtprune.serving.places import with_places
from vtprune.serving.processing import TEXT, decoded
from vtprune.serving.release import check_release
from vtprune.serving.settings import KEY, Settings


def check_engine(config: Any, settings: Settings) -> None:
    """Raises VTPruneError, by name, for a way of running (vLLM's config) that would not prune rightly."""
    check_release()
    multimodal, compilation = config.model_config.multimodal_config, config.compilation_config
    ranks = config.parallel_config.tensor_parallel_size
    if ranks > 1 and multimodal.mm_encoder_tp_mode != "data":
        raise VTPruneError(
            f"the encoder's heads would be spread over {ranks} ranks, none of which sees all attention; add "
            "--mm-encoder-tp-mode data"
        )
    for name in ("compile_mm_encoder", "cudagraph_mm_encoder"):
        if getattr(compilation, name, False):
            raise VTPruneError(f"{name}: an encoder that is compiled shows nobody its attention; leave it out")
    if settings.positions == "original" and not multimodal.is_multimodal_pruning_enabled():
        raise VTPruneError(
            "positions='original' needs video_pruning_rate above 0, by which vLLM is told to ask for positions anew; "
            "start with vtprune serve, or with what vtprune.serving.engine_args answers"
        )
    if settings.positions == "original" and config.speculative_config is not None:
        raise VTPruneError("positions='original' and speculative decoding were never run together; leave one out")


class Pruning:
    """A mixin over a model of vLLM's: what happens between its projector and its decoder."""

    settings: Settings

    def chosen(
        self: Any,
        batch: Sequence[Tensor],
        told: dict[str, Any],
        grids: Sequence[tuple[int, int, int]],
        pixels: Sequence[Tensor],
        signals: Sequence[LayerSignals],
    ) -> list[Tensor]:
        """What goes on of each image of a batch: (K, D), or with their places where positions are original.

        batch: (N, D) features of each; told: what vLLM's processor was told of the images.
        """
        found = []
        texts = told[TEXT]
        for index, pruner in enumerate(decoded(told[KEY])):
            features, grid, ids = batch[index], grids[index], texts[index].to(batch[index].device)
            shown = Shown(
                features=features,
                grid=grid,
                count=pruner.count(grid),
                pixels=pixels[index],
                signals=signals[index],
                text=self.language_model.model.embed_tokens(ids) if len(ids) else features[:0],
                text_ids=ids,
                source=self.source,
            )
            vectors, kept = choose(pruner, shown)
            found.append(with_places(vectors, kept, grid[2]) if self.settings.positions == "original" else vectors)
        return found


def span_of(feature: Any, advance: int) -> tuple[int, int, int]:
    """Where an image's tokens start in a prompt, how many they are, and how far positions advance over it."""
    return feature.mm_position.offset, feature.mm_position.length, advance


def in_order(features: Sequence[Any]) -> list[Any]:
    """What a prompt shows, in its order."""
    return sorted(features, key=lambda one: one.mm_position.offset)
