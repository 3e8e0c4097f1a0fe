"""The probe: what a method sees of a decoder layer before the pass that counts, and what that leaves behind."""

from __future__ import annotations

import copy
import gc
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import vtprune
from tests.flop_helper import _counter, measured_flops
from tests.models import IMAGE, MODELS, PAST, ROWS, Row, make, prompt, text_positions
from tests.oracle import TOLERANCE, difference_from_masked, through_norm
from vtprune.decoder.run import DecoderRun
from vtprune.method.answers import Selection
from vtprune.method.pruner import Pruner
from vtprune.method.stages import BeforeDecoder
from vtprune.method.views import VisionStream

every_model = pytest.mark.parametrize("kind", MODELS)
SEEN: list[VisionStream] = []


@vtprune.register("test_probes", paper="a test")
@dataclass(frozen=True)
class Probes(BeforeDecoder):
    """Keeps the first tokens, and remembers what it saw of a decoder layer."""

    layer: int = 2

    def probe_layer(self) -> int:
        return self.layer

    def select(self, stream: VisionStream) -> Selection:
        SEEN.append(stream)
        return Selection(torch.arange(stream.budget))


@pytest.fixture(autouse=True)
def _nothing_seen() -> None:
    SEEN.clear()


@contextmanager
def _states(model: Any, layer: int) -> Iterator[dict[str, Tensor]]:
    """Query and keys (B, H, n, d) of a decoder layer in the next forward, by the model's own rotary embedding."""
    attention = model.model.language_model.layers[layer].self_attn
    found: dict[str, Tensor] = {}

    def save(name: str) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            found[name] = output.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

        return hook

    def turn(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        cos, sin = kwargs["position_embeddings"]
        query, key = (through_norm(attention, name, found[name]) for name in ("q", "k"))
        found["q"], found["k"] = apply_rotary_pos_emb(query, key, cos, sin)
        found["k"] = found["k"].repeat_interleave(attention.num_key_value_groups, dim=1)

    handles = [
        attention.q_proj.register_forward_hook(save("q")),
        attention.k_proj.register_forward_hook(save("k")),
        attention.register_forward_hook(turn, with_kwargs=True),
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _given(kind: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs with the position ids that generation would give."""
    return inputs if kind.startswith("qwen") else {**inputs, "position_ids": text_positions(inputs)}


@every_model
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("layer", [0, 2, 4])
def test_a_probe_sees_what_the_unpruned_model_computes(kind: str, attention: str, padding: str, layer: int) -> None:
    inputs = prompt(kind, ROWS[kind], padding)
    model = make(kind, attention)
    with torch.no_grad(), _states(model, layer) as found:
        model(**_given(kind, inputs))
    with torch.no_grad(), vtprune.wrapped(model, Probes(keep=4, layer=layer)):
        model(**_given(kind, inputs))
    rows = [row for row, one in enumerate(ROWS[kind]) for _ in one.grids]
    assert len(SEEN) == len(rows)
    for row, stream in zip(rows, SEEN, strict=True):
        probe = stream.probe
        real = inputs["attention_mask"][row].nonzero().flatten()
        assert probe is not None
        assert (probe.first, probe.last, probe.index) == (int(real[0]), int(real[-1]), layer)
        assert torch.allclose(probe.query[:, 0], found["q"][row, :, real[-1]], atol=1e-5)
        assert torch.allclose(probe.key[:, real], found["k"][row][:, real], atol=1e-5)
        ids = inputs["input_ids"][row]
        assert bool((ids[probe.vision] == IMAGE).all())
        assert probe.vision.numel() == stream.total
        assert torch.equal(probe.text, real[ids[real] != IMAGE])


@every_model
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("first", [vtprune.VisionZip(keep=11), vtprune.Random(keep=11), vtprune.Pool(keep=9)])
def test_a_probe_sees_the_prompt_as_an_earlier_stage_left_it(kind: str, padding: str, first: Pruner) -> None:
    inputs = _given(kind, prompt(kind, ROWS[kind], padding))
    model = make(kind)
    with torch.no_grad(), vtprune.wrapped(model, first), _states(model, 2) as found:
        model(**inputs)
    with torch.no_grad(), vtprune.wrapped(model, [first, Probes(keep=4)]):
        model(**inputs)
    rows = [row for row, one in enumerate(ROWS[kind]) for _ in one.grids]
    for row, stream in zip(rows, SEEN, strict=True):
        probe = stream.probe
        assert probe is not None
        assert probe.vision.numel() == stream.features.shape[0] <= 11
        own = slice(probe.first, probe.last + 1)
        alive = sum(one.features.shape[0] for other, one in zip(rows, SEEN, strict=True) if other == row)
        assert probe.last + 1 - probe.first == probe.text.numel() + alive
        assert torch.allclose(probe.key[:, own], found["k"][row][:, own], atol=1e-5)
        assert torch.allclose(probe.query[:, 0], found["q"][row, :, probe.last], atol=1e-5)


def _count_layers(model: Any, runs: Counter[str]) -> list[Any]:
    """Counts how often each decoder layer's attention and MLP run."""
    handles = []
    for index, layer in enumerate(model.model.language_model.layers):
        for name in ("self_attn", "mlp"):

            def count(*_: Any, key: str = f"{index} {name}") -> None:
                runs[key] += 1

            handles.append(getattr(layer, name).register_forward_pre_hook(count))
    return handles


@every_model
@pytest.mark.parametrize(("keep", "twice"), [(4, 3), (1.0, 0), (10_000, 0)])
def test_only_the_layers_before_the_probed_one_run_twice(kind: str, keep: int | float, twice: int) -> None:
    model = vtprune.wrap(make(kind), Probes(keep=keep, layer=3))
    runs: Counter[str] = Counter()
    handles = _count_layers(model, runs)
    with torch.no_grad():
        model(**prompt(kind, ROWS[kind]))
    assert [runs[f"{index} {name}"] for index in range(5) for name in ("self_attn", "mlp")] == [
        2 if index < twice else 1 for index in range(5) for _ in range(2)
    ]
    for handle in handles:
        handle.remove()


def _second_turn(kind: str, cache: Any, grid: tuple[int, int], seed: int = 7) -> dict[str, Any]:
    turn = prompt(kind, [Row([3, 4], [grid], seed)])
    start = cache.get_seq_length()
    mask = torch.ones(1, start + turn["input_ids"].shape[1], dtype=torch.long)
    return {**turn, "attention_mask": mask, PAST: cache}


@every_model
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_in_a_later_turn_a_probe_sees_the_cache_and_leaves_it_alone(kind: str, attention: str) -> None:
    model = make(kind, attention)
    grid = (4, 4) if kind.startswith("qwen") else (6, 6)
    with torch.no_grad():
        with vtprune.wrapped(model, vtprune.Random(keep=5)):
            cache = model(**prompt(kind, ROWS[kind][:1])).past_key_values
        twin = copy.deepcopy(cache)
        before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        with vtprune.wrapped(model, Probes(keep=1.0)), _states(model, 2) as found:
            model(**_second_turn(kind, twin, grid))
        with vtprune.wrapped(model, Probes(keep=4)):
            model(**_second_turn(kind, cache, grid))
            report = vtprune.report(cache)
    (stream,) = SEEN
    assert stream.probe is not None
    assert torch.allclose(stream.probe.query, found["q"][0][:, -1:], atol=1e-5)
    assert torch.allclose(stream.probe.key, found["k"][0], atol=1e-5)
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        held = keys.shape[2]
        assert torch.equal(layer.keys[:, :, :held], keys)
        assert torch.equal(layer.values[:, :, :held], values)
        assert layer.keys.shape[2] == held + report.samples[0].text_tokens + 4


@every_model
def test_flops_of_a_later_turn_count_the_probes_attention_to_the_cache(kind: str) -> None:
    model = vtprune.wrap(make(kind, "eager"), vtprune.GemFilter(keep=4, layer=3))
    prefix = prompt(kind, [Row([30], [], 3)])["input_ids"]
    with torch.no_grad():
        cache = model(input_ids=prefix).past_key_values
    measured = _counter(model, {**prompt(kind, ROWS[kind][:1]), PAST: cache}).get_total_flops()
    assert vtprune.report(cache).flops == pytest.approx(measured, rel=0.01)


LISTS: list[list[Pruner]] = [
    [vtprune.VisionZip(keep=11), vtprune.GemFilter(keep=6)],
    [vtprune.GemFilter(keep=11, layer=1), vtprune.GemFilter(keep=6, layer=4)],
    [vtprune.GemFilter(keep=11, layer=4), vtprune.FastV(keep=6)],
    [vtprune.VFlowOpt(keep=0.5), vtprune.GemFilter(keep=4)],
    [vtprune.Pool(keep=10), vtprune.GemFilter(keep=6, layer=0)],
]
every_list = pytest.mark.parametrize("stages", LISTS, ids=lambda stages: "+".join(stage.name for stage in stages))


@every_model
@pytest.mark.parametrize("row", [0, 2], ids=["one image", "two images"])
@every_list
def test_flops_of_lists_with_probes_are_torchs(kind: str, row: int, stages: list[Pruner]) -> None:
    inputs = prompt(kind, ROWS[kind][row : row + 1])
    model = vtprune.wrap(make(kind, "eager"), stages)
    measured = measured_flops(model, inputs)
    assert vtprune.report(model).flops == pytest.approx(measured, rel=0.01)


@every_model
@every_list
def test_lists_with_probes_are_exact(kind: str, stages: list[Pruner]) -> None:
    for rows in (ROWS[kind][2:], ROWS[kind]):
        inputs = prompt(kind, rows)
        assert difference_from_masked(kind, vtprune.wrap(make(kind), stages), inputs)[0] < TOLERANCE


def test_the_report_says_by_which_layer_a_stage_selects() -> None:
    model = vtprune.wrap(make("llava-clip"), [vtprune.VisionZip(keep=11), vtprune.GemFilter(keep=6)])
    with torch.no_grad():
        model(**prompt("llava-clip", ROWS["llava-clip"]))
    assert [stage.stage for stage in vtprune.report(model).stages] == ["encoder", "before decoder, by decoder layer 2"]


@pytest.mark.parametrize("name", ["FastV", "PyramidDrop"])
def test_a_probe_cannot_follow_drops_inside_the_decoder(name: str) -> None:
    with pytest.raises(vtprune.VTPruneError, match=r"gemfilter acts before the decoder, .* only inside the decoder"):
        vtprune.wrap(make("llava-clip"), [getattr(vtprune, name)(), vtprune.GemFilter(keep=4)])


def test_what_raises_in_a_probe_leaves_nothing_behind() -> None:
    kind = "llava-clip"
    inputs = prompt(kind, ROWS[kind])
    model = vtprune.wrap(make(kind), vtprune.GemFilter(keep=5))
    layer = model.model.language_model.layers[1].mlp

    def stop(error: type[BaseException]) -> Any:
        def hook(*_: Any) -> None:
            raise error("stop")

        return hook

    with torch.no_grad():
        expected = model(**inputs).logits
        for error in (RuntimeError, KeyboardInterrupt):
            handle = layer.register_forward_pre_hook(stop(error))
            with pytest.raises(error, match="stop"):
                model(**inputs)
            handle.remove()
            gc.collect()
            assert not [one for one in gc.get_objects() if type(one) is DecoderRun]
            assert torch.equal(model(**inputs).logits, expected)


def test_a_finished_probe_leaves_nothing_behind() -> None:
    kind = "llava-clip"
    model = vtprune.wrap(make(kind), vtprune.GemFilter(keep=5))
    gc.collect()
    gc.disable()
    try:
        model.generate(**prompt(kind, ROWS[kind]), max_new_tokens=2)
        assert not [one for one in gc.get_objects() if type(one) is DecoderRun]
    finally:
        gc.enable()


@every_model
def test_outputs_that_were_asked_for_are_those_of_the_pass_that_counts(kind: str) -> None:
    inputs = prompt(kind, ROWS[kind])
    model = vtprune.wrap(make(kind, "eager"), vtprune.GemFilter(keep=5))
    with torch.no_grad():
        plain = model(**inputs)
        out = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 6
    assert len(out.attentions) == 5
    assert torch.equal(out.logits, plain.logits)


@every_model
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_probe_takes_no_part_in_the_gradients(kind: str, reentrant: bool) -> None:
    inputs = prompt(kind, ROWS[kind])
    ids = inputs["input_ids"]
    labels = ids.masked_fill((ids == IMAGE) | (inputs["attention_mask"] == 0), -100)
    gradients, kept = [], []
    model = vtprune.wrap(make(kind), vtprune.GemFilter(keep=5))
    for checkpointing in (False, True):
        model.train().zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model(**inputs, labels=labels).loss.backward()
        kept.append([image.kept for sample in vtprune.report(model).samples for image in sample.images])
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert kept[0] == kept[1]
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[1][name], grad, atol=1e-6) for name, grad in gradients[0].items())


@every_model
def test_threads_probe_beside_each_other(kind: str) -> None:
    model = vtprune.wrap(make(kind), vtprune.GemFilter(keep=5))
    batches = [prompt(kind, [row]) for row in ROWS[kind]]
    with torch.no_grad():
        expected = [model(**inputs).logits for inputs in batches]
    found: dict[int, list[Tensor]] = {index: [] for index in range(len(batches))}

    def work(index: int) -> None:
        with torch.no_grad():
            found[index] += [model(**batches[index]).logits for _ in range(4)]

    threads = [threading.Thread(target=work, args=(index,)) for index in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, logits in enumerate(expected):
        assert len(found[index]) == 4
        assert all(torch.equal(one, logits) for one in found[index])


@every_model
def test_beams_select_as_their_row_does(kind: str) -> None:
    model = vtprune.wrap(make(kind), vtprune.GemFilter(keep=5))
    inputs = prompt(kind, ROWS[kind])
    kept = []
    for beams in (1, 3):
        model.generate(**inputs, max_new_tokens=3, num_beams=beams, do_sample=False)
        report = vtprune.report(model)
        kept.append([[image.kept for image in sample.images] for sample in report.samples])
    assert kept[1] == [images for images in kept[0] for _ in range(3)]


@pytest.mark.slow
def test_a_compiled_model_probes() -> None:
    kind = "qwen2.5-vl"
    inputs = prompt(kind, ROWS[kind])
    model = vtprune.wrap(make(kind), vtprune.GemFilter(keep=5))
    with torch.no_grad():
        expected = model(**inputs).logits
        torch.compiler.reset()
        assert torch.allclose(torch.compile(model, backend="eager")(**inputs).logits, expected, atol=2e-5)
