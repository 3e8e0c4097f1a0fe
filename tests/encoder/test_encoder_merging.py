"""Merging inside the vision encoder equals a full-length encoder in which each group's survivor holds the merged
vector, its key weighs as many tokens as it stands for, and everything else is masked. Nothing here uses vtprune's
own bookkeeping: the reference keeps every token in its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import vtprune
from tests.models import MODELS, ROWS, make, prompt, tower_order
from vtprune.errors import VTPruneError
from vtprune.hooks.records import RECORD
from vtprune.method.answers import EncoderSelection
from vtprune.method.stages import InEncoder
from vtprune.method.views import EncoderLayer

TOLERANCE = 2e-5
DEPTH = {"llava-clip": 5, "llava-siglip": 5, "qwen2.5-vl": 6, "qwen2-vl": 6, "qwen3-vl": 6, "qwen3-vl-moe": 6}


@dataclass(frozen=True)
class Step:
    """What happens to one image's alive tokens, by place: groups[kept] = {member: weight}; cls: the place where CLS
    goes (its own token still flows into a group), or None."""

    groups: dict[int, dict[int, float]]
    cls: int | None


def step(image: int, layer: int, sizes: list[int], *, mean: bool, cls: bool) -> Step:
    """A pseudo-random step: some tokens dropped, some merged, the rest left alone; every image loses another number.

    mean: weights are the size-weighted mean, else arbitrary ones that do not sum to 1.
    """
    generator = torch.Generator().manual_seed(100 * image + layer)
    count = len(sizes)
    order = torch.randperm(count, generator=generator).tolist()
    dropped = min(1 + image, count // 5)
    sources = order[dropped : dropped + count // 4]
    kept = order[dropped + count // 4 :]
    groups = {place: [place] for place in kept}
    for number, source in enumerate(sources):
        # Pairs and triples, some far apart.
        groups[kept[number % max(1, len(kept) // 3)]].append(source)
    weighted = {}
    for place, members in groups.items():
        if len(members) == 1:
            weighted[place] = {place: 1.0}
        elif mean:
            total = sum(sizes[m] for m in members)
            weighted[place] = {m: sizes[m] / total for m in members}
        else:
            drawn = torch.rand(len(members), generator=generator) * 0.5 + 0.2
            weighted[place] = dict(zip(members, drawn.tolist(), strict=True))
    return Step(weighted, min(sources) if cls and sources else None)


@vtprune.register("test_merges", paper="a test")
@dataclass(frozen=True)
class Merges(InEncoder):
    """The steps above, after each of `layers` or before its MLP; CLS takes a place after the last of them."""

    layers: tuple[int, ...] = ()
    before_mlp: bool = False
    cls: bool = False

    def budget(self, tokens: int) -> int:
        return 1

    def places_cls(self, layer: int) -> bool:
        return self.cls and layer == self.layers[-1]

    merges = True

    @property
    def weighs_keys(self) -> bool:
        return self.before_mlp

    def encoder_layers(self) -> tuple[int, ...]:
        return self.layers

    def prune_encoder(self, layer: EncoderLayer) -> EncoderSelection:
        keep = torch.zeros_like(layer.valid)
        into, weights = torch.full(keep.shape, -1), torch.ones(keep.shape)
        places = torch.full(keep.shape[:1], -1)
        for image, valid in enumerate(layer.valid):
            sizes = layer.sizes[image][valid].long().tolist()
            own = step(image, layer.index, sizes, mean=self.before_mlp, cls=self.places_cls(layer.index))
            for place, members in own.groups.items():
                keep[image, place] = True
                for member, weight in members.items():
                    into[image, member], weights[image, member] = place, weight
            if own.cls is not None:
                keep[image, own.cls], places[image] = True, own.cls
        return EncoderSelection(keep, into, weights, places if self.cls else None)


@dataclass
class Image:
    """One image at its full length: `alive` survivors in raster order with the shares of their original tokens;
    `flows`: by layer, (T, T) what each token becomes of the others; `bias`: by layer, (T,) what is added to the
    logits of each key; `cls`: by layer, where CLS goes; `nameless`: tokens that its place held before."""

    alive: list[int]
    shares: dict[int, dict[int, float]]
    flows: dict[int, Tensor] = field(default_factory=dict)
    bias: list[Tensor] = field(default_factory=list)
    cls: dict[int, int] = field(default_factory=dict)
    nameless: set[int] = field(default_factory=set)

    def name(self, survivor: int) -> int:
        """The heaviest member of a survivor, the lowest on ties; CLS goes by the place that it took."""
        named = [item for item in sorted(self.shares[survivor].items()) if item[0] not in self.nameless]
        return max(named, key=lambda item: round(item[1], 6))[0] if named else survivor


def follow(pruner: Merges, image: int, total: int, depth: int) -> Image:
    """Everything that happens to an image of `total` tokens."""
    found = Image(list(range(total)), {token: {token: 1.0} for token in range(total)})
    for layer in range(depth):
        bias = torch.full((total,), float("-inf"))
        for token in found.alive:
            stands_for = len(found.shares[token]) if pruner.weighs_keys else 1
            bias[token] = torch.tensor(float(stands_for)).log()
        found.bias.append(bias)
        if layer not in pruner.layers:
            continue
        sizes = [len(found.shares[token]) for token in found.alive]
        own = step(image, layer, sizes, mean=pruner.before_mlp, cls=pruner.places_cls(layer))
        flow, shares = torch.eye(total), dict[int, dict[int, float]]()
        for place, members in own.groups.items():
            survivor = found.alive[place]
            flow[survivor], shares[survivor] = 0.0, {}
            for member, weight in members.items():
                flow[survivor, found.alive[member]] = weight
                for token, share in found.shares[found.alive[member]].items():
                    shares[survivor][token] = share * weight
        if own.cls is not None:
            found.cls[layer] = found.alive[own.cls]
            found.nameless |= set(found.shares[found.alive[own.cls]])
            shares[found.alive[own.cls]] = {}
        found.flows[layer], found.shares, found.alive = flow, shares, sorted(shares)
    return found


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    """(H, n, d) attention with (n,) or (n, n) added to the logits."""
    return ((query @ key.transpose(-1, -2)) * scale + bias).softmax(dim=-1) @ value


def run_llava(model: Any, images: list[Image], *, before_mlp: bool) -> None:
    """Makes the tower's layers do by hand, at full length, what happens to the images."""
    prefix = int(model.config.vision_config.model_type == "clip_vision_model")

    def forward_of(index: int, layer: Any) -> Callable[..., Tensor]:
        attention = layer.self_attn

        def one(states: Tensor, image: Image) -> Tensor:
            normed = layer.layer_norm1(states)
            split = [
                projection(normed).unflatten(-1, (attention.num_heads, -1)).transpose(0, 1)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            ]
            bias = torch.cat([torch.zeros(prefix), image.bias[min(index, len(image.bias) - 1)]])
            attended = attend(*split, bias, attention.scale).transpose(0, 1).flatten(1)
            states = states + attention.out_proj(attended)
            flow = torch.eye(states.shape[0])
            if index in image.flows:
                flow[prefix:, prefix:] = image.flows[index]
            if index in image.cls:
                flow[prefix + image.cls[index]] = torch.eye(states.shape[0])[0]
            states = flow @ states if before_mlp else states
            states = states + layer.mlp(layer.layer_norm2(states))
            return states if before_mlp else flow @ states

        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return torch.stack([one(states, image) for states, image in zip(hidden, images, strict=True)])

        return forward

    for index, layer in enumerate(model.model.vision_tower.encoder.layers):
        layer.forward = forward_of(index, layer)


