"""VisionZip: its budgets, what it keeps and merges, and the place of CLS."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import vtprune
from tests.golden.anyres import join_crops
from tests.layers import batch_layer, image_states, naive_metric, naive_saliency
from tests.models import ROWS, make, prompt
from tests.streams import few
from vtprune.encoder.merging import flow_together
from vtprune.errors import ScoreError, VTPruneError
from vtprune.method.facts import Work
from vtprune.pruners import VisionZip
from vtprune.pruners.visionzip import zip_tokens

LAYOUTS = st.sampled_from([(1, 1), (0, 1), (0, 4)])


@pytest.mark.parametrize(
    ("keep", "contextual"), [(192, 30), (128, 20), (64, 10), (32, 5), (1, 0), (2, 0), (3, 1), (4, 1), (6, 1), (13, 2)]
)
def test_the_published_budgets_come_out(keep: int, contextual: int) -> None:
    assert VisionZip(keep=keep).contextual_count(keep) == contextual


def test_a_share_or_a_count_of_contextual_tokens() -> None:
    assert VisionZip(contextual=0.5).contextual_count(10) == 5
    assert VisionZip(contextual=0.01).contextual_count(10) == 1
    assert VisionZip(contextual=0.0).contextual_count(10) == 0
    assert VisionZip(contextual=7).contextual_count(10) == 7
    assert VisionZip(contextual=7).contextual_count(4) == 3
    assert VisionZip(contextual=0).contextual_count(10) == 0


@pytest.mark.parametrize("contextual", [1.0, -1, -0.1, float("nan"), True, "a"])
def test_a_share_that_makes_no_sense_is_refused(contextual: Any) -> None:
    with pytest.raises(VTPruneError, match="visionzip: contextual is a count"):
        VisionZip(contextual=contextual)


def test_a_count_that_contradicts_keep_is_refused() -> None:
    with pytest.raises(VTPruneError, match=r"contextual=8 leaves nothing of keep=8.*most that works is 7"):
        VisionZip(keep=8, contextual=8)


# Against a plain reference of the method's description


def reference(
    image: Tensor, keep: int, contextual: int, *, prefix: int, group: int, cls: bool
) -> tuple[list[int], Any]:
    """Kept tokens and {target: members} of one image, the token in whose place CLS stands among the kept."""
    scores = naive_saliency(image, prefix=prefix, group=group).tolist()
    metric = naive_metric(image, prefix=prefix, group=group)
    with_cls = cls and prefix > 0 and keep - contextual >= 2
    patches = keep - contextual - with_cls
    dominant = sorted(sorted(range(len(scores)), key=lambda token: -scores[token])[:patches])
    rest = [token for token in range(len(scores)) if token not in dominant]
    step = max(1, len(rest) // contextual) if contextual else 1
    targets = [rest[number * step] for number in range(contextual)]
    members: dict[int, list[int]] = {target: [] for target in targets}
    for token in rest:
        if token not in targets and targets:
            cosines = [float(metric[token] @ metric[target]) for target in targets]
            members[targets[max(range(len(targets)), key=lambda number: cosines[number])]].append(token)
    kept = dominant + targets
    if with_cls:
        kept.append(min(token for token in range(len(scores)) if token not in kept))
    return sorted(kept), members


@few
@given(
    sizes=st.lists(st.integers(2, 30), min_size=1, max_size=4),
    keep=st.integers(1, 14),
    contextual=st.sampled_from([None, 0, 2, 0.5]),
    layout=LAYOUTS,
    cls=st.booleans(),
    seed=st.integers(0, 999),
)
def test_each_image_of_a_batch_is_zipped_as_described(sizes, keep, contextual, layout, cls, seed):
    prefix, group = layout
    sizes = [size + keep for size in sizes]
    images = [image_states(n, prefix=prefix, group=group, seed=seed + row) for row, n in enumerate(sizes)]
    pruner = VisionZip(keep=max(keep, 3 if contextual == 2 else 1), contextual=contextual, cls=cls)
    budget = pruner.budget(max(sizes))
    selection = pruner.prune_encoder(batch_layer(images, [budget] * len(images), prefix=prefix, group=group))
    for row, image in enumerate(images):
        own = selection.keep[row].nonzero().flatten().tolist()
        contextual_count = pruner.contextual_count(budget)
        kept, members = reference(image, budget, contextual_count, prefix=prefix, group=group, cls=cls)
        assert own == kept
        assert len(own) == budget
        for target, flowing in members.items():
            assert [t for t in range(sizes[row]) if int(selection.into[row, t]) == target and t != target] == flowing
            vectors = torch.randn(len(selection.into[row]), 3)
            merged = flow_together(vectors, selection.into[row], selection.weights[row])[target]
            expected = vectors[target] + (vectors[flowing].mean(dim=0) if flowing else 0)
            assert torch.allclose(merged, expected, atol=1e-5)


def test_without_merging_the_same_tokens_go_on_as_they_are() -> None:
    images = [image_states(30, prefix=1, group=1, seed=seed) for seed in (1, 2)]
    layer = batch_layer(images, [12, 12], prefix=1, group=1)
    merged, plain = (VisionZip(keep=12, merge=merge).prune_encoder(layer) for merge in (True, False))
    assert torch.equal(merged.keep, plain.keep)
    flows = plain.targets >= 0
    assert not bool((flows & ~plain.keep).any())
    assert bool((plain.shares == 1).all())


def test_cls_takes_the_place_of_the_first_token_that_does_not_go_on() -> None:
    scores = torch.tensor([[5.0, 0, 4, 0, 0, 3, 0, 0]])
    metric = torch.nn.functional.normalize(torch.randn(1, 8, 4), dim=-1)
    zipped = zip_tokens(scores, metric, torch.ones(1, 8, dtype=torch.bool), alive=[8], dominant=[3], contextual=[2])
    assert zipped.dominant.nonzero()[:, 1].tolist() == [0, 2, 5]
    assert zipped.targets.nonzero()[:, 1].tolist() == [1, 4]
    selection = zipped.selection(merge=True, cls=[True])
    assert selection.cls.tolist() == [3]
    assert selection.keep.nonzero()[:, 1].tolist() == [0, 1, 2, 3, 4, 5]
    assert int(selection.into[0, 3]) in (1, 4), "its own vector still flows into a target"
    assert zipped.selection(merge=True, cls=[False]).cls is None


def test_cls_goes_on_only_beside_a_dominant_patch() -> None:
    layer = batch_layer([image_states(9, prefix=1, group=1, seed=3)], [1], prefix=1, group=1)
    for budget, there in ((1, False), (2, True), (3, True)):
        layer = replace(layer, budgets=(budget,))
        selection = VisionZip().prune_encoder(layer)
        assert (selection.cls is not None) is there
        assert selection.settled().counts == (budget,)
        assert int(selection.keep.sum()) == budget
    assert VisionZip(cls=False).prune_encoder(layer).cls is None


def test_nan_raises_but_nan_padding_does_not() -> None:
    images = [image_states(n, prefix=0, group=1, seed=n) for n in (12, 9)]
    layer = batch_layer(images, [4, 4], prefix=0, group=1)
    layer.key[1, :, 9:] = layer.query[1, :, 9:] = float("nan")
    assert not bool(VisionZip().prune_encoder(layer).keep[1, 9:].any())
    layer.key[0, 0, 3] = float("nan")
    with pytest.raises(ScoreError, match="visionzip"):
        VisionZip().prune_encoder(layer)


# In a model


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"cls": False}, {"merge": False}, {"contextual": 5}], ids=str)
@pytest.mark.parametrize("kind", ["llava-clip", "llava-siglip"])
def test_features_are_the_projected_vectors_of_the_reference(kind: str, options: dict[str, Any]) -> None:
    inputs = prompt(kind, ROWS[kind][:1])
    model = make(kind)
    layer, heads, prefix = model.model.vision_tower.encoder.layers[4], 4, int(kind == "llava-clip")
    seen: dict[str, Tensor] = {}
    projections = {"q": layer.self_attn.q_proj, "k": layer.self_attn.k_proj, "v": layer.self_attn.v_proj, "h": layer}
    handles = [
        module.register_forward_hook(lambda _m, _a, output, name=name: seen.update({name: output}))
        for name, module in projections.items()
    ]
    model.model.get_image_features(inputs["pixel_values"])
    for handle in handles:
        handle.remove()
    image = torch.stack([seen[name][0].unflatten(-1, (heads, -1)).transpose(0, 1) for name in "qkv"])
    pruner = VisionZip(keep=16, **options)
    hidden, scale = seen["h"][0], layer.self_attn.scale
    scaled = torch.stack([image[0] * scale / 0.5, image[1], image[2]])
    contextual = pruner.contextual_count(16)
    kept, members = reference(scaled, 16, contextual, prefix=prefix, group=1, cls=pruner.cls)
    vectors = hidden[prefix:].clone()
    for target, flowing in members.items():
        if flowing and pruner.merge:
            vectors[target] += hidden[prefix:][flowing].mean(dim=0)
    if pruner.cls and prefix:
        dominant = naive_saliency(scaled, prefix=1, group=1).topk(16 - contextual - 1).indices.tolist()
        (place,) = set(kept) - set(members) - set(dominant)
        vectors[place] = hidden[0]
    expected = model.model.multi_modal_projector(vectors[kept])
    vtprune.wrap(model, pruner)
    actual = model.model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    names = actual.abs().sum(dim=-1).nonzero().flatten()
    assert names.numel() == 16
    # A target with a single member may go by that member's place, so only the set of vectors is the same.
    distances = torch.cdist(actual[names], expected)
    assert sorted(distances.argmin(dim=1).tolist()) == list(range(16))
    assert float(distances.min(dim=1).values.max()) < 1e-3
    if not members or not pruner.merge:
        assert names.tolist() == kept


def test_the_report_says_what_flowed_where() -> None:
    inputs = prompt("llava-clip", ROWS["llava-clip"])
    model = vtprune.wrap(make("llava-clip"), VisionZip(keep=16))
    with torch.no_grad():
        model(**inputs)
    report = vtprune.report(model)
    for sample in report.samples:
        for image in sample.images:
            assert len(image.kept) == 16
            # All of the 36 tokens but the 13 dominant patches are in the two groups, that in CLS's place too.
            assert sum(len(merge.members) for merge in image.merged) == 36 - 13
            assert {merge.into for merge in image.merged} <= set(image.kept)
            assert all(sum(merge.weights) == pytest.approx(2) for merge in image.merged if len(merge.members) > 1)
    assert report.achieved_keep == pytest.approx(16 / 36)


def test_crops_of_a_large_image_are_joined_as_released() -> None:
    tokens = torch.arange(2 * 4 * 1.0).reshape(2, 4, 1)
    places = torch.tensor([[0, 3], [1, 2]])
    joined = join_crops(tokens, places, (1, 2), 2)
    assert joined.flatten().tolist() == [1, 5, 2, 6, 0, 4, 3, 7]


def test_scoring_is_one_row_and_the_similarities() -> None:
    work = Work(
        patches=576, tokens=576, shown=576, kept=64,
        encoder_width=1024, encoder_heads=16, decoder_width=4096, decoder_heads=32,
        prompt=600, text=24, encoder_patches=(577,) * 24, encoder_layers=(22,), decoder_layers=(), has_cls=True,
    )  # fmt: skip
    assert VisionZip(keep=64).flops(work) == 2 * 577 * 1024 + 2 * 576 * 10 * 64
