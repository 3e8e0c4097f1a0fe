"""FastV and PyramidDrop: their scores and kept tokens against whole attention maps, and what their budgets mean."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import vtprune
from tests.cost.test_cost import LLAVA_7B
from tests.golden.runner import run_case
from tests.models import LONG, MODELS, ROWS, SHORT, TEXT, Row, make, prompt
from tests.oracle import TOLERANCE, compare, difference_from_masked, run_masked, run_wrapped
from tests.pruners.test_dual_attention import decoder_layer
from tests.streams import few
from vtprune.errors import ScoreError, VTPruneError
from vtprune.method.facts import ModelFacts, Work
from vtprune.method.pruner import Pruner, asked
from vtprune.method.views import DecoderLayer
from vtprune.pruners import FastV, PyramidDrop, VisionZip
from vtprune.pruners.parts.staged import scaled_layers
from vtprune.report.costs import flops

CASES = Path(__file__).parents[1] / "golden" / "cases"
FACTS = ModelFacts(True, 24, 32, 1)
LLAVA = "llava-clip"


def kept_per_layer(model: Any, inputs: dict[str, Tensor]) -> list[list[list[int]]]:
    """For each image, the tokens that each layer processed."""
    with torch.no_grad():
        model(**inputs)
    return [image.kept_per_layer for sample in vtprune.report(model).samples for image in sample.images]


def whole_row(layer: Any, hidden: Tensor, numbers: Tensor, rotary: Any, alive: list[int]) -> Tensor:
    """(len(alive),) the last token's attention in a Llama layer, head by head over the tokens `alive`, in fp64."""
    own, states = layer.self_attn, layer.input_layernorm(hidden[alive]).double()
    cos, sin = (part[0].double() for part in rotary(hidden[None], numbers[None]))
    size = own.head_dim

    def turned(states: Tensor) -> Tensor:
        half = size // 2
        return states * cos + torch.cat([-states[:, half:], states[:, :half]], dim=1) * sin

    found = []
    for head in range(own.config.num_attention_heads):
        group = head // own.num_key_value_groups
        query = turned(states @ own.q_proj.weight.double()[head * size : (head + 1) * size].T)
        key = turned(states @ own.k_proj.weight.double()[group * size : (group + 1) * size].T)
        found.append((key @ query[-1] / size**0.5).softmax(dim=0))
    return torch.stack(found).mean(dim=0)


@torch.no_grad()
def slow_kept(method: str, drops: dict[int, int], row: Row) -> list[list[int]]:
    """Tokens that each layer of the LLaVA processes, when each of `drops` (layer: count) drops the lowest by the
    attention of the layer before (FastV) or of that layer itself (PyramidDrop)."""
    model, inputs = make(LLAVA, "eager"), prompt(LLAVA, [row])
    decoder, seen = model.model.language_model, []
    handle = decoder.register_forward_pre_hook(lambda m, a, k: seen.append(k["inputs_embeds"][0]), with_kwargs=True)
    model(**inputs)
    handle.remove()
    hidden, places = seen[0], torch.arange(len(seen[0]))
    image = (inputs["input_ids"][0] == 90).nonzero().flatten()
    alive, kept, before = torch.ones(len(places), dtype=torch.bool), [], hidden
    for index, layer in enumerate(decoder.layers):
        if index in drops:
            scored, states = (decoder.layers[index - 1], before) if method == "fastv" else (layer, hidden)
            here = alive.nonzero().flatten().tolist()
            scores = dict(zip(here, whole_row(scored, states, places[here], decoder.rotary_emb, here), strict=True))
            ranked = sorted((int(p) for p in image if alive[p]), key=lambda place: (-float(scores[place]), place))
            alive[ranked[drops[index] :]] = False
        kept.append([int(place - image[0]) for place in image if alive[place]])
        mask = torch.full((len(places), len(places)), float("-inf")).triu(1)
        mask[:, ~alive] = float("-inf")
        mask[~alive] = 0.0
        before = hidden
        embeddings = decoder.rotary_emb(hidden[None], places[None])
        hidden = layer(hidden[None], attention_mask=mask[None, None], position_embeddings=embeddings)[0]
    return kept


