"""LazyLLM: what is left out waits, returns when a later step wants it, and is computed once at the most."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import vtprune
from tests.models import DECODER_LAYERS, IMAGE, MODELS, ROWS, TWO, Row, make, prompt
from tests.oracle import STEPS, TOLERANCE, compare, next_tokens, run_masked, run_wrapped
from tests.slow_lazyllm import SlowLazyLLM
from vtprune.report import ImageReport
from vtprune.revival import check_revival

every_model = pytest.mark.parametrize("kind", MODELS)
BOUNDARIES = (1, 3, 4)
NO_MEDIA = {"suppress_tokens": [90, 91, 92, 93]}


def _positions(kind: str, model: Any, inputs: dict[str, Tensor]) -> Tensor:
    length = inputs["input_ids"].shape[1]
    if not kind.startswith("qwen"):
        return torch.arange(length)[None]
    return model.model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=(inputs["input_ids"] == IMAGE).long(),
        image_grid_thw=inputs.get("image_grid_thw"),
    )[0]


@torch.no_grad()
def _slow(kind: str, parts: list[dict[str, Tensor]], tokens: Tensor) -> SlowLazyLLM:
    """The slow reference for turns of one row each, and `tokens` (1, n) after them."""
    model = make(kind, "eager")
    ids = torch.cat([*(part["input_ids"] for part in parts), tokens], dim=1)
    media = [part for part in parts if "pixel_values" in part]
    inputs = {name: torch.cat([part[name] for part in media]) for name in ("pixel_values", "image_grid_thw")
              if media and name in media[0]}  # fmt: skip
    embeds = model.get_input_embeddings()(ids)[0].clone()
    places = (ids[0] == IMAGE).nonzero().flatten().tolist()
    images = []
    if media:
        grids = {name: value for name, value in inputs.items() if name == "image_grid_thw"}
        features = model.model.get_image_features(inputs["pixel_values"], **grids).pooler_output
        embeds[ids[0] == IMAGE] = torch.cat(list(features))
        for feature in features:
            images.append(places[: len(feature)])
            places = places[len(feature) :]
    return SlowLazyLLM(
        model, ids[0], embeds, _positions(kind, model, {**inputs, "input_ids": ids}), images, BOUNDARIES
    )


def _same_sets(slow: SlowLazyLLM, images: list[ImageReport]) -> int:
    """Asserts that the report names the sets of the reference; how many tokens returned."""
    returned = 0
    for own, image in zip(slow.images, images, strict=True):
        for number, step in enumerate(image.steps):
            forward = number + len(slow.attended) - len(image.steps)
            for layer in range(DECODER_LAYERS):
                attended = {own[token] for token in step.attended_per_layer[layer]}
                computed = {own[token] for token in step.computed_per_layer[layer]}
                assert attended == slow.attended[forward][layer] & set(own)
                assert computed == slow.computed[forward][layer] & set(own)
                assert step.attended_per_layer[layer] == sorted(step.attended_per_layer[layer])
                returned += len(computed)
    return returned


@every_model
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_prefill_and_steps_equal_a_token_by_token_reference(kind: str, attention: str, padding: str) -> None:
    model = vtprune.wrap(make(kind, attention), "lazyllm")
    inputs = prompt(kind, ROWS[kind], padding)
    logits, _, cache = run_wrapped(kind, model, inputs)
    report = vtprune.report(cache)
    for index, row in enumerate(ROWS[kind]):
        own = prompt(kind, [row])
        slow = _slow(kind, [own], next_tokens(len(ROWS[kind]))[index : index + 1])
        with torch.no_grad():
            expected = slow.feed(own["input_ids"].shape[1])
            steps = torch.cat([slow.feed(1) for _ in range(STEPS)])
        mask = inputs["attention_mask"][index].bool()
        text = own["input_ids"][0] != IMAGE
        assert float((logits[index, : len(mask)][mask] - expected)[text].abs().max()) < TOLERANCE
        assert float((logits[index, len(mask) :] - steps).abs().max()) < TOLERANCE
        for image, places in zip(report.samples[index].images, slow.images, strict=True):
            for layer, kept in enumerate(image.kept_per_layer):
                assert {places[token] for token in kept} == slow.attended[0][layer] & set(places)
            assert len(image.steps) == STEPS
        assert _same_sets(slow, report.samples[index].images) > 20


@every_model
def test_every_layer_computes_a_token_once_at_the_most(kind: str) -> None:
    model = vtprune.wrap(make(kind), "lazyllm", keep=0.4)
    _, _, cache = run_wrapped(kind, model, prompt(kind, ROWS[kind]))
    report = vtprune.report(cache)
    steps_with_returns = set()
    for row, sample in enumerate(report.samples):
        for layer in range(DECODER_LAYERS):
            held = 0
            for image in sample.images:
                computed = list(image.kept_per_layer[layer])
                for number, step in enumerate(image.steps):
                    computed += step.computed_per_layer[layer]
                    steps_with_returns |= {number} if step.computed_per_layer[layer] else set()
                    assert len(step.attended_per_layer[layer]) == len(image.kept_per_layer[layer])
                    assert set(step.attended_per_layer[layer]) <= set(computed)
                    if layer:
                        assert set(step.attended_per_layer[layer]) <= set(step.attended_per_layer[layer - 1])
                assert len(computed) == len(set(computed))
                held += len(computed)
            # Text, the steps' own tokens, and what was computed so far: nothing else is in the cache.
            assert report.kv_tokens_per_layer[layer][row] == held + sample.text_tokens + STEPS
    assert len(steps_with_returns) >= 3


@torch.no_grad()
def _turn(model: Any, inputs: dict[str, Tensor], cache: Any = None) -> Any:
    return model(**inputs, past_key_values=DynamicCache() if cache is None else cache, use_cache=True)


@torch.no_grad()
def _steps(model: Any, cache: Any, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits (B, n, V) after feeding tokens (B, n) one by one."""
    logits = []
    for column in tokens.split(1, dim=1):
        extra = {}
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(column)], dim=1)
            extra["attention_mask"] = mask
        logits.append(model(input_ids=column, past_key_values=cache, **extra).logits)
    return torch.cat(logits, dim=1)


