"""IA-RED^2: which patches its agents let go on, what they learn, and where the first of them stands."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import vtprune
from tests.flop_helper import measured_flops
from tests.layers import batch_layer, image_states
from tests.models import ROWS, make, prompt
from vtprune import IARED2
from vtprune.errors import ScoreError
from vtprune.method.facts import ModelFacts
from vtprune.method.views import EncoderLayer
from vtprune.pruners.iared2 import chances, entropy, likely
from vtprune.pruners.parts.patches import saliency

WIDTH = 12
FACTS = ModelFacts(has_cls=True, encoder_depth=6, decoder_depth=4, group=1, encoder_width=WIDTH)


def layer_of(method: IARED2, tokens: tuple[int, ...], budgets: list[int], index: int, **own: Any) -> EncoderLayer:
    """Images of so many tokens with a CLS token in front, hidden states and the method's untrained agents."""
    images = [image_states(count, prefix=1, group=1, seed=count) for count in tokens]
    layer = batch_layer(images, budgets, prefix=1, group=1, index=index, depth=6)
    hidden = torch.randn(len(tokens), max(tokens) + 1, WIDTH, generator=torch.Generator().manual_seed(0))
    return replace(layer, hidden=hidden, module=method.make_module(), **own)


def asked(method: IARED2, layer: EncoderLayer) -> Any:
    found = method.prune_encoder(layer)
    assert found is not None
    return found


def test_agents_stand_before_groups_of_equal_depth_the_first_before_the_first_layer() -> None:
    assert IARED2().bind(FACTS).agents == (-1, 1, 3)
    assert IARED2().bind(replace(FACTS, encoder_depth=23)).agents == (-1, 6, 14)
    assert IARED2(groups=4).bind(replace(FACTS, encoder_depth=12)).agents == (-1, 2, 5, 8)
    assert IARED2().bind(replace(FACTS, encoder_depth=2)).agents == (-1, 0)


def test_a_head_has_64_channels_where_that_divides_the_width() -> None:
    heads = {width: IARED2().bind(replace(FACTS, encoder_width=width)).heads for width in (384, 1024, 1152, 100, 12)}
    assert heads == {384: 6, 1024: 16, 1152: 18, 100: 1, 12: 1}


