"""What a model family may say about itself beyond one source of one image a row: its norms of queries and keys, what a
prompt shows, which rows of the encoder make an image, and which placeholders are vision tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vtprune
from tests.models import BUILDERS, END, HYBRIDS, IMAGE, LONG, MODELS, PAST, ROWS, SHORT, START, VIDEO, make, prompt
from tests.oracle import TOLERANCE
from vtprune import adapters
from vtprune.adapters import sizes
from vtprune.adapters.base import Adapter
from vtprune.adapters.llava import LlavaAdapter
from vtprune.adapters.seams import Source
from vtprune.encoder.arrangement import Arrangement, Part
from vtprune.encoder.encoding import EncodedImage, Encoding
from vtprune.hooks.taps import Taps
from vtprune.method.views import DecoderLayer

LAYER, HYBRID_LAYER = 2, 4


# ---- queries and keys


def _with_norms() -> Any:
    """A LLaVA whose decoder has norms of queries and keys, and heads that do not share its width."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 24, "patch_size": 4,
        },
        text_config={
            "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "vocab_size": 100,
        },
        image_token_id=IMAGE,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    _spread_norms(model)
    return model


def _spread_norms(model: Any) -> None:
    """Norms of queries and keys that each column of theirs goes through in another way."""
    for layer in model.model.language_model.layers:
        attention = getattr(layer, "self_attn", None)
        for norm in () if attention is None else (attention.q_norm, attention.k_norm):
            norm.weight.data.uniform_(0.5, 2.0)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """By decoder layer, the q, k and v that went into its attention."""
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if getattr(module, "q_proj", None) is not None and module.is_causal:
            groups = query.shape[1] // key.shape[1]
            found[module.layer_idx] = query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        return original(module, query, key, value, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", attention)
    return found


@pytest.mark.parametrize("kind", [*MODELS, *HYBRIDS, "with norms"])
@torch.no_grad()
def test_methods_are_shown_the_queries_and_keys_that_attention_got(
    kind: str, computed: dict[int, tuple[Tensor, Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "DECODERS", (*sizes.DECODERS, "qwen3"))
    model = _with_norms() if kind == "with norms" else make(kind)
    if kind in HYBRIDS:
        _spread_norms(model)
    inputs = prompt(kind, [LONG] if kind == "with norms" else [ROWS[kind][0]])
    adapter = adapters.adapter_for(model)
    index = HYBRID_LAYER if kind in HYBRIDS else LAYER
    layer = list(adapter.decoder_layers)[index]
    taps: dict[str, Tensor] = {}
    entered: dict[str, Any] = {}
    for name, module in adapter.decoder_taps(layer).modules().items():
        module.register_forward_hook(lambda _, args, output, name=name: taps.update({name: output}))
    layer.register_forward_pre_hook(lambda _, args, kwargs: entered.update(kwargs, hidden=args[0]), with_kwargs=True)
    model(**inputs)
    query, key, value = computed[index]
    embeddings, last = entered["position_embeddings"], torch.tensor([[3, query.shape[2] - 1]])
    torch.testing.assert_close(adapter.decoder_query(taps, embeddings), query)
    torch.testing.assert_close(adapter.decoder_query(taps, embeddings, last), query[:, :, last[0]])
    torch.testing.assert_close(adapter.repeated(adapter.decoder_keys(taps, embeddings)), key)
    torch.testing.assert_close(adapter.repeated(adapter.decoder_values(taps)), value)
    ahead = adapter.query_and_keys(layer, entered["hidden"], embeddings, last)
    torch.testing.assert_close(ahead[0], query[:, :, last[0]])
    torch.testing.assert_close(ahead[1], key)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[DecoderLayer]:
    """What SpAtten was shown, layer by layer, values looked at as the layer ran."""
    found: list[DecoderLayer] = []
    original = vtprune.SpAtten.prune_decoder

    def prune(self: Any, layer: DecoderLayer) -> Any:
        found.append(layer)
        assert layer.value.shape == layer.key.shape
        return original(self, layer)

    monkeypatch.setattr(vtprune.SpAtten, "prune_decoder", prune)
    return found


def _expect_computed(shown: list[DecoderLayer], computed: dict[int, tuple[Tensor, Tensor, Tensor]]) -> None:
    assert shown
    for layer in shown:
        query, key, value = computed[layer.index]
        count = query.shape[2]
        torch.testing.assert_close(layer.query, query[0])
        torch.testing.assert_close(layer.key, key[0, :, -count:])
        torch.testing.assert_close(layer.value, value[0, :, -count:])
    shown.clear()


@pytest.mark.parametrize("kind", [*MODELS, "with norms"])
@torch.no_grad()
def test_a_method_sees_what_attention_got_with_a_cache_without_one_and_behind_earlier_turns(
    kind: str,
    computed: dict[int, tuple[Tensor, Tensor, Tensor]],
    shown: list[DecoderLayer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sizes, "DECODERS", (*sizes.DECODERS, "qwen3"))
    inputs = prompt("llava-clip" if kind == "with norms" else kind, [LONG])
    with vtprune.wrapped(_with_norms() if kind == "with norms" else make(kind), "spatten", keep=0.5) as model:
        for use_cache in (True, False, True):
            model(**inputs, use_cache=use_cache)
            _expect_computed(shown, computed)
        mask = torch.ones(1, 2 * inputs["input_ids"].shape[1], dtype=torch.long)
        cache = model(**inputs).past_key_values
        shown.clear()
        model(**{**inputs, "attention_mask": mask, PAST: cache})
        _expect_computed(shown, computed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_a_method_sees_the_same_bits_with_and_without_a_cache(
    kind: str, dtype: torch.dtype, shown: list[DecoderLayer]
) -> None:
    inputs = {name: one.to(dtype) if one.is_floating_point() else one for name, one in prompt(kind, [LONG]).items()}
    with vtprune.wrapped(make(kind).to(dtype), "spatten", keep=0.5) as model:
        for use_cache in (True, False):
            model(**inputs, use_cache=use_cache)
    half = len(shown) // 2
    assert half
    for with_cache, without in zip(shown[:half], shown[half:], strict=True):
        for name in ("query", "key", "value"):
            assert torch.equal(getattr(with_cache, name), getattr(without, name))


@torch.no_grad()
def test_keys_and_values_are_hooked_once_a_forward_comes_without_a_cache() -> None:
    model, inputs = make("llava-clip"), prompt("llava-clip", [LONG])
    attention = next(iter(adapters.adapter_for(model).decoder_layers)).self_attn
    projections = attention.q_proj, attention.k_proj, attention.v_proj

    def hooks() -> list[int]:
        return [len(module._forward_hooks) for module in projections]

    with vtprune.wrapped(model, "spatten", keep=0.5):
        model(**inputs)
        assert hooks() == [1, 0, 0]
        for _ in range(2):
            model(**inputs, use_cache=False)
            assert hooks() == [1, 1, 1]
    assert hooks() == [0, 0, 0]


def test_a_thread_takes_no_group_for_hooked_that_another_one_is_still_hooking() -> None:
    taps, module, others = Taps(lambda: None), torch.nn.Linear(2, 2), list[Thread]()

    def find() -> dict[str, torch.nn.Module]:
        # As the first thread is about to hook the module, another one asks for the same.
        others.append(Thread(target=taps.follow, args=("group", lambda: [find])))
        others[-1].start()
        others[-1].join(0.1)
        assert others[-1].is_alive()
        return {"q": module}

    taps.follow("group", lambda: [find])
    others[0].join()
    assert len(others) == len(module._forward_hooks) == 1


@pytest.mark.parametrize("kind", BUILDERS)
@torch.no_grad()
def test_the_last_norm_is_what_the_last_layers_states_go_through(kind: str) -> None:
    model, states = make(kind), list[Tensor]()
    adapter = adapters.adapter_for(model)
    adapter.language_model.norm.weight.data.uniform_(0.5, 2.0)
    list(adapter.decoder_layers)[-1].register_forward_hook(lambda module, args, output: states.append(output))
    given = model(**prompt(kind, ROWS[kind][:1]), output_hidden_states=True).hidden_states[-1]
    assert torch.equal(adapter.final_normed(states[0]), given)


# ---- what a prompt shows


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[Adapter]], None]:
    """Makes an adapter the only one."""
    return lambda adapter: monkeypatch.setattr(adapters, "ADAPTERS", (adapter,))


def _mixed() -> dict[str, Tensor]:
    """A row with a video before its image, and one with an image alone, padded on the left."""
    generator = torch.Generator().manual_seed(5)
    words = iter(torch.randint(3, 80, (40,), generator=generator).tolist())

    def shown(token: int, count: int) -> list[int]:
        return [START, *[token] * count, END]

    rows = [
        [next(words), *shown(VIDEO, 12), next(words), *shown(IMAGE, 12), *[next(words) for _ in range(5)]],
        [next(words), *shown(IMAGE, 20), next(words), next(words)],
    ]
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
        "mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO),
        "pixel_values": torch.randn(4 * 32, 96, generator=generator),
        "image_grid_thw": torch.tensor([[1, 6, 8], [1, 8, 10]]),
        "pixel_values_videos": torch.randn(4 * 12, 96, generator=generator),
        "video_grid_thw": torch.tensor([[2, 4, 6]]),
    }


@torch.no_grad()
def _masked(model: Any, inputs: dict[str, Tensor], dropped: Tensor) -> Tensor:
    """Logits of the unwrapped model whose decoder does not see the `dropped` (B, L) places."""
    given: dict[str, Any] = {}
    decoder = model.model.language_model
    handle = decoder.register_forward_pre_hook(lambda _, args, kwargs: given.update(kwargs), with_kwargs=True)
    model(**inputs)
    handle.remove()
    seen = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])) * ~dropped
    states = decoder(
        inputs_embeds=given["inputs_embeds"], position_ids=given["position_ids"], attention_mask=seen
    ).last_hidden_state
    return model.lm_head(states)