@every_model
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_later_turns_of_text_and_images_equal_the_reference(kind: str, attention: str) -> None:
    model = vtprune.wrap(make(kind, attention), "lazyllm")
    first = prompt(kind, [ROWS[kind][2]])
    text = {"input_ids": torch.tensor([[11, 12, 13, 14]])}
    image = prompt(kind, [Row([0, 4], [(4, 5)] if kind.startswith("qwen") else [(6, 6)], seed=7)])
    tokens = next_tokens(1)[:, :4]
    ids = torch.cat([first["input_ids"], tokens[:, :2], text["input_ids"], image["input_ids"]], dim=1)
    slow = _slow(kind, [{**first}, {"input_ids": tokens[:, :2]}, text, image], tokens[:, 2:])
    with torch.no_grad():
        cache = _turn(model, first).past_key_values
        found = [_steps(model, cache, tokens[:, :2]), _turn(model, text, cache).logits]
        own = {**image}
        if kind.startswith("qwen"):
            own["mm_token_type_ids"] = (image["input_ids"] == IMAGE).long()
        found += [_turn(model, own, cache).logits, _steps(model, cache, tokens[:, 2:])]
        lengths = [first["input_ids"].shape[1], 1, 1, 4, image["input_ids"].shape[1], 1, 1]
        expected = torch.cat([slow.feed(length) for length in lengths])[lengths[0] :]
    fed = torch.cat([ids[0, lengths[0] :], tokens[0, 2:]])
    assert float((torch.cat(found, dim=1)[0] - expected)[fed != IMAGE].abs().max()) < TOLERANCE
    images = vtprune.report(cache).samples[0].images
    assert [len(one.steps) for one in images] == [6] * (len(images) - 1) + [2]
    assert _same_sets(slow, images) > 20


