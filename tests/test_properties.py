"""Properties that hold for every pruner on every model."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import vtprune
from tests.matrix import CACHE, DROPS, GATED, PRUNERS, RELEASED, Drops, at_depth, label
from tests.models import MODELS, PAST, ROWS, TEXT, make, prompt
from tests.oracle import TOLERANCE, next_tokens, run_wrapped
from vtprune.method.pruner import Pruner
from vtprune.method.stages import BeforeDecoder, Trained, drop_layers, encoder_layers, evict_layers, routed_layers
from vtprune.method.views import (
    CachedRow,
    DecoderLayer,
    EncoderLayer,
    RoutedTokens,
    VisionStream,
)
from vtprune.report.report import SampleReport

# Every method and every model meet in tests/test_support.py.
pytestmark = pytest.mark.lean

ALL = DROPS[-1:] + PRUNERS + CACHE
every_model = pytest.mark.parametrize("kind", MODELS)
every_pruner = pytest.mark.parametrize("pruner", ALL, ids=label)


def _kept(report: vtprune.Report) -> list[list[list[int]]]:
    return [image.kept_per_layer for sample in report.samples for image in sample.images]


def _decided(sample: SampleReport) -> list[Any]:
    return [
        (image.kept_per_layer, image.cached_per_head, [(one.into, one.members, one.layer) for one in image.merged])
        for image in sample.images
    ]


def _whole(pruner: Pruner) -> Pruner:
    """The same method, asked to keep everything."""
    options = {"theta": 1.0} if isinstance(pruner, vtprune.MuE) else {"keep": 1.0}
    return dataclasses.replace(pruner, **options)


@every_model
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pruner", [_whole(one) for one in PRUNERS + CACHE], ids=label)
def test_keeping_everything_is_the_unpruned_model_bit_for_bit(kind: str, attention: str, pruner: Pruner) -> None:
    inputs = prompt(kind, ROWS[kind])
    model = make(kind, attention)
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True)
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with vtprune.wrapped(model, pruner), torch.no_grad():
        actual = model(**inputs, output_hidden_states=True)
        assert torch.equal(actual.logits, expected.logits)
        assert all(map(torch.equal, actual.hidden_states, expected.hidden_states))
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), tokens)
        report = vtprune.report(model)
    assert report.achieved_keep == 1.0
    assert report.flops == report.flops_full


@every_model
@every_pruner
def test_a_ragged_batch_equals_each_row_alone(kind: str, pruner: Pruner) -> None:
    model = vtprune.wrap(make(kind), pruner)
    inputs = prompt(kind, ROWS[kind])
    logits, report, _ = run_wrapped(kind, model, inputs)
    steps = next_tokens(len(ROWS[kind]))
    flops = 0
    for index, row in enumerate(ROWS[kind]):
        own = prompt(kind, [row])
        length = own["input_ids"].shape[1]
        out, alone = _teacher_forced(model, own, steps[index : index + 1])
        assert _decided(alone.samples[0]) == _decided(report.samples[index])
        flops += alone.flops
        ours = torch.cat([logits[index, : -steps.shape[1]][-length:], logits[index, -steps.shape[1] :]])
        text = torch.cat([own["input_ids"][0] < 90, torch.ones(steps.shape[1], dtype=torch.bool)])
        assert float((out[0] - ours)[text].abs().max()) < TOLERANCE
    assert report.flops == flops


def _teacher_forced(
    model: Any, inputs: dict[str, torch.Tensor], steps: torch.Tensor
) -> tuple[torch.Tensor, vtprune.Report]:
    with torch.no_grad():
        out = model(**inputs)
        report = vtprune.report(model)
        logits, cache = [out.logits], out.past_key_values
        for step in range(steps.shape[1]):
            logits.append(model(input_ids=steps[:, step : step + 1], **{PAST: cache}).logits)
    return torch.cat(logits, dim=1), report


@every_model
@every_pruner
def test_sdpa_and_eager_keep_the_same_tokens_and_agree(kind: str, pruner: Pruner) -> None:
    inputs = prompt(kind, ROWS[kind])
    sdpa, first, _ = run_wrapped(kind, vtprune.wrap(make(kind, "sdpa"), pruner), inputs)
    eager, second, _ = run_wrapped(kind, vtprune.wrap(make(kind, "eager"), pruner), inputs)
    assert _kept(first) == _kept(second)
    real = inputs["attention_mask"].bool() & (inputs["input_ids"] < 90)
    assert float((sdpa - eager)[:, : real.shape[1]][real].abs().max()) < TOLERANCE


@every_model
@every_pruner
def test_two_runs_are_the_same(kind: str, pruner: Pruner) -> None:
    inputs = prompt(kind, ROWS[kind])
    model = vtprune.wrap(make(kind), pruner)
    with torch.no_grad():
        first = model(**inputs).logits
        kept = _kept(vtprune.report(model))
        assert torch.equal(first, model(**inputs).logits)
    assert _kept(vtprune.report(model)) == kept


def _traces(model: Any) -> dict[str, Any]:
    """Every hook, instance attribute and config value of a model and its modules."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_forward_hooks_with_kwargs",
             "_forward_pre_hooks_with_kwargs")  # fmt: skip
    found: dict[str, Any] = {"config": model.config.to_dict(), "class": type(model)}
    for name, module in model.named_modules():
        found[name] = sorted(module.__dict__), [list(getattr(module, kind)) for kind in hooks]
    return found


