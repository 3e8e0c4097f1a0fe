"""D2O against a reference by hand, head by head; and what a cache goes through before and after it is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtprune
from tests.cache_reference import Reference, Rule
from tests.models import IMAGE, MODELS, ROWS, make, prompt
from tests.oracle import STEPS, TOLERANCE, next_tokens, run_wrapped

every_model = pytest.mark.parametrize("kind", MODELS)
RULES = {
    "default": Rule(),
    "count": Rule(keep=9),
    "one entry": Rule(keep=1),
    "plain eviction": Rule(keep=0.4, merge=False),
    "released": Rule(keep=0.3, released=True),
    "text": Rule(keep=0.4, text=True),
    "text, plain eviction": Rule(keep=0.5, text=True, merge=False),
}
BATCHES = {"alone": ([0], "left"), "ragged-left": ([0, 1, 2], "left"), "ragged-right": ([0, 1, 2], "right")}


def pruner(rule: Rule) -> vtprune.D2O:
    variant = "released" if rule.released else "paper"
    return vtprune.D2O(keep=rule.keep, merge=rule.merge, text=rule.text, variant=variant)


def own_logits(logits: torch.Tensor, inputs: dict[str, torch.Tensor], row: int) -> torch.Tensor:
    """The logits of one row without padding."""
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))[row].bool()
    return logits[row, torch.cat([mask, torch.ones(STEPS, dtype=torch.bool)])]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@every_model
def test_prefill_and_decoding_equal_the_reference_by_hand(kind: str, attention: str, rule: str, batch: str) -> None:
    rows, padding = BATCHES[batch]
    inputs = prompt(kind, [ROWS[kind][row] for row in rows], padding)
    model = vtprune.wrap(make(kind, attention), pruner(RULES[rule]))
    logits, prefill, cache = run_wrapped(kind, model, inputs)
    report = vtprune.report(cache)
    plain = make(kind, "eager")
    for row, which in enumerate(rows):
        own = prompt(kind, [ROWS[kind][which]])
        reference = Reference(kind, plain, RULES[rule])
        expected = reference.run(own, next_tokens(len(rows))[row : row + 1])
        text = torch.cat([own["input_ids"][0] != IMAGE, torch.ones(STEPS, dtype=torch.bool)])
        difference = (own_logits(logits, inputs, row) - expected)[text]
        assert float(difference.abs().max()) < TOLERANCE
        for layer, heads in enumerate(reference.sets[-1]):
            assert {len(places) for places in heads} == {report.kv_tokens_per_layer[layer][row]}
        assert held(report, row, own) == [
            [[place for place in head if place < own["input_ids"].shape[1] and own["input_ids"][0, place] == IMAGE]
             for head in heads] if layer in (2, 3) else [] for layer, heads in enumerate(reference.sets[-1])
        ]  # fmt: skip
    assert prefill.achieved_keep == 1.0


def held(report: vtprune.Report, row: int, own: dict[str, torch.Tensor]) -> list[list[list[int]]]:
    """The places of the image entries that each head of each layer holds, by the report."""
    places = (own["input_ids"][0] == IMAGE).nonzero().flatten()
    found: list[list[list[int]]] = []
    for layer in range(5):
        heads: list[list[int]] = []
        first = 0
        for image in report.samples[row].images:
            for head, tokens in enumerate(image.cached_per_head[layer]):
                if len(heads) <= head:
                    heads.append([])
                heads[head] += places[first : first + image.tokens][tokens].tolist()
            first += image.tokens
        found.append(heads)
    return found
