"""YOPO's cases: a decoder layer of the release, the neighbours of each token, and how many heads its masks keep.

The released layers compute everything and mask; vtprune's own parts compute what is left. From the layer on in which
vision is no longer read, the release goes on computing it, for nobody; there the text alone is compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.golden import towers
from tests.golden.case import Case, UnknownCase, expect_close, expect_equal
from tests.golden.prefill import CONFIG
from vtprune.adapters.decoder_side import DecoderSide
from vtprune.cost.sizes import TransformerCost
from vtprune.hooks.attention import Attending, Planned, Window, first_channels
from vtprune.method.answers import VisionPlan
from vtprune.tensors.apart import Apart, neighbours

# Outputs are stored in fp16.
HALF = {"atol": 2e-3, "rtol": 2e-3}
# What the release counts on: images of so many rows and columns.
SIDE = 24


@torch.no_grad()
def run(case: Case) -> None:
    """Raises Mismatch where a result differs, UnknownCase for another kind of case."""
    if "allowed_packed" in case:
        check_neighbours(case)
    elif "headmask" in case:
        check_layer(case)
    elif "kept_per_layer" in case:
        check_counts(case)
    else:
        raise UnknownCase("neither neighbours, nor a layer, nor counts of heads")


def check_neighbours(case: Case) -> None:
    """Which vision tokens see which, (V, V), and how many each of them sees."""
    table = neighbours((SIDE, SIDE), int(case["window"]), causal=False)
    seen = torch.zeros(len(table), len(table) + 1, dtype=torch.bool)
    seen = seen.scatter_(1, table % (len(table) + 1), True)[:, :-1]
    expect_equal("allowed", torch.from_numpy(np.packbits(seen.numpy(), axis=-1)), case["allowed_packed"])
    expect_equal("counts", seen.sum(dim=1), case["counts"])


def check_counts(case: Case) -> None:
    """That the first two layers are whole in a mask, as a file of heads that names none of them says."""
    kept = case["kept_per_layer"]
    expect_equal("kept_per_layer", kept[:2], kept.max().expand(2))
    expect_equal("kept_per_layer", kept.clamp(min=0, max=int(kept[0])), kept)


@dataclass
class Bare(DecoderSide):
    """A Llama decoder that stands alone."""

    model: Any

    def __post_init__(self) -> None:
        self.inner = SimpleNamespace(language_model=self.model)

    @property
    def cost(self) -> Any:
        config = self.model.config
        size = config.hidden_size // config.num_attention_heads
        return SimpleNamespace(
            decoder=TransformerCost(
                width=config.hidden_size,
                heads=config.num_attention_heads,
                query_width=config.hidden_size,
                kv_width=config.num_key_value_heads * size,
                mlp_width=config.intermediate_size,
                mlp_matrices=3,
                layers=1,
            )
        )


def check_layer(case: Case) -> None:
    """What one layer puts out: of all tokens, or of the text where vision is no longer read."""
    cfg = case.setting("cfg")
    config = {CONFIG[name]: value for name, value in cfg.items() if name in CONFIG}
    config |= {"num_hidden_layers": 1, "num_key_value_heads": cfg.get("kv_heads", cfg["heads"]), "vocab_size": 2}
    weights = {f"layers.0.{name}": one.float() for name, one in case.weights().items()}
    # The norm behind the last layer is not asked.
    weights["norm.weight"] = torch.ones(cfg["hidden"])
    model = towers.llama(config, weights)
    hidden, start, tokens = case["x"].float(), int(cfg["sprompt"]), int(cfg["n_img"])
    # The release has no windows in prompts that are no longer than an image.
    window = int(cfg["window"]) if hidden.shape[1] > tokens and cfg["window"] else None
    cut = int(case["layer_idx"]) >= int(cfg["layercut"])
    heads = () if cut else tuple(case["headmask"].nonzero().flatten().tolist())
    plan = VisionPlan(heads, window=window, mlp=int(cfg["inter"] / cfg["mlpcut"]))
    vision = torch.zeros(1, hidden.shape[1], dtype=torch.bool)
    vision[:, start : start + tokens] = True
    found = planned_layer(Bare(model), model, plan, hidden=hidden, vision=vision, start=start)
    own = ~vision[0] if cut else torch.ones_like(vision[0])
    expect_close("out", found[:, own], case["out"].float()[:, own], **HALF)


def planned_layer(
    adapter: Bare, model: Any, plan: VisionPlan, *, hidden: Tensor, vision: Tensor, start: int
) -> Tensor:
    """(1, n, D) what the only layer of a decoder makes of (1, n, D), by the parts that planned layers have."""
    layer, apart = model.layers[0], Apart.of(vision, [int(vision.sum())])
    near = () if plan.window is None else (Window(0, 0, start, neighbours((SIDE, SIDE), plan.window, causal=False)),)
    turn = model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    attending = Attending(adapter, layer, Planned(plan, apart, near))  # type: ignore[arg-type]
    behind = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool).triu(1)
    mask = torch.zeros(1, 1, *behind.shape).masked_fill(behind, torch.finfo(torch.float32).min)
    hidden = hidden + attending.forward(0, layer.input_layernorm(hidden), turn, mask)
    text, image = apart.split(layer.post_attention_layernorm(hidden))
    width = plan.mlp if plan.mlp is not None else model.config.intermediate_size
    return hidden + apart.join(layer.mlp(text), first_channels(layer.mlp, image, width))