@pytest.mark.parametrize("row", [LONG, SHORT, Row([0, 5], [(6, 6)], 7), Row([5, 0], [(6, 6)], 8)], ids=str)
@pytest.mark.parametrize(
    ("pruner", "drops"),
    [
        (FastV(ratio=0.75, layers=(2,)), {2: 9}),
        (FastV(keep=0.5, schedule="steps", layers=(1, 3)), {1: 18, 3: 9}),
        (PyramidDrop(), {1: 18, 3: 9, 4: 4}),
        (PyramidDrop(factor=0.7, layers=(2, 4)), {2: 25, 4: 17}),
    ],
    ids=str,
)
def test_the_tokens_that_stay_are_those_of_whole_attention_maps(
    pruner: Pruner, drops: dict[int, int], row: Row
) -> None:
    """The tiny LLaVA has two query heads to a key head, and its images stand first, inside, or last."""
    model = vtprune.wrap(make(LLAVA), pruner)
    assert kept_per_layer(model, prompt(LLAVA, [row])) == [slow_kept(pruner.name, drops, row)]


@pytest.mark.parametrize("pad", [0, 3])
@pytest.mark.parametrize("method", [FastV(), PyramidDrop()], ids=str)
def test_scores_are_the_last_rows_softmax_over_the_prompt_without_padding(method: Any, pad: int) -> None:
    layer = decoder_layer(pad=pad)
    maps = []
    for query, key in zip(layer.query, layer.key, strict=True):
        weights = (key[pad:] @ query[-1] * layer.scale).softmax(dim=0)
        maps.append(weights[layer.vision - pad])
    assert torch.allclose(method.scores(layer), torch.stack(maps).mean(dim=0), atol=1e-6)
    alone = replace(layer, query=layer.query[:, -1:], value=layer.value[:, :0])
    assert torch.equal(method.scores(alone), method.scores(layer))


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("pruner", [FastV(keep=0.4), PyramidDrop(keep=0.4)], ids=str)
def test_padding_changes_no_choice(pruner: Pruner, padding: str) -> None:
    model = vtprune.wrap(make(LLAVA), pruner)
    together = kept_per_layer(model, prompt(LLAVA, [LONG, SHORT, TEXT], padding))
    alone = [kept_per_layer(model, prompt(LLAVA, [row]))[0] for row in (LONG, SHORT)]
    assert together == alone


def test_ties_go_to_the_first_tokens_and_scores_that_are_no_numbers_are_refused() -> None:
    layer = replace(decoder_layer(), budget=3)
    same = replace(layer, key=torch.zeros_like(layer.key))
    for method in (FastV(), PyramidDrop()):
        selection = method.prune_decoder(same)
        assert selection is not None
        assert selection.kept.tolist() == [0, 1, 2]
        with pytest.raises(ScoreError, match=f"{method.name}: 8 of 8 token scores are NaN"):
            method.prune_decoder(replace(layer, key=torch.full_like(layer.key, float("nan"))))


def test_published_settings_keep_the_published_counts() -> None:
    assert FastV().bind(FACTS).counts(576, 576) == (576,) * 2 + (288,) * 30
    for ratio, count in ((0.5, 288), (0.75, 144), (0.875, 72), (0.9, 57)):
        counts = FastV(ratio=ratio, layers=(3,)).bind(FACTS).counts(576, 576)
        assert counts == (576,) * 3 + (count,) * 29
    pyramid = PyramidDrop().bind(FACTS)
    assert pyramid.counts(576, 576) == (576,) * 8 + (288,) * 8 + (144,) * 8 + (72,) * 8
    assert pyramid.default_keep * 576 == pyramid.counted.of(list(pyramid.counts(576, 576))) == 270
    # Every count rounds down, as in both references.
    assert PyramidDrop().bind(FACTS).counts(35, 35)[::8] == (35, 17, 8, 4)
    assert FastV(ratio=0.9).bind(FACTS).counts(30, 30)[-1] == 3


def test_published_layers_scale_with_the_depth() -> None:
    assert [scaled_layers((2,), depth) for depth in (2, 8, 28, 32, 40)] == [(1,), (1,), (2,), (2,), (3,)]
    assert [scaled_layers((8, 16, 24), depth) for depth in (2, 3, 4, 5, 28)] == [
        (1,), (1, 2), (1, 2, 3), (1, 3, 4), (7, 14, 21),
    ]  # fmt: skip