@every_model
def test_the_reference_notices_another_choice(kind: str) -> None:
    model = vtprune.wrap(make(kind), "lazyllm")
    inputs = prompt(kind, ROWS[kind])
    logits, _, cache = run_wrapped(kind, model, inputs)
    report = vtprune.report(cache)
    assert compare(logits, run_masked(kind, vtprune.unwrap(model), inputs, report), inputs) < TOLERANCE
    step = report.samples[0].images[0].steps[3]
    unused = next(token for token in range(12) if token not in step.attended_per_layer[-1])
    step.attended_per_layer[-1][0] = unused
    assert compare(logits, run_masked(kind, model, inputs, report), inputs) > 100 * TOLERANCE


@every_model
@pytest.mark.parametrize("change", ["repeat", "select", "reorder", "copy"])
def test_what_waits_follows_the_caches_rows(kind: str, change: str) -> None:
    model = vtprune.wrap(make(kind), "lazyllm")
    inputs = prompt(kind, ROWS[kind])
    tokens = next_tokens(3)
    rows = {"repeat": [0, 0, 1, 1, 2, 2], "select": [2, 0], "reorder": [2, 0, 1], "copy": [0, 1, 2]}[change]
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(tokens[:, :3])], dim=1)
    caches = []
    for _ in range(2):
        cache = _turn(model, inputs).past_key_values
        _steps(model, cache, tokens[:, :3], inputs["attention_mask"])
        caches.append(cache)
    expected = _steps(model, caches[0], tokens[:, 3:], mask)[rows]
    cache = caches[1]
    if change == "repeat":
        cache.batch_repeat_interleave(2)
    elif change == "select":
        cache.batch_select_indices(torch.tensor(rows))
    elif change == "reorder":
        cache.reorder_cache(torch.tensor(rows))
    else:
        cache = copy.deepcopy(cache)
        _steps(model, caches[1], tokens[:, 3:], mask)
    found = _steps(model, cache, tokens[rows, 3:], mask[rows])
    assert float((found - expected).abs().max()) < TOLERANCE
    first, second = vtprune.report(caches[0]), vtprune.report(cache)
    assert [sample.images for sample in second.samples] == [first.samples[row].images for row in rows]
    for ours, theirs in zip(second.kv_tokens_per_layer, first.kv_tokens_per_layer, strict=True):
        assert ours == [theirs[row] for row in rows]


@every_model
def test_cropping_takes_returns_back(kind: str) -> None:
    model = vtprune.wrap(make(kind), "lazyllm")
    inputs = prompt(kind, ROWS[kind])
    tokens, mask = next_tokens(3), inputs["attention_mask"]
    cache = _turn(model, inputs).past_key_values
    _steps(model, cache, tokens[:, :2], mask)
    before = vtprune.report(cache)
    twin = copy.deepcopy(cache)
    longer = torch.cat([mask, torch.ones_like(tokens[:, :2])], dim=1)
    _steps(model, cache, tokens[:, 2:7], longer)
    assert vtprune.report(cache).kv_tokens_per_layer[-1] > before.kv_tokens_per_layer[-1]
    cache.crop(-5)
    after = vtprune.report(cache)
    assert after.kv_tokens_per_layer == before.kv_tokens_per_layer
    assert [sample.images for sample in after.samples] == [sample.images for sample in before.samples]
    assert after.aux_bytes == before.aux_bytes
    other = tokens.flip(1)[:, :4]
    found, expected = _steps(model, cache, other, longer), _steps(model, twin, other, longer)
    assert float((found - expected).abs().max()) < TOLERANCE
    assert vtprune.report(cache).samples == vtprune.report(twin).samples


