"""What an engine prunes with, and what a request may ask for instead: plain values that travel in a model's config."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from vtprune.errors import VTPruneError
from vtprune.method.config import from_dict
from vtprune.method.pruner import Pruner, asked, budget_of, checked_grid, checked_keep
from vtprune.method.stages import Read, Trained, reads

POSITIONS = ("original", "compact")
# By this name a config holds the settings, and a request's `mm_processor_kwargs` a method of its own.
KEY = "vtprune"
# What a server can hand to a method beside the features, the pixels and the text.
GIVEN = frozenset({Read.ENCODER, Read.ENCODER_FLOWS, Read.WHOLE_GRID, Read.GRID, Read.PIXELS})


@dataclass(frozen=True)
class Settings:
    """pruner: the method for requests that say nothing; positions: "original" or "compact", as `vtprune.wrap` has
    them; most: the largest share (float) or number (int) of an image's tokens that a request may keep, None for what
    the method itself keeps, with which the engine's memory is measured; weights: the folder with those of a method
    that is trained, "" for none. Raises VTPruneError for what cannot be served."""

    pruner: Pruner
    positions: str = "original"
    most: int | float | None = None
    weights: str = ""

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            raise VTPruneError(f"positions is 'original' or 'compact', got {self.positions!r}")
        object.__setattr__(self, "most", checked_keep(self.most, "most"))
        self.check(self.pruner)

    @property
    def limit(self) -> int | float:
        """`most`, or what the method is asked to keep."""
        own = asked(self.pruner) if self.most is None else self.most
        return 1.0 if own is None else own

    def check(self, pruner: Pruner) -> None:
        """Raises VTPruneError, by name, for a method that cannot be served with these settings."""
        name = pruner.name
        if pruner.info.unserved:
            raise VTPruneError(f"{name} cannot be served: it {pruner.info.unserved} (vtprune list says what can)")
        pruner.count((1, 1))
        if isinstance(pruner, Trained):
            self._check_trained(pruner)
        if reads(pruner) - GIVEN:
            raise VTPruneError(
                f"{name} cannot be served with these options: it needs a second model beside the server's"
            )
        if pruner.keep_video is not None:
            raise VTPruneError(f"{name}: keep_video is of videos, which are not pruned by a server; leave it out")
        if getattr(pruner, "renumbers", False) and self.positions != "compact":
            raise VTPruneError(f"{name}: variant='released' numbers positions anew; start with positions='compact'")
        pruner.resolve()

    def _check_trained(self, pruner: Pruner) -> None:
        """Raises VTPruneError for a method without the weights that it was trained to."""
        if not self.weights:
            raise VTPruneError(
                f"{pruner.name} cannot be served without trained weights: start with the folder that vtprune train or "
                "vtprune.save wrote"
            )
        if dataclasses.replace(pruner, keep=self.pruner.keep) != self.pruner:
            raise VTPruneError(
                f"{pruner.name}: the server's weights are of {self.pruner.to_dict()}; a request may change keep alone"
            )

    def asked_for(self, given: object) -> Pruner:
        """The method that a request asks for, {"method": name, **options}, or the engine's own where `given` is None;
        raises VTPruneError for one that cannot be served."""
        if given is None:
            return self.pruner
        if not isinstance(given, dict) or not isinstance(given.get("method"), str):
            raise VTPruneError(f'a request says {{"{KEY}": {{"method": "divprune", "keep": 64}}}}, got {given!r:.200}')
        found = from_dict(given)
        assert isinstance(found, Pruner)
        self.check(found)
        return found

    def count(self, pruner: Pruner, grid: tuple[int, ...]) -> int:
        """How many tokens of an image of this grid a method keeps; raises VTPruneError where these are more than a
        request may keep."""
        kept, most = pruner.count(grid), budget_of(self.limit, math.prod(checked_grid(grid)))
        if kept > most:
            raise VTPruneError(
                f"{pruner.name} keeps {kept} tokens of an image of {math.prod(grid)}, and the server was started for "
                f"at most {most}: ask for a smaller keep, or start it with a larger most"
            )
        return kept

    def largest(self) -> Pruner:
        """The method that an engine's memory is measured with: its own at the most that a request may keep."""
        if self.limit == 1.0 or self.most is None:
            return self.pruner if self.most is None else from_checked("none")
        return dataclasses.replace(self.pruner, keep=self.most)

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        told = {"pruner": self.pruner.to_dict(), "positions": self.positions, "most": self.most}
        return {**told, "weights": self.weights} if self.weights else told

    @classmethod
    def of(cls, config: Any) -> Settings:
        """Those in a model's config; raises VTPruneError where there are none."""
        found = getattr(config, KEY, None)
        if not isinstance(found, dict) or "pruner" not in found:
            raise VTPruneError(
                "this engine runs a class of vtprune's without vtprune's settings: start it with vtprune serve, or "
                "with what vtprune.serving.engine_args answers"
            )
        pruner = from_dict(found["pruner"])
        assert isinstance(pruner, Pruner)
        return cls(pruner, found.get("positions", POSITIONS[0]), found.get("most"), found.get("weights", ""))


def from_checked(name: str) -> Pruner:
    """A method by name, with its defaults."""
    found = from_dict({"method": name})
    assert isinstance(found, Pruner)
    return found
