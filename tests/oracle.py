"""The proof that pruning is exact: the unpruned decoder with the dropped tokens masked out of attention.

From each layer on, the tokens that the report names as dropped are masked, and for decode steps those that were
cut from a layer's cache too; where tokens merge, the layer is fed the merged vector at the survivor's place. Tokens
that return see what the layer had computed by then, and each step what the report says that it attended to.
Positions are those of the unpruned prompt. Nothing here uses vtprune's own compaction.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import vtprune
from tests.models import IMAGE, PAST, VIDEO, text_positions

STEPS = 8
TOLERANCE = 2e-5


def next_tokens(rows: int) -> Tensor:
    """Fixed tokens that every decode step is fed: (rows, STEPS)."""
    return torch.randint(3, 80, (rows, STEPS), generator=torch.Generator().manual_seed(9))


def full_mask(inputs: dict[str, Tensor], extra: int) -> Tensor:
    """(B, L + extra) the 2-D attention mask with `extra` new tokens."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    return torch.cat([mask, mask.new_ones(ids.shape[0], extra)], dim=1)


@torch.no_grad()
def run_wrapped(kind: str, model: Any, inputs: dict[str, Tensor], row: int = 0) -> tuple[Tensor, vtprune.Report, Any]:
    """Logits (B, L + STEPS, V) of a prefill and STEPS decode steps on the wrapped model, and its report; row: whose
    tokens the first one is fed."""
    length = inputs["input_ids"].shape[1]
    positions = text_positions(inputs, STEPS)
    padded = "attention_mask" in inputs
    own = {} if kind.startswith("qwen") else {"position_ids": positions[:, :length]}
    out = model(**inputs, **own, use_cache=True)
    report = vtprune.report(model)
    logits, cache = [out.logits], out.past_key_values
    tokens = next_tokens(row + inputs["input_ids"].shape[0])[row:]
    for step in range(STEPS):
        own = {} if kind.startswith("qwen") else {"position_ids": positions[:, length + step : length + step + 1]}
        if padded:
            own["attention_mask"] = full_mask(inputs, step + 1)
        out = model(input_ids=tokens[:, step : step + 1], **{PAST: cache}, use_cache=True, **own)
        logits.append(out.logits)
    return torch.cat(logits, dim=1), report, cache


