"""Launches and read-backs are counted exactly, and what methods add to them stays within its bound."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from vtprune.evals.settings import for_videos_alone
from vtprune.evals.speed.launches import Counts, count_all, counting, main
from vtprune.method.registry import available, pruner_class
from vtprune.method.stages import Growing


class Bound(NamedTuple):
    """The most that a method may do, on LLaVA-1.5's depth at batch 1: launches of a prefill as a share of the unpruned
    model's, read-backs beyond its own; the same of the first decode step and of later ones."""

    prefill: float
    reads: int
    first: float = 1.01
    first_reads: int = 0
    later: float = 1.01
    later_reads: int = 0


# Every prefill reads back where its placeholders stand, and whether the scores that it chose by are numbers. Beyond
# that: `random` a hash of the pixels, greedy methods and HoloV what they choose by on the host (which tells NaN, too),
# methods whose counts follow from scores these counts.
BOUNDS = {
    "none": Bound(1.01, 1),
    "grid": Bound(1.03, 1),
    "pool": Bound(1.03, 1),
    "random": Bound(1.03, 2),
    "fopru": Bound(1.04, 2),
    "covipal": Bound(1.04, 2),
    "holov": Bound(1.05, 2),
    "fastv": Bound(1.04, 2),
    "dart": Bound(1.07, 2),
    "divprune": Bound(1.06, 2),
    "cdpruner": Bound(1.08, 2),
    "visionzip": Bound(1.09, 2),
    "vispruner": Bound(1.05, 3),
    "prumerge": Bound(1.05, 3),
    "gemfilter": Bound(1.34, 2),  # the layers before its own run twice
    "pyramid_drop": Bound(1.08, 2),
    "vtw": Bound(1.02, 1),
    "sparsevlm": Bound(1.16, 3),
    "vscan": Bound(1.12, 2),
    "vflowopt": Bound(1.12, 4),
    "mustdrop": Bound(1.17, 3),
    "lazyllm": Bound(1.10, 2, first=1.34, first_reads=3, later=1.34, later_reads=3),
    "spatten": Bound(1.17, 2),
    "yopo": Bound(1.08, 1),
    "d2o": Bound(1.08, 2, first=1.79, first_reads=2),
    "pmod": Bound(1.24, 2),
    "mue": Bound(1.38, 27),  # each layer is followed by the question whether an image stops
    "random_ltd": Bound(1.02, 1),
    "gamma_mod": Bound(1.22, 2, first=1.08, later=1.08),
    "flowcut": Bound(1.31, 12),  # ten layers drop by a threshold
    "turbo": Bound(1.35, 2),
    "tome": Bound(1.29, 2),
    "iared2": Bound(1.06, 2),
}
# What compares frames, on a video on Qwen2.5-VL's depth, where the wrapper alone reads back twice.
ON_VIDEOS = {
    "evs": Bound(1.03, 3),
    "dycoke": Bound(1.03, 2),
    "vidcom2": Bound(1.03, 3),
    "holitom": Bound(1.03, 4),  # 1.05 where something stands still, which nothing does in this video
    "fastvid": Bound(1.05, 4),
    "frame_pool": Bound(1.03, 2),
    "frame_skip": Bound(1.03, 2),
}
# What the towers that pack images add to read-backs on Qwen2.5-VL: each cut says where windows end.
PACKED = {
    "visionzip": 3, "vispruner": 3, "vscan": 3, "mustdrop": 3, "flowcut": 12, "turbo": 40, "tome": 40, "iared2": 6,
}  # fmt: skip


def test_views_launch_nothing_and_everything_else_does() -> None:
    states = torch.ones(4, 6)
    with counting() as counts:
        states.view(2, 12).transpose(0, 1)[3:].unsqueeze(0).detach()
    assert (counts.launched, counts.read) == (0, 0)
    with counting() as counts:
        (states @ states.mT).softmax(dim=-1)
    assert counts.launched == 2


@pytest.mark.parametrize(
    "wait",
    [
        lambda one: one.max().item(), lambda one: bool((one > 0).all()), lambda one: int(one[0]),
        lambda one: one.tolist(), lambda one: one.nonzero(), lambda one: one[one > 2], lambda one: one.unique(),
        lambda one: torch.equal(one, one), lambda one: one.repeat_interleave(one), lambda one: one.cpu(),
        lambda one: one.index_put((one > 2,), one[0]),
    ],
)  # fmt: skip
def test_what_python_waits_for_is_a_read_back(wait: object) -> None:
    values = torch.arange(5)
    with counting() as counts:
        wait(values)  # type: ignore[operator]
    assert counts.read == 1


