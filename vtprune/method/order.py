"""Which pruners may follow which, and why not."""

from __future__ import annotations

import itertools

from vtprune.errors import VTPruneError
from vtprune.method.kinds import IMAGE
from vtprune.method.pruner import Pruner
from vtprune.method.stages import (
    BeforeDecoder,
    InEncoder,
    Read,
    acts,
    cut_caches,
    drop_layers,
    encoder_layers,
    evict_layers,
    planned_layers,
    probe_layer,
    reads,
    revives,
    routed_layers,
    spares,
)

PLACES = ("in the encoder", "before the decoder", "inside the decoder", "in the cache that the prompt left")


def check_order(pruners: list[Pruner]) -> None:
    """Raises VTPruneError, with the reason, for a list of pruners that tokens cannot pass through in this order."""
    for first, second in itertools.combinations(pruners, 2):
        _check_budgets(first, second)
        _check_encoder(first, second)
        _check_returning(first, second)
        _check_caches(first, second)
        _check_routes(first, second)
        if Read.WHOLE_GRID in reads(second) and _start(first) < 2 and acts(first):
            raise VTPruneError(
                f"{second.name} needs every token of the image's grid, and {first.name} leaves some of them out "
                "before it; use it alone, or with stages inside the decoder after it"
            )
    for first, second in itertools.pairwise([pruner for pruner in pruners if acts(pruner)]):
        if _start(second) < _start(first):
            raise VTPruneError(
                f"{second.name} acts {PLACES[_start(second)]}, {first.name} only "
                f"{PLACES[_start(first)]}: list pruners in the order in which tokens meet them"
            )


def _start(pruner: Pruner) -> int:
    if encoder_layers(pruner):
        return 0
    if evict_layers(pruner):
        return 3
    return 2 if (drop_layers(pruner) or planned_layers(pruner)) and not isinstance(pruner, BeforeDecoder) else 1


def _check_budgets(first: Pruner, second: Pruner) -> None:
    """A later stage keeps fewer tokens than an earlier one, where both are counts or both are fractions."""
    before, after = first.keep, second.keep
    if spares(first, IMAGE) and not spares(second, IMAGE):
        # Images come to the second one whole.
        return
    if before is None or after is None or type(before) is not type(after) or after < before:
        return
    raise VTPruneError(
        f"{second.name} is asked to keep {after!r} of the tokens that {first.name} cuts to {before!r}, which leaves "
        "it nothing to do; each stage keeps less than the one before it"
    )


def _check_encoder(first: Pruner, second: Pruner) -> None:
    layers = [set(encoder_layers(pruner)) for pruner in (first, second)]
    if not all(layers):
        return
    for one, other in ((first, second), (second, first)):
        if isinstance(one, InEncoder) and one.before_mlp:
            raise VTPruneError(
                f"{one.name} merges between attention and MLP of the encoder's layers, so no other method can act in "
                f"the same encoder; combine it with methods that act after the encoder, not with {other.name}"
            )
    shared = sorted(layers[0] & layers[1])
    if shared and any(isinstance(one, InEncoder) and one.merges for one in (first, second)):
        raise VTPruneError(
            f"{first.name} and {second.name} both act after encoder layer {shared[0]}, and one of them merges there: "
            "what would flow into what is not defined"
        )


def _check_returning(first: Pruner, second: Pruner) -> None:
    for one, other in ((first, second), (second, first)):
        if revives(one) and (revives(other) or drop_layers(other) or cut_caches(other) or evict_layers(other)):
            raise VTPruneError(
                f"{one.name} chooses anew at every step which tokens each decoder layer attends to, so {other.name} "
                "cannot drop tokens inside the decoder or from its cache beside it; combine it with methods that act "
                "in the encoder or before the decoder"
            )


def _check_routes(first: Pruner, second: Pruner) -> None:
    for one, other in ((first, second), (second, first)):
        acts_inside = (
            drop_layers(other)
            or cut_caches(other)
            or evict_layers(other)
            or routed_layers(other)
            or probe_layer(other) is not None
        )
        if planned_layers(one) and (acts_inside or planned_layers(other)):
            raise VTPruneError(
                f"{one.name} changes what decoder layers compute of vision, which {other.name} reads or routes beside "
                "it; combine it with methods that act in the encoder or before the decoder"
            )
        if routed_layers(one) and acts_inside:
            raise VTPruneError(
                f"{one.name} decides at each of its decoder layers what they compute, so {other.name} cannot choose "
                "tokens by the decoder's layers beside it; combine it with methods that act in the encoder or before "
                "the decoder"
            )


def _check_caches(first: Pruner, second: Pruner) -> None:
    if evict_layers(first) and evict_layers(second):
        raise VTPruneError(
            f"{first.name} and {second.name} both cut the cache that the prompt left; a list takes one such method, "
            "as its last"
        )
