"""What an engine's model checks when it is made, and what the models of all families share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vtprune.errors import VTPruneError
from vtprune.hooks.weights import read_module
from vtprune.method.facts import ModelFacts
from vtprune.method.pruner import Pruner
from vtprune.method.stages import InEncoder, Trained
from vtprune.method.views import LayerSignals
from vtprune.serving.choosing import Shown, choose, choose_encoded
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


@dataclass
class Batch:
    """The images that an encoder is given at once: the method of each, its grid (t, h, w), the ids of its prompt's
    text (empty where the method does not read it), and, once the encoder's last layer has run, the tokens (K,) of
    those whose method chooses there."""

    pruners: list[Pruner]
    grids: Sequence[tuple[int, int, int]]
    texts: Sequence[Tensor]
    chosen: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, told: dict[str, Any], grids: Sequence[tuple[int, int, int]]) -> Batch:
        """Of what vLLM's processor was told of the images."""
        return cls(decoded(told[KEY]), grids, told[TEXT])

    @property
    def encoded(self) -> list[int]:
        """The images whose method chooses among what the encoder puts out."""
        return [index for index, pruner in enumerate(self.pruners) if isinstance(pruner, InEncoder)]

    def choose(self, states: Sequence[Tensor], signals: Callable[[], Sequence[LayerSignals]]) -> list[Tensor]:
        """The states (P + N * group, D) of each image, with what flowed together, once these have chosen."""
        found, shown = list(states), signals()
        for index in self.encoded:
            pruner, grid = self.pruners[index], self.grids[index]
            found[index], self.chosen[index] = choose_encoded(
                pruner, states[index], grid=grid, count=pruner.count(grid), signals=shown[index]
            )
        return found


class Pruning:
    """A mixin over a model of vLLM's: what happens between its encoder and its decoder."""

    settings: Settings

    def prepare(self: Any, config: Any, settings: Settings) -> None:
        """Takes the settings, and the weights of a trained method, for a model that has been made; raises VTPruneError
        for weights of another one."""
        self.settings, self.source = settings, str(config.model_config.model)
        # In a list: vLLM asks a checkpoint for the weights of every module that it finds.
        self.trained: list[nn.Module] = []
        if not settings.weights:
            return
        like = self.language_model.model.embed_tokens.weight
        facts = ModelFacts(has_cls=False, encoder_depth=2, decoder_depth=2, group=1, decoder_width=like.shape[1])
        pruner = settings.pruner.bind(facts)
        assert isinstance(pruner, Trained)
        module = pruner.make_module()
        read_module(module, Path(settings.weights), config.model_config.hf_config.model_type)
        self.trained.append(module.to(like).eval().requires_grad_(False))

    def pruned(
        self: Any, features: Sequence[Tensor], batch: Batch, pixels: Sequence[Tensor], signals: Sequence[LayerSignals]
    ) -> list[Tensor]:
        """What goes on of each image of a batch, of its features (N, D): (K, D), or with their places where positions
        are original. Raises RuntimeError where the encoder ran without asking."""
        found = []
        if batch.chosen.keys() != set(batch.encoded):
            raise RuntimeError("vLLM's encoder passed over the hook at its end, where methods choose")
        for index, pruner in enumerate(batch.pruners):
            own, grid, ids = features[index], batch.grids[index], batch.texts[index].to(features[index].device)
            shown = Shown(
                features=own,
                grid=grid,
                count=pruner.count(grid),
                pixels=pixels[index],
                signals=signals[index],
                text=self.language_model.model.embed_tokens(ids) if len(ids) else own[:0],
                text_ids=ids,
                source=self.source,
                module=next(iter(self.trained), None),
                chosen=batch.chosen.get(index),
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