@torch.no_grad()
def feed(model: Any, cache: Any, tokens: list[int], mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits after feeding tokens to every row one by one."""
    logits = []
    for token in tokens:
        rows = cache.layers[0].keys.shape[0]
        extra = {}
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1)
            extra["attention_mask"] = mask
        logits.append(model(input_ids=torch.full((rows, 1), token), **{PAST: cache}, **extra).logits[:, -1])
    return torch.stack(logits, dim=1)


@torch.no_grad()
def run_masked(
    kind: str,
    model: Any,
    inputs: dict[str, Tensor],
    report: vtprune.Report,
    features: Any = None,
    *,
    compact: bool = False,
    newlines: str = "keep",
) -> Tensor:
    """Logits (B, L + STEPS, V) of the unwrapped model in one pass, with the report's dropped tokens masked.

    features: image features to feed instead of the model's own (from an encoder that dropped tokens).
    compact: whether each layer numbers the tokens alive in it without gaps; newlines: as it was wrapped with.
    """
    ids = torch.cat([inputs["input_ids"], next_tokens(inputs["input_ids"].shape[0])], dim=1)
    embeds = embeddings_of(model, inputs, ids, features)
    decoder = model.model.language_model
    handles = []
    length = inputs["input_ids"].shape[1]
    real = full_mask(inputs, STEPS).bool()
    both = zip(_alive(ids, real, report, newlines), _alive(ids, real, report, newlines, cached=True), strict=True)
    for index, (layer, (alive, cached)) in enumerate(zip(decoder.layers, both, strict=True)):
        numbers = ((alive | cached).cumsum(dim=1) - 1).clamp(min=0)
        numbers[:, length:] = (cached.cumsum(dim=1) - 1)[:, length:]
        embeddings = decoder.rotary_emb(embeds, numbers) if compact else None
        # What a layer does not compute and its cache holds all the same is read in the prefill, too.
        mask = torch.cat([_mask(alive | cached)[:, :, :length], _mask(cached)[:, :, length:]], dim=2)
        _return(mask, ids, real, report, index)
        merges = _merges(ids, report, index)
        if _skipped(ids, report, index).any():
            handles.append(layer.register_forward_hook(_keep_as_it_was(_skipped(ids, report, index))))
        handles.append(layer.register_forward_pre_hook(_replace(mask, embeddings, merges), with_kwargs=True))
    positions = positions_of(kind, model, inputs, ids.shape[1])
    planes = _merged_planes(planes_of(model, inputs, ids, features), ids, report)
    try:
        out = decoder(inputs_embeds=embeds, position_ids=positions, use_cache=False, **planes)
    finally:
        for handle in handles:
            handle.remove()
    return model.lm_head(out.last_hidden_state)


def positions_of(kind: str, model: Any, inputs: dict[str, Tensor], length: int) -> Tensor:
    extra = length - inputs["input_ids"].shape[1]
    text = text_positions(inputs, extra)
    if not kind.startswith("qwen"):
        return text
    sizes = {name: inputs[name] for name in ("video_grid_thw", "second_per_grid_ts") if name in inputs}
    positions, deltas = model.model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs.get("image_grid_thw"),
        attention_mask=inputs.get("attention_mask"),
        **sizes,
    )
    tail = (text[:, -extra:] + deltas)[None].expand(3, -1, -1)
    return torch.cat([positions, tail], dim=-1) if extra else positions


def embeddings_of(model: Any, inputs: dict[str, Tensor], ids: Tensor, features: Any) -> Tensor:
    embeds = model.get_input_embeddings()(ids).clone()
    features = image_features(model, inputs) if features is None else features
    for token, own in (features.own if isinstance(features, Features) else {IMAGE: features}).items():
        embeds[ids == token] = torch.cat(list(own))
    return embeds


def planes_of(model: Any, inputs: dict[str, Tensor], ids: Tensor, features: Any = None) -> dict[str, Any]:
    """What a decoder adds to vision tokens after its first layers, as it is given that; {} where it adds nothing."""
    planes = (features if isinstance(features, Features) else image_features(model, inputs)).planes
    if not planes:
        return {}
    marks = vision(ids)
    found = []
    for number in range(min(map(len, planes.values()))):
        own = {token: torch.cat(list(planes[token][number])) for token in planes}
        whole = next(iter(own.values())).new_zeros(*ids.shape, next(iter(own.values())).shape[-1])
        for token, values in own.items():
            whole[ids == token] = values
        found.append(whole[marks])
    return {"deepstack_visual_embeds": found, "visual_pos_masks": marks}


def added(model: Any, inputs: dict[str, Tensor], ids: Tensor) -> list[Tensor]:
    """The same by layer, (B, L, D) with zeros for text; 0 for layers after which nothing is added."""
    given = planes_of(model, inputs, ids)
    if not given:
        return []
    marks = given["visual_pos_masks"]
    found = []
    for plane in given["deepstack_visual_embeds"]:
        whole = plane.new_zeros(*ids.shape, plane.shape[-1])
        whole[marks] = plane
        found.append(whole)
    return found


def through_norm(attention: Any, name: str, states: Tensor) -> Tensor:
    """Queries or keys (..., d) through the norm that some families have behind the projection."""
    norm = getattr(attention, f"{name}_norm", None)
    return states if norm is None else norm(states)


def _merged_planes(planes: dict[str, Any], ids: Tensor, report: vtprune.Report) -> dict[str, Any]:
    """The same for tokens that others flowed into before a layer: they take theirs along from that layer on."""
    number = vision(ids).flatten().cumsum(0).view_as(ids) - 1
    for index, plane in enumerate(planes.get("deepstack_visual_embeds", [])):
        for layer in range(index + 1):
            for row, into, members, weights in _merges(ids, report, layer):
                plane[number[row, into]] = (plane[number[row, members]] * weights[:, None]).sum(dim=0)
    return planes


class Features(list[Tensor]):
    """Features of each image, by placeholder those of images and of videos, and the planes that go with them: of each
    plane a tensor an image."""

    own: dict[int, list[Tensor]]
    planes: dict[int, list[list[Tensor]]]


def vision(ids: Tensor) -> Tensor:
    """Where a vision token stands."""
    return (ids == IMAGE) | (ids == VIDEO)


def places_of(ids: Tensor, sample: Any) -> list[Tensor]:
    """The places of the tokens of each image and video of one row (L,), in the order of its report."""
    first = {"image": 0, "video": 0}
    places = {kind: (ids == token).nonzero().flatten() for kind, token in (("image", IMAGE), ("video", VIDEO))}
    found = []
    for image in sample.images:
        length = image.tokens + image.structural
        found.append(without_newlines(places[image.kind][first[image.kind] : first[image.kind] + length], image))
        first[image.kind] += length
    return found


def without_newlines(places: Tensor, image: Any) -> Tensor:
    """Those of an image's placeholders that are vision tokens: a newline ends each row of the crops' grid, or all of
    what has no such grid."""
    if not image.structural:
        return places
    if len(image.parts) == 1 or image.kind == "video":
        return places[: -image.structural]
    base, (_, height, width) = math.prod(image.parts[0]), image.parts[1]
    rows = places[base:].view(height, width + 1)
    return torch.cat([places[:base], rows[:, :-1].flatten()])


def _merges(ids: Tensor, report: vtprune.Report, layer: int) -> list[tuple[int, int, Tensor, Tensor]]:
    """Row, place of the survivor, places of the members and their weights, of what merges before a decoder layer;
    vectors that merged in the encoder are among the features."""
    found = []
    for row, sample in enumerate(report.samples):
        for image, own in zip(sample.images, places_of(ids[row], sample), strict=True):
            for merge in image.merged:
                if merge.stage == "decoder" and merge.layer == layer:
                    found.append((row, int(own[merge.into]), own[merge.members], torch.tensor(merge.weights)))
    return found


def dropped_newlines(ids: Tensor, image: Any, own: Tensor, policy: str) -> Tensor:
    """The places of an image's newlines that its policy takes out, of one row (L,); own: the places of its tokens."""
    rows: dict[int, set[int]] = {}
    first, base = int(own[0]), math.prod(image.parts[0])
    for place in range(first, first + image.tokens + image.structural):
        if place not in own.tolist():
            rows[place] = set()
    for token, place in enumerate(own.tolist()):
        after = [end for end in rows if end > place]
        if after and (len(image.parts) == 1 or image.kind == "video" or token >= base):
            rows[min(after)].add(token)
    if policy == "keep" or len(image.kept) == image.tokens:
        return torch.tensor([], dtype=torch.long)
    gone = [place for place, tokens in rows.items() if policy == "drop" or not tokens & set(image.kept)]
    assert len(gone) == image.structural - image.structural_left
    return torch.tensor(gone, dtype=torch.long)


def _alive(
    ids: Tensor, real: Tensor, report: vtprune.Report, newlines: str = "keep", *, cached: bool = False
) -> list[Tensor]:
    """(B, L) for each layer: neither padding nor dropped; cached: nor cut from its cache after the prefill."""
    found = []
    for layer in range(len(report.tokens_per_layer)):
        alive = real.clone()
        for row, sample in enumerate(report.samples):
            for image, own in zip(sample.images, places_of(ids[row], sample), strict=True):
                alive[row, own] = False
                alive[row, dropped_newlines(ids[row], image, own, newlines)] = False
                kept = image.cached_per_layer if cached else image.kept_per_layer
                alive[row, own[kept[layer]]] = True
        found.append(alive)
    return found


def _return(mask: Tensor, ids: Tensor, real: Tensor, report: vtprune.Report, layer: int) -> None:
    """Opens and closes the mask for tokens that return, and for the steps, the last ones, to which they return."""
    for row, sample in enumerate(report.samples):
        # The step that computed each place at this layer: 0 for the prefill, infinity where none did.
        computed = torch.zeros(ids.shape[1]).masked_fill(~real[row], torch.inf)
        for image, own in zip(sample.images, places_of(ids[row], sample), strict=True):
            computed[own] = torch.inf
            computed[own[image.kept_per_layer[layer]]] = 0
            for number, step in enumerate(image.steps):
                computed[own[step.computed_per_layer[layer]]] = number + 1
                query = ids.shape[1] - len(image.steps) + number
                mask[row, 0, query, own] = float("-inf")
                mask[row, 0, query, own[step.attended_per_layer[layer]]] = 0.0
        for place in (computed.isfinite() & (computed > 0)).nonzero().flatten().tolist():
            seen = (computed <= computed[place]) & (torch.arange(ids.shape[1]) <= place)
            mask[row, 0, place] = torch.zeros(ids.shape[1]).masked_fill(~seen, float("-inf"))


def _skipped(ids: Tensor, report: vtprune.Report, layer: int) -> Tensor:
    """(B, L) the vision tokens that skip a layer and go on: a later layer processes them again, or they are read."""
    later = torch.zeros_like(ids, dtype=torch.bool)
    for row, sample in enumerate(report.samples):
        for image, own in zip(sample.images, places_of(ids[row], sample), strict=True):
            for kept in [*image.kept_per_layer[layer + 1 :], *image.cached_per_layer[layer:]]:
                later[row, own[kept]] = True
            later[row, own[image.kept_per_layer[layer]]] = False
    return later


def _keep_as_it_was(skipped: Tensor) -> Any:
    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        return torch.where(skipped[..., None], args[0], output)

    return hook


def _mask(alive: Tensor) -> Tensor:
    """Additive (B, 1, L, L): causal, without padding and dropped tokens; every token sees itself."""
    batch, length = alive.shape
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    allowed = (causal & alive[:, None, :]) | torch.eye(length, dtype=torch.bool)
    return torch.zeros(batch, 1, length, length).masked_fill(~allowed[:, None], float("-inf"))


def _replace(mask: Tensor, embeddings: Any, merges: list[tuple[int, int, Tensor, Tensor]]) -> Any:
    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        new = {"attention_mask": mask}
        if embeddings is not None:
            new["position_embeddings"] = embeddings
        states = args[0].clone()
        # In the order in which they came about: what one stage merged may flow on in the next.
        for row, into, members, weights in merges:
            states[row, into] = (states[row, members] * weights.to(states)[:, None]).sum(dim=0)
        return (states, *args[1:]), {**kwargs, **new}

    return hook


def image_features(model: Any, inputs: dict[str, Tensor]) -> Features:
    """Features of the model, zeros where a wrapped one's encoder dropped tokens."""
    found = Features()
    found.own, found.planes = {}, {}
    for token, kind, pixels in ((IMAGE, "image", "pixel_values"), (VIDEO, "video", "pixel_values_videos")):
        if pixels not in inputs:
            continue
        sizes = (f"{kind}_grid_thw", *(("image_sizes",) if kind == "image" else ()))
        grids = {name: inputs[name] for name in sizes if name in inputs}
        with torch.no_grad():
            out = getattr(model.model, f"get_{kind}_features")(inputs[pixels], **grids)
        # Some releases answer a video frame by frame.
        found.own[token] = [one.flatten(0, -2).clone() for one in out.pooler_output]
        planes = [[one.clone() for one in plane] for plane in getattr(out, "deepstack_features", None) or ()]
        if planes:
            found.planes[token] = planes
        found.extend(found.own[token])
    return found


def difference_from_masked(kind: str, model: Any, inputs: dict[str, Tensor]) -> tuple[float, vtprune.Report]:
    """How far the wrapped model's logits are from those of the masked one, and its report; unwraps the model."""
    logits, report, _ = run_wrapped(kind, model, inputs)
    features = image_features(model, inputs)
    expected = run_masked(kind, vtprune.unwrap(model), inputs, report, features)
    return compare(logits, expected, inputs), report


def compare(actual: Tensor, expected: Tensor, inputs: dict[str, Tensor]) -> float:
    """Largest absolute difference of the logits at real text positions."""
    ids = inputs["input_ids"]
    real = full_mask(inputs, STEPS).bool()
    real[:, : ids.shape[1]] &= ~vision(ids)
    return float((actual - expected)[real].abs().max())
