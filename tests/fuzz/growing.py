"""Answers at rising levels: each row is answered by the first level that is sure enough, as that one alone answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

import vtprune
from tests.fuzz import judges
from tests.fuzz.architectures import PAD
from tests.fuzz.cases import Case, draw
from tests.fuzz.methods import DECODER, ENCODER, INPUT, draw_options
from tests.fuzz.prompts import STEPS, build
from tests.fuzz.trial import Outcome, outcome_of
from tests.growing import Given
from vtprune.hooks.growing import FirstToken
from vtprune.hooks.levels import unfit
from vtprune.method.growth import SCORES
from vtprune.method.registry import create
from vtprune.method.stages import encoder_layers


@dataclass(frozen=True)
class Alone:
    """What one level answers by itself: (B, L) sequences, its report, and (B,) how sure each first token was."""

    ids: Tensor
    report: vtprune.Report
    sure: list[float]


def draw_growing(seed: int) -> Case:
    """The same case for the same seed: a method at levels."""
    case, rng = draw(seed), Random(f"growing {seed}")
    places = [*INPUT, *DECODER, *([] if not isinstance(case.shape.feature, int) else ENCODER)]
    name = rng.choice([one for one in places if not unfit(create(one, keep=0.5))])
    levels = sorted(round(rng.uniform(0.1, 0.95), 2) for _ in range(rng.randint(1, 3)))
    last = 1.0 if rng.random() < 0.8 else 0.97
    inner = create(name, **{**draw_options(rng, case.shape, name, levels[0]), "keep": levels[0]})
    if judges.shares_counts(inner):
        inner = replace(inner, variant="paper")  # type: ignore[call-arg]
    given = Given(method=inner, score=rng.choice(SCORES), levels=(*levels, last), fixed=levels[0])
    # Answers go on from the last column.
    layout = replace(case.layout, side="left")
    return replace(case, layout=layout, pruners=(given,), attention="sdpa")


def attempt_growing(seed: int) -> Outcome:
    """The outcome of the case that a seed stands for."""
    return outcome_of(seed, draw_growing, _complaints)


def _complaints(case: Case, outcome: Outcome) -> Iterator[str]:
    (given,) = case.pruners
    assert isinstance(given, Given)
    rng = Random(f"answers {case.seed}")
    # Where between the rows' scores at the first level the threshold lies, from 0 to 1, and whether a token ends
    # answers.
    share, ends = rng.uniform(-0.2, 1.2), rng.random() < 0.4
    inputs, model = build(case.shape, case.layout).inputs, judges.working(case)
    before = judges.traces(model)
    positions = "compact" if case.compact else "original"
    options: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": PAD}
    if ends:
        # What the whole model says second ends answers, and so at different steps in different rows.
        options["eos_token_id"] = int(model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] + 1])
    levels: dict[int | float, Alone] = {}
    for level in given.levels:
        first = FirstToken()
        with vtprune.wrapped(model, replace(given.inner, keep=level), positions=positions):
            found = model.generate(**inputs, **options, logits_processor=LogitsProcessorList([first]))
            levels[level] = Alone(found, vtprune.report(model), getattr(first, given.score).tolist())
    threshold = _between(levels[given.levels[0]].sure, share)
    vtprune.wrap(model, replace(given, threshold=threshold), positions=positions)
    answers, report = model.generate(**inputs, **options), vtprune.report(model)
    shared = not encoder_layers(given.inner.bind(vtprune.adapters.adapter_for(model).facts()))
    vtprune.unwrap(model)
    for row in range(len(answers)):
        yield from _row(given, threshold, levels, row, answers[row], report, shared=shared)
    if report.flops != report.flops_breakdown.total:
        yield f"flops {report.flops} are not the sum of their parts {report.flops_breakdown.total}"
    yield from judges.left_behind(before, model, case.shape.number)


def _between(sure: Sequence[float], share: float) -> float:
    """A threshold that some pass: none above 1, all below 0."""
    low, high = min(sure), max(sure)
    return math.inf if share > 1 else low + share * (high - low) if share >= 0 else 0.0


def _row(
    given: Given,
    threshold: float,
    levels: dict[int | float, Alone],
    row: int,
    answer: Tensor,
    report: vtprune.Report,
    *,
    shared: bool,
) -> Iterator[str]:
    """Complaints about one row of a batch that grew."""
    sample = report.samples[row]
    tried: list[int | float] = []
    # Where no row shows anything, nothing grows.
    for level in given.levels if any(one.images for one in report.samples) else ():
        tried.append(level)
        alone = levels[level]
        images = alone.report.samples[row].images
        whole = all(len(kept) == image.tokens for image in images for kept in image.kept_per_layer)
        if whole or alone.sure[row] >= threshold:
            break
    if sample.attempts != tried:
        yield f"row {row} took {sample.attempts}, its scores say {tried}"
        return
    if not tried:
        return
    alone = levels[tried[-1]]
    own = alone.report.samples[row]
    length = min(len(answer), alone.ids.shape[1])
    if not torch.equal(answer[:length], alone.ids[row, :length]) or bool((answer[length:] != PAD).any()):
        yield f"row {row} is answered with {answer.tolist()}, {tried[-1]} alone answers {alone.ids[row].tolist()}"
    if [image.kept_per_layer for image in sample.images] != [image.kept_per_layer for image in own.images]:
        yield f"row {row} keeps other tokens than {tried[-1]} alone"
    if sample.kv_bytes_prefill != own.kv_bytes_prefill:
        yield f"row {row} caches {sample.kv_bytes_prefill} bytes, {tried[-1]} alone {own.kv_bytes_prefill}"
    parts = [levels[level].report.samples[row] for level in tried]
    flops = sum(one.flops for one in parts) - sum(one.encoder_flops for one in parts[1:] if shared)
    if sample.flops != flops:
        yield f"row {row} costs {sample.flops} FLOPs, its attempts {flops}"