@pytest.mark.lean(by="stages")
@every_model
@every_pruner
def test_unwrap_leaves_nothing_behind(kind: str, pruner: Pruner) -> None:
    inputs = prompt(kind, ROWS[kind])
    model = make(kind)
    with torch.no_grad():
        expected = model(**inputs).logits
        before = _traces(model)
        vtprune.wrap(model, pruner)
        model(**inputs)
        model.generate(**inputs, max_new_tokens=2)
        assert vtprune.unwrap(model) is model
        assert _traces(model) == before
        assert torch.equal(model(**inputs).logits, expected)


@every_model
def test_wrapped_unwraps_when_its_block_raises(kind: str) -> None:
    model = make(kind)
    before = _traces(model)
    with pytest.raises(RuntimeError, match="stop"), vtprune.wrapped(model, "random", keep=3):
        raise RuntimeError("stop")
    assert _traces(model) == before


@every_model
def test_models_with_different_pruners_do_not_disturb_each_other(kind: str) -> None:
    inputs = prompt(kind, ROWS[kind])
    plain, first, second = make(kind), make(kind), make(kind)
    with torch.no_grad():
        expected = plain(**inputs).logits
        vtprune.wrap(first, "random", keep=5)
        alone = first(**inputs).logits
        vtprune.wrap(second, "flowcut", keep=7)
        assert torch.equal(plain(**inputs).logits, expected)
        second(**inputs)
        assert torch.equal(first(**inputs).logits, alone)
    assert {len(kept[0]) for kept in _kept(vtprune.report(first))} == {5}


@pytest.mark.lean(by="stages")
@every_model
@every_pruner
def test_a_prompt_without_images_is_left_alone(kind: str, pruner: Pruner) -> None:
    inputs = {"input_ids": prompt(kind, [TEXT])["input_ids"]}
    model = make(kind)
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    vtprune.wrap(model, pruner)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), expected)
    assert vtprune.report(model).samples[0].images == []


@every_model
@every_pruner
def test_a_saved_config_prunes_the_same(kind: str, pruner: Pruner, tmp_path: Path) -> None:
    inputs = prompt(kind, ROWS[kind])
    model = make(kind)
    vtprune.save_config(pruner, tmp_path)
    with vtprune.wrapped(model, pruner):
        vtprune.save_config(model, tmp_path / "of the model")
        if isinstance(pruner, Trained):
            vtprune.save(model, tmp_path / "whole")
    assert vtprune.load_config(tmp_path / "of the model") == vtprune.load_config(tmp_path) == pruner
    folder = tmp_path
    if isinstance(pruner, Trained):
        # A folder without the weights is refused; one that `save` wrote has both.
        with pytest.raises(vtprune.VTPruneError, match="no vtprune_weights"):
            vtprune.wrap(model, str(tmp_path))
        folder = tmp_path / "whole"
        assert vtprune.load_config(folder) == pruner
    found = []
    for given in (pruner, str(folder), folder, [pruner], vtprune.load_config(folder)):
        with vtprune.wrapped(model, given), torch.no_grad():
            model(**inputs)
            found.append(_kept(vtprune.report(model)))
    assert all(kept == found[0] for kept in found)


@every_model
def test_stages_compose_each_within_its_own_budget(kind: str) -> None:
    inputs = prompt(kind, ROWS[kind])
    stages = [vtprune.FlowCut(keep=11, stages=1), vtprune.Random(keep=8), Drops(layers=(0, 1, 2))]
    model = vtprune.wrap(make(kind), stages)
    logits, report, _ = run_wrapped(kind, model, inputs)
    for kept in _kept(report):
        assert len(kept[0]) <= 8
        assert set(kept[-1]) < set(kept[0])
    assert report.asked_keep == [11, 8, Drops().default_keep]
    assert report.method == "flowcut+random+test_drops"
    assert logits.isfinite().all()


