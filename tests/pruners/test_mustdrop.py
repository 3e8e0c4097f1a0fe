"""MustDrop: merged windows, the key set, the filters, and what a given budget makes of them."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import vtprune
from tests.cost.test_cost import LLAVA_7B
from tests.golden.runner import run_case
from tests.models import MODELS, ROWS, make, prompt
from tests.oracle import TOLERANCE, compare, image_features, next_tokens, run_masked, run_wrapped
from tests.pruners.test_dual_attention import decoder_layer
from tests.streams import few, stream
from vtprune.encoder.merging import flow_together
from vtprune.errors import ScoreError, VTPruneError
from vtprune.method.facts import ModelFacts, Work
from vtprune.method.views import EncoderLayer, VisionStream
from vtprune.pruners import MustDrop
from vtprune.pruners.mustdrop.windows import (
    alike_windows,
    batch_windows,
    window_members,
    window_similarity,
)
from vtprune.report.costs import flops

CASES = Path(__file__).parents[1] / "golden" / "cases" / "mustdrop"
# Settings under which thresholds drop something of a few dozen tokens.
THRESHOLDS = MustDrop(merge_threshold=0.05, global_threshold=0.03, individual_threshold=0.2)


def encoder_layer(
    images: list[tuple[tuple[int, int, int], Tensor]], *, prefix: int = 1, group: int = 1, left: int = 1
) -> EncoderLayer:
    """Layer 0 of images given by grid and hidden states (N * group, D); padding and prefix hold NaN."""
    grids = tuple(grid for grid, _ in images)
    totals = torch.tensor([len(states) // group for _, states in images])
    longest, width = int(totals.max()), images[0][1].shape[1]
    hidden = torch.full((len(images), prefix + longest * group, width), float("nan"))
    for row, (_, states) in enumerate(images):
        hidden[row, prefix : prefix + len(states)] = states
    empty = torch.zeros(len(images), 1, hidden.shape[1], 2)
    valid = torch.arange(longest)[None] < totals[:, None]
    return EncoderLayer(
        empty, empty, empty, valid, totals, torch.full_like(totals, left), 0, 5, 1.0, prefix, group, {},
        valid.float(), grids, hidden,
    )  # fmt: skip


def naive_windows(grid: tuple[int, int, int], states: Tensor) -> dict[tuple[int, ...], float]:
    """The mean pairwise cosine of each 3x3 window with at least two tokens of the grid."""
    frames, height, width = grid
    found = {}
    for frame, top, left in itertools.product(range(frames), range(0, height, 3), range(0, width, 3)):
        cells = itertools.product(range(top, min(top + 3, height)), range(left, min(left + 3, width)))
        members = tuple((frame * height + row) * width + col for row, col in cells)
        pairs = list(itertools.combinations(members, 2))
        if pairs:
            cosines = [torch.cosine_similarity(states[a].double(), states[b].double(), dim=0) for a, b in pairs]
            found[members] = float(sum(cosines) / len(pairs))
    return found


def alike(grid: tuple[int, int, int], seed: int, group: int = 1) -> Tensor:
    """States that resemble each other, some windows more than others."""
    generator = torch.Generator().manual_seed(seed)
    total = grid[0] * grid[1] * grid[2] * group
    return torch.randn(total, 6, generator=generator) + 1.5 * torch.rand(total, 1, generator=generator)


@few
@given(
    grids=st.lists(st.tuples(st.integers(1, 2), st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=3),
    layout=st.sampled_from([(1, 1), (0, 1), (0, 4)]),
    seed=st.integers(0, 99),
)
def test_windows_merge_whose_mean_cosine_reaches_the_threshold(grids, layout, seed):
    prefix, group = layout
    images = [(grid, alike(grid, seed + row, group)) for row, grid in enumerate(grids)]
    selection = MustDrop(merge_threshold=0.2).prune_encoder(encoder_layer(images, prefix=prefix, group=group))
    for row, (grid, states) in enumerate(images):
        tokens = states.unflatten(0, (-1, group)).mean(dim=1)
        into, weights = torch.arange(len(tokens)), torch.ones(len(tokens))
        for members, cosine in naive_windows(grid, tokens).items():
            if cosine >= 0.2:
                into[list(members)], weights[list(members)] = members[0], 1 / len(members)
        assert torch.equal(selection.into[row, : len(tokens)], into)
        assert torch.equal(selection.keep[row, : len(tokens)], into == torch.arange(len(tokens)))
        assert torch.equal(selection.weights[row, : len(tokens)], weights)
        assert not selection.keep[row, len(tokens) :].any()


def test_nine_members_weigh_a_ninth_each_and_flow_into_the_first():
    states = torch.ones(36, 4) + 0.01 * torch.randn(36, 4, generator=torch.Generator().manual_seed(0))
    selection = MustDrop().prune_encoder(encoder_layer([((1, 6, 6), states)]))
    assert selection.keep[0].nonzero().flatten().tolist() == [0, 3, 18, 21]
    assert torch.allclose(selection.weights, torch.full((1, 36), 1 / 9))
    merged = flow_together(states, selection.into[0], selection.weights[0])[21]
    assert torch.allclose(merged, states[[21, 22, 23, 27, 28, 29, 33, 34, 35]].mean(dim=0), atol=1e-6)


def test_at_a_budget_the_most_similar_windows_merge_and_no_more_than_it_needs():
    states = torch.randn(36, 64, generator=torch.Generator().manual_seed(0))
    for window, noise in zip(window_members((1, 6, 6), (3, 3)), (0.3, 0.1, 0.0, 0.2), strict=True):
        states[window] = 1 + noise * states[window]
    for left, heads in ((36, 36), (28, 28), (27, 28), (20, 20), (12, 12), (5, 12), (4, 4)):
        selection = MustDrop(keep=left).prune_encoder(encoder_layer([((1, 6, 6), states)], left=left))
        assert int(selection.keep.sum()) == heads
    best = MustDrop(keep=28).prune_encoder(encoder_layer([((1, 6, 6), states)], left=28))
    assert (best.weights[0] != 1).nonzero().flatten().tolist() == [18, 19, 20, 24, 25, 26, 30, 31, 32]


def test_released_images_merge_as_many_windows_and_ragged_windows_stay():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.ones(2, 42, 5)
    second[:6] = torch.randn(6, 5, generator=generator)
    layer = encoder_layer([((1, 6, 7), first), ((1, 6, 7), second)])
    own = MustDrop().prune_encoder(layer)
    assert own.keep.sum(dim=1).tolist() == [6, 2 * 9 + 4]
    shared = MustDrop(variant="released").prune_encoder(layer)
    assert shared.keep.sum(dim=1).tolist() == [42 - 2 * 8] * 2
    assert (shared.weights[:, 6::7] == 1).all()


def test_windows_of_a_single_token_and_padding_never_merge():
    windows = batch_windows(((1, 1, 1), (1, 4, 4)), (3, 3))
    assert windows.members.shape == (2, 4, 9)
    similarity = window_similarity(torch.ones(2, 16, 3), windows)
    spare = torch.tensor([1, 16])
    assert alike_windows(similarity, windows, 0.0, spare).tolist() == [[False] * 4, [True, True, True, False]]


@pytest.mark.parametrize("keep", [1, 5, 0.2, 0.4, 0.7])
@pytest.mark.parametrize(
    "options", [{}, {"merge_threshold": 0.05}, {"merge": False}, {"variant": "released"}], ids=str
)
@pytest.mark.parametrize("kind", MODELS)
def test_the_mean_over_layers_is_at_most_what_was_asked(kind: str, options: dict, keep: int | float) -> None:
    model = vtprune.wrap(make(kind), "mustdrop", keep=keep, **options)
    with torch.no_grad():
        model(**prompt(kind, ROWS[kind]))
    report = vtprune.report(model)
    shares = []
    for image in (image for sample in report.samples for image in sample.images):
        counts = [len(kept) for kept in image.kept_per_layer]
        asked = min(keep, image.tokens) if isinstance(keep, int) else max(1, round(keep * image.tokens))
        assert sum(counts) / len(counts) <= asked
        assert counts == sorted(counts, reverse=True)
        shares.append(sum(counts) / len(counts) / image.tokens)
    assert report.achieved_keep == pytest.approx(sum(shares) / len(shares))
    assert report.asked_keep == keep


@pytest.mark.parametrize("pruner", [THRESHOLDS, replace(THRESHOLDS, layers=(0, 2, 3))], ids=["default", "layers"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("kind", MODELS)
def test_thresholds_are_exact_and_a_row_of_a_batch_is_that_row_alone(
    kind: str, padding: str, pruner: MustDrop
) -> None:
    inputs = prompt(kind, ROWS[kind], padding)
    model = vtprune.wrap(make(kind), pruner)
    logits, report, cache = run_wrapped(kind, model, inputs)
    features = image_features(model, inputs)
    with torch.no_grad():
        alone = []
        for row in ROWS[kind]:
            model(**prompt(kind, [row]))
            alone += vtprune.report(model).samples
    kept = [[image.kept_per_layer for image in sample.images] for sample in report.samples]
    assert kept == [[image.kept_per_layer for image in sample.images] for sample in alone]
    assert all(len(image.kept) < image.tokens for image in report.samples[0].images)
    assert compare(logits, run_masked(kind, vtprune.unwrap(model), inputs, report, features), inputs) < TOLERANCE
    first = pruner.layers[0] if pruner.layers else 1
    lengths = {cache.layers[index].keys.shape[-2] for index in range(first, 5)}
    assert len(lengths) == 1
    assert next_tokens(1).shape[1] < lengths.pop()


def test_merged_windows_are_in_the_report() -> None:
    model = vtprune.wrap(make("llava-clip"), MustDrop(merge_threshold=0.0))
    with torch.no_grad():
        model(**prompt("llava-clip", ROWS["llava-clip"][:1]))
    image = vtprune.report(model).samples[0].images[0]
    assert image.merged
    for merge in image.merged:
        assert (merge.stage, merge.into, len(merge.members)) == ("encoder", merge.members[0], 9)
        assert merge.weights == pytest.approx([1 / 9] * 9)


def test_numbers_that_are_not_finite_are_refused_by_name() -> None:
    states = torch.randn(9, 4)
    states[4, 0] = float("nan")
    with pytest.raises(ScoreError, match="mustdrop"):
        MustDrop().prune_encoder(encoder_layer([((1, 3, 3), states)]))
    layer = decoder_layer()
    layer.key[0, 4, 0] = float("nan")
    for pruner in (MustDrop(), MustDrop(keep=0.2)):
        with pytest.raises(ScoreError, match="mustdrop"):
            pruner.prune_decoder(layer)
    shown = stream()
    shown.signals.key[0, 3, 0] = float("nan")
    with pytest.raises(ScoreError, match="mustdrop"):
        MustDrop().remember(replace(shown, last_signals=shown.signals))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"keep": 0.2, "global_threshold": 0.1}, "keep and global_threshold contradict"),
        ({"keep": 64, "global_threshold": 0.1, "individual_threshold": 0}, "global_threshold and individual_thr"),
        ({"global_threshold": -0.1}, "global_threshold is a finite number of at least 0"),
        ({"individual_threshold": "low"}, "individual_threshold"),
        ({"merge_threshold": None}, "merge_threshold"),
        ({"key_share": 1.5}, "key_share is at most 1"),
        ({"merge": 1}, "merge is one of True, False"),
        ({"cut_cache": None}, "cut_cache"),
        ({"variant": "published"}, "variant is one of 'paper', 'released'"),
        ({"layers": (3, 2)}, "ascending"),
        ({"layers": ()}, "ascending"),
        ({"layers": (True,)}, "ascending"),
        ({"layers": [1, 2]}, "in a tuple"),
    ],
)
def test_bad_options_are_refused(options: dict, says: str) -> None:
    with pytest.raises(VTPruneError, match=says):
        MustDrop(**options)


def test_layers_that_the_decoder_does_not_have_are_refused() -> None:
    facts = ModelFacts(has_cls=True, encoder_depth=5, decoder_depth=5, group=1)
    assert MustDrop().bind(facts).layers == (1, 2)
    assert MustDrop(layers=(0, 3)).bind(facts).layers == (0, 3)
    with pytest.raises(VTPruneError, match="layers 0 to L - 2 of L, got 2, 4 of 5"):
        MustDrop(layers=(2, 4)).bind(facts)
    with pytest.raises(VTPruneError, match="a decoder of 2 has none"):
        MustDrop().bind(replace(facts, decoder_depth=2))


def test_windows_need_the_whole_grid() -> None:
    layer = encoder_layer([((1, 3, 3), torch.ones(9, 4))])
    with pytest.raises(VTPruneError, match="windows of whole images"):
        MustDrop().prune_encoder(replace(layer, valid=torch.arange(9)[None] < 8, alive=()))


def test_search_space_names_fields_and_fits_the_keep() -> None:
    assert set(MustDrop(keep=0.2).search_space(576)) == {"merge_threshold", "key_share"}
    assert set(MustDrop(keep=0.2, merge=False).search_space(576)) == {"key_share"}
    space = MustDrop().search_space(576)
    assert set(space) == {"merge_threshold", "key_share", "global_threshold", "individual_threshold"}
    assert MustDrop(**{name: one.high for name, one in space.items()}).input_budget(576) is None
    assert MustDrop(keep=1.0).input_budget(576) == 576
    assert MustDrop(keep=1).input_budget(576) is None


@pytest.mark.parametrize(("has_cls", "group", "width"), [(True, 1, 1024), (False, 1, 1152), (False, 4, 1280)])
def test_scoring_is_a_small_part_of_a_prefill(has_cls: bool, group: int, width: int) -> None:
    work = Work(
        patches=576 * group, tokens=576, shown=576, kept=576,
        encoder_width=width, encoder_heads=16, decoder_width=4096,
        decoder_heads=32, prompt=640, text=64, encoder_patches=(576 * group + has_cls,) * 24, encoder_layers=(0,),
        decoder_layers=(2, 6, 10, 14), has_cls=has_cls, text_after=64,
    )  # fmt: skip
    prefill = flops(LLAVA_7B, 576, text_tokens=64, images=1).total
    assert 0 < MustDrop().flops(work) < 0.005 * prefill


@pytest.mark.parametrize(
    ("case", "tensor"),
    [
        ("lsm_s0", "out"),
        ("lsm_batch", "size"),
        ("keyset_s0", "index"),
        ("daf_s0", "keep"),
        ("prefill_s0", "decode_out"),
    ],
)
def test_a_corrupted_case_fails(case: str, tensor: str, tmp_path: Path) -> None:
    with np.load(CASES / f"{case}.npz") as file:
        arrays = {name: file[name] for name in file.files}
    arrays[tensor].flat[-1] += 1
    np.savez(tmp_path / "case.npz", **arrays)
    assert run_case("mustdrop", tmp_path / "case.npz").status == "FAIL"
    del arrays[tensor]
    np.savez(tmp_path / "case.npz", **arrays)
    if tensor != "decode_out":
        assert run_case("mustdrop", tmp_path / "case.npz").status == "UNKNOWN"


def test_another_methods_case_is_unknown(tmp_path: Path) -> None:
    shutil.copy(CASES.parent / "holov" / "case0.safetensors", tmp_path)
    assert run_case("mustdrop", tmp_path / "case0.safetensors").status == "UNKNOWN"


def test_the_key_set_is_that_of_the_towers_last_layer() -> None:
    kind = "llava-clip"
    inputs = prompt(kind, ROWS[kind][:1])
    model = make(kind, "eager")
    with torch.no_grad():
        maps = model.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions
    rows = [attention[0].mean(dim=0)[0, 1:] for attention in (maps[-1], maps[model.config.vision_feature_layer])]
    seen: list[Tensor] = []

    class Watched(MustDrop):
        def remember(self, stream: VisionStream) -> dict[str, Tensor]:
            found = super().remember(stream)
            seen.append(found["saliency"])
            return found

    with vtprune.wrapped(model, Watched(keep=0.4, merge=False)), torch.no_grad():
        model(**inputs)
    assert torch.allclose(seen[0], rows[0], atol=1e-6)
    assert not torch.allclose(seen[0], rows[1], atol=1e-3)
