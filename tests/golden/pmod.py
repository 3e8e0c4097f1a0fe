"""p-MoD's cases: the ratios by layer, one routed layer, and a decoder of 32 with two decode steps."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from tests.golden import towers
from tests.golden.case import Case, UnknownCase, expect_close, expect_equal
from tests.golden.prefill import CONFIG, HIDDEN, Cached, decode
from vtprune.decoder.packing import Packed
from vtprune.method import schedules
from vtprune.method.answers import Routes
from vtprune.method.facts import ModelFacts
from vtprune.method.views import RoutedTokens
from vtprune.pruners.pmod import DECAYS, NORMS, PMoD

LABEL = re.compile(r"shifted(cos|linear)\|beta=([\d.]+)\|max=([\d.]+)\|min=([\d.]+)")


@torch.no_grad()
def run(case: Case) -> None:
    """Raises Mismatch where a result differs, UnknownCase for another kind of case."""
    if "applied" in case:
        check_schedules(case)
    elif "layer_ratio" in case:
        check_model(case)
    elif "router_weight" in case:
        check_layer(case)
    else:
        raise UnknownCase("neither ratios, nor a layer, nor a model")


def check_schedules(case: Case) -> None:
    """The ratios must be the same numbers."""
    labels, depth = LABEL.findall(case.metadata.get("labels", "")), case["applied"].shape[1]
    if len(labels) != len(case["applied"]):
        raise UnknownCase(f"{len(labels)} schedules are named, {len(case['applied'])} recorded")
    for (kind, *numbers), applied in zip(labels, case["applied"], strict=True):
        ratios = DECAYS["cosine" if kind == "cos" else "linear"](depth, *map(float, numbers))
        expect_close(f"shifted{kind} {numbers}", torch.tensor(ratios, dtype=torch.float64), applied, atol=0, rtol=0)


class Decoder:
    """Llama layers with recorded weights, each of which a method may route."""

    def __init__(self, case: Case, given: dict[str, Any], layers: int, prefix: str, method: PMoD) -> None:
        weights = case.weights()
        if "embed_tokens.weight" not in weights and "norm.weight" not in weights:
            weights["norm.weight"] = torch.ones(given["hidden"])
        routers = {name: value for name, value in weights.items() if ".router." in f".{name}"}
        own = {prefix + n: t for n, t in weights.items() if n not in routers and n != "norm.weight"}
        own = {name.replace("decoder_layer.", ""): tensor for name, tensor in own.items()}
        config = {CONFIG[name]: value for name, value in given.items() if name in CONFIG}
        config |= {"num_hidden_layers": layers, "vocab_size": 2}
        config.setdefault("num_key_value_heads", config["num_attention_heads"])
        self.model = towers.llama(config, {**own, "norm.weight": weights["norm.weight"]})
        self.method, self.caches, self.kept = method, [], []
        self.routers: dict[str, nn.Linear] = {}
        for name, tensor in routers.items():
            index = (re.findall(r"layers\.(\d+)\.", name) or ["0"])[0]
            router = self.routers.setdefault(index, nn.Linear(given["hidden"], 1))
            getattr(router, name.rsplit(".", 1)[1]).copy_(tensor)

    def routes(self, index: int, hidden: Tensor, target: Tensor, real: Tensor, count: Tensor) -> Routes:
        """What the method says of a layer; count: (B, 1) targets to compute in each row."""
        image = torch.where(target, 0, -1)
        norm = self.model.layers[index].input_layernorm
        return self.method.route(
            RoutedTokens(
                hidden=hidden, norm=norm, real=real, image=image, text=~target,
                totals=target.sum(dim=1, keepdim=True), budgets=count, index=index, depth=len(self.model.layers),
                module=self.routers, training=False,
            )
        )  # fmt: skip

    def layer(self, index: int, hidden: Tensor, routes: Routes, real: Tensor) -> Tensor:
        """(B, n, D) after a layer; what it computed goes into `caches` and `kept`."""
        packed = Packed.of(hidden, routes)
        columns = packed.columns
        if columns is None:
            columns = torch.arange(hidden.shape[1]).expand(hidden.shape[0], -1)
        inside, layer = packed.inside, self.model.layers[index]
        held = (columns >= 0) & real.gather(1, columns.clamp(min=0))
        mask = towers.causal_mask(columns.shape[1]).masked_fill(~held[:, None, None, :], float("-inf"))
        mask = mask.masked_fill(~held[:, None, :, None], 0.0)
        handle = layer.mlp.register_forward_hook(
            lambda module, args, output: None if packed.gate is None else output * packed.gate[..., None]
        )
        towers.RECORDER.chunks.clear()
        rotary = self.model.rotary_emb(hidden, columns.clamp(min=0))
        computed = layer(inside, attention_mask=mask, position_embeddings=rotary)
        handle.remove()
        _, key, value = towers.RECORDER.take()
        self.kept.append((columns, held))
        self.caches.append((key, value))
        return packed.unpack(computed)


def _method(norm: str) -> PMoD:
    name, *numbers = norm.split("_")
    if name not in NORMS or len(numbers) not in (0, 2):
        raise UnknownCase(f"norm {norm!r}")
    scale, bias = map(float, numbers or (1.0, 1.0))
    return PMoD(norm=name, scale=scale, bias=bias)


def check_layer(case: Case) -> None:
    """Gates, what is kept, the layer's output, and what it leaves in its cache."""
    given, hidden = case.setting("cfg"), case["x"]
    target, real = case["target_mask"].bool(), case["attn_mask"].bool()
    decoder = Decoder(case, given, 1, "layers.0.", _method(given["norm"]))
    ratio = float(case["ratio"])
    counts = [[schedules.counts((ratio,), int(row.sum()))[0]] for row in target]
    routes = decoder.routes(0, hidden, target, real, torch.tensor(counts))
    assert routes.scale is not None
    expect_close("router_weight", routes.scale[target], case["router_weight"][target], atol=1e-6)
    output = decoder.layer(0, hidden, routes, real)
    expect_close("out", output[real], case["out"][real], **HIDDEN)
    columns, held = decoder.kept[0]
    key, value = decoder.caches[0]
    for row, places in enumerate(case["kept_position_ids"]):
        own = columns[row][held[row]]
        expect_equal(f"kept_position_ids of row {row}", own, places[: own.numel()])
        for name, states in (("k_cache", key), ("v_cache", value)):
            expect_close(
                f"{name} of row {row}", states[row][:, held[row]], case[name][row, :, : own.numel()], **HIDDEN
            )


