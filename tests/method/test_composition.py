"""Lists of pruners: what composes, what is refused, and what the report says of each stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import vtprune
from tests.models import MODELS, ROWS, make, prompt
from tests.oracle import TOLERANCE, difference_from_masked
from vtprune.method.answers import Selection
from vtprune.method.pruner import Pruner
from vtprune.method.stages import BeforeDecoder, Read
from vtprune.method.views import VisionStream


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "stages",
    [
        [vtprune.VisionZip(keep=11), vtprune.VFlowOpt(keep=6)],
        [vtprune.Turbo(keep=12), vtprune.DivPrune(keep=7)],
        [vtprune.FlowCut(keep=11, stages=1), vtprune.CDPruner(keep=8), vtprune.Random(keep=3)],
        [vtprune.MustDrop(keep=9), vtprune.HoloV(keep=5)],
        [vtprune.Pool(keep=12), vtprune.VFlowOpt(keep=6, cell=3.0)],
        [vtprune.Pool(keep=16), vtprune.DivPrune(keep=5)],
    ],
    ids=lambda stages: "+".join(stage.name for stage in stages),
)
def test_stages_of_all_kinds_compose_exactly(kind: str, stages: list[Pruner]) -> None:
    inputs = prompt(kind, ROWS[kind])
    model = vtprune.wrap(make(kind), stages)
    difference, report = difference_from_masked(kind, model, inputs)
    assert difference < TOLERANCE
    assert [stage.method for stage in report.stages] == [stage.name for stage in stages]
    assert all(stage.tokens_left <= stages[i].keep for i, stage in enumerate(report.stages))


def test_the_report_names_where_each_stage_acts_and_its_budget() -> None:
    model = vtprune.wrap(make("llava-clip"), [vtprune.FlowCut(keep=12), vtprune.VFlowOpt(keep=6)])
    with torch.no_grad():
        model(**prompt("llava-clip", ROWS["llava-clip"][:1]))
    first, second = vtprune.report(model).stages
    assert (first.stage, first.asked_keep, first.tokens_left) == ("encoder", 12, 12)
    assert second.stage.startswith("before decoder; after decoder layer")
    assert second.asked_keep == 6
    assert second.tokens_left <= 12


@pytest.mark.parametrize(
    ("stages", "reason"),
    [
        ([vtprune.HoloV(keep=9), vtprune.VisionZip(keep=4)], "visionzip acts in the encoder, holov only before"),
        ([vtprune.FlowCut(keep=9), vtprune.HoloV(keep=9)], "holov is asked to keep 9 .* nothing to do"),
        ([vtprune.FlowCut(keep=0.25), vtprune.HoloV(keep=0.5)], "holov is asked to keep 0.5 .* nothing to do"),
        ([vtprune.Random(keep=9), vtprune.Grid(keep=4)], "grid needs every token .* random leaves some"),
        ([vtprune.FlowCut(keep=9), vtprune.Pool(keep=4)], "pool needs every token .* flowcut leaves some"),
        ([vtprune.Turbo(keep=18), vtprune.VisionZip(keep=9)], "turbo merges between attention and MLP"),
        (
            [vtprune.FlowCut(keep=18), vtprune.VisionZip(keep=9)],
            "both act after encoder layer 4",
        ),
        ([], "a pruner is a name"),
    ],
    ids=str,
)
def test_impossible_orders_are_refused_with_the_reason(stages: list[Pruner], reason: str) -> None:
    model = make("llava-clip")
    with pytest.raises(vtprune.VTPruneError, match=reason):
        vtprune.wrap(model, stages)
    assert not hasattr(model, "_vtprune")


@vtprune.register("test_signals", paper="a test")
@dataclass(frozen=True)
class Signals(BeforeDecoder):
    """Keeps the first tokens and remembers the streams that it saw."""

    seen: ClassVar[list[VisionStream]] = []

    input_reads = frozenset({Read.ENCODER, Read.LAST_LAYER})

    def select(self, stream: VisionStream) -> Selection:
        self.seen.append(stream)
        return Selection(torch.arange(stream.budget))


def _seen(kind: str, stages: list[Pruner]) -> list[VisionStream]:
    Signals.seen.clear()
    with vtprune.wrapped(make(kind), stages) as model, torch.no_grad():
        model(**prompt(kind, ROWS[kind]))
    return list(Signals.seen)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("first", [vtprune.Random(keep=9), vtprune.DivPrune(keep=9)], ids=lambda one: one.name)
def test_a_later_stage_sees_the_signals_of_the_tokens_that_are_left(kind: str, first: Pruner) -> None:
    for whole, cut in zip(_seen(kind, [Signals(keep=4)]), _seen(kind, [first, Signals(keep=4)]), strict=True):
        assert cut.indices.numel() == 9
        for before, after in ((whole.signals, cut.signals), (whole.last_signals, cut.last_signals)):
            assert before is not None
            assert after is not None
            patches = cut.indices[:, None] * before.group + torch.arange(before.group)
            rows = torch.cat([torch.arange(before.prefix), before.prefix + patches.flatten()])
            for name in ("query", "key", "value"):
                assert torch.equal(getattr(after, name), getattr(before, name)[:, rows])


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "second", [vtprune.VFlowOpt(keep=5), vtprune.FoPru(keep=5), vtprune.HoloV(keep=5)], ids=lambda one: one.name
)
def test_methods_that_read_the_encoder_follow_others(kind: str, second: Pruner) -> None:
    inputs = prompt(kind, ROWS[kind])
    model = vtprune.wrap(make(kind), [vtprune.DivPrune(keep=10), second])
    assert difference_from_masked(kind, model, inputs)[0] < TOLERANCE


@pytest.mark.parametrize("kind", MODELS)
def test_what_one_stage_merged_flows_on_in_the_next(kind: str) -> None:
    stages = [vtprune.Pool(keep=16), vtprune.VFlowOpt(keep=12, cell=3.0), vtprune.SparseVLM(keep=8)]
    model = vtprune.wrap(make(kind), stages)
    difference, report = difference_from_masked(kind, model, prompt(kind, ROWS[kind]))
    assert difference < TOLERANCE
    merges = [merge for sample in report.samples for image in sample.images for merge in image.merged]
    assert {merge.layer > 0 for merge in merges} == {True, False}


def test_no_pruning_may_stand_anywhere_in_a_list() -> None:
    model = vtprune.wrap(make("llava-clip"), [vtprune.NoPruning(), vtprune.FlowCut(keep=9), vtprune.NoPruning()])
    with torch.no_grad():
        model(**prompt("llava-clip", ROWS["llava-clip"][:1]))
    assert len(vtprune.report(model).samples[0].images[0].kept) == 9


@pytest.mark.parametrize("kind", MODELS)
def test_a_later_stage_sees_the_vectors_that_an_earlier_one_merged(kind: str) -> None:
    whole = _seen(kind, [Signals(keep=4)])
    model = vtprune.wrap(make(kind), [vtprune.Pool(keep=9), Signals(keep=4)])
    Signals.seen.clear()
    with torch.no_grad():
        model(**prompt(kind, ROWS[kind]))
    images = [image for sample in vtprune.report(model).samples for image in sample.images]
    for before, after, image in zip(whole, list(Signals.seen), images, strict=True):
        merged = {merge.into: merge for merge in image.merged}
        for token, vector in zip(after.indices.tolist(), after.features, strict=True):
            weights = torch.tensor(merged[token].weights)
            expected = (before.features[merged[token].members] * weights[:, None]).sum(dim=0)
            assert torch.allclose(vector, expected, atol=1e-6)
