"""One budget for several: the pieces of an image, or the images of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vtprune.errors import VTPruneError
from vtprune.method.answers import Selection
from vtprune.method.asking import Asking, asking
from vtprune.method.pruner import Pruner, budget_of, checked_keep
from vtprune.method.stages import InCache, InEncoder, InLayers, acts

BY = ("size", "importance")
# What a message says where the second one cannot be.
BY_SIZE = "give share='size'"


@dataclass(frozen=True)
class Sharing:
    """What all images and videos of one prompt keep together.

    keep: a count of their vision tokens, or a fraction of them; by: "size", each in proportion to its tokens; or
    "importance": where tokens drop, those with the highest scores stay whichever image they belong to, as many as by
    size in all. Each keeps at least one token.
    """

    keep: int | float
    by: str = "size"

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", checked_keep(self.keep, "keep_prompt"))
        if self.by not in BY:
            raise VTPruneError(f"share is one of {', '.join(map(repr, BY))}, got {self.by!r}")

    def counts(self, totals: Sequence[int]) -> list[int]:
        """What each of the images of a prompt may keep, by their tokens."""
        return shares_by_size(totals, max(len(totals), budget_of(self.keep, sum(totals))))

    def check(self, pruners: Sequence[Pruner]) -> None:
        """Raises VTPruneError for methods that cannot share."""
        if len(pruners) != 1:
            raise VTPruneError("keep_prompt is the budget of one method; wrap the model with one alone")
        (pruner,) = pruners
        if pruner.keep is not None or pruner.keep_video is not None:
            raise VTPruneError(f"{pruner.name}: keep and keep_prompt contradict each other; give one of them")
        reason = None
        if isinstance(pruner, InEncoder):
            reason = "prunes inside the vision encoder, where it is not known which images make a prompt"
        elif isinstance(pruner, InLayers):
            reason = "routes its layers by one keep"
        elif isinstance(pruner, InCache):
            reason = "cuts each image's entries of a cache by themselves"
        elif not acts(pruner):
            reason = "prunes nothing"
        if reason is not None:
            raise VTPruneError(f"{pruner.name} {reason}; give keep, a budget an image")
        try:
            self.base(pruner)
        except VTPruneError as error:
            raise VTPruneError(
                f"{pruner.name}: keep_prompt says how many tokens stay, as a keep does, and the other options do not "
                f"go with one ({error})"
            ) from error

    def base(self, pruner: Pruner) -> Pruner:
        """The method with a count to keep, which says where it acts; each prompt's images have counts of their own."""
        return replace(pruner, keep=1)


def shares_by_size(totals: Sequence[int], budget: int) -> list[int]:
    """A budget shared over pieces by their sizes, the largest remainders first (ties: the first), at least 1 each
    where there is one for each, and none with more than it has."""
    whole = sum(totals)
    if budget >= whole:
        return list(totals)
    exact = [budget * total / whole for total in totals]
    found = [max(int(budget >= len(totals)), int(share)) for share in exact]
    # Those that are owed most come first: budget < whole, so that a share rounded up is at most its total.
    owed = sorted(range(len(totals)), key=lambda piece: (found[piece] - exact[piece], piece))
    for piece in owed[: max(0, budget - sum(found))]:
        found[piece] += 1
    while sum(found) > budget:
        # What was raised to 1 is taken from the largest.
        found[max(range(len(found)), key=found.__getitem__)] -= 1
    return found


@asking
def by_importance(name: str, selections: Sequence[Selection | None], budget: int) -> Asking[list[Selection]]:
    """The choices of one prompt's images, made together: the `budget` tokens with the highest scores of them all, the
    best of each image among them; ties go to the first image. Raises VTPruneError, in the name of the method, for a
    choice that is not one by scores."""
    if any(selection is not None and selection.learns for selection in selections):
        raise VTPruneError(f"{name} is being trained, where images do not share a budget by importance; {BY_SIZE}")
    rankings = [None if selection is None else selection.ranking for selection in selections]
    if any(ranking is None for ranking in rankings):
        raise VTPruneError(
            f"{name} does not choose by one score a token, by which images could share a budget; {BY_SIZE}"
        )
    scores = [ranking for ranking in rankings if ranking is not None]
    pooled = torch.cat([_with_best(ranking) for ranking in scores])
    owner = torch.repeat_interleave(torch.tensor([one.numel() for one in scores]))
    order = torch.sort(pooled, descending=True, stable=True).indices[:budget]
    known = yield owner.to(pooled.device)[order]
    counts = np.bincount(known, minlength=len(scores)).tolist()
    return [Selection.best(ranking, count) for ranking, count in zip(scores, counts, strict=True)]


def _with_best(scores: Tensor) -> Tensor:
    """The scores (N,) in fp32, with the highest one above all others."""
    scores = scores.float()
    return scores.scatter(0, scores.argmax()[None], float("inf"))