def test_a_low_budget_moves_pyramid_drops_stages_forward_and_explicit_ones_stay() -> None:
    assert PyramidDrop().places(0.47) == (8, 16, 24)
    early = PyramidDrop().places(64 / 576)
    assert early[0] < early[1] < early[2]
    assert early < (4, 8, 12)
    assert PyramidDrop(layers=(8, 16)).places(0.2) == (8, 16)
    counts = PyramidDrop(keep=64).bind(FACTS).counts(576, 576)
    assert 63 < sum(counts) / 32 <= 64
    with pytest.raises(VTPruneError, match=r"pyramid_drop: .* cannot keep 0\.2 of .* the 8 of 32 layers"):
        PyramidDrop(keep=0.2, layers=(8, 16, 24)).bind(FACTS)


@few
@given(
    method=st.sampled_from([FastV, PyramidDrop]),
    schedule=st.sampled_from(["constant", "steps", "linear", "shifted_cosine"]),
    depth=st.integers(2, 40),
    tokens=st.integers(1, 900),
    share=st.floats(0.3, 1.0),
    data=st.data(),
)
def test_the_mean_over_layers_is_at_most_what_was_asked(method, schedule, depth, tokens, share, data) -> None:
    keep = data.draw(st.sampled_from([share, max(1, round(share * tokens))]))
    pruner = method(keep=keep, schedule=schedule)
    budget, start = pruner.budget(tokens), pruner.places(0.0)[0]
    # What the layers before the first drop take, and one token in each of the others.
    assume(budget == tokens or (budget * depth >= start * tokens + depth - start))
    pruner = pruner.bind(replace(FACTS, decoder_depth=depth, first=False))
    counts = pruner.counts(tokens, tokens)
    assert list(counts) == sorted(counts, reverse=True)
    assert sum(counts) <= pruner.budget(tokens) * depth
    # A layer after which a count falls is one that the method is asked after.
    falls = {layer for layer in range(depth - 1) if counts[layer + 1] < counts[layer]}
    assert falls <= set(pruner.drop_layers())
    assert all(pruner.drop_budget(tokens, layer, tokens) == counts[layer + 1] for layer in falls)


def test_equal_methods_of_two_models_count_for_their_own_decoder() -> None:
    deep, flat = (FastV(keep=0.5).bind(replace(FACTS, decoder_depth=depth)) for depth in (32, 5))
    assert deep != flat
    assert deep.to_dict() == flat.to_dict()
    assert [len(one.counts(36, 36)) for one in (deep, flat, deep)] == [32, 5, 32]


@pytest.mark.parametrize("schedule", vtprune.method.schedules.NAMES)
@pytest.mark.parametrize("method", [FastV, PyramidDrop])
@pytest.mark.parametrize("keep", [0.4, 15, 36, 50])
def test_every_schedule_runs_within_its_budget_and_keeps_small_images_whole(method, schedule, keep) -> None:
    model = vtprune.wrap(make(LLAVA), method(keep=keep, schedule=schedule))
    (kept,) = kept_per_layer(model, prompt(LLAVA, [LONG]))
    counts = [len(layer) for layer in kept]
    budget = min(36, keep) if isinstance(keep, int) else 14
    assert sum(counts) <= budget * len(counts)
    assert counts == [36] * 5 if budget == 36 else counts[-1] < counts[0]
    assert all(set(after) <= set(before) for before, after in itertools.pairwise(kept))


def test_the_entropy_decides_by_image_within_one_budget() -> None:
    pruner = PyramidDrop(keep=20, schedule="entropy")
    model = vtprune.wrap(make(LLAVA), pruner)
    rows = [Row([3, 7], [(6, 6)], seed=seed) for seed in range(4)]
    counts = [[len(layer) for layer in kept] for kept in kept_per_layer(model, prompt(LLAVA, rows))]
    assert len({tuple(one) for one in counts}) > 1
    assert all(sum(one) <= 20 * 5 for one in counts)