def _differs(inputs: dict[str, Tensor], dropped: Tensor, ours: Tensor, theirs: Tensor) -> float:
    """How far apart two logits are where a token is left."""
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool() & ~dropped
    return float((ours - theirs)[real].abs().max())


@pytest.mark.parametrize("nested", [False, True], ids=["own tower call", "by the method for images"])
@pytest.mark.parametrize("method", ["random:keep=5", "divprune:keep=0.4"])
def test_a_second_source_is_pruned_beside_the_first(method: str, nested: bool) -> None:
    model, inputs = make("qwen2-vl"), _mixed()
    inner = model.model
    if nested:
        # As later families do: a video is encoded by the method that encodes images, which is wrapped, too.
        inner.get_video_features = lambda pixel_values_videos, video_grid_thw=None, **kwargs: inner.get_image_features(
            pixel_values_videos, video_grid_thw, **kwargs
        )
    vtprune.wrap(model, method)
    with torch.no_grad():
        logits = model(**inputs).logits
    report = vtprune.report(model)
    assert [[image.grid for image in sample.images] for sample in report.samples] == [
        [(2, 2, 3), (1, 3, 4)],
        [(1, 4, 5)],
    ]
    dropped = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for row, (sample, tokens) in enumerate(zip(report.samples, [(VIDEO, IMAGE), (IMAGE,)], strict=True)):
        for image, token in zip(sample.images, tokens, strict=True):
            assert image.kept_per_layer[-1] == image.kept
            assert 0 < len(image.kept) < image.tokens
            places = (inputs["input_ids"][row] == token).nonzero().flatten()
            gone = torch.ones(image.tokens, dtype=torch.bool)
            gone[image.kept] = False
            dropped[row, places[gone]] = True
    expected = _masked(vtprune.unwrap(model), inputs, dropped)
    assert _differs(inputs, dropped, logits, expected) < TOLERANCE


