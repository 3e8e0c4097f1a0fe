"""p-MoD: the published schedule, trained gates against a reference by masks, and what the report says of them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import vtprune
from tests.flop_helper import measured_flops
from tests.matrix import at_depth
from tests.models import DECODER_LAYERS, IMAGE, MODELS, PAST, ROWS, TEXT, make, prompt
from tests.oracle import STEPS, TOLERANCE, compare, image_features, next_tokens, run_masked, run_wrapped
from vtprune.method import schedules
from vtprune.method.choosing import best_of_each
from vtprune.method.config import from_dict, to_dict
from vtprune.method.facts import ModelFacts
from vtprune.pruners import PMoD

every_model = pytest.mark.parametrize("kind", MODELS)
SETTINGS = [
    PMoD(),
    PMoD(keep=0.7, norm="sigmoid", scale=1.0),
    PMoD(keep=9),
    PMoD(variant="paper"),
    PMoD(keep=0.5, reads_skipped=True),
]
every_setting = pytest.mark.parametrize("method", SETTINGS, ids=["default", "sigmoid", "count", "paper", "read"])


def trained(kind: str, method: PMoD, attention: str = "sdpa", seed: int = 3) -> Any:
    """A wrapped model whose routers are not at zero."""
    model = vtprune.wrap(make(kind, attention), method)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith("vtprune_weights"):
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return model


def routers_of(model: Any) -> dict[int, tuple[Tensor, Tensor]]:
    """(weight, bias) of each router, by layer."""
    modules = model.vtprune_weights["0"]
    return {
        int(name): (module.weight.detach().clone(), module.bias.detach().clone()) for name, module in modules.items()
    }


def gates_of(method: PMoD, router: tuple[Tensor, Tensor], states: Tensor) -> Tensor:
    """(B, L) straight from the formula."""
    logits = states @ router[0][0] + router[1]
    return method.bias + method.scale * (torch.tanh(logits) if method.norm == "tanh" else 1 / (1 + (-logits).exp()))


@contextlib.contextmanager
def gated(
    model: Any, method: PMoD, routers: dict[int, tuple[Tensor, Tensor]], ids: Tensor, report: vtprune.Report
) -> Iterator[None]:
    """The unwrapped model with gates on the vision tokens of its routed layers, after the oracle's own hooks."""
    handles: list[Any] = []
    vision = torch.cat([ids == IMAGE, torch.zeros(len(ids), STEPS, dtype=torch.bool)], dim=1)
    for index, router in routers.items():
        layer, seen = model.model.language_model.layers[index], {}
        kept = computed(ids, report, index)

        def enter(module: Any, args: Any, kwargs: Any, seen: dict[str, Tensor] = seen, router: Any = router) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            seen["x"], seen["g"] = states, gates_of(method, router, states)

        def mlp(module: Any, args: Any, output: Tensor, seen: dict[str, Tensor] = seen, kept: Tensor = kept) -> Tensor:
            gate = torch.where(kept, seen["g"], 1.0) if method.variant == "released" else torch.ones(1)
            return output * gate[..., None]

        def leave(
            module: Any, args: Any, output: Tensor, seen: dict[str, Tensor] = seen, kept: Tensor = kept
        ) -> Tensor:
            gate, before = seen["g"][..., None], seen["x"]
            if method.variant == "paper":
                output = torch.where(kept[..., None], before + gate * (output - before), output)
            return torch.where((vision & ~kept)[..., None], gate * before, output)

        handles += [
            layer.register_forward_pre_hook(enter, with_kwargs=True),
            layer.mlp.register_forward_hook(mlp),
            layer.register_forward_hook(leave),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def computed(ids: Tensor, report: vtprune.Report, layer: int) -> Tensor:
    """(B, L + STEPS) the vision tokens that the report says a layer computed."""
    found = torch.zeros(len(ids), ids.shape[1] + STEPS, dtype=torch.bool)
    for row, sample in enumerate(report.samples):
        places, first = (ids[row] == IMAGE).nonzero().flatten(), 0
        for image in sample.images:
            found[row, places[first : first + image.tokens][image.kept_per_layer[layer]]] = True
            first += image.tokens
    return found


@every_model
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["left", "right"])
@every_setting
def test_trained_gates_equal_masks_and_products(kind: str, attention: str, padding: str, method: PMoD) -> None:
    inputs, model = prompt(kind, ROWS[kind], padding), trained(kind, method, attention)
    logits, report, _ = run_wrapped(kind, model, inputs)
    features, routers = image_features(model, inputs), routers_of(model)
    vtprune.unwrap(model)
    assert not any("vtprune" in name for name, _ in model.named_modules())
    with gated_after(model, method, routers, inputs["input_ids"], report):
        expected = run_masked(kind, model, inputs, report, features)
    assert compare(logits, expected, inputs) < TOLERANCE
    kept = [{tuple(image.kept_per_layer[layer]) for layer in routers} for image in report.samples[0].images]
    assert all(len(choices) > 1 for choices in kept)


