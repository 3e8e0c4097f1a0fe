"""Random-LTD: the middle layers compute random vision tokens while a model is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtprune.errors import VTPruneError
from vtprune.method.answers import Routes
from vtprune.method.pruner import Counted
from vtprune.method.registry import register
from vtprune.method.stages import InLayers
from vtprune.method.views import RoutedTokens
from vtprune.pruners.parts.checks import check_choice, check_share
from vtprune.pruners.parts.skipping import check_even, even_budget, even_mean


@register(
    "random_ltd",
    paper="Random-LTD: Random and Layerwise Token Dropping Brings Efficient Training for Large-scale Transformers",
    arxiv="2211.11586",
    licence="Apache-2.0",
    needs="a model that is trained with it",
)
@dataclass(frozen=True)
class RandomLTD(InLayers):
    """random-LTD: random and layerwise token dropping (arXiv 2211.11586), the dull baseline of routed methods.

    While the model is trained, each decoder layer but the first and the last computes a random subset of each image's
    tokens, drawn uniformly without repeats for every image, layer and step; the others skip the layer and stay as they
    are, neither read there nor scaled. Otherwise every layer computes everything, bit for bit, unless `at_test`: then
    tokens are routed at random in use, too, the same ones whenever an image has as many tokens; another `seed` draws
    others.

    `skip` is the share that skips a routed layer (None: half); `keep` sets it so that the mean over decoder layers is
    met, which counts as that of other routed methods.

    Departures. Text is computed everywhere (the paper draws from all tokens of a row). The share is constant (the
    paper's grows over the steps until nothing is skipped). Tokens keep their positions. In training the draws come
    from torch's random state, which `vtprune train` seeds and goes on with; `seed` is of draws in use alone.
    Reference: microsoft/DeepSpeed.
    """

    skip: float | None = None
    at_test: bool = False
    seed: int = 0

    counted = Counted.MEAN_OF_LAYERS
    for_training = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.name, "skip", self.skip, self.keep)
        check_choice(self.name, "at_test", self.at_test, (False, True))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise VTPruneError(f"{self.name}: seed is an int of at least 0, got {self.seed!r}")

    @property
    def skipped_share(self) -> float:
        """The share that skips a routed layer where no `keep` is given."""
        return 0.5 if self.skip is None else self.skip

    @property
    def default_keep(self) -> float:
        """The mean over layers of which the routed ones skip a share."""
        return even_mean(self, self.skipped_share)

    def resolve(self) -> dict[str, Any]:
        """Nothing; raises VTPruneError for a decoder of fewer than three layers, and for a share that skipping in the
        routed layers cannot meet."""
        check_even(self)
        return {}

    def routed_layers(self) -> tuple[int, ...]:
        """All but the first and the last."""
        return tuple(range(1, self.model.decoder_depth - 1))

    def routed_budget(self, tokens: int, layer: int, entered: int) -> int:
        """The same in every routed layer; raises CannotCut where the first and the last layer, and one token in each
        other, exceed the budget."""
        return even_budget(self, self.skipped_share, tokens=tokens, entered=entered)

    def route(self, tokens: RoutedTokens) -> Routes:
        """All text, and random tokens of each image, in training or `at_test`; else everything."""
        if tokens.training:
            return tokens.best(torch.rand(tokens.text.shape, device=tokens.text.device))
        return tokens.best(self._draws(tokens)) if self.at_test else Routes()

    def _draws(self, tokens: RoutedTokens) -> Tensor:
        """(B, n) a number for each token, by its layer and its place among those of its image."""
        images = torch.arange(tokens.budgets.shape[1], device=tokens.image.device)[:, None]
        own = tokens.image[:, None] == images
        place = (own.cumsum(dim=2) * own).sum(dim=1)
        # The first numbers of a longer row are those of a shorter one.
        numbers = np.random.default_rng([self.seed, tokens.index]).random(place.shape[1] + 1, dtype=np.float32)
        return torch.from_numpy(numbers).to(place.device)[place]