@pytest.mark.parametrize("keep", [5, 7])
@pytest.mark.parametrize("schedule", ["steps", "entropy"])
def test_an_image_that_cannot_be_cut_to_a_count_is_kept_whole_with_the_reason(schedule: str, keep: int) -> None:
    model = vtprune.wrap(make(LLAVA), PyramidDrop(keep=keep, schedule=schedule))
    with pytest.warns(vtprune.KeptWholeWarning, match=r"pyramid_drop: .*raise keep, or drop earlier"):
        model(**prompt(LLAVA, [LONG]))
    image = vtprune.report(model).samples[0].images[0]
    assert image.kept_per_layer == [list(range(36))] * 5
    assert "raise keep, or drop earlier" in image.kept_whole


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "stages",
    [
        [VisionZip(keep=20), PyramidDrop(keep=9)],
        [VisionZip(keep=0.5), FastV(keep=0.3)],
        # Alone, a mean of 0.15 is out of reach of a decoder of 5 layers.
        [VisionZip(keep=0.3), PyramidDrop(keep=0.15)],
        [VisionZip(keep=0.3), PyramidDrop()],
        [VisionZip(keep=20), PyramidDrop(keep=9, schedule="entropy")],
        [PyramidDrop(keep=0.8, layers=(1,)), FastV(keep=0.6, layers=(2,))],
    ],
    ids=lambda stages: "+".join(f"{stage.name}-{stage.keep}" for stage in stages),
)
def test_stages_compose_exactly_where_fewer_tokens_enter(kind: str, stages: list[Pruner]) -> None:
    inputs = prompt(kind, ROWS[kind])
    model = vtprune.wrap(make(kind), stages)
    difference, report = difference_from_masked(kind, model, inputs)
    assert difference < TOLERANCE
    for sample in report.samples:
        for image in sample.images:
            mean = sum(map(len, image.kept_per_layer)) / len(image.kept_per_layer)
            entered, last = len(image.kept), stages[-1]
            wanted = asked(last)
            assert mean <= (wanted if isinstance(wanted, int) else max(1, round(wanted * image.tokens)))
            assert len(image.kept_per_layer[-1]) < entered


def test_a_share_out_of_reach_alone_is_refused_when_wrapping() -> None:
    for pruner in (FastV(keep=0.15), PyramidDrop(keep=0.15)):
        with pytest.raises(VTPruneError, match=f"{pruner.name}: .* or combine with a method that prunes before"):
            vtprune.wrap(make(LLAVA), pruner)


def test_the_released_pyramid_renumbers_positions_in_every_layer() -> None:
    inputs = prompt(LLAVA, [LONG, SHORT])
    model = vtprune.wrap(make(LLAVA), PyramidDrop(variant="released"))
    logits, report, _ = run_wrapped(LLAVA, model, inputs)
    expected = run_masked(LLAVA, vtprune.unwrap(model), inputs, report, compact=True)
    assert compare(logits, expected, inputs) < TOLERANCE


def test_only_the_layers_before_a_drop_are_scored() -> None:
    work = Work(
        patches=576, tokens=576, shown=576, kept=576,
        encoder_width=1024, encoder_heads=16, decoder_width=4096, decoder_heads=32,
        prompt=640, text=64, encoder_patches=(577,) * 24, encoder_layers=(), decoder_layers=(7, 15, 23),
        decoder_kv_width=1024, decoder_tokens=(640, 352, 208), first_asked=(True, True, False),
    )  # fmt: skip
    row = [2 * tokens * 4096 for tokens in work.decoder_tokens]
    keys = [2 * tokens * 4096 * 1024 for tokens in work.decoder_tokens]
    assert FastV().flops(work) == sum(row)
    assert PyramidDrop().flops(work) == sum(row) + sum(keys[:2]) + 2 * 2 * 4096**2
    assert PyramidDrop().flops(work) < 0.01 * flops(LLAVA_7B, 576, text_tokens=64, images=1).total
    model = vtprune.wrap(make(LLAVA), PyramidDrop(keep=12))
    kept_per_layer(model, prompt(LLAVA, [LONG]))
    assert vtprune.report(model).stages[0].stage == "after decoder layers 0, 1, 2"


