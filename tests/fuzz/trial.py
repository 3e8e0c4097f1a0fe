"""One case, through all judges."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

import vtprune
from tests.fuzz import judges
from tests.fuzz.architectures import original
from tests.fuzz.cases import Case, draw
from tests.fuzz.gates import gates_of, scatter
from tests.fuzz.prompts import build
from tests.fuzz.reference import positions_of
from tests.fuzz.running import image_features, run
from vtprune.method.stages import encoder_layers


@dataclass
class Outcome:
    """refused: vtprune's reason, if it did; complaints: what does not hold; far: how far the run was from the
    reference, and `allowed` how far it may be."""

    case: Case | None
    refused: str = ""
    complaints: list[str] = field(default_factory=list)
    far: float = 0.0
    allowed: float = judges.EXACT


def attempt(seed: int) -> Outcome:
    """The outcome of the case that a seed stands for."""
    return outcome_of(seed, draw, _complaints)


def outcome_of(seed: int, drawn: Callable[[int], Case], judged: Callable[[Case, Outcome], Iterator[str]]) -> Outcome:
    """The outcome of a case. What vtprune raises, but for a refusal, is a complaint."""
    outcome = Outcome(None)
    try:
        outcome.case = drawn(seed)
        outcome.complaints = list(judged(outcome.case, outcome))
    except vtprune.ScoreError as error:
        outcome.complaints.append(f"ScoreError: {error}")
    except vtprune.VTPruneError as error:
        outcome.refused = f"{type(error).__name__}: {error}"
    except Exception as error:
        if outcome.case is None:
            raise
        outcome.complaints.append(f"{type(error).__name__}: {error}")
    if outcome.case is not None and (outcome.complaints or outcome.refused):
        judges.discard(outcome.case)
    return outcome


def _complaints(case: Case, outcome: Outcome) -> Iterator[str]:
    shape, prompt = case.shape, build(case.shape, case.layout)
    model = judges.working(case)
    plain = original(shape.number)
    plain.set_attn_implementation(case.attention)
    before = judges.traces(model)
    vtprune.wrap(model, list(case.pruners), positions="compact" if case.compact else "original")
    scatter(model, case.routers, case.seed)
    ours = run(shape, model, prompt, wrapped=True)
    # Features are the model's own where nothing acts in its encoder.
    encoder = any(encoder_layers(pruner) for pruner in case.pruners)
    features = image_features(model, prompt) if encoder else None
    gates = gates_of(model, case.pruners, shape.depth)
    yield from judges.counted(case, prompt, ours)
    if len(case.layout.rows) > 1 and not any(map(judges.shares_counts, case.pruners)):
        for row in range(len(case.layout.rows)):
            single, places = build(shape, case.layout, only=row), None
            if shape.is_qwen and not any(prompt.images):
                # Where no row has an image, Qwen numbers padding, too; alone a row has none, but the same places.
                places = positions_of(shape, plain, prompt)[:, row : row + 1, prompt.real[row]]
            lonely = run(shape, model, single, wrapped=True, positions=places)
            yield from judges.alone(case, row, (prompt, ours), (single, lonely))
    outcome.far, outcome.allowed = judges.masked(case, prompt, ours, features, gates)
    if outcome.far > outcome.allowed:
        yield f"{outcome.far:.1e} from the model under masks, at most {outcome.allowed:.0e} is allowed"
    vtprune.unwrap(model)
    yield from judges.left_behind(before, model, shape.number)
    yield from _unchanged(case, prompt, model, plain, ours)


def _unchanged(case: Case, prompt: Any, model: Any, plain: Any, ours: Any) -> Iterator[str]:
    """The unwrapped model equals one that was never wrapped, bit for bit; so does one that kept everything."""
    if judges.keeps_everything(case):
        # Qwen by itself cannot tell the positions of a step that comes with a mask.
        theirs = run(case.shape, plain, prompt, wrapped=False, positions=positions_of(case.shape, plain, prompt))
        if not torch.equal(ours.logits[prompt.real], theirs.logits[prompt.real]):
            yield "keeping everything changes logits"
    with torch.no_grad():
        own = {} if case.shape.is_qwen else {"position_ids": prompt.positions[:, : prompt.length]}
        if not torch.equal(model(**prompt.inputs, **own).logits, plain(**prompt.inputs, **own).logits):
            yield "the unwrapped model has other logits than one that was never wrapped"
