"""`vtprune.flops` says of planned layers what reports of wrapped models say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import vtprune
from tests.models import DECODER_LAYERS, ROWS, make, prompt
from vtprune import PlannedTokens

KIND = "llava-clip"


def report_of(pruner: Any) -> vtprune.Report:
    with torch.no_grad(), vtprune.wrapped(make(KIND), pruner) as model:
        model(**prompt(KIND, ROWS[KIND][:1]))
        return vtprune.report(model)


def stated(report: vtprune.Report, planned: dict[int, PlannedTokens], **options: Any) -> int:
    """The decoder's FLOPs by hand, from the tokens that the report counts."""
    vision = [row[0] for row in report.tokens_per_layer]
    text = report.samples[0].text_tokens
    return vtprune.flops(make(KIND).config, vision, text_tokens=text, images=1, planned=planned, **options).decoder


def test_a_plan_of_heads_and_channels_is_what_yopo_costs(tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    path.write_text(json.dumps({"kv_heads": 2, "depth": DECODER_LAYERS, "kept": {"1": [1], "2": []}}))
    report = report_of(vtprune.YOPO(mlp=3, head_file=str(path), layer=3))
    planned = {0: PlannedTokens(mlp_width=16), 1: PlannedTokens(1, 16), 2: PlannedTokens(0, 16)}
    assert stated(report, planned) == report.flops_breakdown.decoder
    assert stated(report, {}) > report.flops_breakdown.decoder


def test_a_plan_of_windows_is_what_yopo_costs() -> None:
    report = report_of(vtprune.YOPO(mlp=1, window=3, layer=4))
    tokens = report.tokens_per_layer[0][0]
    before = int((prompt(KIND, ROWS[KIND][:1])["input_ids"][0] == 90).nonzero()[0])
    planned = {layer: PlannedTokens(seen=((tokens, before + 9),)) for layer in range(4)}
    assert stated(report, planned) == report.flops_breakdown.decoder


def test_keys_alone_are_what_the_released_yopo_costs() -> None:
    report = report_of(vtprune.YOPO(mlp=2, layer=3, variant="released"))
    tokens, planned = report.tokens_per_layer[0][0], {layer: PlannedTokens(mlp_width=24) for layer in range(3)}
    read = [0, 0, 0, tokens, tokens]
    assert stated(report, planned, read_tokens_per_layer=read, keys_alone=True) == report.flops_breakdown.decoder


def test_a_plan_of_heads_is_what_spatten_costs() -> None:
    report = report_of(vtprune.SpAtten(heads=0.5, keep=0.6))
    planned = {layer: PlannedTokens(heads=1) for layer in (2, 3, 4)}
    assert stated(report, planned) == report.flops_breakdown.decoder


def test_a_plan_that_leaves_everything_is_none() -> None:
    config = make(KIND).config
    whole = {layer: PlannedTokens() for layer in range(DECODER_LAYERS)}
    counts: dict[str, Any] = {"tokens_per_layer": 9, "text_tokens": 5, "images": 1}
    assert vtprune.flops(config, **counts, planned=whole) == vtprune.flops(config, **counts)


@pytest.mark.parametrize(
    ("planned", "message"),
    [
        ({9: PlannedTokens()}, "planned takes layers of 0 to 4 with attention that has no gate, got 9"),
        ({1: PlannedTokens(heads=3)}, r"planned\[1\].heads is at most 2 on this decoder, got 3"),
        ({1: PlannedTokens(mlp_width=49)}, r"planned\[1\].mlp_width is at most 48"),
        ({1: PlannedTokens(heads=-1)}, r"planned\[1\].heads takes counts"),
        ({1: PlannedTokens(seen=((4, 9),))}, r"planned\[1\].seen tells of 4 tokens, and the layer computes 9"),
        ({1: PlannedTokens(past=-1)}, r"planned\[1\].past takes counts"),
    ],
)
def test_plans_that_no_layer_can_have_are_refused(planned: dict[int, PlannedTokens], message: str) -> None:
    with pytest.raises(vtprune.VTPruneError, match=message):
        vtprune.flops(make(KIND).config, 9, text_tokens=5, images=1, planned=planned)


def test_other_formulas_and_decoders_have_no_plans() -> None:
    plan = {1: PlannedTokens(heads=1)}
    with pytest.raises(vtprune.VTPruneError, match="'2ndm' is a formula for layers that treat all tokens alike"):
        vtprune.flops(make(KIND).config, 9, text_tokens=5, images=1, planned=plan, convention="2ndm")
    narrow = {1: PlannedTokens(mlp_width=8)}
    with pytest.raises(vtprune.VTPruneError, match="mlp_width is of one MLP, and this decoder has experts"):
        vtprune.flops(make("qwen3-vl-moe").config, 9, text_tokens=5, images=[(1, 3, 3)], planned=narrow)
    with pytest.raises(vtprune.VTPruneError, match="attention that has no gate"):
        vtprune.flops(make("qwen3.5").config, 9, text_tokens=5, images=[(1, 3, 3)], planned=narrow)
