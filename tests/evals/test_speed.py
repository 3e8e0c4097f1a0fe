"""The speed measurement of decoder-stage methods at a tiny size: that it compares like with like, not how fast."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import vtprune
from tests.evals.test_overhead import TINY
from tests.flop_helper import measured_flops
from tests.models import PAST
from vtprune.errors import VTPruneError
from vtprune.evals.speed import overhead, speed
from vtprune.evals.speed.overhead import (
    Pairs,
    Size,
    build_inputs,
    build_model,
)
from vtprune.evals.speed.replay import record
from vtprune.evals.speed.research import ResearchModel, rank
from vtprune.method.pruner import Pruner
from vtprune.method.stages import Query

CPU = torch.device("cpu")
METHODS = [vtprune.FastV(keep=0.6), vtprune.FastV(keep=0.7, schedule="linear"), vtprune.PyramidDrop(keep=0.6)]
every_method = pytest.mark.parametrize("pruner", METHODS, ids=lambda pruner: f"{pruner.name}-{pruner.schedule}")


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model(TINY, CPU, torch.float32)


@torch.inference_mode()
def _logits(model: Any, inputs: dict[str, torch.Tensor], tokens: list[int]) -> torch.Tensor:
    """The last prompt token's and those of the given tokens after it: (1 + T, V)."""
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    found, cache = [out.logits[0]], out.past_key_values
    for token in tokens:
        found.append(model(input_ids=torch.tensor([[token]]), **{PAST: cache}).logits[0])
    return torch.cat(found)


@every_method
@pytest.mark.parametrize("images", [1, 3])
def test_all_ways_to_run_a_method_keep_the_same_tokens(model: Any, pruner: Pruner, images: int) -> None:
    inputs, tokens = build_inputs(TINY, CPU, torch.float32, images), [5, 6, 7]
    recorded = record(model, inputs, pruner)
    with vtprune.wrapped(model, pruner):
        expected, report = _logits(model, inputs, tokens), vtprune.report(model)
    with vtprune.wrapped(model, recorded.replay):
        assert torch.equal(_logits(model, inputs, tokens), expected)
        replayed = vtprune.report(model)
    kept = [[image.kept_per_layer for image in one.samples[0].images] for one in (report, replayed)]
    assert kept[0] == kept[1]
    assert replayed.flops_breakdown.scoring == 0 < report.flops_breakdown.scoring
    assert recorded.promised < recorded.promised_unscored
    plain = ResearchModel(model, recorded.plan, ahead=pruner.query is Query.NEXT_LAYER)
    with torch.inference_mode():
        found = [plain.prefill(**inputs)[0], *(plain.step(torch.tensor([[token]]))[0] for token in tokens)]
    assert float((torch.cat(found) - expected).abs().max()) < 2e-5


