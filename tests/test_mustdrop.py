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
from tests.golden.runner import run_case
from tests.models import MODELS, ROWS, make, prompt
from tests.oracle import TOLERANCE, compare, next_tokens, run_masked, run_wrapped
from tests.streams import few, stream
from tests.test_cost import LLAVA_7B
from vtprune.cost import flops
from vtprune.errors import ScoreError, VTPruneError
from vtprune.merging import flow_together
from vtprune.pruner import ModelFacts, ScoringWork
from vtprune.pruners import MustDrop
from vtprune.pruners import dual_attention as dual
from vtprune.pruners.windows import alike_windows, batch_windows, window_members, window_similarity
from vtprune.stream import DecoderLayer, EncoderLayer

CASES = Path(__file__).parent / "golden" / "cases" / "mustdrop"
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
    assert windows.shape == (2, 4, 9)
    similarity = window_similarity(torch.ones(2, 16, 3), windows)
    spare = torch.tensor([1, 16])
    assert alike_windows(similarity, windows, 0.0, spare).tolist() == [[False] * 4, [True, True, True, False]]


def decoder_layer(*, before: int = 3, tokens: int = 8, after: int = 4, pad: int = 0, seed: int = 0) -> DecoderLayer:
    """A random layer: padding (NaN), text, an image, text; the first two tokens are the key set."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(3, 2, pad + before + tokens + after, 4, generator=generator)
    states[:, :, :pad] = float("nan")
    vision = pad + before + torch.arange(tokens)
    text = torch.cat([pad + torch.arange(before), pad + before + tokens + torch.arange(after)])
    key = torch.arange(tokens) < 2
    return DecoderLayer(
        *states, vision, states.shape[2] - 1, 0.5, tokens, torch.arange(tokens), tokens, 2, 32, text,
        {"key": key, "entering": torch.full((tokens,), tokens), "saliency": torch.zeros(tokens)},
    )  # fmt: skip


def naive_attention(layer: DecoderLayer, rows: list[int], first: int) -> Tensor:
    """(T, N) head-mean causal attention, a row and a head at a time."""
    found = []
    for row in rows:
        heads = []
        for query, key in zip(layer.query.double(), layer.key.double(), strict=True):
            weights = (key[first : row + 1] @ query[row] * layer.scale).softmax(dim=0)
            heads.append(torch.stack([weights[at - first] if at <= row else weights[0] * 0 for at in layer.vision]))
        found.append(torch.stack(heads).mean(dim=0))
    return torch.stack(found)


@pytest.mark.parametrize("pad", [0, 2])
def test_the_texts_rows_are_the_layers_own_causal_attention(pad: int) -> None:
    layer = decoder_layer(pad=pad, before=2)
    rows = dual.rows_after(layer, text_only=True)
    assert rows.tolist() == [pad + 10, pad + 11, pad + 12, pad + 13]
    want = naive_attention(layer, rows.tolist(), pad)
    assert torch.allclose(dual.attention_to_image(layer, rows).double(), want, atol=1e-6)


def test_rows_are_text_after_the_image_or_all_tokens_after_it_or_the_last_one() -> None:
    layer = replace(decoder_layer(after=4), text=torch.tensor([0, 1, 2, 13, 14]))
    assert dual.rows_after(layer, text_only=True).tolist() == [13, 14]
    assert dual.rows_after(layer, text_only=False).tolist() == [11, 12, 13, 14]
    last = decoder_layer(after=0)
    assert dual.rows_after(last, text_only=True).tolist() == [10]
    assert dual.rows_after(last, text_only=False).tolist() == [10]


@few
@given(seed=st.integers(0, 99), first=st.floats(0, 0.3), second=st.floats(0, 0.3))
def test_a_token_goes_that_is_below_both_thresholds_and_no_key_token(seed, first, second):
    layer = decoder_layer(seed=seed)
    attention = dual.attention_to_image(layer, dual.rows_after(layer, text_only=True))
    sums = attention.sum(dim=0).tolist()
    stays = []
    for token in range(8):
        low = sums[token] < first * float(attention.sum()) - 1e-9
        stays.append(token < 2 or not (low and float(attention[:, token].max()) < second))
    pruner = MustDrop(global_threshold=first, individual_threshold=second)
    assert pruner.prune_decoder(layer).kept.tolist() == [token for token in range(8) if stays[token]]


def test_thresholds_of_zero_drop_nothing_and_high_ones_leave_the_key_set() -> None:
    layer = decoder_layer()
    nothing = MustDrop(global_threshold=0, individual_threshold=0).prune_decoder(layer)
    assert nothing.kept.tolist() == list(range(8))
    high = MustDrop(global_threshold=2, individual_threshold=2)
    assert high.prune_decoder(layer).kept.tolist() == [0, 1]
    best = dual.attention_to_image(layer, dual.rows_after(layer, text_only=True)).sum(dim=0).argmax()
    no_key = {**layer.memory, "key": torch.zeros(8, dtype=torch.bool)}
    assert high.prune_decoder(replace(layer, memory=no_key)).kept.tolist() == [int(best)]


def test_ranking_is_raising_both_thresholds_together() -> None:
    attention = 0.05 * torch.rand(5, 20, generator=torch.Generator().manual_seed(1)) ** 3
    factor = dual.threshold_factor(attention)
    for count in range(1, 20):
        edge = float(factor.sort(descending=True).values[count - 1 : count + 1].mean())
        passed = dual.passes(attention, edge * dual.GLOBAL, edge * dual.INDIVIDUAL)
        assert passed.nonzero().flatten().tolist() == dual.top_with_key(factor, factor < 0, count).tolist()
    assert bool(torch.isfinite(dual.threshold_factor(torch.zeros(2, 3))).all())


def test_the_key_set_is_certain_of_half_the_places() -> None:
    scores, key = torch.tensor([1.0, 9, 2, 8, 3, 7]), torch.tensor([1, 0, 1, 0, 1, 0]).bool()
    assert dual.top_with_key(scores, key, 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert dual.top_with_key(scores, key, 4).tolist() == [1, 2, 3, 4]
    assert dual.top_with_key(scores, key, 2).tolist() == [1, 4]
    assert dual.top_with_key(scores, key, 1).tolist() == [1]


def test_key_set_is_the_salient_share_rounded_up() -> None:
    shown = replace(stream((1, 5, 5)), last_signals=stream((1, 5, 5)).signals)
    memory = MustDrop().remember(shown)
    assert memory["key"].nonzero().flatten().tolist() == sorted(memory["saliency"].topk(2).indices.tolist())
    assert int(MustDrop(key_share=0.0).remember(shown)["key"].sum()) == 0
    assert int(MustDrop(key_share=1.0).remember(shown)["key"].sum()) == 25
    assert int(dual.key_set(torch.rand(576), 0.08).sum()) == 47


@pytest.mark.parametrize(
    ("depth", "layers"),
    [(3, (1,)), (5, (1, 2)), (16, (1, 3, 5, 7)), (28, (2, 5, 9, 12)), (32, (2, 6, 10, 14)), (40, (3, 8, 13, 18))],
)
def test_filter_layers_are_fractions_of_the_depth(depth: int, layers: tuple[int, ...]) -> None:
    assert MustDrop().decoder_layers(depth) == layers
    assert MustDrop().cache_layers(depth) == tuple(range(layers[0], layers[-1] + 1))
    assert MustDrop(cut_cache=False).cache_layers(depth) == ()
    assert sum(dual.stage_lengths(layers, depth)) == depth


@few
@given(alive=st.integers(1, 3000), budget=st.integers(1, 3000), depth=st.integers(3, 48))
def test_the_schedule_meets_the_budget_and_wastes_little(alive, budget, depth):
    lengths = dual.stage_lengths(dual.filter_layers(depth), depth)
    entered = dual.most_entering(alive, budget, lengths)
    counts = dual.schedule(entered, budget, lengths)
    assert counts[0] == entered <= alive
    assert counts == sorted(counts, reverse=True)
    assert min(counts) >= 1
    mean = sum(c * n for c, n in zip(counts, lengths, strict=True)) / depth
    assert mean <= budget
    if alive > budget:
        # Rounding down costs a token a stage at the most; entering one more would cost a whole one.
        assert mean > 0.9 * budget - len(counts) - 1


def test_published_budgets_at_576_tokens() -> None:
    lengths = [3, 4, 4, 4, 17]
    assert [dual.most_entering(576, budget, lengths) for budget in (192, 128, 64)] == [576, 543, 271]
    assert dual.schedule(576, 192, lengths)[0] == 576
    assert dual.schedule(192, 192, lengths) == [192] * 5


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
    grids = {"image_grid_thw": inputs["image_grid_thw"]} if "image_grid_thw" in inputs else {}
    with torch.no_grad():
        features = [one.clone() for one in model.model.get_image_features(inputs["pixel_values"], **grids)[1]]
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
    assert MustDrop().for_model(facts).layers == (1, 2)
    assert MustDrop(layers=(0, 3)).for_model(facts).layers == (0, 3)
    with pytest.raises(VTPruneError, match="layers 0 to L - 2 of L, got 2, 4 of 5"):
        MustDrop(layers=(2, 4)).for_model(facts)
    with pytest.raises(VTPruneError, match="a decoder of 2 has none"):
        MustDrop().for_model(replace(facts, decoder_depth=2))


def test_windows_need_the_whole_grid() -> None:
    layer = encoder_layer([((1, 3, 3), torch.ones(9, 4))])
    with pytest.raises(VTPruneError, match="windows of whole images"):
        MustDrop().prune_encoder(replace(layer, valid=torch.arange(9)[None] < 8))


def test_search_space_names_fields_and_fits_the_keep() -> None:
    assert set(MustDrop(keep=0.2).search_space()) == {"merge_threshold", "key_share"}
    assert set(MustDrop(keep=0.2, merge=False).search_space()) == {"key_share"}
    space = MustDrop().search_space()
    assert set(space) == {"merge_threshold", "key_share", "global_threshold", "individual_threshold"}
    assert MustDrop(**{name: one.high for name, one in space.items()}).adaptive
    assert not MustDrop(keep=1.0).adaptive
    assert MustDrop(keep=1).adaptive


@pytest.mark.parametrize(("has_cls", "group", "width"), [(True, 1, 1024), (False, 1, 1152), (False, 4, 1280)])
def test_scoring_is_a_small_part_of_a_prefill(has_cls: bool, group: int, width: int) -> None:
    work = ScoringWork(
        patches=576 * group, tokens=576, kept=576, encoder_width=width, encoder_heads=16, decoder_width=4096,
        decoder_heads=32, prompt=640, text=64, encoder_patches=(576 * group + has_cls,) * 24, encoder_layers=(0,),
        decoder_layers=(2, 6, 10, 14), has_cls=has_cls,
    )  # fmt: skip
    prefill = flops(LLAVA_7B, 576, text_tokens=64, images=1).total
    assert 0 < MustDrop().scoring_flops(work) < 0.005 * prefill


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