@contextlib.contextmanager
def gated_after(model: Any, *given: Any) -> Iterator[None]:
    """`gated`, with its hooks behind those that `run_masked` registers."""
    decoder = model.model.language_model
    original = decoder.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with gated(model, *given):
            return original(*args, **kwargs)

    decoder.forward = forward
    try:
        yield
    finally:
        del decoder.forward


@every_model
def test_each_layer_computes_the_tokens_with_the_highest_gates_of_what_it_is_given(kind: str) -> None:
    method, seen = PMoD(), {}
    model, inputs = trained(kind, method), prompt(kind, ROWS[kind])
    routers = routers_of(model)
    decoder = model.model.language_model
    # Before vtprune's own hook, which packs the input.
    for index in routers:

        def look(module: Any, args: Any, kwargs: Any, index: int = index) -> None:
            seen[index] = args[0] if args else kwargs["hidden_states"]

        decoder.layers[index].register_forward_pre_hook(look, with_kwargs=True, prepend=True)
    with torch.no_grad():
        model(**inputs)
    report, ids = vtprune.report(model), inputs["input_ids"]
    for index, router in routers.items():
        logits = seen[index] @ router[0][0] + router[1]
        for row, sample in enumerate(report.samples):
            places, first = (ids[row] == IMAGE).nonzero().flatten(), 0
            for image in sample.images:
                own = logits[row, places[first : first + image.tokens]]
                first += image.tokens
                kept = image.kept_per_layer[index]
                ratio = schedules.cosine_ratios(DECODER_LAYERS, 0.5)[index]
                assert kept == own.topk(int(ratio * image.tokens)).indices.sort().values.tolist()


@every_model
def test_a_token_that_skipped_a_layer_is_computed_by_a_later_one(kind: str) -> None:
    model = trained(kind, PMoD())
    with torch.no_grad():
        model(**prompt(kind, ROWS[kind]))
    images = [image for sample in vtprune.report(model).samples for image in sample.images]
    sets = [[set(kept) for kept in image.kept_per_layer] for image in images]
    assert any(later - earlier for layers in sets for earlier, later in itertools.pairwise(layers))


def test_the_published_ratios_have_the_published_mean() -> None:
    method = PMoD().bind(ModelFacts(True, 23, 32, 1))
    assert method.default_keep == pytest.approx(0.5375, abs=5e-5)
    assert method.routed_layers() == tuple(range(8, 32))
    counts = method.counts(576, 576)
    assert [count + 64 for count in counts[:10]] == [640] * 8 + [550, 528]
    assert counts[-1] == 86


