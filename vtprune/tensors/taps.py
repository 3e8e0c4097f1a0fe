"""What the projections of a layer put out, as hooks noted it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from vtprune.errors import VTPruneError


def tapped(taps: Mapping[str, Tensor], name: str) -> Tensor:
    """The output of a projection, by its name among `taps`; raises VTPruneError where it was not noted."""
    if name not in taps:
        raise VTPruneError(
            "a layer ran without the hooks on its projections that a method reads it by: torch.compile takes the "
            "graph of a layer without hooks for one with them, unless "
            "torch._dynamo.config.skip_nnmodule_hook_guards is False when layers are compiled"
        )
    return taps[name]