@every_model
def test_cropping_into_the_prompt_forgets_what_was_there(kind: str) -> None:
    model = vtprune.wrap(make(kind), "lazyllm")
    row = ROWS[kind][2]
    inputs = prompt(kind, [row])
    cache = _turn(model, inputs).past_key_values
    _steps(model, cache, next_tokens(1))
    last = int((inputs["input_ids"][0] == IMAGE).nonzero().max())
    second = [image.tokens for image in vtprune.report(cache).samples[0].images][-1]
    length = last + 1 - second
    cache.crop(length - cache.get_seq_length())
    assert _steps(model, cache, next_tokens(1)).isfinite().all()
    report = vtprune.report(cache)
    assert len(report.samples[0].images) == len(row.grids) - 1
    assert all(count <= length + STEPS for (count,) in report.kv_tokens_per_layer)
    cache.crop(-cache.get_seq_length())
    found, expected = _turn(model, inputs, cache), _turn(model, inputs)
    assert torch.equal(found.logits, expected.logits)
    again = _steps(model, cache, next_tokens(1)), _steps(model, expected.past_key_values, next_tokens(1))
    assert torch.equal(*again)


@every_model
def test_beams_carry_their_own_choices(kind: str) -> None:
    model = vtprune.wrap(make(kind), "lazyllm")
    inputs = prompt(kind, ROWS[kind][:1])
    out = model.generate(
        **inputs, **NO_MEDIA, max_new_tokens=8, num_beams=4, num_return_sequences=4, do_sample=False,
        length_penalty=0.0, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    tokens = out.sequences[:, inputs["input_ids"].shape[1] :]
    for row, score in zip(tokens, out.sequences_scores, strict=True):
        first = _turn(model, inputs)
        logits = torch.cat([first.logits[:, -1:], _steps(model, first.past_key_values, row[None, :-1])], dim=1)[0]
        chosen = logits.log_softmax(dim=-1).gather(1, row[:, None]).sum()
        assert abs(float(chosen - score)) < 1e-4


@every_model
def test_interleaved_generations_and_threads_keep_their_own_state(kind: str) -> None:
    model = vtprune.wrap(make(kind), "lazyllm")
    prompts = [prompt(kind, [row]) for row in ROWS[kind]]
    tokens = next_tokens(1)
    expected = [_steps(model, _turn(model, one).past_key_values, tokens) for one in prompts]
    caches = [_turn(model, one).past_key_values for one in prompts]
    for step in range(STEPS):
        for cache, steps in zip(caches, expected, strict=True):
            assert torch.equal(_steps(model, cache, tokens[:, step : step + 1])[0, 0], steps[0, step])
    found: list[Any] = [None] * 6

    def work(job: int) -> None:
        found[job] = _steps(model, _turn(model, prompts[job % 3]).past_key_values, tokens)

    workers = [threading.Thread(target=work, args=(job,)) for job in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(logits, expected[job % 3]) for job, logits in enumerate(found))


@every_model
def test_hidden_states_keep_the_length_of_the_input_while_tokens_return(kind: str) -> None:
    model = vtprune.wrap(make(kind), "lazyllm")
    cache = _turn(model, prompt(kind, ROWS[kind][:1])).past_key_values
    with torch.no_grad():
        out = model(input_ids=torch.tensor([[5, 6, 7]]), past_key_values=cache, output_hidden_states=True)
    step = vtprune.report(cache).samples[0].images[0].steps[0]
    assert any(step.computed_per_layer)
    assert [states.shape[1] for states in out.hidden_states] == [3] * (DECODER_LAYERS + 1)
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)


@every_model
def test_without_a_cache_tokens_drop_as_in_the_prefill(kind: str) -> None:
    model = vtprune.wrap(make(kind), "lazyllm")
    inputs = prompt(kind, ROWS[kind])
    with torch.no_grad():
        cached = model(**inputs)
        kept = [image.kept_per_layer for sample in vtprune.report(model).samples for image in sample.images]
        assert torch.equal(model(**inputs, use_cache=False).logits, cached.logits)
    report = vtprune.report(model)
    assert [image.kept_per_layer for sample in report.samples for image in sample.images] == kept
    assert report.aux_bytes == 0


