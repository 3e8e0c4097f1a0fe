"""FlowCut: its score, its prune counts, and both its stages."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.streams import few
from vtprune.errors import ScoreError, VTPruneError
from vtprune.method.choosing import top_mask
from vtprune.method.facts import ModelFacts
from vtprune.method.views import DecoderLayer, EncoderLayer
from vtprune.pruners import FlowCut
from vtprune.pruners.flowcut import entropies, flow_score, prune_count, shares


def test_flowcut_score_by_hand():
    attention, semantic = torch.tensor([[0.2, 0.2]]), torch.tensor([[0.1, 0.3]])
    density = torch.tensor([[2.0, 4.0]])
    assert torch.allclose(flow_score(attention, semantic, density), torch.tensor([[1.5, 5.0]]))
    assert torch.allclose(flow_score(attention, None, density), torch.tensor([[0.4, 0.8]]))


def test_flowcut_prunes_more_where_attention_is_focused():
    even, focused = torch.full((16,), 1 / 16), torch.zeros(16)
    focused[3] = 0.7
    found = entropies(shares(torch.stack([even, focused])))
    assert [prune_count(one, 16, 4, 4) for one in found] == [0, 6]
    assert [prune_count(one, 16, 17, 4) for one in found] == [0, 0]
    assert prune_count(float("nan"), 16, 4, 4) == 0


def test_flowcut_entropy_ignores_padding():
    attention = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    padded = torch.nn.functional.pad(attention, (0, 9))
    assert entropies(shares(padded)) == entropies(shares(attention)) == [pytest.approx(1.75 * math.log(2))]


def test_top_mask_skips_padding_and_prefers_low_indices():
    scores = torch.tensor([[1.0, 5, 5, 9], [float("nan"), 0, 0, 0]])
    valid = torch.tensor([[True, True, True, False], [False, True, True, True]])
    mask = top_mask(scores, [2, 2], valid)
    assert mask.tolist() == [[False, True, True, False], [False, True, True, False]]
    assert top_mask(scores, [1, 4], valid).tolist() == [[False, True, False, False], [False, True, True, True]]
    assert top_mask(scores[:1], [2], None).tolist() == [[False, True, False, True]]


def encode(
    pruner: FlowCut, images: list[Tensor], budgets: list[int], *, prefix: int, group: int, depth: int
) -> list[list[int]]:
    """The tokens of each image that survive an encoder whose layers are given, with padding and compaction.

    images: (depth, 3, H, prefix + N * group, d) queries, keys and values of each image.
    """
    totals = [(image.shape[-2] - prefix) // group for image in images]
    alive = [torch.arange(total) for total in totals]
    memory: dict[str, Tensor] = {}
    for index in range(depth):
        longest = max(map(len, alive))
        states = torch.full((len(images), *images[0].shape[1:3], prefix + longest * group, images[0].shape[-1]), 7.0)
        valid = torch.zeros(len(images), longest, dtype=torch.bool)
        for row, (image, left) in enumerate(zip(images, alive, strict=True)):
            patches = (left[:, None] * group + torch.arange(group)).flatten() + prefix
            places = torch.cat([torch.arange(prefix), patches])
            states[row, :, :, : len(places)] = image[index][:, :, places]
            valid[row, : len(left)] = True
        query, key, value = states.unbind(1)
        layer = EncoderLayer(
            query, key, value, valid, torch.tensor(totals), torch.tensor(budgets), index, depth, 0.5, prefix,
            group, memory, valid.float(), ((1, 1, 1),) * len(images),
        )  # fmt: skip
        selection = pruner.prune_encoder(layer)
        if selection is None:
            continue
        mask = selection.keep
        assert selection.settled().counts == tuple(mask.sum(dim=1).tolist())
        assert not bool((mask & ~valid).any())
        alive = [left[mask[row, : len(left)]] for row, left in enumerate(alive)]
        longest = max(map(len, alive))
        for name, scores in memory.items():
            compacted = torch.full((len(images), longest), float("nan"))
            for row, left in enumerate(alive):
                compacted[row, : len(left)] = scores[row][mask[row]]
            memory[name] = compacted
    return [left.tolist() for left in alive]


def towers(sizes: list[int], *, prefix: int, group: int, depth: int, seed: int) -> list[Tensor]:
    """Random layers for images of these many tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(depth, 3, 2, prefix + size * group, 4, generator=generator) for size in sizes]


@few
@given(
    sizes=st.lists(st.integers(2, 24), min_size=1, max_size=4),
    keep=st.sampled_from([1, 5, 0.2, 0.5, 0.9]),
    layout=st.sampled_from([(1, 1), (0, 1), (0, 4)]),
    depth=st.integers(2, 7),
    seed=st.integers(0, 99),
)
def test_flowcut_in_a_ragged_batch_is_flowcut_alone(sizes, keep, layout, depth, seed):
    prefix, group = layout
    options = {"prefix": prefix, "group": group, "depth": depth}
    images = towers(sizes, seed=seed, **options)
    pruner = FlowCut(keep=keep)
    budgets = [pruner.budget(size) for size in sizes]
    together = encode(pruner, images, budgets, **options)
    alone = [encode(pruner, [i], [b], **options)[0] for i, b in zip(images, budgets, strict=True)]
    assert together == alone
    assert [len(kept) for kept in together] == budgets
    assert all(kept == sorted(set(kept)) for kept in together)


