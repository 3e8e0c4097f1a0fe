"""`generate` at rising levels: each row is answered as its level alone answers, and everything that ran is counted."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import vtprune
from tests.growing import GREEDY, LEVELS, Given, alone, assert_as_alone, between
from tests.models import CROPPED, LONG, PAST, ROWS, VIDEOS, Row, make, prompt
from vtprune.errors import PromiseWarning
from vtprune.hooks.base_sample import sample_base
from vtprune.method.growth import Origin


@pytest.mark.parametrize("method", ["grid", "visionzip", "flowcut", "fastv", "gemfilter"])
@pytest.mark.parametrize("kind", ["llava-clip", "qwen2.5-vl", "qwen3-vl"])
def test_each_row_is_answered_as_its_level_alone_answers(kind: str, method: str) -> None:
    inputs = prompt(kind, ROWS[kind])
    known = alone(kind, inputs, method)
    shared = method not in ("visionzip", "flowcut")
    model = vtprune.wrap(make(kind), Given(method=method, threshold=between(kind, inputs, method)))
    answers, report = model.generate(**inputs, **GREEDY), vtprune.report(model)
    assert len({sample.attempts[-1] for sample in report.samples}) > 1, "no row was refused, or all were"
    assert_as_alone(answers, report, known, shared=shared)
    assert report.flops == report.flops_breakdown.total == sum(sample.flops for sample in report.samples)
    assert report.kv_bytes_prefill == report.history[0].kv_bytes
    assert report.kv_bytes == report.history[-1].kv_bytes
    assert "rows answered: " in str(report)


@pytest.mark.parametrize(
    ("kind", "rows"),
    [("llava-next", CROPPED), ("llava-onevision", CROPPED), ("qwen2.5-vl", VIDEOS), ("qwen3.5", ROWS["qwen3.5"])],
)
def test_crops_videos_and_states_grow_as_well(kind: str, rows: list[Row]) -> None:
    inputs = prompt(kind, rows)
    known = alone(kind, inputs, "grid")
    model = vtprune.wrap(make(kind), Given(threshold=between(kind, inputs, "grid")))
    answers, report = model.generate(**inputs, **GREEDY), vtprune.report(model)
    assert len({sample.attempts[-1] for sample in report.samples}) > 1
    assert_as_alone(answers, report, known, shared=True)


def test_rows_that_lose_nothing_are_answered_at_once() -> None:
    # Of the first row nothing is cut to 1,000 tokens, and the second one shows nothing.
    rows = [ROWS["qwen2.5-vl"][0], Row([9], [], seed=4), ROWS["qwen2.5-vl"][1]]
    inputs = prompt("qwen2.5-vl", rows)
    plain = make("qwen2.5-vl").generate(**inputs, **GREEDY)
    model = vtprune.wrap(make("qwen2.5-vl"), Given(threshold=2.0))
    assert torch.equal(model.generate(**inputs, **GREEDY), plain)
    attempts = [sample.attempts for sample in vtprune.report(model).samples]
    assert attempts == [list(LEVELS), [LEVELS[0]], list(LEVELS)]
    model = vtprune.wrap(make("qwen2.5-vl"), Given(threshold=2.0, levels=(1000, 1.0)))
    assert torch.equal(model.generate(**inputs, **GREEDY), plain)
    assert [sample.attempts for sample in vtprune.report(model).samples] == [[1000]] * 3
    # The layer before the first drop alone is a fifth, and no count is that close above it: images are kept whole.
    model = vtprune.wrap(make("qwen2.5-vl"), Given(method="pyramid_drop", threshold=2.0, levels=(0.21, 0.23, 1.0)))
    with pytest.warns(vtprune.KeptWholeWarning):
        assert torch.equal(model.generate(**inputs, **GREEDY), plain)
    assert [sample.attempts for sample in vtprune.report(model).samples] == [[0.21], [0.21], [0.21]]
    # No row of six tokens fits into five, which the method finds out as it looks at the image.
    inputs = prompt("llava-clip", [LONG])
    plain, rows = make("llava-clip").generate(**inputs, **GREEDY), vtprune.FoPru(strategy="row", keep=5)
    model = vtprune.wrap(make("llava-clip"), Given(method=rows, threshold=2.0, levels=(5, 12, 1.0), fixed=5))
    assert torch.equal(model.generate(**inputs, **GREEDY), plain)
    assert [sample.attempts for sample in vtprune.report(model).samples] == [[5]]


def test_threads_on_one_model_do_not_mix() -> None:
    inputs = prompt("llava-clip", ROWS["llava-clip"])
    model = vtprune.wrap(make("llava-clip"), Given(threshold=between("llava-clip", inputs, "grid")))
    wanted = model.generate(**inputs, **GREEDY)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: model.generate(**inputs, **GREEDY), range(6)))
    assert all(torch.equal(one, wanted) for one in found)


def encodings(model: Any) -> list[int]:
    """Counts, from now on, how often the tower runs."""
    found: list[int] = []
    model.model.vision_tower.register_forward_hook(lambda *args: found.append(1))
    return found


@pytest.mark.parametrize(("method", "times"), [("grid", 1), ("fopru", 1), ("visionzip", 3)])
def test_the_tower_runs_once_where_its_work_is_the_same_at_each_level(method: str, times: int) -> None:
    model = make("llava-clip")
    ran = encodings(model)
    vtprune.wrap(model, Given(method=method, threshold=2.0))
    model.generate(**prompt("llava-clip", ROWS["llava-clip"]), **GREEDY)
    assert len(ran) == times


def test_a_threshold_that_all_pass_answers_at_the_first_level_and_one_that_none_passes_as_the_model_does() -> None:
    inputs = prompt("llava-clip", ROWS["llava-clip"])
    plain = make("llava-clip").generate(**inputs, **GREEDY)
    for threshold, level in ((0.0, LEVELS[0]), (2.0, 1.0)):
        model = vtprune.wrap(make("llava-clip"), Given(threshold=threshold))
        found = model.generate(**inputs, **GREEDY)
        assert {sample.attempts[-1] for sample in vtprune.report(model).samples} == {level}
        if level == 1.0:
            assert torch.equal(found, plain)


def test_a_forward_of_its_own_and_a_callers_processor_run_at_the_fixed_level() -> None:
    inputs = prompt("llava-clip", ROWS["llava-clip"])
    with vtprune.wrapped(make("llava-clip"), "grid", keep=LEVELS[1]) as model:
        wanted, tokens = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    model = vtprune.wrap(make("llava-clip"), Given(threshold=2.0))
    assert torch.equal(model(**inputs).logits, wanted)
    assert vtprune.report(model).samples[0].attempts == []

    class Same(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores

    with pytest.warns(PromiseWarning, match="logits_processor"):
        found = model.generate(**inputs, **GREEDY, logits_processor=LogitsProcessorList([Same()]))
    assert torch.equal(found, tokens)


def test_text_alone_and_a_later_turn_go_through() -> None:
    kind = "llava-clip"
    inputs = prompt(kind, [ROWS[kind][0]])
    model = vtprune.wrap(make(kind), Given(threshold=2.0))
    plain = make(kind)
    text = {"input_ids": torch.tensor([[1, 5, 6, 7]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    assert torch.equal(model.generate(**text, **GREEDY), plain.generate(**text, **GREEDY))
    caches = [DynamicCache(), DynamicCache()]
    outputs = []
    for one, cache in zip((model, plain), caches, strict=True):
        first = one.generate(**inputs, **GREEDY, **{PAST: cache})
        more = torch.cat([first, torch.tensor([[5, 6, 7]])], dim=1)
        outputs.append(one.generate(input_ids=more, attention_mask=torch.ones_like(more), **GREEDY, **{PAST: cache}))
    assert torch.equal(*outputs)
    assert caches[0].get_seq_length() == caches[1].get_seq_length()


def test_what_a_caller_holds_is_of_one_level_for_the_batch() -> None:
    inputs = prompt("llava-clip", ROWS["llava-clip"])
    threshold = between("llava-clip", inputs, "grid")
    model = vtprune.wrap(make("llava-clip"), Given(threshold=threshold))
    found = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
    levels = {sample.attempts[-1] for sample in vtprune.report(model).samples}
    assert len(levels) == 1
    with vtprune.wrapped(make("llava-clip"), "grid", keep=levels.pop()) as other:
        wanted = other.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(found.sequences, wanted.sequences)
    torch.testing.assert_close(found.logits, wanted.logits)


class Told(BaseStreamer):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.values: list[Any] = []

    def put(self, value: Any) -> None:
        self.values.append(value.tolist())

    def end(self) -> None:
        self.values.append("end")


@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_a_streamer_hears_the_prompt_once_and_no_token_that_was_thrown_away(threshold: float) -> None:
    inputs = prompt("llava-clip", [ROWS["llava-clip"][0]])
    with vtprune.wrapped(make("llava-clip"), "grid", keep=1.0 if threshold else LEVELS[0]) as other:
        wanted = Told()
        other.generate(**inputs, **GREEDY, streamer=wanted)
    model = vtprune.wrap(make("llava-clip"), Given(threshold=threshold))
    told = Told()
    model.generate(**inputs, **GREEDY, streamer=told)
    assert told.values == wanted.values


def test_stopping_criteria_hear_of_no_attempt_that_was_refused_as_a_whole() -> None:
    seen: list[int] = []

    class Counting(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            seen.append(len(input_ids))
            return torch.ones(len(input_ids), dtype=torch.bool)

    inputs = prompt("llava-clip", ROWS["llava-clip"])
    model = vtprune.wrap(make("llava-clip"), Given(threshold=2.0))
    found = model.generate(**inputs, **GREEDY, stopping_criteria=StoppingCriteriaList([Counting()]))
    assert seen == [len(inputs["input_ids"])]
    assert found.shape[1] == inputs["input_ids"].shape[1] + 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"do_sample": True}, "sample"),
        ({"num_beams": 2}, "beam_search"),
        ({"prompt_lookup_num_tokens": 2}, "assisted_generation"),
    ],
)
def test_answers_that_are_not_greedy_are_refused_by_name(options: dict[str, Any], named: str) -> None:
    model = vtprune.wrap(make("llava-clip"), Given())
    with pytest.raises(vtprune.VTPruneError, match=f"asks for {named}"):
        model.generate(**prompt("llava-clip", [ROWS["llava-clip"][0]]), **{**GREEDY, **options})


@contextmanager
def warned() -> Iterator[list[str]]:
    """The promises that did not hold."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    found += [str(one.message) for one in caught if issubclass(one.category, PromiseWarning)]


