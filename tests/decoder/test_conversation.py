"""An image is judged by its own conversation: its text, without guesses, answers and neighbours, up to its end."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import vtprune
from tests.matrix import CACHE, GATED, PRUNERS, RELEASED, at_depth, label
from tests.models import IMAGE, MODELS, ROWS, Row, make, prompt, text_positions
from tests.oracle import TOLERANCE
from vtprune.cache.adopting import cache_in
from vtprune.decoder.prompt import PromptInfo, real_tokens, sight
from vtprune.errors import VTPruneError
from vtprune.method.pruner import Pruner
from vtprune.method.stages import Trained, routed_layers

EVERY = PRUNERS + CACHE + GATED
every_model = pytest.mark.parametrize("kind", MODELS)
every_pruner = pytest.mark.parametrize("pruner", EVERY, ids=label)
READS_ALL = (vtprune.LazyLLM, vtprune.D2O)


def _kept(report: vtprune.Report) -> list[list[list[int]]]:
    return [image.kept_per_layer for sample in report.samples for image in sample.images]


def _positions(kind: str, model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The position ids of one conversation alone: (1, L), or (4, 1, L) where the text has a plane of its own."""
    text = text_positions(inputs)
    if not kind.startswith("qwen"):
        return text
    planes, _ = model.model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs.get("image_grid_thw"),
    )
    return torch.cat([text[None], planes])


def _packed(kind: str, model: Any, rows: list[Row]) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
    """The inputs of each conversation alone, and of all in one row."""
    alone = []
    for row in rows:
        inputs: dict[str, Any] = prompt(kind, [row])
        alone.append({**inputs, "position_ids": _positions(kind, model, inputs)})
    dims = {"pixel_values": 0, "image_grid_thw": 0}
    return alone, {name: torch.cat([one[name] for one in alone], dim=dims.get(name, -1)) for name in alone[0]}


def _block_mask(lengths: list[int], kind: str) -> Tensor:
    """(1, 1, L, L) a causal mask within each conversation, bool or additive."""
    seen = torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool()[None, None]
    return seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


def _check_each_as_alone(kind: str, model: Any, alone: list[dict[str, Tensor]], packed: dict[str, Any]) -> None:
    with torch.no_grad():
        logits = model(**packed).logits[0]
        report = vtprune.report(model)
        kept, place, flops, words = _kept(report), 0, 0, 0
        for inputs in alone:
            ids = inputs["input_ids"][0]
            expected = model(**inputs, use_cache=False).logits[0]
            one = vtprune.report(model)
            assert [kept.pop(0) for _ in _kept(one)] == _kept(one)
            text = ids != IMAGE
            assert float((logits[place : place + len(ids)] - expected)[text].abs().max()) < TOLERANCE
            place, flops, words = place + len(ids), flops + one.flops, words + one.samples[0].text_tokens
    assert (report.flops, report.samples[0].text_tokens) == (flops, words)


@pytest.mark.lean
@every_model
@every_pruner
def test_conversations_packed_into_a_row_are_pruned_as_each_is_alone(kind: str, pruner: Pruner) -> None:
    model = vtprune.wrap(make(kind), pruner)
    alone, packed = _packed(kind, model, ROWS[kind])
    _check_each_as_alone(kind, model, alone, {**packed, "use_cache": False})


@pytest.mark.lean
@pytest.mark.parametrize("form", ["bool", "additive"])
@every_pruner
def test_a_block_mask_packs_conversations_too(form: str, pruner: Pruner) -> None:
    model = vtprune.wrap(make("llava-clip"), pruner)
    alone, packed = _packed("llava-clip", model, ROWS["llava-clip"])
    packed["attention_mask"] = _block_mask([one["input_ids"].shape[1] for one in alone], form)
    if isinstance(pruner, READS_ALL):
        with pytest.raises(VTPruneError, match="a row of its own"):
            model(**packed)
        packed["use_cache"] = False
    _check_each_as_alone("llava-clip", model, alone, packed)


@pytest.mark.parametrize("kind", ["llava-clip", "llava-siglip"])
def test_renumbered_positions_begin_again_with_each_conversation(kind: str) -> None:
    model = vtprune.wrap(make(kind), "grid", keep=9, positions="compact")
    alone, packed = _packed(kind, model, ROWS[kind])
    _check_each_as_alone(kind, model, alone, {**packed, "use_cache": False})


def test_flash_attention_on_packed_conversations_is_refused_before_it_runs() -> None:
    model = vtprune.wrap(make("llava-clip"), "grid", keep=9)
    _, packed = _packed("llava-clip", model, ROWS["llava-clip"])
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(VTPruneError, match="flash attention"):
        model(**packed, use_cache=False)