def test_released_flowcut_shares_the_prune_count():
    options = {"prefix": 1, "group": 1, "depth": 6}
    images = towers([20, 20, 20], seed=3, **options)
    images[0][:, 1, :, 5] *= 9
    shared = FlowCut(variant="released")
    layer_counts = {len(kept) for kept in encode(shared, images, [4, 4, 4], **options)}
    assert layer_counts == {4}
    assert shared.renumbers
    assert not FlowCut().renumbers


def test_flowcut_prunes_at_every_second_layer_and_last_to_the_budget():
    for prefix, depth, layers in ((1, 7, [1, 3, 5]), (0, 6, [1, 3, 5]), (1, 6, [0, 2, 4]), (0, 1, [0])):
        image = towers([16], prefix=prefix, group=1, depth=depth, seed=1)[0]
        memory: dict[str, Tensor] = {}
        acted = []
        for index in range(depth):
            query, key, value = image[index][:, None].unbind(0)
            layer = EncoderLayer(
                query, key, value, torch.ones(1, 16, dtype=torch.bool), torch.tensor([16]), torch.tensor([4]),
                index, depth, 0.5, prefix, 1, memory, torch.ones(1, 16), ((1, 4, 4),),
            )  # fmt: skip
            selection = FlowCut().prune_encoder(layer)
            if selection is not None:
                acted.append(index)
                left = int(selection.keep.sum())
        assert acted == layers
        assert left == 4


def test_flowcut_nan_raises_but_nan_padding_does_not():
    valid = torch.tensor([[True, True, True, False]])
    states = torch.randn(3, 1, 2, 5, 4)
    states[:, :, :, -1] = float("nan")
    for prefix in (0, 1):
        query, key, value = states[..., 1 - prefix :, :].unbind(0)
        layer = EncoderLayer(
            query, key, value, valid, torch.tensor([4]), torch.tensor([1]), 0, 1 + prefix, 0.5, prefix, 1, {},
            valid.float(), ((1, 2, 2),),
        )  # fmt: skip
        selection = FlowCut().prune_encoder(layer)
        assert selection is not None
        assert not selection.keep[0, 3]
        bad = replace(layer, valid=torch.ones_like(valid), alive=(), memory={})
        with pytest.raises(ScoreError, match="flowcut"):
            FlowCut().prune_encoder(bad)
        # A layer at which nothing drops keeps what it found for the next one that chooses.
        assert FlowCut().prune_encoder(replace(bad, depth=2 + prefix)) is None
        sane = {name: torch.ones(1, 2, 5 - 1 + prefix, 4) for name in ("query", "key", "value")}
        with pytest.raises(ScoreError, match="flowcut"):
            FlowCut().prune_encoder(replace(bad, index=1, depth=2 + prefix, **sane))


def test_flowcut_stages_follow_the_model():
    facts = ModelFacts(has_cls=True, encoder_depth=23, decoder_depth=32, group=1)
    one = FlowCut(keep=64).bind(facts)
    two = FlowCut(keep=64).bind(replace(facts, has_cls=False))
    assert (one.stages, two.stages) == (1, 2)
    assert (one.encoder_budget(576), one.budget(576)) == (64, 64)
    assert (two.encoder_budget(576), two.budget(576)) == (128, 64)
    assert two.encoder_budget(100) == 100
    assert (one.drop_layers(), two.drop_layers()) == ((), (1,))
    assert FlowCut(stages=1).bind(replace(facts, has_cls=False)).stages == 1


def test_flowcut_says_where_a_model_is_too_shallow():
    facts = ModelFacts(has_cls=False, encoder_depth=4, decoder_depth=2, group=1)
    with pytest.raises(VTPruneError, match="at least 3 decoder layers, got 2; stages=1 works"):
        FlowCut().bind(facts)
    assert FlowCut(stages=1).bind(facts).stages == 1
    with pytest.raises(VTPruneError, match="at least 2 encoder layers"):
        FlowCut().bind(replace(facts, has_cls=True, encoder_depth=1))


def decoder_layer(budget: int) -> DecoderLayer:
    """A layer where tokens 3 and 1 of four match the last prompt token best."""
    key = torch.zeros(1, 6, 2)
    key[0, 1:5, 0] = torch.tensor([0.0, 2.0, 1.0, 3.0])
    query, value = torch.zeros(1, 6, 2), torch.ones(1, 6, 2)
    query[0, 5, 0] = 1.0
    vision = torch.arange(1, 5)
    return DecoderLayer(query, key, value, vision, 5, 1.0, 4, torch.arange(4), budget, 1, 4, vision[:0], {})


def test_flowcut_second_stage_by_hand():
    assert FlowCut(stages=2).prune_decoder(decoder_layer(2)).kept.tolist() == [1, 3]
    assert FlowCut(stages=2).prune_decoder(decoder_layer(4)) is None
    layer = decoder_layer(2)
    layer.key[0, 2, 0] = float("inf")
    with pytest.raises(ScoreError, match="flowcut"):
        FlowCut(stages=2).prune_decoder(layer)
