"""What methods share by which an image leaves the decoder before one of its layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vtprune.errors import CannotCut, VTPruneError
from vtprune.method.answers import Selection
from vtprune.method.pruner import Counted, budget_of
from vtprune.method.stages import BetweenLayers, Query
from vtprune.method.views import DecoderLayer
from vtprune.pruners.parts.checks import check_count


@dataclass(frozen=True)
class Withdrawing(BetweenLayers):
    """A method that takes an image out before decoder layer `layer` (None: half of the depth), or before the one that
    `keep`, a mean over layers, asks for."""

    layer: int | None = None

    query = Query.NOBODY
    counted = Counted.MEAN_OF_LAYERS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer is None:
            return
        check_count(self.name, "layer", self.layer)
        if self.keep is not None:
            raise VTPruneError(
                f"{self.name}: layer={self.layer} decides how much is kept, so keep={self.keep} contradicts it"
            )

    @property
    def default_keep(self) -> float:
        """The share of the layers that see the image."""
        depth = self.model.decoder_depth
        return (depth // 2 if self.layer is None else self.layer) / depth

    def resolve(self) -> dict[str, Any]:
        """Nothing; raises VTPruneError for a layer that the decoder does not have, and a share below one layer's."""
        depth = self.model.decoder_depth
        if self.layer is not None and self.layer >= depth:
            raise VTPruneError(f"{self.name}: layer={self.layer}, but the decoder has {depth}; give 1 to {depth - 1}")
        if isinstance(self.keep, float) and self.model.first and self.keep * depth < 1:
            raise VTPruneError(
                f"{self.name}: the first of {depth} layers alone is {1 / depth:.3g} of the mean, and "
                f"keep={self.keep:.3g} is below it"
            )
        return {}

    def first_without(self, tokens: int, entered: int) -> int:
        """The layer before which an image of `tokens`, of which `entered` entered the decoder, is withdrawn; raises
        CannotCut where the first layer alone exceeds the budget."""
        depth = self.model.decoder_depth
        if self.keep is None:
            return round(self.default_keep * depth)
        found = min(depth, budget_of(self.keep, tokens) * depth // entered)
        if found < 1:
            raise CannotCut(f"{self.name}: one layer of {depth} with {entered} tokens is above a mean of {self.keep}")
        return found

    def drop_layers(self) -> tuple[int, ...]:
        """Those after which an image may be withdrawn: which one it is depends on it where a `keep` is given."""
        depth = self.model.decoder_depth
        return (round(self.default_keep * depth) - 1,) if self.keep is None else tuple(range(depth - 1))

    def drop_budget(self, tokens: int, layer: int, entered: int) -> int:
        """All of them, or none."""
        return 0 if layer + 1 >= self.first_without(tokens, entered) else entered

    def prune_decoder(self, layer: DecoderLayer) -> Selection:
        """None of them."""
        return Selection.nothing(layer.vision)