def test_a_chance_is_the_mean_over_heads_of_sigmoids_of_the_product_with_cls() -> None:
    method = IARED2(heads=3).bind(FACTS)
    layer = layer_of(method, (5,), [2], index=-1)
    agent: Any = layer.module[0]
    found = chances(agent, layer.hidden, layer.valid, prefix=1, group=1)
    states = layer.hidden[0]
    normed = (states - states.mean(-1, keepdim=True)) / (states.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    query, keys = agent.query(normed[0]).view(3, 4), agent.key(normed[1:]).view(5, 3, 4)
    expected = torch.stack([((query * key).sum(-1) / 2).sigmoid().mean() for key in keys])
    torch.testing.assert_close(found[0], expected)


def test_without_cls_the_mean_of_all_patches_asks_and_padding_does_not() -> None:
    agent = IARED2(heads=1).bind(FACTS).make_module()[0]
    states = torch.randn(1, 8, WIDTH)
    padded = torch.cat([states, torch.full((1, 4, WIDTH), float("nan"))], dim=1)
    alone = chances(agent, states, torch.ones(1, 4, dtype=torch.bool), prefix=0, group=2)
    valid = torch.arange(6)[None] < 4
    torch.testing.assert_close(chances(agent, padded, valid, prefix=0, group=2)[:, :4], alone)


def test_without_keep_what_is_likelier_than_not_goes_on_and_at_least_one() -> None:
    valid = torch.tensor([[True, True, True, True], [True, True, True, False]])
    found = likely(torch.tensor([[0.5, 0.6, 0.2, 0.51], [0.1, 0.3, 0.3, 0.9]]), valid)
    assert found.tolist() == [[False, True, False, True], [False, True, False, False]]


def test_with_keep_each_agent_leaves_the_same_share_and_the_last_one_the_budget() -> None:
    method = IARED2(keep=8).bind(FACTS)
    counts = []
    for index in method.agents:
        layer = layer_of(method, (64, 27), [8, 8], index=index)
        found = asked(method, layer)
        expected = chances(layer.module[len(counts)], layer.hidden, layer.valid, prefix=1, group=1)
        for row, count in enumerate(found.counts):
            assert (
                found.keep[row].nonzero().flatten().tolist()
                == expected[row].topk(count).indices.sort().values.tolist()
            )
        counts.append(found.counts)
    assert counts == [(32, 18), (16, 12), (8, 8)]


def test_nan_raises_but_nan_padding_does_not() -> None:
    method = IARED2(keep=4).bind(FACTS)
    layer = layer_of(method, (12, 9), [4, 4], index=1)
    layer.hidden[1, 10:] = float("nan")
    assert asked(method, layer).counts == (6, 5)
    layer.hidden[0, 3] = float("nan")
    with pytest.raises(ScoreError, match="iared2"):
        method.prune_encoder(layer)


def test_in_training_nothing_is_dropped_and_each_agent_learns_what_the_last_layer_looks_at() -> None:
    method = IARED2(keep=4).bind(FACTS)
    losses: list[Tensor] = []
    first = layer_of(method, (12, 9), [4, 4], index=-1, teach=losses.append)
    memory, agents, seen = first.memory, first.module, []
    for index in (*method.agents, 5):
        layer = replace(layer_of(method, (12, 9), [4, 4], index=index), module=agents, memory=memory)
        layer = replace(layer, teach=losses.append)
        seen.append(layer)
        assert method.prune_encoder(layer) is None
    expected = []
    for place, counts in enumerate([(8, 7), (6, 5), (4, 4)]):
        looked = saliency(seen[-1])
        wanted = torch.zeros_like(first.valid)
        for row, count in enumerate(counts):
            wanted[row, looked[row].topk(count).indices] = True
        found = chances(agents[place], seen[place].hidden, first.valid, prefix=1, group=1)
        own = torch.nn.functional.binary_cross_entropy(found[first.valid], wanted[first.valid].float())
        expected.append(own)
        torch.testing.assert_close(entropy(found, wanted, first.valid), own)
    torch.testing.assert_close(losses, [torch.stack(expected).mean()])
    losses[0].backward()
    assert all(bool(weight.grad.abs().sum() > 0) for weight in agents.parameters())


@pytest.mark.parametrize("kind", ["llava-clip", "qwen2.5-vl"])
def test_agents_that_were_trained_choose_what_the_encoder_looks_at(kind: str) -> None:
    inputs = prompt(kind, ROWS[kind])
    model = vtprune.wrap(make(kind), IARED2(keep=0.3)).requires_grad_(False).train()
    model.vtprune_weights.requires_grad_(True)
    weights = list(model.vtprune_weights.parameters())
    optimizer, losses = torch.optim.Adam(weights, lr=0.02), []
    for _ in range(25):
        model(**inputs, labels=inputs["input_ids"])
        loss = vtprune.auxiliary_loss(model)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert all(
        image.kept == list(range(image.tokens)) for one in vtprune.report(model).samples for image in one.images
    )


@pytest.mark.parametrize("keep", [None, 0.3])
def test_what_the_agents_cost_is_in_the_report(keep: float | None) -> None:
    kind = "llava-clip"
    model = vtprune.wrap(make(kind), IARED2(keep=keep))
    inputs = prompt(kind, ROWS[kind][:1])
    counted = measured_flops(model, inputs)
    assert vtprune.report(model).flops == pytest.approx(counted, rel=0.001)


def test_the_first_agent_spares_the_first_layer() -> None:
    kind = "llava-clip"
    model = vtprune.wrap(make(kind), IARED2(keep=4, groups=1))
    with torch.no_grad():
        model(**prompt(kind, ROWS[kind]))
    widths: list[int] = []
    layer = vtprune.adapters.adapter_for(model).encoder_layers[0]
    hook = layer.register_forward_hook(lambda module, args, output: widths.append(args[0].shape[1]))
    with torch.no_grad():
        model(**prompt(kind, ROWS[kind]))
    hook.remove()
    assert widths == [5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 9}, "groups=9, but only"),
        ({"heads": 7}, "heads=7 does not divide the encoder's width"),
        ({"taught": 0.0}, r"taught is a share in \(0, 1\]"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(vtprune.VTPruneError, match=message):
        vtprune.wrap(make("llava-clip"), "iared2", **options)
