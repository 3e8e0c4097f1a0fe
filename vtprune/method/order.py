"""Which pruners may follow which, and why not."""

from __future__ import annotations

import itertools

from vtprune.errors import VTPruneError
from vtprune.method.facts import ModelFacts
from vtprune.method.pruner import Pruner

PLACES = ("in the encoder", "before the decoder", "inside the decoder", "in the cache that the prompt left")


def check_order(pruners: list[Pruner], facts: ModelFacts) -> None:
    """Raises VTPruneError, with the reason, for a list of pruners that tokens cannot pass through in this order."""
    for first, second in itertools.combinations(pruners, 2):
        _check_budgets(first, second)
        _check_encoder(first, second, facts)
        _check_returning(first, second, facts)
        _check_caches(first, second, facts)
        _check_routes(first, second, facts)
        if second.needs_whole_grid and _start(first, facts) < 2 and first.name != "none":
            raise VTPruneError(
                f"{second.name} needs every token of the image's grid, and {first.name} leaves some of them out "
                "before it; use it alone, or with stages inside the decoder after it"
            )
    for first, second in itertools.pairwise([pruner for pruner in pruners if pruner.name != "none"]):
        if _start(second, facts) < _start(first, facts):
            raise VTPruneError(
                f"{second.name} acts {PLACES[_start(second, facts)]}, {first.name} only "
                f"{PLACES[_start(first, facts)]}: list pruners in the order in which tokens meet them"
            )


def _start(pruner: Pruner, facts: ModelFacts) -> int:
    if pruner.encoder_layers(facts.encoder_depth):
        return 0
    if pruner.evict_layers(facts.decoder_depth):
        return 3
    return 2 if pruner.decoder_layers(facts.decoder_depth) and not pruner.selects else 1


def _check_budgets(first: Pruner, second: Pruner) -> None:
    """A later stage keeps fewer tokens than an earlier one, where both are counts or both are fractions."""
    before, after = first.keep, second.keep
    if before is None or after is None or type(before) is not type(after) or after < before:
        return
    raise VTPruneError(
        f"{second.name} is asked to keep {after!r} of the tokens that {first.name} cuts to {before!r}, which leaves "
        "it nothing to do; each stage keeps less than the one before it"
    )


def _check_encoder(first: Pruner, second: Pruner, facts: ModelFacts) -> None:
    layers = [set(pruner.encoder_layers(facts.encoder_depth)) for pruner in (first, second)]
    if not all(layers):
        return
    for one, other in ((first, second), (second, first)):
        if one.acts_before_mlp:
            raise VTPruneError(
                f"{one.name} merges between attention and MLP of the encoder's layers, so no other method can act in "
                f"the same encoder; combine it with methods that act after the encoder, not with {other.name}"
            )
    shared = sorted(layers[0] & layers[1])
    if shared and (first.merges_in_encoder or second.merges_in_encoder):
        raise VTPruneError(
            f"{first.name} and {second.name} both act after encoder layer {shared[0]}, and one of them merges there: "
            "what would flow into what is not defined"
        )


def _check_returning(first: Pruner, second: Pruner, facts: ModelFacts) -> None:
    for one, other in ((first, second), (second, first)):
        depth = facts.decoder_depth
        if one.revives and (
            other.revives or other.decoder_layers(depth) or other.cache_layers(depth) or other.evict_layers(depth)
        ):
            raise VTPruneError(
                f"{one.name} chooses anew at every step which tokens each decoder layer attends to, so {other.name} "
                "cannot drop tokens inside the decoder or from its cache beside it; combine it with methods that act "
                "in the encoder or before the decoder"
            )


def _check_routes(first: Pruner, second: Pruner, facts: ModelFacts) -> None:
    depth = facts.decoder_depth
    for one, other in ((first, second), (second, first)):
        acts_inside = (
            other.decoder_layers(depth)
            or other.cache_layers(depth)
            or other.evict_layers(depth)
            or other.routed_layers(depth)
            or other.probe_layer(depth) is not None
        )
        if one.routed_layers(depth) and acts_inside:
            raise VTPruneError(
                f"{one.name} decides at each of its decoder layers what they compute, so {other.name} cannot choose "
                "tokens by the decoder's layers beside it; combine it with methods that act in the encoder or before "
                "the decoder"
            )


def _check_caches(first: Pruner, second: Pruner, facts: ModelFacts) -> None:
    if first.evict_layers(facts.decoder_depth) and second.evict_layers(facts.decoder_depth):
        raise VTPruneError(
            f"{first.name} and {second.name} both cut the cache that the prompt left; a list takes one such method, "
            "as its last"
        )
