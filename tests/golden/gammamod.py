"""gamma-MoD's cases: the rank of attention maps, and one routed layer in training and on a prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.golden import towers
from tests.golden.case import Case, UnknownCase, expect_close, expect_equal
from tests.golden.prefill import CONFIG, HIDDEN
from vtprune.decoder.packing import Packed
from vtprune.evals.arank.ranks import arank, head_ranks
from vtprune.method.answers import Routes
from vtprune.method.views import RoutedTokens
from vtprune.pruners.gamma_mod import GammaMoD


def run(case: Case) -> None:
    """Raises Mismatch where a result differs, UnknownCase for another kind of case."""
    with torch.no_grad():
        if "attn" in case:
            run_rank(case)
        elif "x" in case and ("img_and_instr_len" in case or "route_prob" in case):
            run_layer(case)
        else:
            raise UnknownCase(f"neither attention maps nor a layer: {', '.join(case.tensors)}")


def run_rank(case: Case) -> None:
    """The rank of each head's map, and their mean; a singular value at the tolerance may fall on either side of it on
    another machine."""
    attention = case["attn"]
    values = torch.linalg.svdvals(attention.float().tril(-1))
    tolerance = values[:, :1] * attention.shape[-1] * torch.finfo(torch.float32).eps
    unsure = ((values > tolerance / 2) & (values < tolerance * 2)).sum(dim=-1)
    if "head_ranks_recomputed" in case:
        ranks, want = head_ranks(attention), case["head_ranks_recomputed"]
        expect_equal("head_ranks_recomputed", torch.where((ranks - want).abs() <= unsure, want, ranks), want)
    slack = float(unsure.float().mean()) + 1e-6
    expect_close("arank_printed", torch.tensor(arank(attention)), case["arank_printed"].float(), atol=slack, rtol=0)


def run_layer(case: Case) -> None:
    """One routed layer: in training where the length of what stands up to the end of the image is recorded."""
    training, hidden = "img_and_instr_len" in case, case["x"]
    if not training and hidden.shape[0] != 1:
        raise UnknownCase(f"a prompt of {hidden.shape[0]} rows")
    model, router = layer_of(case)
    layer, pruner = model.layers[0], GammaMoD(variant="released", layers=(1,), loss_weight=1.0)
    image = torch.full(hidden.shape[:2], -1)
    image[:, : int(case["img_and_instr_len"]) if training else 0] = 0
    count = torch.zeros(hidden.shape[0], 1, dtype=torch.long)
    tokens = RoutedTokens(
        hidden=hidden, norm=layer.input_layernorm, real=torch.ones_like(image, dtype=torch.bool), image=image,
        text=image < 0, totals=count, budgets=count, index=1, depth=2, module=router, training=training,
    )  # fmt: skip
    routes = pruner.route(tokens)
    logits = pruner.logits(tokens)
    if "router_logits" in case:
        expect_close("router_logits", logits, case["router_logits"])
    if "route_prob" in case:
        expect_close("route_prob", logits.softmax(dim=-1)[..., 1], case["route_prob"])
    out, positions = computed(model, hidden, routes)
    expect_equal("n_kept", routes.computed(hidden).mask.sum(dim=1), case["n_kept"].expand(hidden.shape[0]))
    if "new_position_ids" in case:
        expect_equal("new_position_ids", positions, case["new_position_ids"])
    if "aux_loss" in case:
        assert routes.loss is not None
        expect_close("aux_loss", routes.loss, case["aux_loss"])
    expect_close("out", out, case["out"], **HIDDEN)


def layer_of(case: Case) -> tuple[Any, nn.Linear]:
    """A decoder of the one recorded layer, and its router."""
    config = {CONFIG[name]: value for name, value in case.setting("cfg").items() if name in CONFIG}
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    weights = case.weights()
    router = nn.Linear(config["hidden_size"], 2, bias=False)
    router.weight.copy_(weights.pop("router.weight"))
    named = {f"layers.0.{name}": weight for name, weight in weights.items()}
    named["norm.weight"] = torch.ones(config["hidden_size"])
    return towers.llama({**config, "num_hidden_layers": 1, "vocab_size": 2}, named), router


def computed(model: Any, hidden: Tensor, routes: Routes) -> tuple[Tensor, Tensor]:
    """(B, n, D) after the layer, and the positions (1, m) of the tokens that it computed."""
    packed = Packed.of(hidden, routes)
    positions = torch.arange(packed.inside.shape[1])[None]
    if packed.empty:
        return packed.unpack(hidden), positions
    gate = packed.gate
    assert gate is not None
    handle = model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * gate[..., None])
    try:
        return packed.unpack(towers.run_decoder_layer(model, 0, packed.inside, positions)), positions
    finally:
        handle.remove()