@every_method
def test_the_research_way_ranks_the_same_tokens_first(
    model: Any, pruner: Pruner, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = build_inputs(TINY, CPU, torch.float32)
    recorded = record(model, inputs, pruner)
    ranked: list[tuple[torch.Tensor, torch.Tensor]] = []
    monkeypatch.setattr("vtprune.evals.speed.research.rank", lambda attention, kept: ranked.append((attention, kept)))
    with torch.inference_mode():
        ResearchModel(model, recorded.plan, ahead=pruner.query is Query.NEXT_LAYER).prefill(**inputs)
    assert len(ranked) == len(recorded.plan) > 0
    text = TINY.text_tokens
    for attention, kept in ranked:
        first, count = 4, len(attention) - text
        chosen = rank(attention[first : first + count], torch.empty(len(kept) - text))
        assert (chosen + first).tolist() == kept[first : first + len(kept) - text].tolist()


def test_nothing_of_the_research_way_stays_on_the_model(model: Any) -> None:
    inputs = build_inputs(TINY, CPU, torch.float32)
    before, own = _logits(model, inputs, [5]), model.model.language_model.layers[0].self_attn.config
    recorded = record(model, inputs, METHODS[0])
    with torch.inference_mode():
        ResearchModel(model, recorded.plan, ahead=False).prefill(**inputs)
    assert torch.equal(_logits(model, inputs, [5]), before)
    assert all(layer.self_attn.config is own for layer in model.model.language_model.layers)
    assert own._attn_implementation == "sdpa"


@pytest.mark.parametrize("pruner", [vtprune.Grid(keep=0.5), vtprune.MustDrop(keep=0.5), vtprune.FastV(keep=1.0)])
def test_methods_that_act_elsewhere_are_refused(model: Any, pruner: Pruner) -> None:
    with pytest.raises(VTPruneError, match=f"{pruner.name}: .* between decoder layers, and only there"):
        record(model, build_inputs(TINY, CPU, torch.float32), pruner)


def test_flops_of_a_decode_step_are_torchs(model: Any) -> None:
    inputs = build_inputs(TINY, CPU, torch.float32)
    eager = build_model(TINY, CPU, torch.float32)
    eager.set_attn_implementation("eager")
    with torch.inference_mode():
        cache = eager(**inputs).past_key_values
    entries = [cache.layers[0].keys.shape[2] + 1] * TINY.layers
    measured = measured_flops(eager, {"input_ids": torch.tensor([[5]]), PAST: cache})
    assert speed.decode_flops(model.config, entries) == pytest.approx(measured, rel=0.01)
    report = record(model, inputs, METHODS[0]).report
    assert 1 < speed.promised_decode(model, report, 8) < 2


def test_the_promise_of_a_tower_is_that_of_each_row(model: Any) -> None:
    found = []
    for batch in (1, 3):
        with torch.inference_mode(), vtprune.wrapped(model, "turbo", keep=0.5):
            model(**build_inputs(TINY, CPU, torch.float32, batch=batch))
            found.append(speed.promised_tower(model, vtprune.report(model)))
    assert found[0] > 1
    assert found[1] == pytest.approx(found[0])


def test_speedups_are_of_each_round_by_itself() -> None:
    pairs = Pairs(plain=[2.0, 4.0, 8.0], wrapped=[1.0, 4.0, 2.0])
    assert speed.speedups(pairs) == (1.5, 2.0, 3.0)
    timings = [
        speed.Timing("a", pairs, pairs, 4.0, 1.0),
        speed.Timing("a" + speed.RESEARCH, Pairs([1.0] * 3, [3.0] * 3), pairs),
    ]
    assert timings[0].to_dict()["prefill"]["delivered"] == 0.5
    assert speed.against_research(timings)["a"].ratios == [1 / 3, 4 / 3, 2 / 3]


def test_command_prints_a_table_and_writes_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(overhead.SIZES, Size.small, TINY)
    app = speed.typer.Typer()
    app.command()(speed.main)
    output = tmp_path / "speed.json"
    arguments = ["--size", "small", "--tokens", "64,128", "--keep", "60%", "--steps", "2", "--budget", "0"]
    arguments += ["--methods", "fastv,pyramid_drop,turbo"]
    result = CliRunner().invoke(app, [*arguments, "--output", str(output)])
    assert result.exit_code == 0, result.output
    for words in ("64 vision tokens", "128 vision tokens", "the wrapper adds", "fastv prefills", "by FLOPs"):
        assert words in result.output
    written = json.loads(output.read_text())
    assert [method["method"] for method in written["methods"]] == ["fastv", "pyramid_drop", "turbo"]
    assert [one["vision_tokens"] for one in written["measured"]] == [64, 128]
    for one in written["measured"]:
        names = [run["name"] for run in one["runs"]]
        ways = ["", speed.GIVEN, speed.RESEARCH]
        known = [method + way for method in ("fastv", "pyramid_drop") for way in ways]
        assert names == [speed.WHOLE, *known, "turbo", "turbo" + speed.TOWER]
        *whole, tower = one["runs"]
        assert all(len(run[phase]["ratios"]) == speed.FEWEST for run in whole for phase in ("prefill", "decode"))
        assert "decode" not in tower
        assert tower["prefill"]["promised"] > 1
        assert all(run["peak_bytes"]["plain"] > run["peak_bytes"]["wrapped"] > 0 for run in (whole[1], whole[-1]))
        assert set(one["against_research"]) == {"fastv", "pyramid_drop"}


@pytest.mark.parametrize("tokens", ["100", "", "64,65", "none"])
def test_tokens_that_make_no_whole_images_are_refused(tokens: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(overhead.SIZES, Size.small, TINY)
    app = speed.typer.Typer()
    app.command()(speed.main)
    result = CliRunner().invoke(app, ["--size", "small", "--tokens", tokens])
    assert result.exit_code == 2
    assert "64" in result.output
