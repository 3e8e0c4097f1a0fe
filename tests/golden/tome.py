"""ToMe's cases: what merges with what, weighted by sizes, and the schedules."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.golden.case import Case, Mismatch, UnknownCase, expect_close, expect_equal
from vtprune.encoder.merging import flow_together
from vtprune.pruners.parts.bipartite import bipartite, weighted_mean
from vtprune.pruners.tome import schedule

# How r changes with depth in each recorded schedule.
INFLECT = {"constant": 0.0, "decreasing": -1.0, "increasing": 1.0, "half": -0.5}
GIVEN = "given"


def run(case: Case) -> None:
    """Raises Mismatch where a result differs, UnknownCase for another kind of case."""
    names = set(case.tensors)
    if {"metric", "x", "r", "class_token", "merged", "source"} <= names:
        return check_merging(case)
    if names and names <= {*INFLECT, GIVEN}:
        return check_schedules(case)
    raise UnknownCase(f"no ToMe case has tensors {', '.join(sorted(names))}")


def check_schedules(case: Case) -> None:
    """Tokens that merge in each layer; r is what the layers merge on average."""
    for name, rates in case.tensors.items():
        layers = len(rates)
        if name == GIVEN:
            found = [schedule(rates[: int(rates.nonzero().max()) + 1].tolist(), 0.0, layers)]
        else:
            # What is rounded down is less than one a layer.
            mean = float(rates.double().mean())
            found = [schedule(r, INFLECT[name], layers) for r in range(int(mean), int(mean) + 2)]
        if tuple(rates.tolist()) not in found:
            raise Mismatch(f"{name}: {list(found[-1])}, recorded {rates.tolist()}")


def check_merging(case: Case) -> None:
    """Groups, their sizes, and their vectors, with sizes of one before and with the recorded ones. metric: (B, N, C);
    x: (B, N, D); the outputs stand in the order of the code: sources that stay, then destinations."""
    cls, count = int(case["class_token"]), int(case["r"])
    metric = torch.nn.functional.normalize(case["metric"].float(), dim=-1)[:, cls:]
    images, tokens = metric.shape[:2]
    into = bipartite(metric, None, [count] * images, first=cls, method="tome")
    groups = torch.arange(tokens)[None, :, None] == into[:, None]
    groups = groups.where(groups.any(dim=-1, keepdim=True), torch.zeros_like(groups))
    for image in range(images):
        recorded = {tuple(row.nonzero().flatten().tolist()) for row in case["source"][image][:, cls:] if row.any()}
        found = {tuple(row.nonzero().flatten().tolist()) for row in groups[image] if row.any()}
        if found != recorded:
            raise Mismatch(f"image {image}: {len(found - recorded)} of {len(found)} groups differ")
    check_vectors(case, into, torch.ones(images, tokens, 1), names=("merged", "size"))
    if "merged_sized" in case:
        check_vectors(case, into, case["sizes_in"][:, cls:], names=("merged_sized", "size_sized"))


def check_vectors(case: Case, into: Tensor, sizes: Tensor, names: tuple[str, str]) -> None:
    """The vectors and sizes that the core makes of what flows `into` (B, N) where, in any order."""
    cls, own = int(case["class_token"]), sizes[..., 0].float()
    keep = into == torch.arange(into.shape[1])
    selection = weighted_mean(keep, into, own, None)
    for image in range(len(into)):
        vectors = flow_together(case["x"][image, cls:], selection.targets[image], selection.shares[image])
        total = torch.zeros_like(own[image]).scatter_add_(0, into[image], own[image])
        found = torch.cat([vectors, total[:, None]], dim=1)[keep[image]]
        recorded = torch.cat([case[names[0]][image], case[names[1]][image].float()], dim=1)
        # The CLS token, which never merges, comes first.
        recorded = recorded[cls:]
        nearest = torch.cdist(found.double(), recorded.double()).argmin(dim=1)
        expect_equal(f"{names[0]} of image {image}, their places", nearest.sort().values, torch.arange(len(recorded)))
        expect_close(f"{names[0]} of image {image}", found, recorded[nearest])