@every_model
def test_what_waits_is_counted_beside_the_cache(kind: str) -> None:
    model = vtprune.wrap(make(kind), "lazyllm")
    cache = _turn(model, prompt(kind, ROWS[kind][:1])).past_key_values
    report = vtprune.report(cache)
    text = model.config.get_text_config()
    head = text.hidden_size // text.num_attention_heads
    counts = [len(kept) for kept in report.samples[0].images[0].kept_per_layer]
    waiting = counts[0] - counts[-1]
    assert report.aux_bytes == 4 * waiting * (text.hidden_size + 2 * head)
    assert report.kv_bytes == report.kv_bytes_allocated
    # Nothing that returns leaves, and what was computed on the way and cut again comes on top.
    _steps(model, cache, next_tokens(1))
    assert vtprune.report(cache).aux_bytes >= report.aux_bytes


@every_model
def test_after_stages_before_the_decoder_only_what_entered_returns(kind: str) -> None:
    model = vtprune.wrap(make(kind), [vtprune.Random(keep=12), vtprune.LazyLLM()])
    inputs = prompt(kind, ROWS[kind])
    logits, _, cache = run_wrapped(kind, model, inputs)
    report = vtprune.report(cache)
    assert compare(logits, run_masked(kind, vtprune.unwrap(model), inputs, report), inputs) < TOLERANCE
    images = [image for sample in report.samples for image in sample.images]
    assert any(any(step.computed_per_layer) for image in images for step in image.steps)
    for image in images:
        assert all(set(step.attended_per_layer[0]) == set(image.kept) for step in image.steps)


@every_model
@pytest.mark.parametrize("row", [Row([0, 5], [(6, 6)], 8), Row([4, 0], [(6, 6)], 9), TWO], ids=["start", "end", "two"])
def test_an_image_may_stand_anywhere(kind: str, row: Row) -> None:
    model = vtprune.wrap(make(kind), "lazyllm")
    inputs = prompt(kind, [row])
    logits, _, cache = run_wrapped(kind, model, inputs)
    report = vtprune.report(cache)
    assert compare(logits, run_masked(kind, vtprune.unwrap(model), inputs, report), inputs) < TOLERANCE


def test_an_image_of_one_token_stays() -> None:
    kind = "qwen2.5-vl"
    rows = [Row([3, 4], [(1, 1)], 5), Row([2, 3], [(3, 4)], 6), Row([6], [], 7)]
    model = vtprune.wrap(make(kind), "lazyllm")
    inputs = prompt(kind, rows)
    logits, _, cache = run_wrapped(kind, model, inputs)
    report = vtprune.report(cache)
    assert compare(logits, run_masked(kind, vtprune.unwrap(model), inputs, report), inputs) < TOLERANCE
    assert report.samples[0].images[0].steps[0].attended_per_layer == [[0]] * DECODER_LAYERS
    alone = prompt(kind, rows[:1])
    with vtprune.wrapped(model, "lazyllm"), torch.no_grad():
        cache = model(**alone).past_key_values
    assert vtprune.report(cache).aux_bytes == 0