def test_an_order_that_tokens_cannot_meet_is_refused() -> None:
    with pytest.raises(vtprune.VTPruneError, match="flowcut acts in the encoder, random only before the decoder"):
        vtprune.wrap(make("llava-clip"), [vtprune.Random(keep=8), vtprune.FlowCut(keep=4)])


@every_model
@pytest.mark.parametrize("keep", [1, 4, 0.3, 10_000])
@pytest.mark.parametrize(
    "name",
    [
        "random",
        "grid",
        "pool",
        "fopru",
        "flowcut",
        "holov",
        "divprune",
        "cdpruner",
        "visionzip",
        "mustdrop",
        "gemfilter",
    ],
)
def test_what_was_kept_is_at_most_what_was_asked(kind: str, name: str, keep: int | float) -> None:
    model = vtprune.wrap(make(kind), name, keep=keep)
    with torch.no_grad():
        model(**prompt(kind, ROWS[kind]))
    for sample in vtprune.report(model).samples:
        for image in sample.images:
            asked = min(keep, image.tokens) if isinstance(keep, int) else max(1, round(keep * image.tokens))
            final = image.kept_per_layer[-1]
            assert 1 <= len(final) <= asked
            assert final == sorted(set(final))
            assert set(final) <= set(image.kept)
            if keep == 10_000:
                assert image.kept == list(range(image.tokens))


WATCHED = [*ALL, *GATED, *RELEASED, vtprune.CoViPAL(keep=9, width=16, stage="guide")]
FIRST_OF_EACH = [next(one for one in WATCHED if type(one) is method) for method in dict.fromkeys(map(type, WATCHED))]
SEEN = (torch.Tensor, VisionStream, EncoderLayer, DecoderLayer, RoutedTokens, CachedRow)


def _watch(pruner: Pruner, monkeypatch: pytest.MonkeyPatch) -> dict[str, set[bool]]:
    """By each method of a pruner's that is shown tensors: whether autocast was on when it was called."""
    seen: dict[str, set[bool]] = {}
    stages = [stage for stage in type(pruner).__mro__ if stage.__module__ == BeforeDecoder.__module__]
    for name in {name for stage in stages for name, base in vars(stage).items() if inspect.isfunction(base)}:
        if name.startswith("_"):
            continue
        original = getattr(type(pruner), name)

        def watched(self: Pruner, *args: Any, name: str = name, original: Any = original) -> Any:
            if any(isinstance(one, SEEN) for one in args):
                seen.setdefault(name, set()).add(torch.is_autocast_enabled("cpu"))
            return original(self, *args)

        monkeypatch.setattr(type(pruner), name, watched)
    return seen


def _watched_run(kind: str, pruner: Pruner, dtype: torch.dtype, autocast: bool, monkeypatch: Any) -> None:
    seen = _watch(pruner, monkeypatch)
    inputs = prompt(kind, ROWS[kind])
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    model = vtprune.wrap(make(kind).to(dtype), pruner)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= 90, -100)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
        model.train()(**inputs, labels=labels)
        assert torch.is_autocast_enabled("cpu") == autocast
    assert all(calls == {False} for calls in seen.values()), seen
    bound = at_depth(pruner, 5)
    named = {"evict": evict_layers(bound), "route": routed_layers(bound), "select": isinstance(pruner, BeforeDecoder)}
    named |= {"prune_decoder": drop_layers(bound), "prune_encoder": encoder_layers(bound)}
    assert {name for name, acts in named.items() if acts} <= set(seen) | {"select"}


@pytest.mark.parametrize("pruner", FIRST_OF_EACH, ids=label)
def test_scores_are_fp32_products_also_under_autocast(pruner: Pruner, monkeypatch: Any) -> None:
    _watched_run("llava-clip", pruner, torch.float32, True, monkeypatch)


@pytest.mark.slow
@every_model
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False)],
)
@pytest.mark.parametrize("pruner", WATCHED, ids=label)
def test_no_method_sees_autocast_in_any_dtype(
    kind: str, pruner: Pruner, dtype: torch.dtype, autocast: bool, monkeypatch: Any
) -> None:
    _watched_run(kind, pruner, dtype, autocast, monkeypatch)