def test_a_mask_of_four_dimensions_says_what_is_padding() -> None:
    for padding in ("left", "right"):
        inputs = prompt("llava-clip", ROWS["llava-clip"], padding)
        flat = inputs["attention_mask"]
        length = flat.shape[1]
        seen = torch.ones(length, length).tril().bool() & flat.bool()[:, None, :]
        # Rows that see nothing are opened, as models do it.
        opened = seen | ~seen.any(dim=-1, keepdim=True)
        for mask in (opened[:, None], torch.zeros(opened[:, None].shape).masked_fill(~opened[:, None], -1e38)):
            info = PromptInfo(len(flat), length, 0, flat.device, real_tokens(mask), None, sees=sight(mask))
            assert torch.equal(info.real(), flat.bool())
            assert info.conversations.most == 1


@pytest.mark.lean
@every_model
@every_pruner
def test_prompt_lookup_changes_neither_the_answer_nor_the_report(kind: str, pruner: Pruner) -> None:
    model = vtprune.wrap(make(kind), pruner)
    row = Row([6, 6], ROWS[kind][0].grids, seed=5)
    inputs = prompt(kind, [row])
    # The prompt's end was there before, so that there is something to guess at once.
    inputs["input_ids"][0, :3] = inputs["input_ids"][0, -3:]
    options = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [IMAGE, 91, 92, 93]}
    if isinstance(pruner, READS_ALL):
        with pytest.raises(VTPruneError, match="prompt_lookup_num_tokens"):
            model.generate(**inputs, **options, prompt_lookup_num_tokens=3)
        return
    expected, report = model.generate(**inputs, **options), vtprune.report(model)
    assert torch.equal(model.generate(**inputs, **options, prompt_lookup_num_tokens=3), expected)
    _check_same_prefill(vtprune.report(model), report)


def _check_same_prefill(actual: vtprune.Report, expected: vtprune.Report) -> None:
    assert _kept(actual) == _kept(expected)
    assert actual.samples[0].text_tokens == expected.samples[0].text_tokens
    assert (actual.flops, actual.flops_full) == (expected.flops, expected.flops_full)
    assert actual.kv_bytes_prefill == expected.kv_bytes_prefill
    assert actual.history[0] == expected.history[0]


@pytest.mark.parametrize("pruner", [vtprune.FastV(keep=0.5), vtprune.MustDrop(keep=0.4), vtprune.CDPruner(keep=5)])
def test_an_assistant_changes_neither_the_answer_nor_the_report(pruner: Pruner) -> None:
    model = vtprune.wrap(make("llava-clip"), pruner)
    assistant = LlamaForCausalLM(copy.deepcopy(model.config.text_config)).eval()
    assistant.generation_config.eos_token_id = None
    options = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [IMAGE, 91, 92]}
    for row in (Row([3, 5], [(6, 6)], seed=1), Row([2, 3, 4], [(6, 6), (6, 6)], seed=2)):
        inputs = prompt("llava-clip", [row])
        expected, report = model.generate(**inputs, **options), vtprune.report(model)
        assert torch.equal(model.generate(**inputs, **options, assistant_model=assistant), expected)
        _check_same_prefill(vtprune.report(model), report)


def test_guesses_by_the_models_own_first_layers_are_refused() -> None:
    model = vtprune.wrap(make("llava-clip"), "grid", keep=9)
    with pytest.raises(VTPruneError, match="assistant_early_exit"):
        model.generate(**prompt("llava-clip", ROWS["llava-clip"][:1]), max_new_tokens=2, assistant_early_exit=2)


@every_model
@pytest.mark.parametrize("more", [{}, {"num_beams": 2}, {"use_cache": False}], ids=str)
def test_the_report_under_guidance_is_that_of_the_prompt(kind: str, more: dict[str, Any]) -> None:
    inputs = prompt(kind, ROWS[kind][:1])
    # Without a cache each step selects anew, and guidance leads to other text.
    model = vtprune.wrap(make(kind), "grid" if "use_cache" in more else "fastv", keep=0.5)
    options = {"max_new_tokens": 3, "do_sample": False, **more}
    model.generate(**inputs, **options)
    expected = vtprune.report(model)
    model.generate(**inputs, **options, guidance_scale=1.5)
    actual = vtprune.report(model)
    assert _kept(actual) == _kept(expected) != []
    assert (actual.flops, actual.steps, actual.kv_bytes) == (expected.flops, expected.steps, expected.kv_bytes)
    assert actual.kv_tokens_per_layer == expected.kv_tokens_per_layer
    # What is asked for next is reported next, images or none.
    model.generate(**prompt(kind, [Row([9], [], seed=4)]), max_new_tokens=2, do_sample=False)
    assert _kept(vtprune.report(model)) == []