@every_model
@pytest.mark.parametrize("method", [PMoD(beta=2.0), PMoD(keep=1.0)], ids=["nothing routed", "all through gates"])
def test_routers_at_zero_leave_the_base_as_it_is_at_ratio_one(kind: str, method: PMoD) -> None:
    inputs, model = prompt(kind, ROWS[kind]), make(kind)
    with torch.no_grad():
        base = model(**inputs).logits
        vtprune.wrap(model, method)
        assert torch.equal(model(**inputs).logits, base)
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[0] == len(ROWS[kind])


@every_model
def test_at_ratio_one_every_token_goes_through_the_trained_gates(kind: str) -> None:
    inputs, model = prompt(kind, ROWS[kind]), trained(kind, PMoD(keep=1.0))
    assert sorted(routers_of(model)) == list(at_depth(PMoD(), DECODER_LAYERS).routed_layers())
    logits, report, _ = run_wrapped(kind, model, inputs)
    features, routers = image_features(model, inputs), routers_of(model)
    assert report.achieved_keep == 1
    vtprune.unwrap(model)
    with gated_after(model, PMoD(keep=1.0), routers, inputs["input_ids"], report):
        expected = run_masked(kind, model, inputs, report, features)
    assert compare(logits, expected, inputs) < TOLERANCE


@every_model
@every_setting
def test_rows_equal_each_row_alone_whatever_the_gates(kind: str, method: PMoD) -> None:
    together, _, _ = run_wrapped(kind, trained(kind, method), prompt(kind, ROWS[kind]))
    inputs = prompt(kind, ROWS[kind])
    for row in range(len(ROWS[kind])):
        alone_inputs = prompt(kind, [ROWS[kind][row]])
        model = trained(kind, method)
        with torch.no_grad():
            logits = model(**alone_inputs).logits[0, -1]
        length = inputs["input_ids"].shape[1]
        assert float((together[row, length - 1] - logits).abs().max()) < TOLERANCE


@every_model
@every_setting
def test_costs_are_what_is_measured(kind: str, method: PMoD) -> None:
    inputs, model = prompt(kind, ROWS[kind][:1]), trained(kind, method)
    measured = measured_flops(model, inputs)
    report = vtprune.report(model)
    assert report.flops == pytest.approx(measured, rel=0.01)
    with torch.no_grad():
        cache = model(**inputs).past_key_values
        for step in range(3):
            model(input_ids=next_tokens(1)[:, step : step + 1], **{PAST: cache})
    report = vtprune.report(cache)
    held = [layer.keys.shape[-2] for layer in cache.layers]
    assert [layer[0] for layer in report.kv_tokens_per_layer] == held
    text = report.samples[0].text_tokens
    layers = [sum(len(image.cached_per_layer[n]) for image in report.samples[0].images) for n in range(len(held))]
    assert held == [vision + text + 3 for vision in layers]
    assert method.reads_skipped or layers == [layer[0] for layer in report.tokens_per_layer]
    assert report.kv_bytes == sum(layer.keys.numel() * 2 * 4 for layer in cache.layers)


@every_model
def test_a_later_turn_and_its_image_are_routed_too(kind: str) -> None:
    row, model = ROWS[kind][:1], trained(kind, PMoD())
    inputs = prompt(kind, row)
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        cache = model(**inputs).past_key_values
        model(input_ids=torch.tensor([[5, 6]]), **{PAST: cache})
        mask = torch.ones(1, 2 * length + 2, dtype=torch.long)
        model(**{**inputs, "attention_mask": mask}, **{PAST: cache})
    first, second = vtprune.report(cache).samples[0].images
    assert list(map(len, first.kept_per_layer)) == list(map(len, second.kept_per_layer))
    assert first.kept_per_layer != second.kept_per_layer


@every_model
def test_text_alone_is_the_base(kind: str) -> None:
    model, inputs = make(kind), prompt(kind, [TEXT])
    with torch.no_grad():
        base = model(**inputs).logits
    assert torch.equal(trained(kind, PMoD())(**inputs).logits, base)