def test_what_was_not_calibrated_is_told_once() -> None:
    inputs = prompt("llava-clip", [ROWS["llava-clip"][0]])
    model = make("llava-clip")
    base = sample_base(model, "vtprune_weights").metadata()
    origin = Origin(base=base, dtype="float32", most_tokens=4, generation={"max_new_tokens": 2})
    vtprune.wrap(model, Given(origin=origin))
    with warned() as found:
        model.generate(**inputs, **GREEDY, repetition_penalty=1.3)
        model.generate(**inputs, **GREEDY, repetition_penalty=1.3)
    assert [one.partition("cover ")[2].partition("=")[0] for one in found] == [
        "repetition_penalty",
        "vision tokens of a prompt",
        "an answer's tokens",
    ]


@pytest.mark.parametrize("method", ["pmod", "yopo", "d2o", "lazyllm", "mue"])
def test_methods_that_have_no_levels_are_refused_by_name(method: str) -> None:
    with pytest.raises(vtprune.VTPruneError, match=f"{method} .*; calibrate with another method"):
        vtprune.wrap(make("llava-clip"), Given(method=method))


def test_features_that_were_made_at_one_level_are_refused_where_the_tower_prunes() -> None:
    inputs = prompt("llava-clip", [ROWS["llava-clip"][0]])
    model = vtprune.wrap(make("llava-clip"), Given(method="visionzip"))
    features = model.model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
    with pytest.raises(vtprune.VTPruneError, match="give pixel_values"):
        model.generate(**inputs, **GREEDY, mm_encoder_outputs={"image": features})
