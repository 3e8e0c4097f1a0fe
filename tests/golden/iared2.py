"""IA-RED^2's cases: what the agents say of each patch, which ones go on, and the vectors of those that are left."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention

from tests.golden.case import Case, expect_close, expect_equal
from vtprune.pruners.iared2 import THRESHOLD, Agent, chances

# Of the blocks' norms, as DeiT has them.
EPS = 1e-6


@torch.no_grad()
def run(case: Case) -> None:
    """Raises Mismatch where a chance, a choice, a vector that is left, or the share of the cost differs."""
    for row in range(len(case["x"])):
        check_image(case, row)


def check_image(case: Case, row: int) -> None:
    """Drops what agents do not want from one image, CLS first, where the reference sets it to zero."""
    states, sizes = case["x"][row], case["group_sizes"].tolist()
    tokens, last = len(states), int(case["curriculum_step"])
    left, spent = torch.arange(tokens), 0.0
    for group, size in enumerate(sizes):
        # Groups behind the last one that is trained take over the choice before them.
        if last < 0 or group <= last:
            agent = agent_of(case.weights(f"w.{group}.agent.qk."), int(case["agent_heads"]))
            everything = torch.ones(1, len(states) - 1, dtype=torch.bool)
            found = chances(agent, states[None], everything, prefix=1, group=1)[0]
            whole = torch.zeros(tokens).index_put((left[1:],), found)
            expect_close(f"chances of group {group}", whole[1:], case["probs"][group, row, 1:], atol=1e-6)
            stays = torch.cat([torch.ones(1, dtype=torch.bool), found > THRESHOLD])
            left, states = left[stays], states[stays]
        expect_equal(f"kept by group {group}", left, case["policies"][group, row].nonzero()[:, 0])
        spent += len(left) / tokens * size / sum(sizes)
        for place in range(size):
            weights = case.weights(f"w.{group}.block_list.{place}.")
            states = block(states, weights, int(case["block_heads"]))
    expect_close("vectors that are left", states, case["out"][row, left])
    expect_close("share of the cost", torch.tensor(spent), case["flops"][row])


def agent_of(weights: dict[str, Tensor], heads: int) -> Agent:
    """An agent of the reference's weights, whose last third nobody reads."""
    width = weights["weight"].shape[1]
    agent = Agent(width, heads)
    for place, part in enumerate((agent.query, agent.key)):
        own = slice(place * width, (place + 1) * width)
        part.load_state_dict({name: weight[own] for name, weight in weights.items()})
    return agent


def block(states: Tensor, weights: dict[str, Tensor], heads: int) -> Tensor:
    """(n, D) of (n, D): a ViT's block."""

    def by(name: str, values: Tensor) -> Tensor:
        return linear(values, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def normed(name: str, values: Tensor) -> Tensor:
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return layer_norm(values, values.shape[-1:], weight=weight, bias=bias, eps=EPS)

    query, key, value = rearrange(by("attn.qkv", normed("norm1", states)), "n (t h d) -> t h n d", t=3, h=heads)
    mixed = rearrange(scaled_dot_product_attention(query, key, value), "h n d -> n (h d)")
    states = states + by("attn.proj", mixed)
    return states + by("mlp.2", gelu(by("mlp.0", normed("norm2", states))))