@pytest.mark.parametrize("method", [FastV, PyramidDrop])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layers": [2]}, "layers are ints in a tuple"),
        ({"layers": ()}, "rising ints of at least 1"),
        ({"layers": (0,)}, "rising ints of at least 1"),
        ({"layers": (True,)}, "rising ints of at least 1"),
        ({"layers": (2, 2), "schedule": "steps"}, "rising ints of at least 1"),
        ({"layers": (2.0,)}, "rising ints of at least 1"),
        ({"layers": (2, 3), "schedule": "constant"}, r"'constant' takes one layer, .* got layers \(2, 3\)"),
        ({"layers": (2, 3), "schedule": "linear"}, "'linear' takes one layer"),
        ({"schedule": "pyramid"}, "schedule is one of 'constant', .*'entropy', got 'pyramid'"),
        ({"schedule": None}, "schedule is one of"),
        ({"keep": True}, "got True"),
        ({"keep": 0.0}, "got 0.0"),
        ({"keep": float("nan")}, "got nan"),
    ],
)
def test_bad_options_are_refused(method, options: dict[str, Any], says: str) -> None:
    with pytest.raises(VTPruneError, match=says):
        method(**options)


@pytest.mark.parametrize(("method", "option"), [(FastV, "ratio"), (PyramidDrop, "factor")])
@pytest.mark.parametrize("value", [0, 1, 1.5, -0.5, True, "0.5", float("nan")])
def test_shares_lie_between_0_and_1_and_contradict_a_keep(method, option: str, value: object) -> None:
    with pytest.raises(VTPruneError, match=f"{option} is a number between 0 and 1"):
        method(**{option: value})
    with pytest.raises(VTPruneError, match=f"keep and {option} contradict each other"):
        method(keep=0.5, **{option: 0.5})


def test_decoders_that_are_too_flat_are_refused() -> None:
    for method in (FastV, PyramidDrop):
        with pytest.raises(VTPruneError, match=f"{method().name}: .*at least 2 of them, got 1"):
            method().bind(replace(FACTS, decoder_depth=1))
        with pytest.raises(VTPruneError, match=r"drop before decoder layer 5 .* at least 6 decoder layers, got 5"):
            method(layers=(5,)).bind(replace(FACTS, decoder_depth=5))
        assert method().bind(replace(FACTS, decoder_depth=2)).drop_layers() == (0,)


def test_search_space_names_the_schedules_that_the_layers_allow() -> None:
    assert FastV().search_space(576) == {}
    assert FastV(keep=0.5).search_space(576)["schedule"].choices == vtprune.method.schedules.NAMES
    several = PyramidDrop(keep=0.5, layers=(1, 2)).search_space(576)["schedule"].choices
    assert several == ("steps", "entropy")
    for schedule in several:
        PyramidDrop(keep=0.5, layers=(1, 2), schedule=schedule)


def golden_arrays(folder: str) -> dict[str, Any]:
    """The arrays of the bundled case in a folder."""
    (path,) = (CASES / folder).glob("*.npz")
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


@pytest.mark.parametrize(
    ("folder", "tensor"),
    [
        ("fastv", "score"),
        ("fastv", "keep_img_index"),
        ("fastv", "last_hidden"),
        ("fastv", "cache_lens"),
        ("fastv", "decode_out"),
        ("pyramiddrop", "last_hidden"),
        ("pyramiddrop", "cache_lens"),
        ("pyramiddrop", "decode_out"),
    ],
)
def test_a_corrupted_case_fails(folder: str, tensor: str, tmp_path: Path) -> None:
    arrays = golden_arrays(folder)
    arrays[tensor].flat[-1] += 1
    np.savez(tmp_path / "case.npz", **arrays)
    assert run_case(folder, tmp_path / "case.npz").status == "FAIL"


@pytest.mark.parametrize("folder", ["fastv", "pyramiddrop"])
def test_a_case_needs_no_decode_step_but_its_inputs(folder: str, tmp_path: Path) -> None:
    arrays = golden_arrays(folder)
    del arrays["decode_in"], arrays["decode_out"]
    np.savez(tmp_path / "case.npz", **arrays)
    assert run_case(folder, tmp_path / "case.npz").status == "ok"
    for name in ("x", "n_img", "last_hidden"):
        np.savez(tmp_path / "case.npz", **{key: value for key, value in arrays.items() if key != name})
        assert run_case(folder, tmp_path / "case.npz").status == "UNKNOWN"
    shutil.copy(CASES / "holov" / "case0.safetensors", tmp_path)
    assert run_case(folder, tmp_path / "case0.safetensors").status == "UNKNOWN"


def test_a_layer_whose_budget_is_met_is_not_scored() -> None:
    class Deaf(FastV):
        def scores(self, layer: DecoderLayer) -> Tensor:
            raise AssertionError("scored")

    assert Deaf().prune_decoder(decoder_layer()) is None