def check_model(case: Case) -> None:
    """A prefill through 32 layers, what each of them computes and caches, and decode steps."""
    hidden, target, ratios = case["x"], case["target_mask"].bool(), case["layer_ratio"].tolist()
    given = {"hidden": hidden.shape[-1], **recorded_config(case, len(ratios))}
    method = PMoD().bind(ModelFacts(True, 1, len(ratios), 1))
    expect_close("layer_ratio", torch.tensor(method.ratios(), dtype=torch.float64), case["layer_ratio"],
                 atol=0, rtol=0)  # fmt: skip
    decoder = Decoder(case, given, len(ratios), "", method)
    tokens, real = int(target.sum()), torch.ones_like(target)
    for index, count in enumerate(method.counts(tokens, tokens)):
        routes = Routes(real)
        if index in method.routed_layers():
            routes = decoder.routes(index, hidden, target, real, torch.tensor([[count]]))
        hidden = decoder.layer(index, hidden, routes, real)
        if "kept_mask" in case:
            kept = routes.computed(hidden).mask
            bits = ((case["kept_mask"][index][:, None] >> torch.arange(7, -1, -1)) & 1).flatten()[: target.shape[1]]
            expect_equal(f"kept_mask of layer {index}", kept[0].long(), bits)
    expect_close("last_hidden", decoder.model.norm(hidden), case["last_hidden"], **HIDDEN)
    caches = [
        Cached(columns[0], key[0], value[0])
        for (columns, _), (key, value) in zip(decoder.kept, decoder.caches, strict=True)
    ]
    expect_equal("cache_len_prefill", torch.tensor([one.places.numel() for one in caches]), case["cache_len_prefill"])
    _decode_steps(case, decoder.model, caches, target.shape[1])


def _decode_steps(case: Case, model: Any, caches: list[Cached], length: int) -> None:
    for step, (given, want) in enumerate(zip(case["decode_in"], case["decode_out"], strict=True)):
        hidden = decode(model, given, caches, [length + step] * len(caches), grow=True)
        expect_close(f"decode_out {step}", hidden, want, **HIDDEN)
    grown = torch.tensor([cached.key.shape[1] for cached in caches])
    if "cache_len_after2" in case and len(case["decode_in"]) == 2:
        expect_equal("cache_len_after2", grown, case["cache_len_after2"])


def recorded_config(case: Case, layers: int) -> dict[str, Any]:
    """The recorded config; where none is, heads of 8 and the epsilon that the other cases name."""
    try:
        return {**case.setting("cfg"), "layers": layers}
    except UnknownCase:
        width = case["x"].shape[-1]
        return {"heads": width // 8, "inter": case["w.layers.0.mlp.up_proj.weight"].shape[0], "eps": 1e-5}
