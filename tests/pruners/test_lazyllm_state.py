"""What waits for LazyLLM belongs to the cache and follows it; what cannot be right is refused."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch

import vtprune
from tests.models import IMAGE, MODELS, ROWS, make, prompt
from tests.oracle import STEPS, TOLERANCE, next_tokens
from tests.pruners.slow_lazyllm import steps, turn
from vtprune.decoder.revival import check_revival

every_model = pytest.mark.parametrize("kind", MODELS)
NO_MEDIA = {"suppress_tokens": [90, 91, 92, 93]}


@every_model
@pytest.mark.parametrize("change", ["repeat", "select", "reorder", "copy", "first", "second"])
def test_what_waits_follows_the_caches_rows(kind: str, change: str) -> None:
    model = vtprune.wrap(make(kind), "lazyllm")
    inputs = prompt(kind, ROWS[kind])
    tokens = next_tokens(3)
    rows = {"repeat": [0, 0, 1, 1, 2, 2], "select": [2, 0], "reorder": [2, 0, 1], "copy": [0, 1, 2],
            "first": [0], "second": [1]}[change]  # fmt: skip
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(tokens[:, :3])], dim=1)
    caches = []
    for _ in range(2):
        cache = turn(model, inputs).past_key_values
        steps(model, cache, tokens[:, :3], inputs["attention_mask"])
        caches.append(cache)
    expected = steps(model, caches[0], tokens[:, 3:], mask)[rows]
    cache = caches[1]
    if change == "repeat":
        cache.batch_repeat_interleave(2)
    elif change in ("select", "first", "second"):
        cache.batch_select_indices(torch.tensor(rows))
    elif change == "reorder":
        cache.reorder_cache(torch.tensor(rows))
    else:
        cache = copy.deepcopy(cache)
        steps(model, caches[1], tokens[:, 3:], mask)
    found = steps(model, cache, tokens[rows, 3:], mask[rows])
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
    cache = turn(model, inputs).past_key_values
    steps(model, cache, tokens[:, :2], mask)
    before = vtprune.report(cache)
    twin = copy.deepcopy(cache)
    longer = torch.cat([mask, torch.ones_like(tokens[:, :2])], dim=1)
    steps(model, cache, tokens[:, 2:7], longer)
    assert vtprune.report(cache).kv_tokens_per_layer[-1] > before.kv_tokens_per_layer[-1]
    cache.crop(-5)
    after = vtprune.report(cache)
    assert after.kv_tokens_per_layer == before.kv_tokens_per_layer
    assert [sample.images for sample in after.samples] == [sample.images for sample in before.samples]
    assert after.aux_bytes == before.aux_bytes
    other = tokens.flip(1)[:, :4]
    found, expected = steps(model, cache, other, longer), steps(model, twin, other, longer)
    assert float((found - expected).abs().max()) < TOLERANCE
    assert vtprune.report(cache).samples == vtprune.report(twin).samples


@every_model
def test_cropping_into_the_prompt_forgets_what_was_there(kind: str) -> None:
    model = vtprune.wrap(make(kind), "lazyllm")
    row = ROWS[kind][2]
    inputs = prompt(kind, [row])
    cache = turn(model, inputs).past_key_values
    steps(model, cache, next_tokens(1))
    last = int((inputs["input_ids"][0] == IMAGE).nonzero().max())
    second = [image.tokens for image in vtprune.report(cache).samples[0].images][-1]
    length = last + 1 - second
    cache.crop(length - cache.get_seq_length())
    assert steps(model, cache, next_tokens(1)).isfinite().all()
    report = vtprune.report(cache)
    assert len(report.samples[0].images) == len(row.grids) - 1
    assert all(count <= length + STEPS for (count,) in report.kv_tokens_per_layer)
    cache.crop(-cache.get_seq_length())
    found, expected = turn(model, inputs, cache), turn(model, inputs)
    assert torch.equal(found.logits, expected.logits)
    again = steps(model, cache, next_tokens(1)), steps(model, expected.past_key_values, next_tokens(1))
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
        first = turn(model, inputs)
        logits = torch.cat([first.logits[:, -1:], steps(model, first.past_key_values, row[None, :-1])], dim=1)[0]
        chosen = logits.log_softmax(dim=-1).gather(1, row[:, None]).sum()
        assert abs(float(chosen - score)) < 1e-4


@every_model
def test_interleaved_generations_and_threads_keep_their_own_state(kind: str) -> None:
    model = vtprune.wrap(make(kind), "lazyllm")
    prompts = [prompt(kind, [row]) for row in ROWS[kind]]
    tokens = next_tokens(1)
    expected = [steps(model, turn(model, one).past_key_values, tokens) for one in prompts]
    caches = [turn(model, one).past_key_values for one in prompts]
    for step in range(STEPS):
        for cache, logits in zip(caches, expected, strict=True):
            assert torch.equal(steps(model, cache, tokens[:, step : step + 1])[0, 0], logits[0, step])
    found: list[Any] = [None] * 6

    def work(job: int) -> None:
        found[job] = steps(model, turn(model, prompts[job % 3]).past_key_values, tokens)

    workers = [threading.Thread(target=work, args=(job,)) for job in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(logits, expected[job % 3]) for job, logits in enumerate(found))


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
    with pytest.raises(vtprune.VTPruneError, match="assisted decoding"):
        model.generate(**inputs, max_new_tokens=4, prompt_lookup_num_tokens=3)
    assert vtprune.unwrap(model).generate(**inputs, max_new_tokens=4, prompt_lookup_num_tokens=3).shape[0] == 1


def test_a_cache_cannot_go_on_with_another_method() -> None:
    model = make("llava-clip")
    with vtprune.wrapped(model, "lazyllm"):
        cache = turn(model, prompt("llava-clip", ROWS["llava-clip"][:1])).past_key_values
    for other in (vtprune.Random(keep=4), vtprune.LazyLLM(layers=(2, 4))):
        with vtprune.wrapped(model, other), pytest.raises(vtprune.VTPruneError, match="same method and settings"):
            steps(model, cache, torch.tensor([[5]]))
    with vtprune.wrapped(model, "lazyllm"):
        assert steps(model, cache, torch.tensor([[5]])).isfinite().all()


@pytest.mark.parametrize(
    ("flash", "windows", "reason"), [(True, False, "flash attention has no mask"), (False, True, "sliding windows")]
)
def test_what_cannot_mask_single_queries_is_refused(flash: bool, windows: bool, reason: str) -> None:
    with pytest.raises(vtprune.VTPruneError, match=reason):
        check_revival([], vtprune.LazyLLM(), frozenset(), flash=flash, windows=windows)


def test_attention_that_is_not_a_number_is_refused_at_a_step() -> None:
    model = vtprune.wrap(make("llava-clip"), "lazyllm")
    cache = turn(model, prompt("llava-clip", ROWS["llava-clip"][:1])).past_key_values
    projection = model.model.language_model.layers[0].self_attn.q_proj
    handle = projection.register_forward_pre_hook(lambda module, args: (args[0] * float("nan"),))
    with pytest.raises(vtprune.ScoreError, match="lazyllm"):
        steps(model, cache, torch.tensor([[5]]))
    handle.remove()