def run_qwen(model: Any, images: list[Image], grid_thw: Tensor, *, before_mlp: bool) -> None:
    """The same in the tower's own order, patches attending within their window or image."""
    order = tower_order(model, grid_thw)

    def forward_of(index: int, block: Any) -> Callable[..., Tensor]:
        attention = block.attn
        flow = torch.block_diag(
            *[image.flows.get(index, torch.eye(len(image.bias[0]))) for image in images]
        )[order][:, order]  # fmt: skip
        logits = torch.cat([image.bias[index] for image in images])[order].repeat_interleave(4)

        def forward(states: Tensor, cu_seqlens: Tensor, position_embeddings: Any, **kwargs: Any) -> Tensor:
            count = states.shape[0]
            query, key, value = attention.qkv(block.norm1(states)).reshape(count, 3, attention.num_heads, -1).unbind(1)
            cos, sin = (part[:, None] for part in position_embeddings)
            half = query.shape[-1] // 2
            turn = lambda x: x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin  # noqa: E731
            segment = torch.bucketize(torch.arange(count), cu_seqlens[1:], right=True)
            apart = torch.zeros(count, count).masked_fill(segment[:, None] != segment[None], float("-inf"))
            bias = apart + logits
            # A window whose tokens are all gone: what it computes, nobody reads.
            bias = bias.masked_fill(torch.eye(count, dtype=torch.bool) & logits.isinf()[:, None], 0.0)
            heads = (part.transpose(0, 1) for part in (turn(query), turn(key), value))
            attended = attend(*heads, bias, attention.scaling).transpose(0, 1).flatten(1)
            states = states + attention.proj(attended)
            states = flowing(flow, states) if before_mlp else states
            states = states + block.mlp(block.norm2(states))
            return states if before_mlp else flowing(flow, states)

        return forward

    for index, block in enumerate(model.model.visual.blocks):
        block.forward = forward_of(index, block)


