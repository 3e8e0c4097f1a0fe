"""VScan: its windows, both scans and what flows together against a slow reference; how its stages share a budget."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import vtprune
from tests.layers import batch_layer, image_states, naive_saliency
from tests.models import LONG, make, prompt
from tests.pruners.test_dual_attention import decoder_layer
from tests.streams import few
from vtprune.errors import ScoreError, VTPruneError
from vtprune.method.facts import PUBLISHED, ModelFacts
from vtprune.method.views import EncoderLayer
from vtprune.pruners import PyramidDrop, VScan
from vtprune.pruners.vscan.scans import rank_in_window, window_count, windows_of
from vtprune.pruners.vscan.vscan import unturned
from vtprune.tensors.rotary import rotate

# Three encoder layers, of which the first and the last are read.
FACTS = ModelFacts(True, 3, 4, 1)
GRIDS = [(1, 5, 4), (1, 3, 6), (1, 2, 2)]


def test_windows_are_squares_and_the_last_ones_take_in_what_is_left_over() -> None:
    assert windows_of((1, 5, 4), 2).view(5, 4).tolist() == [
        [0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3], [2, 2, 3, 3],
    ]  # fmt: skip
    assert windows_of((2, 1, 3), 2).view(2, 3).tolist() == [[0] * 3, [1] * 3]
    assert windows_of((1, 24, 24), 6).bincount().tolist() == [36] * 16
    assert [window_count(grid, 2) for grid in ((1, 5, 4), (2, 1, 3), (1, 1, 1))] == [4, 2, 1]


def test_a_rank_counts_within_the_window_and_ties_go_to_the_first() -> None:
    scores, windows = torch.tensor([[3.0, 1, 3, 2, 5, 1]]), torch.tensor([[0, 0, 0, 1, 1, 0]])
    assert rank_in_window(scores, windows).tolist() == [[0, 2, 1, 1, 0, 3]]


def slow(early: Tensor, late: Tensor, hidden: Tensor, grid: Any, *, budget: int, side: int) -> Any:
    """Kept tokens, and where each token flows to, of one image."""
    windows, order = windows_of(grid, side).tolist(), sorted(range(len(early)), key=lambda token: -float(early[token]))
    wanted, quota = budget // 2, -(-(budget // 2) // window_count(grid, side))
    local: list[int] = []
    for token in order:
        if len(local) < wanted and sum(windows[one] == windows[token] for one in local) < quota:
            local.append(token)
    local += [token for token in order if token not in local][: wanted - len(local)]
    best = sorted(range(len(late)), key=lambda token: -float(late[token]))
    kept = sorted(local + [token for token in best if token not in local][: budget - wanted])
    cosines = (
        torch.nn.functional.normalize(hidden.double(), dim=1)
        @ torch.nn.functional.normalize(hidden[kept].double(), dim=1).T
    )
    into = [token if token in kept else kept[int(cosines[token].argmax())] for token in range(len(hidden))]
    return kept, into


def answered(
    method: VScan, prefix: int, group: int, budgets: list[int], *, seed: int = 0
) -> tuple[Any, list[EncoderLayer], list[list[Tensor]], list[Tensor]]:
    """What the method makes of a ragged batch, the layers that it read, and the states of each of its images."""
    images = [
        [image_states(h * w, prefix=prefix, group=group, seed=seed + 10 * row + number) for number in range(2)]
        for row, (_, h, w) in enumerate(GRIDS)
    ]
    layers, memory = [], dict[str, Tensor]()
    generator = torch.Generator().manual_seed(seed)
    for number, index in enumerate((0, 2)):
        layer = batch_layer(
            [image[number] for image in images], budgets, prefix=prefix, group=group, index=index, depth=3
        )
        hidden = torch.randn(len(GRIDS), layer.key.shape[2], 5, generator=generator)
        layers.append(replace(layer, grids=tuple(GRIDS), memory=memory, hidden=hidden))
    assert method.prune_encoder(layers[0]) is None
    return method.prune_encoder(layers[1]), layers, images, list(layers[1].hidden)


@pytest.mark.parametrize(("prefix", "group"), [(1, 1), (0, 1), (0, 4)])
@pytest.mark.parametrize("budgets", [[9, 7, 2], [6, 6, 3], [20, 4, 1]])
def test_what_stays_and_what_flows_is_that_of_a_slow_reference(prefix: int, group: int, budgets: list[int]) -> None:
    method = VScan(window=2).bind(replace(FACTS, has_cls=bool(prefix), group=group))
    found, _, images, hidden = answered(method, prefix, group, budgets)
    for row, grid in enumerate(GRIDS):
        tokens = grid[1] * grid[2]
        early, late = (naive_saliency(one, prefix=prefix, group=group) for one in images[row])
        states = hidden[row][prefix : prefix + tokens * group].reshape(tokens, -1)
        kept, into = slow(early, late, states, grid, budget=min(budgets[row], tokens), side=2)
        assert found.keep[row].nonzero().flatten().tolist() == kept
        assert found.into[row].tolist() == into + [-1] * (20 - tokens)
        # The plain mean: every token alike.
        shares = [1 / into.count(target) for target in into]
        assert torch.allclose(found.weights[row, :tokens], torch.tensor(shares))
    assert found.counts == (min(budgets[0], 20), min(budgets[1], 18), min(budgets[2], 4))


def test_without_merging_the_same_tokens_stay() -> None:
    merged, _, _, _ = answered(VScan(window=2).bind(FACTS), 1, 1, [9, 7, 2])
    dropped, _, _, _ = answered(VScan(window=2, merge=False).bind(FACTS), 1, 1, [9, 7, 2])
    assert torch.equal(merged.keep, dropped.keep)
    assert dropped.into is None
    assert VScan(merge=False).encoder_reads == frozenset()


def test_one_scan_alone_is_the_top_of_its_layer() -> None:
    for local, number in ((0.0, 1), (1.0, 0)):
        method = VScan(window=99, local=local).bind(FACTS)
        found, _, images, _ = answered(method, 1, 1, [9, 7, 2])
        scores = naive_saliency(images[0][number], prefix=1, group=1)
        assert found.keep[0].nonzero().flatten().tolist() == sorted(scores.topk(9).indices.tolist())


def test_a_stage_that_drops_tokens_before_it_is_refused_and_so_are_scores_that_are_no_numbers() -> None:
    method = VScan(window=2).bind(FACTS)
    _, layers, _, _ = answered(method, 1, 1, [9, 7, 2])
    with pytest.raises(VTPruneError, match="vscan scans windows of whole images"):
        method.prune_encoder(replace(layers[0], grids=((1, 5, 5), *GRIDS[1:])))
    with pytest.raises(ScoreError, match=r"vscan: .* token scores are NaN"):
        method.prune_encoder(replace(layers[0], key=layers[0].key * float("nan")))


# ---- how its stages share a budget


def test_the_published_setting_leaves_96_tokens_and_then_32() -> None:
    for method in (VScan(), VScan(keep=64), VScan(keep=1 / 9)):
        bound = method.bind(PUBLISHED)
        assert bound.encoder_layers() == (5, 22)
        assert bound.encoder_budget(576) == 96
        assert bound.counts(576, 96) == (96,) * 16 + (32,) * 16
    # Qwen2.5-VL's tower and decoder, and RefCOCO's setting there.
    qwen = replace(PUBLISHED, encoder_depth=32, decoder_depth=28, group=4)
    assert VScan().bind(qwen).encoder_layers() == (7, 31)
    assert VScan().bind(qwen).drop_layers() == (13,)
    assert VScan(keep=0.5, left=0.67).bind(qwen).encoder_budget(1000) == round(0.6 * 1000) - 1


@few
@given(
    schedule=st.sampled_from(["constant", "steps", "linear"]),
    depth=st.integers(2, 40),
    tokens=st.integers(1, 900),
    share=st.floats(0.01, 1.0),
    left=st.floats(0.05, 1.0),
)
def test_the_mean_over_layers_is_what_was_asked(schedule, depth, tokens, share, left) -> None:
    facts = replace(FACTS, decoder_depth=depth)
    pruner = VScan(keep=share, schedule=schedule, left=left).bind(facts)
    budget, entered = pruner.budget(tokens), pruner.encoder_budget(tokens)
    counts = pruner.counts(tokens, entered)
    assert counts[0] == entered
    assert sum(counts) <= budget * depth
    assume(schedule == "constant" and budget >= 3)
    assert sum(counts) > (budget - 1) * depth


def test_it_may_keep_less_than_the_layers_before_its_drop_would_take_of_a_whole_image() -> None:
    """Its encoder's stage has cut the image before: no keep is out of its decoder's reach."""
    model = vtprune.wrap(make("llava-clip"), VScan(keep=0.1, window=2))
    with torch.no_grad():
        model(**prompt("llava-clip", [LONG]))
    (image,) = vtprune.report(model).samples[0].images
    assert [len(layer) for layer in image.kept_per_layer] == [5, 5, 5, 2, 2]
    assert not image.kept_whole


def test_what_flows_together_stands_where_the_kept_token_stood() -> None:
    """Not at the first of its members, as where means are named after the heaviest."""
    kept = []
    for merge in (True, False):
        model = vtprune.wrap(make("llava-clip"), VScan(keep=0.3, window=2, merge=merge))
        with torch.no_grad():
            model(**prompt("llava-clip", [LONG]))
        (image,) = vtprune.report(model).samples[0].images
        kept.append(image.kept)
        assert bool(image.merged) == merge
    assert kept[0] == kept[1]


def test_the_decoder_ranks_as_pyramid_drop_does_and_released_without_the_rotary_embedding_where_patches_merge() -> (
    None
):
    layer = decoder_layer()
    assert torch.equal(VScan().scores(layer), PyramidDrop().scores(layer))
    angles = torch.rand(layer.key.shape[1], 2).repeat(1, 2)
    turned = replace(
        layer,
        query=rotate(layer.query, angles.cos(), angles.sin())[:, -1:],
        key=rotate(layer.key, angles.cos(), angles.sin()),
        rotary=(angles.cos(), angles.sin()),
    )
    assert torch.allclose(unturned(turned).key, layer.key, atol=1e-6)
    released = VScan(variant="released")
    assert torch.equal(released.bind(FACTS).scores(turned), VScan().scores(turned))
    assert torch.allclose(released.bind(replace(FACTS, group=4)).scores(turned), VScan().scores(layer), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"left": 0}, "left is the share that goes on, above 0"),
        ({"left": 1.5}, "left is a share of the tokens, at most 1"),
        ({"local": -0.1}, "local is a finite number of at least 0"),
        ({"window": 0}, "window is an int of at least 1"),
        ({"shallow": -1}, "shallow is an int of at least 0"),
        ({"shallow": 3}, "shallow=3 .*only 3 encoder layers feed"),
        ({"layers": (4,)}, "needs at least 5 decoder layers"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(VTPruneError, match=rf"vscan: .*{says}"):
        VScan(**options).bind(FACTS)
