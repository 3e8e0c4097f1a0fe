"""VisionZip's cases: the whole CLIP tower, attention rows with hidden states, and crops joined again."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from tests.golden import towers
from tests.golden.anyres import join_crops
from tests.golden.case import Case, UnknownCase, expect_close, expect_equal
from tests.golden.flowcut import encoder_layer
from vtprune.encoder.merging import Change
from vtprune.method.answers import EncoderSelection
from vtprune.pruners.parts.patches import mean_keys, saliency
from vtprune.pruners.visionzip import Zipped, zip_tokens

# The released restore function knows no other side.
SIDE = 24
FEATURES = {"atol": 1e-3, "rtol": 1e-3}


@torch.no_grad()
def run(case: Case) -> None:
    """Raises Mismatch where a result differs, UnknownCase for another kind of case."""
    names = set(case.tensors)
    if {"crop_all_indices", "crop_tokens", "out_tokens"} <= names:
        return check_crops(case)
    if {"pixel_values", "out_tokens"} <= names:
        return check_tower(case)
    if {"cls_attn_row", "hidden", "metric", "out_tokens"} <= names:
        return check_tensors(case)
    shown = ", ".join(sorted(name for name in names if not name.startswith("w.")))
    raise UnknownCase(f"no VisionZip case has tensors {shown}")


def check_crops(case: Case) -> None:
    """Tokens of tiled crops in the order of the whole image."""
    places = case["crop_all_indices"].sort(dim=1).values[:, 1:] - 1
    crops = places.shape[0]
    found = re.search(r"width=(\d+),\s*height=(\d+)", case.metadata.get("source", ""))
    if {"width", "height"} <= set(case.metadata):
        layout = (int(case.setting("height")), int(case.setting("width")))
    else:
        layout = (int(found[2]), int(found[1])) if found else (math.isqrt(crops), math.isqrt(crops))
    tokens = case["crop_tokens"]
    if layout[0] * layout[1] == crops - 1:
        # The first crop is the whole image, which goes before the others as it is.
        joined = torch.cat([tokens[0], join_crops(tokens[1:], places[1:], layout, SIDE)])
    elif layout[0] * layout[1] == crops:
        joined = join_crops(tokens, places, layout, SIDE)
    else:
        raise UnknownCase(f"{crops} crops in a layout of {layout}")
    expect_close("out_tokens", joined, case["out_tokens"])


def check_tower(case: Case) -> None:
    """Scores, keys and choices at the last layer but one of a CLIP tower, and the tokens that leave it."""
    tower = towers.clip_tower(case.setting("config"), case.weights())
    hidden = tower.pre_layrnorm(tower.embeddings(case["pixel_values"]))
    depth = len(tower.encoder.layers) - 1
    for index in range(depth):
        towers.RECORDER.chunks.clear()
        hidden = tower.encoder.layers[index](hidden, attention_mask=None)
    signals = towers.RECORDER.take()
    if "hidden_m2" in case:
        expect_close("hidden_m2", hidden, case["hidden_m2"], **FEATURES)
    total = hidden.shape[1] - 1
    layer = encoder_layer(signals, depth - 1, depth, 1, total, total, {})
    scores, metric = saliency(layer), mean_keys(layer)
    if "cls_attn_sum" in case:
        expect_close("cls_attn_sum", scores * signals[0].shape[1], case["cls_attn_sum"], atol=1e-4, rtol=1e-3)
    if "metric" in case:
        expect_close("metric", metric, directions(case["metric"][:, 1:]), **FEATURES)
    check_choice(case, scores, metric, hidden)


def check_tensors(case: Case) -> None:
    """Choices and tokens from a recorded CLS row, keys and hidden states."""
    scores = case["cls_attn_row"].float().mean(dim=1)[:, 1:]
    check_choice(case, scores, directions(case["metric"][:, 1:]), case["hidden"])


def directions(vectors: Tensor) -> Tensor:
    """The vectors at length 1."""
    return torch.nn.functional.normalize(vectors.float(), dim=-1)


def check_choice(case: Case, scores: Tensor, metric: Tensor, hidden: Tensor) -> None:
    """Dominant tokens, targets, assignments, and the vectors that the core makes of them."""
    images, tokens = scores.shape
    dominant, contextual = case.setting("dominant"), case.setting("contextual")
    counts = {"alive": [tokens] * images, "dominant": [dominant - 1] * images, "contextual": [contextual] * images}
    zipped = zip_tokens(scores, metric, torch.ones(images, tokens, dtype=torch.bool), **counts)
    if "all_indices" in case:
        places = zipped.dominant.nonzero()[:, 1].reshape(images, -1) + 1
        expect_equal("dominant", places, case["all_indices"].sort(dim=1).values[:, 1:])
    check_targets(case, zipped)
    selection = zipped.selection(merge=True, cls=[True] * images)
    cls, first, last = leaving(selection, zipped, hidden)
    if "dominant_tokens" in case:
        expect_close("dominant_tokens", torch.cat([cls, first], dim=1), case["dominant_tokens"], **FEATURES)
    if "contextual_tokens" in case:
        expect_close("contextual_tokens", last, case["contextual_tokens"], **FEATURES)
    expect_close("out_tokens", torch.cat([cls, first, last], dim=1), case["out_tokens"], **FEATURES)


def check_targets(case: Case, zipped: Zipped) -> None:
    """Targets by their places among the tokens that are not dominant, and where the others of these flow."""
    rest = ~zipped.dominant
    rank = rest.cumsum(dim=1) - 1
    targets = rank[zipped.targets].reshape(rest.shape[0], -1)
    if "target_indices" in case:
        expect_equal("target_indices", targets, case["target_indices"].expand_as(targets))
    if "assign" in case:
        number = zipped.targets.cumsum(dim=1) - 1
        assigned = number.gather(1, zipped.into.clamp(min=0))[rest & ~zipped.targets]
        expect_equal("assign", assigned.reshape(rest.shape[0], -1), case["assign"])


def leaving(selection: EncoderSelection, zipped: Zipped, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The CLS token (B, 1, D), dominant and contextual tokens that leave the encoder; hidden: (B, 1 + N, D)."""
    assert selection.cls is not None
    everything = torch.arange(hidden.shape[1] - 1).expand(hidden.shape[0], -1)
    changed = Change(everything, selection, hidden[:, 0]).apply(hidden[:, 1:])
    rows = torch.arange(hidden.shape[0])
    cls = changed[rows, selection.cls]
    first, last = (
        changed[mask].reshape(hidden.shape[0], -1, hidden.shape[-1]) for mask in (zipped.dominant, zipped.targets)
    )
    return cls[:, None], first, last
