"""One budget for all images of a prompt, shared by size or by importance."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import vtprune
from tests.models import Row, make, prompt
from tests.oracle import TOLERANCE, compare, difference_from_masked, run_wrapped
from tests.streams import few
from vtprune.method.sharing import Sharing, by_importance, shares_by_size
from vtprune.method.views import VisionStream

# A large and a small image, a video, and a row with one image alone.
ROWS = [Row([2, 3, 4, 2], [(6, 6), (2, 3), (2, 3, 4)], 3), Row([3, 5], [(4, 5)], 4)]


def kept(model: Any) -> list[list[int]]:
    return [[len(image.kept) for image in sample.images] for sample in vtprune.report(model).samples]


@few
@given(totals=st.lists(st.integers(1, 40), min_size=1, max_size=6), budget=st.integers(1, 260))
def test_shares_by_size_meet_the_budget_and_are_in_proportion(totals: list[int], budget: int) -> None:
    shares = shares_by_size(totals, budget)
    assert sum(shares) == min(budget, sum(totals))
    assert all(0 <= share <= total for share, total in zip(shares, totals, strict=True))
    if budget >= len(totals):
        assert min(shares) >= 1
        for share, total in zip(shares, totals, strict=True):
            assert share <= max(1, budget * total / sum(totals) + 1)


def test_shares_of_equal_pieces_differ_by_one_the_first_having_more() -> None:
    assert shares_by_size([35, 35, 35], 40) == [14, 13, 13]
    assert shares_by_size([36, 6, 24], 22) == [12, 2, 8]
    assert shares_by_size([90, 5, 5], 4) == [2, 1, 1]
    assert shares_by_size([5, 5], 1) == [1, 0]


@pytest.mark.parametrize(("keep", "expected"), [(22, [[12, 2, 8], [20]]), (0.5, [[18, 3, 12], [10]])])
@pytest.mark.parametrize("method", ["random", "divprune", "fopru"])
def test_images_of_a_prompt_share_a_budget_by_size(method: str, keep: Any, expected: list[list[int]]) -> None:
    model = make("qwen2.5-vl")
    with torch.no_grad(), vtprune.wrapped(model, method, keep_prompt=keep):
        model(**prompt("qwen2.5-vl", ROWS))
        assert kept(model) == expected
        assert vtprune.report(model).asked_keep == keep


@pytest.mark.parametrize("share", ["size", "importance"])
@pytest.mark.parametrize("method", ["fopru", "fastv", "pyramid_drop", "lazyllm", "gemfilter"])
def test_what_is_shared_is_still_exact(method: str, share: str) -> None:
    model = vtprune.wrap(make("qwen2.5-vl"), method, keep_prompt=0.6, share=share)
    inputs = prompt("qwen2.5-vl", ROWS)
    if method == "lazyllm":
        together, _, _ = run_wrapped("qwen2.5-vl", model, inputs)
        alone, _, _ = run_wrapped("qwen2.5-vl", model, prompt("qwen2.5-vl", ROWS[:1]))
        assert float((together[0, -8:] - alone[0, -8:]).abs().max()) < TOLERANCE
        return
    difference, report = difference_from_masked("qwen2.5-vl", model, inputs)
    assert difference < TOLERANCE
    assert all(image.kept for sample in report.samples for image in sample.images)


def test_by_importance_the_best_tokens_of_the_prompt_stay_whichever_image_they_belong_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[int, Tensor] = {}
    original = vtprune.FoPru.significance

    def significance(self: vtprune.FoPru, stream: VisionStream) -> Tensor:
        # The second image matters most, the third not at all.
        scores = original(self, stream) + {6: 1.0, 24: -1.0}.get(stream.total, 0.0)
        seen[stream.total] = scores
        return scores

    monkeypatch.setattr(vtprune.FoPru, "significance", significance)
    model = vtprune.wrap(make("qwen2.5-vl"), "fopru", keep_prompt=22, share="importance")
    with torch.no_grad():
        model(**prompt("qwen2.5-vl", ROWS))
    assert kept(model) == [[15, 6, 1], [20]]
    images = vtprune.report(model).samples[0].images
    assert images[0].kept == sorted(seen[36].topk(15).indices.tolist())
    assert images[2].kept == [int(seen[24].argmax())]


def test_by_importance_a_later_layer_shares_what_is_left() -> None:
    inputs = prompt("qwen2.5-vl", ROWS[:1])
    by_size = vtprune.wrap(make("qwen2.5-vl"), "pyramid_drop", keep_prompt=0.5)
    with torch.no_grad():
        by_size(**inputs)
    model = vtprune.wrap(make("qwen2.5-vl"), "pyramid_drop", keep_prompt=0.5, share="importance")
    with torch.no_grad():
        model(**inputs)
    ours, theirs = vtprune.report(model), vtprune.report(by_size)
    assert ours.tokens_per_layer == theirs.tokens_per_layer
    assert [one.kept_per_layer for one in ours.samples[0].images] != [
        one.kept_per_layer for one in theirs.samples[0].images
    ]


def test_ties_between_images_go_to_the_first() -> None:
    alike = [vtprune.Selection.best(torch.zeros(3), 1) for _ in range(2)]
    first, second = by_importance("test", alike, 4)
    assert (first.kept.tolist(), second.kept.tolist()) == ([0, 1, 2], [0])


def test_batches_share_prompt_by_prompt() -> None:
    model = vtprune.wrap(make("qwen2.5-vl"), "fastv", keep_prompt=0.6, share="importance")
    together, report, _ = run_wrapped("qwen2.5-vl", model, prompt("qwen2.5-vl", ROWS))
    alone, own, _ = run_wrapped("qwen2.5-vl", model, prompt("qwen2.5-vl", ROWS[:1]))
    assert [one.kept_per_layer for one in own.samples[0].images] == [
        one.kept_per_layer for one in report.samples[0].images
    ]
    assert compare(together[:1, -8:], alone[:1, -8:], {"input_ids": torch.zeros(1, 0, dtype=torch.long)}) < TOLERANCE


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("fastv:keep=0.5", {"keep_prompt": 0.5}, "fastv: keep and keep_prompt contradict each other"),
        ("random+fastv", {"keep_prompt": 0.5}, "keep_prompt is the budget of one method"),
        ("pmod", {"keep_prompt": 0.5}, "pmod routes its layers by one keep; give keep, a budget"),
        ("d2o", {"keep_prompt": 0.5}, "d2o cuts each image's entries of a cache by themselves"),
        ("none", {"keep_prompt": 5}, "none prunes nothing; give keep"),
        ("frame_skip:every=2", {"keep_prompt": 5}, "keep_prompt says how many tokens stay, as a keep does"),
        ("visionzip", {"keep_prompt": 0.5}, "visionzip prunes inside the vision encoder, where it is not known"),
        ("fastv", {"keep_prompt": 1.5}, "keep_prompt takes a count of vision tokens per prompt"),
        ("fastv", {"keep_prompt": 0.5, "share": "luck"}, "share is one of 'size', 'importance', got 'luck'"),
        ("fastv", {"share": "importance"}, "share='importance' says how a prompt's images share keep_prompt"),
    ],
)  # fmt: skip
def test_what_cannot_share_is_refused(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(vtprune.VTPruneError, match=re.escape(message)):
        vtprune.wrap(make("qwen2.5-vl"), method, **options)


@pytest.mark.parametrize("method", ["divprune", "holov", "random", "pool"])
def test_a_choice_without_scores_is_not_shared_by_importance(method: str) -> None:
    model = vtprune.wrap(make("qwen2.5-vl"), method, keep_prompt=0.5, share="importance")
    with torch.no_grad(), pytest.raises(vtprune.VTPruneError, match=f"{method} does not choose by one score a token"):
        model(**prompt("qwen2.5-vl", ROWS))


def test_a_method_that_counts_by_itself_is_not_shared_by_importance() -> None:
    model = vtprune.wrap(make("qwen2.5-vl"), "pyramid_drop:schedule=entropy", keep_prompt=0.5, share="importance")
    with (
        torch.no_grad(),
        pytest.raises(vtprune.VTPruneError, match="decides itself how many tokens stay"),
    ):
        model(**prompt("qwen2.5-vl", ROWS))


def test_weights_that_learn_do_not_share_by_importance() -> None:
    model = vtprune.wrap(make("qwen2.5-vl"), "covipal:width=16,heads=2", keep_prompt=10, share="importance").train()
    inputs = prompt("qwen2.5-vl", ROWS, "right")
    with pytest.raises(vtprune.VTPruneError, match="covipal is being trained, where images do not share"):
        model(**inputs, labels=inputs["input_ids"])


def test_whole_numbers_of_any_kind_are_counts() -> None:
    model = vtprune.wrap(make("qwen2.5-vl"), "random", keep_prompt=np.int64(22))
    with torch.no_grad():
        model(**prompt("qwen2.5-vl", ROWS))
    assert kept(model) == [[12, 2, 8], [20]]


def test_whoever_saves_is_told_that_a_config_holds_no_budget_of_a_prompt(tmp_path: Path) -> None:
    model = vtprune.wrap(make("qwen2.5-vl"), "random", keep_prompt=22)
    with pytest.warns(UserWarning, match="a config holds no keep_prompt: give keep_prompt=22, share='size'"):
        vtprune.save(model, tmp_path)


def test_each_image_keeps_one_token_at_the_least() -> None:
    assert Sharing(1).counts([5, 9]) == [1, 1]


@pytest.mark.parametrize("method", ["vidcom2", "dycoke"])
def test_images_that_a_method_for_videos_leaves_whole_have_no_part_in_the_budget(method: str) -> None:
    model = make("qwen2.5-vl")
    with torch.no_grad(), vtprune.wrapped(model, method, keep_prompt=16):
        model(**prompt("qwen2.5-vl", ROWS[:1]))
        assert kept(model) == [[36, 6, 16]]