def test_what_is_encoded_ahead_of_time_is_found_by_its_kind() -> None:
    model, inputs = vtprune.wrap(make("qwen2-vl"), "none"), _mixed()
    expected = vtprune.unwrap(model).generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(vtprune.wrap(model, "none").generate(**inputs, max_new_tokens=4, do_sample=False), expected)
    vtprune.wrap(vtprune.unwrap(model), "random:keep=5").generate(**inputs, max_new_tokens=4, do_sample=False)
    kept = [[len(image.kept) for image in sample.images] for sample in vtprune.report(model).samples]
    assert kept == [[5, 5], [5]]


# ---- which rows and which placeholders are an image


class EndsOfRows(LlavaAdapter):
    """A LLaVA that takes the last column of each image's grid for something that ends a row."""

    def start_encoding(self, source: Source, arguments: dict[str, Any]) -> Encoding:
        slots = torch.arange(36).view(6, 6)[:, :-1].flatten()
        row = Arrangement(((1, 6, 6),), (Part((1, 6, 5)),), slots[:, None], length=36, slots=slots)
        pixels = arguments[source.pixels]
        return self._encoding([(1, 6, 6)] * len(pixels), device=pixels.device, arrangements=[row] * len(pixels))


@pytest.mark.parametrize("method", ["random:keep=9", "divprune:keep=0.25"])
def test_placeholders_that_are_no_vision_tokens_stay_and_are_no_text(
    method: str, family: Callable[[type[Adapter]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    family(EndsOfRows)
    model, inputs = make("llava-clip"), prompt("llava-clip", [LONG, SHORT])
    words: list[Tensor] = []
    kind = type(vtprune.wrap(model, method).__dict__["_vtprune"].given[0])
    original = kind.select
    monkeypatch.setattr(
        kind, "select", lambda self, stream: (words.append(stream.text_ids), original(self, stream))[1]
    )
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(0)
    with torch.no_grad():
        logits = model(**inputs, position_ids=positions).logits
    assert not any(bool((ids == IMAGE).any()) for ids in words)
    assert [len(ids) for ids in words] == [10, 6]
    report = vtprune.report(model)
    dropped = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for row, sample in enumerate(report.samples):
        (image,) = sample.images
        assert (image.grid, image.tokens, len(image.kept)) == ((1, 6, 5), 30, 9 if "random" in method else 8)
        # The model computes them like words, and so they are counted.
        assert sample.text_tokens == [10, 6][row] + 6
        places = (inputs["input_ids"][row] == IMAGE).nonzero().flatten().view(6, 6)[:, :-1].flatten()
        gone = torch.ones(30, dtype=torch.bool)
        gone[image.kept] = False
        dropped[row, places[gone]] = True
    expected = _masked(vtprune.unwrap(model), {**inputs, "position_ids": positions}, dropped)
    assert _differs(inputs, dropped, logits, expected) < TOLERANCE


def test_an_image_of_several_rectangles_is_one_row_of_tokens() -> None:
    one = EncodedImage((Part((1, 4, 5)),), torch.arange(20), None, None, [], (), None)
    assert (one.grid, one.total, one.length) == ((1, 4, 5), 20, 20)
    crops = replace(one, parts=(Part((1, 2, 2)), Part((1, 4, 5))), structural=4)
    assert (crops.grid, crops.total, crops.length) == ((1, 1, 24), 24, 28)
    frames = replace(one, parts=(Part((1, 4, 5)),) * 3)
    assert (frames.grid, frames.total) == ((3, 4, 5), 60)