def test_an_interrupted_generation_leaves_later_reports_alone() -> None:
    inputs = prompt("llava-clip", ROWS["llava-clip"][:1])
    model = vtprune.wrap(make("llava-clip"), "grid", keep=9)

    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(**inputs, max_new_tokens=3, logits_processor=[interrupt])
    with torch.no_grad():
        model(**prompt("llava-clip", [Row([9], [], seed=4)]))
    assert _kept(vtprune.report(model)) == []


@pytest.mark.lean
@every_model
@every_pruner
def test_answers_that_labels_mark_have_no_say(kind: str, pruner: Pruner) -> None:
    model = vtprune.wrap(make(kind), pruner)
    inputs = prompt(kind, [Row([3, 6], ROWS[kind][0].grids, seed=1)])
    with torch.no_grad():
        model(**inputs, use_cache=False)
        expected = _kept(vtprune.report(model))
        answer = torch.tensor([[17, 31, 5, 44]])
        longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], answer], dim=1)}
        if kind.startswith("qwen"):
            longer["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(answer)], dim=1)
        labels = torch.full_like(longer["input_ids"], -100)
        labels[:, -4:] = answer
        model(**longer, labels=labels, use_cache=False)
        report = vtprune.report(model)
        assert _kept(report) == expected
        # They are read and paid for like any text.
        assert report.samples[0].text_tokens == int((longer["input_ids"] != IMAGE).sum())
        # Labels on every token of the text leave no question: then all of it is one.
        model(**longer, use_cache=False)
        unlabelled = _kept(vtprune.report(model))
        if not isinstance(pruner, Trained):
            model(
                **longer, labels=longer["input_ids"].masked_fill(longer["input_ids"] == IMAGE, -100), use_cache=False
            )
            assert _kept(vtprune.report(model)) == unlabelled


@pytest.mark.lean
@every_model
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("pruner", [*PRUNERS, *RELEASED], ids=label)
def test_padding_is_packed_away_with_what_is_dropped(kind: str, padding: str, pruner: Pruner) -> None:
    rows = [ROWS[kind][0], Row([4], [], seed=6)]
    inputs = prompt(kind, rows, padding)
    model = vtprune.wrap(make(kind), pruner)
    widths: dict[int, int] = {}
    for index, layer in enumerate(model.model.language_model.layers):
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, index=index: widths.__setitem__(index, args[0].shape[1]), with_kwargs=True
        )
    with torch.no_grad():
        out = model(**inputs)
    report = vtprune.report(model)
    text = [sample.text_tokens for sample in report.samples]
    assert text == [int((row != IMAGE).sum()) for row in map(torch.cat, _without_padding(inputs))]
    for index, (vision, kv) in enumerate(zip(report.tokens_per_layer, report.kv_tokens_per_layer, strict=True)):
        if routed_layers(at_depth(pruner, len(report.tokens_per_layer))) or vision[0] == inputs["input_ids"].shape[1]:
            continue
        assert widths[index] == max(v + t for v, t in zip(vision, text, strict=True))
        keys = cache_in(out).layers[index].keys
        assert keys.shape[2] == max(kv)


def _without_padding(inputs: dict[str, Tensor]) -> list[list[Tensor]]:
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    return [[row[real]] for row, real in zip(inputs["input_ids"], mask, strict=True)]


@every_model
def test_a_prompt_that_ends_with_an_image_says_where_its_answer_starts(kind: str) -> None:
    inputs = prompt(kind, [Row([5, 0], ROWS[kind][0].grids, seed=1)])
    if kind.startswith("qwen"):
        # Without the token that closes the image.
        inputs = {
            name: value[:, :-1] if value.ndim == 2 and name != "pixel_values" else value
            for name, value in inputs.items()
        }
        inputs["image_grid_thw"] = prompt(kind, [Row([5, 0], ROWS[kind][0].grids, seed=1)])["image_grid_thw"]
    model = vtprune.wrap(make(kind), "grid", keep=4)
    with torch.no_grad():
        model(**inputs)
    image = vtprune.report(model).samples[0].images[0]
    assert [note for note in image.notes if f"starts from token {image.kept[-1]}" in note]
    with torch.no_grad():
        model(**prompt(kind, [Row([5, 3], ROWS[kind][0].grids, seed=1)]))
    assert not [note for note in vtprune.report(model).samples[0].images[0].notes if "starts from token" in note]