@every_model
def test_gradients_reach_routers_and_base_and_flow_through_checkpoints(kind: str) -> None:
    inputs = prompt(kind, ROWS[kind])
    labels = inputs["input_ids"].masked_fill((inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == 0), -100)
    gradients = []
    for checkpointing in (False, True):
        model = trained(kind, PMoD())
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    routers = [name for name in gradients[0] if name.startswith("vtprune_weights")]
    assert len(routers) == 2 * len(at_depth(PMoD(), DECODER_LAYERS).routed_layers())
    assert all(float(gradients[0][name].abs().sum()) > 0 for name in routers)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-5, rtol=1e-4), name


@every_model
def test_the_loss_is_that_of_the_logits(kind: str) -> None:
    inputs, model = prompt(kind, ROWS[kind][:1]), trained(kind, PMoD())
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    out = model(**inputs, labels=labels)
    expected = cross_entropy(out.logits[0, :-1], labels[0, 1:])
    assert float((out.loss - expected).abs()) < 1e-5
    assert vtprune.auxiliary_loss(model) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "relu"}, "norm"),
        ({"scale": float("nan")}, "scale is a finite number"),
        ({"bias": True}, "bias is a finite number"),
        ({"beta": "0.5"}, "beta is a finite number"),
        ({"beta": 0.4, "keep": 0.5}, "give one of them"),
        ({"schedule": "entropy"}, "schedule"),
        ({"schedule": "steps"}, "schedule"),
        ({"layers": (0,)}, "at least 1"),
        ({"layers": (2, 3)}, "takes one layer"),
        ({"variant": "new"}, "variant"),
        ({"decay": "none"}, "decay"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(vtprune.VTPruneError, match=message):
        PMoD(**options)


def test_what_the_model_cannot_meet_is_refused() -> None:
    with pytest.raises(vtprune.VTPruneError, match="decoder layer"):
        vtprune.wrap(make("llava-clip"), PMoD(layers=(7,)))
    with pytest.raises(vtprune.VTPruneError, match="cannot keep"):
        vtprune.wrap(make("llava-clip"), PMoD(keep=0.1))
    for other in (vtprune.FastV(keep=0.5), vtprune.D2O(), vtprune.LazyLLM(), vtprune.GemFilter(keep=0.5), PMoD()):
        with pytest.raises(vtprune.VTPruneError):
            vtprune.wrap(make("llava-clip"), [other, PMoD()])


@every_model
def test_a_stage_before_the_decoder_goes_with_it(kind: str) -> None:
    model = vtprune.wrap(make(kind), [vtprune.Grid(keep=0.5), PMoD(keep=0.3)])
    with torch.no_grad():
        model(**prompt(kind, ROWS[kind]))
    report = vtprune.report(model)
    for sample in report.samples:
        for image in sample.images:
            counts = list(map(len, image.kept_per_layer))
            assert counts[0] <= round(0.5 * image.tokens)
            assert sum(counts) <= max(1, round(0.3 * image.tokens)) * DECODER_LAYERS
            assert all(set(kept) <= set(image.kept) for kept in image.kept_per_layer)


def test_the_best_of_each_image_with_ties_to_the_lowest() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 3.0, 9.0, 2.0, 2.0]])
    image = torch.tensor([[0, 0, 0, 0, -1, 1, 1]])
    kept = best_of_each(scores, image, torch.tensor([[2, 1]]))
    assert kept[0].tolist() == [False, True, True, False, False, True, False]


@every_model
def test_gates_that_are_not_numbers_are_refused(kind: str) -> None:
    model = trained(kind, PMoD())
    with torch.no_grad():
        next(iter(model.vtprune_weights["0"].values())).weight.fill_(float("nan"))
        with pytest.raises(vtprune.ScoreError, match="pmod"):
            model(**prompt(kind, ROWS[kind]))


def test_settings_survive_a_config() -> None:
    method = PMoD(norm="sigmoid", scale=1.0, decay="linear", variant="paper")
    assert from_dict(to_dict(method)) == method
    assert dataclasses.replace(method, decay="cosine") != method
