"""SparseVLM's cases: clusters of recycled tokens, and whole prefills of both versions with a decode step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.golden import towers
from tests.golden.case import Case, UnknownCase, expect_close, expect_equal
from tests.golden.prefill import HIDDEN, Cached, decode, decoder
from vtprune.method.choosing import top
from vtprune.method.views import DecoderLayer
from vtprune.pruners.sparsevlm.raters import choose_raters, relevance
from vtprune.pruners.sparsevlm.recycling import (
    cluster_count,
    cluster_shares,
    density_peaks,
    pool_size,
)
from vtprune.pruners.sparsevlm.sparsevlm import PUBLISHED_STAGES, SparseVLM

# The mean of a cluster is exact here; the reference adds 1e-6 to the count that it divides by.
MEANS = {"atol": 1e-6, "rtol": 2e-6}
SCORES = {"atol": 1e-5, "rtol": 1e-4}
# The reference drops tokens after these layers.
STAGES = (2, 6, 15)
RETAINED = (192, 128, 96, 64)


@torch.no_grad()
def run(case: Case) -> None:
    """Raises Mismatch where a result differs, UnknownCase for another kind of case."""
    kinds = {
        frozenset({"x", "cluster_num", "noise_uniform01", "out"}): check_clusters,
        frozenset({"x", "v_start", "n_img", "rater_idx", "last_hidden"}): check_prefill,
    }
    for needed, check in kinds.items():
        if needed <= set(case.tensors):
            return check(case)
    shown = ", ".join(sorted(name for name in case.tensors if not name.startswith("w.")))
    raise UnknownCase(f"no SparseVLM case has tensors {shown}")


def merged(points: Tensor, count: int, noise: Tensor) -> Tensor:
    """(count, D) the clusters' means in the order of their centres."""
    return torch.matmul(cluster_shares(density_peaks(points, count, noise), count), points)


def check_clusters(case: Case) -> None:
    """The recorded noise decides between equal densities."""
    count = int(case["cluster_num"])
    pairs = zip(case["x"], case["noise_uniform01"], strict=True)
    expect_close("clusters", torch.stack([merged(points, count, own) for points, own in pairs]), case["out"], **MEANS)


def check_prefill(case: Case) -> None:
    """Raters, scores and choices at every stage, the last hidden states, cache lengths and a decode step.

    Clusters stand after the kept tokens here, as in the reference; version 1 renumbers positions.
    """
    given, model = case.setting("cfg"), decoder(case)
    version, retained = int(given["version"].split("_")[0]), int(given["retain"])
    hidden, start, images = case["x"], int(case["v_start"]), int(case["n_img"])
    if hidden.shape[0] != 1 or version not in PUBLISHED_STAGES or retained not in RETAINED:
        raise UnknownCase(f"{hidden.shape[0]} rows of version {given['version']} for {retained} tokens")
    kept = dict(zip(STAGES, PUBLISHED_STAGES[version][RETAINED.index(retained)], strict=True))
    words = hidden[0, start + images :]
    raters = choose_raters(relevance(hidden[0, start : start + images], words))
    expect_equal("raters", torch.tensor(raters), case["rater_idx"].flatten())
    method = SparseVLM(version=version, variant="released")
    memory = {"raters": tuple(word - len(words) for word in raters)}
    places, length = torch.arange(hidden.shape[1]), hidden.shape[1]
    caches: list[Cached] = []
    for index in range(len(model.layers)):
        if method.renumbers:
            places = torch.arange(hidden.shape[1])
        hidden = towers.run_decoder_layer(model, index, hidden, places[None])
        layer = decoder_layer(model, hidden, places, start, images, index, memory)
        caches.append(Cached(places, layer.key, layer.value))
        if index in kept:
            stage = STAGES.index(index)
            hidden, places = check_stage(case, stage, method, layer, hidden, places, min(kept[index], images - 1))
            images = hidden.shape[1] - start - len(words)
    expect_close("last_hidden", model.norm(hidden), case["last_hidden"], **HIDDEN)
    lengths = [len(cached.places) for cached in caches]
    if "cache_lens" in case:
        expect_equal("cache_lens", torch.tensor(lengths), case["cache_lens"])
    if "decode_in" in case:
        positions = lengths if method.renumbers else [length] * len(caches)
        expect_close("decode_out", decode(model, case["decode_in"], caches, positions), case["decode_out"], **HIDDEN)


def decoder_layer(
    model: Any, hidden: Tensor, places: Tensor, start: int, images: int, index: int, memory: dict[str, Any]
) -> DecoderLayer:
    """What the method sees of the layer that ran."""
    query, key, value = (states[0] for states in towers.RECORDER.take())
    total = hidden.shape[1]
    text = torch.cat([torch.arange(start), torch.arange(start + images, total)])
    cos, sin = model.rotary_emb(hidden, places[None])
    return DecoderLayer(
        query, key, value, start + torch.arange(images), total - 1, query.shape[-1] ** -0.5, images,
        torch.arange(images), images, index, len(model.layers), text, memory, hidden=hidden[0],
        rotary=(cos[0], sin[0]),
    )  # fmt: skip


def check_stage(
    case: Case, stage: int, method: SparseVLM, layer: DecoderLayer, hidden: Tensor, places: Tensor, direct: int
) -> tuple[Tensor, Tensor]:
    """Hidden states (1, n, D) and positions (n,) after a stage that leaves `direct` tokens as they are."""
    scores, first = method.scores(layer), int(layer.vision[0])
    expect_close(f"stage{stage}_score", scores[None], case[f"stage{stage}_score"], **SCORES)
    stay = top(scores, direct)
    mask = torch.zeros(scores.numel(), dtype=torch.bool).index_fill(0, stay, True)
    expect_equal(f"stage{stage}_mask", mask[None], case[f"stage{stage}_mask"])
    image, parts = hidden[0, layer.vision], [hidden[0, :first], hidden[0, layer.vision][stay]]
    if method.recycles:
        dropped = scores.numel() - direct
        pool = scores.sort(descending=True, stable=True).indices[direct:][: pool_size(dropped)]
        parts.append(merged(image[pool], cluster_count(dropped), case[f"stage{stage}_noise"][0]))
    last = int(layer.vision[-1]) + 1
    numbers = torch.cat([places[:first], places[layer.vision][stay], places[last:]])
    return torch.cat([*parts, hidden[0, last:]])[None], numbers