def flowing(flow: Tensor, states: Tensor) -> Tensor:
    """Whole 2x2 groups flow patch by patch."""
    return torch.einsum("st,tgd->sgd", flow, states.unflatten(0, (-1, 4))).flatten(0, 1)


def settings(kind: str) -> list[Merges]:
    last = DEPTH[kind] - 1
    found = [
        Merges(layers=(1,)),
        Merges(layers=(0, 2, last)),
        Merges(layers=(1,), before_mlp=True),
        Merges(layers=(0, 1, 3, last), before_mlp=True),
    ]
    return found + ([Merges(layers=(last,), cls=True), Merges(layers=(1, last), cls=True)] if "clip" in kind else [])


CASES = [(kind, pruner) for kind in MODELS for pruner in settings(kind)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("kind", "pruner"), CASES, ids=[f"{k}-{p.layers}-{p.before_mlp}-{p.cls}" for k, p in CASES])
def test_merging_inside_the_encoder_equals_masking_all_but_the_survivor(
    kind: str, pruner: Merges, attention: str
) -> None:
    inputs = prompt(kind, ROWS[kind])
    grids = {"image_grid_thw": inputs["image_grid_thw"]} if "image_grid_thw" in inputs else {}
    model, reference = make(kind, attention), make(kind, attention)
    totals = (grids["image_grid_thw"].prod(dim=-1) // 4).tolist() if grids else [36] * len(inputs["pixel_values"])
    images = [follow(pruner, i, total, DEPTH[kind]) for i, total in enumerate(totals)]
    assert len({len(image.alive) for image in images}) > 1, "the batch is ragged"
    if grids:
        run_qwen(reference, images, grids["image_grid_thw"], before_mlp=pruner.before_mlp)
    else:
        run_llava(reference, images, before_mlp=pruner.before_mlp)
    vtprune.wrap(model, pruner)
    with torch.no_grad():
        actual = model.model.get_image_features(inputs["pixel_values"], **grids).pooler_output
        expected = reference.model.get_image_features(inputs["pixel_values"], **grids).pooler_output
    for ours, theirs, image in zip(actual, expected, images, strict=True):
        names = [image.name(survivor) for survivor in image.alive]
        assert sorted(ours.abs().sum(dim=-1).nonzero().flatten().tolist()) == sorted(names)
        assert torch.allclose(ours[names], theirs[image.alive], atol=TOLERANCE, rtol=TOLERANCE / 10)
        record = getattr(ours, RECORD)
        assert record.alive.tolist() == sorted(names)
        assert {merge.into: dict(zip(merge.members, merge.weights, strict=True)) for merge in record.merges()} == {
            image.name(survivor): pytest.approx(image.shares[survivor], rel=1e-5)
            for survivor in image.alive
            if len(image.shares[survivor]) > 1
        }


@pytest.mark.parametrize("kind", MODELS)
def test_the_reference_notices_a_wrong_weight(kind: str) -> None:
    inputs = prompt(kind, ROWS[kind])
    grids = {"image_grid_thw": inputs["image_grid_thw"]} if "image_grid_thw" in inputs else {}
    plain, model = make(kind), make(kind)
    vtprune.wrap(model, Merges(layers=(1,), before_mlp=True))
    vtprune.wrap(plain, Merges(layers=(1,)))
    with torch.no_grad():
        sized = model.model.get_image_features(inputs["pixel_values"], **grids).pooler_output
        other = plain.model.get_image_features(inputs["pixel_values"], **grids).pooler_output
    assert max(float((a - b).abs().max()) for a, b in zip(sized, other, strict=True)) > 100 * TOLERANCE


def test_a_merge_into_a_token_that_goes_is_refused() -> None:
    @dataclasses.dataclass(frozen=True)
    class Wrong(Merges):
        def prune_encoder(self, layer: EncoderLayer) -> EncoderSelection:
            answer = super().prune_encoder(layer)
            answer.into[0, (~answer.keep[0]).nonzero()[0]] = (~answer.keep[0]).nonzero()[1]
            return answer

    model = vtprune.wrap(make("llava-siglip"), Wrong(layers=(1,)))
    inputs = prompt("llava-siglip", ROWS["llava-siglip"])
    with pytest.raises(VTPruneError, match="into a kept token or nowhere"):
        model.model.get_image_features(inputs["pixel_values"])