def test_what_needs_no_answer_is_none() -> None:
    values = torch.arange(5)
    with counting() as counts:
        values.repeat_interleave(values, output_size=10)
        values[values.clamp(min=2)].masked_fill(values > 2, 0).cumsum(dim=0)
    assert counts.read == 0


def test_places_are_lines_of_this_project_and_the_model_is_left_alone() -> None:
    found = count_all("llava", 1, ["fopru"])
    assert {place for _, place in found[""].prefill.launches} == {""}
    places = {place.partition(":")[0] for _, place in found["fopru"].prefill.launches}
    assert "vtprune/pruners/fopru.py" in places
    ours = Counts(found["fopru"].prefill.launches - found[""].prefill.launches)
    assert ours.launched < found["fopru"].prefill.launched / 10


def test_every_method_has_its_bound() -> None:
    # Each attempt of a method that grows launches what the method that it runs does.
    shipped = {
        name
        for name in available()
        if pruner_class(name).__module__.startswith("vtprune.") and not issubclass(pruner_class(name), Growing)
    }
    assert shipped == set(BOUNDS) | set(ON_VIDEOS)
    assert {name for name in shipped if for_videos_alone(name)} == set(ON_VIDEOS)


@pytest.mark.parametrize(("model", "bounds"), [("llava", BOUNDS), ("video", ON_VIDEOS)], ids=["image", "video"])
def test_methods_stay_within_their_bounds(model: str, bounds: dict[str, Bound]) -> None:
    found = count_all(model, 1, list(bounds))
    plain, above = found[""], []
    for method, bound in bounds.items():
        own = found[method]
        limits = {
            "prefill": (own.prefill, plain.prefill, *bound[:2]),
            "first step": (own.first, plain.first, *bound[2:4]),
            "later step": (own.later, plain.later, *bound[4:]),
        }
        for when, (counts, base, share, reads) in limits.items():
            if counts.launched > share * base.launched or counts.read > base.read + reads:
                above.append(f"{method}, {when}: {counts.launched / base.launched:.3f}, +{counts.read - base.read}")
    assert not above


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sparsevlm", "vflowopt"])
def test_rows_of_a_batch_wait_together(method: str) -> None:
    one, several = (count_all("llava", batch, [method]) for batch in (1, 3))
    extra = [found[method].prefill.read - found[""].prefill.read for found in (one, several)]
    assert extra[1] <= extra[0]


def test_what_a_decoder_adds_between_its_layers_costs_few_launches_and_no_wait() -> None:
    found = count_all("qwen3", 1, ["grid", "pool"])
    plain = found.pop("").prefill
    for method, own in found.items():
        assert own.prefill.launched <= 1.05 * plain.launched, method
        # The model itself waits for each plane, to see where it stands.
        assert own.prefill.read < plain.read, method


@pytest.mark.slow
def test_packed_towers_wait_once_a_cut_and_rows_of_a_batch_together() -> None:
    one, eight = (count_all("qwen", batch, list(BOUNDS)) for batch in (1, 8))
    for method, bound in BOUNDS.items():
        for found in (one, eight):
            extra = found[method].prefill.read - found[""].prefill.read
            assert extra <= bound.reads + 2 + PACKED.get(method, 0), method


def test_the_command_prints_and_writes_what_it_counted(tmp_path: Path) -> None:
    app = Typer()
    app.command()(main)
    file = tmp_path / "counts.json"
    done = CliRunner().invoke(app, ["--methods", "grid", "--detail", "--output", str(file)])
    assert done.exit_code == 0, done.output
    assert "grid: a prefill" in done.output
    written = json.loads(file.read_text())
    assert written["unpruned"]["prefill"]["read_backs"] < written["grid"]["prefill"]["read_backs"]
    refused = CliRunner().invoke(app, ["--model", "bert"])
    assert refused.exit_code == 2
    assert "model is one of llava, qwen, qwen3, video, got 'bert'" in refused.output.replace("\n", " ")