def test_the_layers_are_those_of_the_paper_and_move_for_a_low_budget() -> None:
    pruner = vtprune.LazyLLM()
    assert pruner.places(32) == (9, 19, 28)
    ratios = pruner.ratios(32)
    assert [ratios[layer] for layer in (8, 9, 19, 28)] == pytest.approx([1, 0.7, 0.49, 0.343])
    assert vtprune.LazyLLM(ratio=0.5).ratios(32)[-1] == pytest.approx(0.125)
    assert pruner.places(32, 0.2)[0] < 9
    assert vtprune.LazyLLM(layers=(4, 8)).places(32, 0.3) == (4, 8)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"ratio": 0.3, "keep": 0.5}, "keep and ratio contradict"),
        ({"ratio": 1.0}, "ratio is a number between 0 and 1"),
        ({"ratio": 0}, "ratio is a number between 0 and 1"),
        ({"ratio": True}, "ratio is a number between 0 and 1"),
        ({"ratio": float("nan")}, "ratio is a number between 0 and 1"),
        ({"layers": (0, 2)}, "rising ints of at least 1"),
        ({"layers": (2, 9)}, "needs at least 10 decoder layers"),
        ({"schedule": "falling"}, "schedule is one of"),
        ({"keep": 0.0}, "keep takes a count"),
        ({"positions": "compact"}, "lazyllm those that were left out return; use 'original'"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(vtprune.VTPruneError, match=reason):
        vtprune.wrap(make("llava-clip"), "lazyllm", **options)


@pytest.mark.parametrize("other", [vtprune.FastV(), vtprune.MustDrop(), vtprune.LazyLLM()], ids=lambda one: one.name)
def test_other_methods_inside_the_decoder_are_refused(other: vtprune.Pruner) -> None:
    for stages in ([other, vtprune.LazyLLM()], [vtprune.LazyLLM(), other]):
        with pytest.raises(vtprune.VTPruneError, match=r"chooses anew at every step|acts in the encoder"):
            vtprune.wrap(make("llava-clip"), stages)


@every_model
def test_assisted_decoding_is_refused_by_name(kind: str) -> None:
    inputs = prompt(kind, ROWS[kind][:1])
    model = vtprune.wrap(make(kind), "lazyllm")
    with pytest.raises(vtprune.VTPruneError, match="assisted decoding checks several"):
        model.generate(**inputs, max_new_tokens=4, prompt_lookup_num_tokens=3)
    assert vtprune.unwrap(model).generate(**inputs, max_new_tokens=4, prompt_lookup_num_tokens=3).shape[0] == 1


def test_a_cache_cannot_go_on_with_another_method() -> None:
    model = make("llava-clip")
    with vtprune.wrapped(model, "lazyllm"):
        cache = _turn(model, prompt("llava-clip", ROWS["llava-clip"][:1])).past_key_values
    for other in (vtprune.Random(keep=4), vtprune.LazyLLM(layers=(2, 4))):
        with vtprune.wrapped(model, other), pytest.raises(vtprune.VTPruneError, match="same method and settings"):
            _steps(model, cache, torch.tensor([[5]]))
    with vtprune.wrapped(model, "lazyllm"):
        assert _steps(model, cache, torch.tensor([[5]])).isfinite().all()


@pytest.mark.parametrize(
    ("setting", "reason"),
    [({"_attn_implementation": "flash_attention_2"}, "flash"), ({"layer_types": ["sliding_attention"]}, "sliding")],
)
def test_what_cannot_mask_single_queries_is_refused(setting: dict[str, Any], reason: str) -> None:
    class Config:
        _attn_implementation = "sdpa"

    for name, value in setting.items():
        setattr(Config, name, value)
    with pytest.raises(vtprune.VTPruneError, match=reason):
        check_revival([], vtprune.LazyLLM(), set(), Config())


def test_attention_that_is_not_a_number_is_refused_at_a_step() -> None:
    model = vtprune.wrap(make("llava-clip"), "lazyllm")
    cache = _turn(model, prompt("llava-clip", ROWS["llava-clip"][:1])).past_key_values
    projection = model.model.language_model.layers[0].self_attn.q_proj
    handle = projection.register_forward_pre_hook(lambda module, args: (args[0] * float("nan"),))
    with pytest.raises(vtprune.ScoreError, match="lazyllm"):
        _steps(model, cache, torch.tensor([[5]]))
    handle.remove()
