"""FlowCut's cases: the whole CLIP stage, the decoder stage, both stages on Qwen2-VL, and single functions."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from tests.golden import towers
from tests.golden.anyres import restore_crops
from tests.golden.case import Case, Mismatch, UnknownCase, expect_close, expect_equal
from vtprune.method.views import DecoderLayer, EncoderLayer
from vtprune.pruners import FlowCut
from vtprune.pruners.flowcut import DECODER_LAYER, MEMORY, entropies, flow_score, prune_count, shares

RELEASED = FlowCut(variant="released", stages=2)
FEATURES = {"atol": 5e-3, "rtol": 1e-3}


@torch.no_grad()
def run(case: Case) -> None:
    """Raises Mismatch where a result differs, UnknownCase for another kind of case."""
    names = set(case.tensors)
    kinds = {
        frozenset({"cls_attn", "value_headmean", "score"}): check_functions,
        frozenset({"crop_keep", "crop_features"}): check_restore,
        frozenset({"pixel_values", "final_keep"}): check_clip,
        frozenset({"pixel_values", "grid_thw", "merged_tokens"}): check_qwen_vision,
        frozenset({"pixel_values", "image_grid_thw", "input_ids"}): check_qwen_full,
        frozenset({"inputs_embeds", "keep_index_within_visual"}): check_decoder,
    }
    for needed, check in kinds.items():
        if needed <= names:
            return check(case)
    shown = ", ".join(sorted(name for name in names if not name.startswith("w.")))
    raise UnknownCase(f"no FlowCut case has tensors {shown}")


def check_functions(case: Case) -> None:
    """The score, and the prune count for each row [remaining, target, count] of the table."""
    attention = case["cls_attn"]
    density = case["value_headmean"].abs().sum(dim=-1)
    semantic = case.tensors.get("sem_attn")
    expect_close("score", flow_score(attention, semantic, density), case["score"], atol=1e-7)
    found = entropies(shares(attention))
    for remaining, target, want in case["ratio_table_rpl_target_prune"].tolist():
        got = max(prune_count(one, attention.shape[1], target, remaining) for one in found)
        if got != max(want, 0):
            raise Mismatch(f"prune count at R={remaining}, T={target}: {got}, recorded {want}")


def check_restore(case: Case) -> None:
    """Kept cells and tokens of tiled crops in the raster order of the whole image."""
    keep, features = case["crop_keep"], case["crop_features"]
    square = next((name for name in case.tensors if re.fullmatch(r"grid_mask_\d+x\d+", name)), None)
    side, default = layout_of(square, case[square].shape) if square else (0, (1, 1))
    for name, want in case.tensors.items():
        original = None
        if name in ("crop_keep", "crop_features"):
            continue
        if found := re.fullmatch(r"(?:grid_mask|tokens)_(\d+)w_(\d+)h", name):
            layout = (int(found[2]), int(found[1]))
            side = case[f"grid_mask_{found[1]}w_{found[2]}h"].shape[0] // layout[0]
        elif found := re.fullmatch(r"(?:mask|tokens)_unpad_(\d+)x(\d+)", name):
            layout, original = default, (int(found[1]), int(found[2]))
        elif name in (square, "tokens_no_unpad"):
            layout = default
        else:
            raise UnknownCase(f"no part of a restore case is called {name!r}")
        crops = layout[0] * layout[1]
        mask, order = restore_crops(keep[:crops], layout, side, original)
        if want.dtype == torch.bool:
            expect_equal(name, mask, want)
        else:
            expect_close(name, features[:crops].flatten(0, 1)[order], want)


def layout_of(name: str, shape: torch.Size) -> tuple[int, tuple[int, int]]:
    """Side of a crop and (rows, cols) of crops, of a mask whose name says 2x3, either way round."""
    first, second = map(int, name.rsplit("_", 1)[1].split("x"))
    for rows, cols in ((first, second), (second, first)):
        if shape[0] * cols == shape[1] * rows:
            return shape[0] // rows, (rows, cols)
    raise UnknownCase(f"{name} of shape {tuple(shape)}")


def encoder_layer(
    signals: tuple[Tensor, Tensor, Tensor],
    index: int,
    depth: int,
    prefix: int,
    total: int,
    budget: int,
    memory: dict[str, Tensor],
) -> EncoderLayer:
    """One layer of a batch without padding, every patch a token."""
    query, key, value = signals
    batch, tokens = query.shape[0], query.shape[2] - prefix
    return EncoderLayer(
        query=query, key=key, value=value, valid=torch.ones(batch, tokens, dtype=torch.bool),
        total=torch.full((batch,), total), budget=torch.full((batch,), budget), index=index, depth=depth,
        scale=query.shape[-1] ** -0.5, prefix=prefix, group=1, memory=memory, sizes=torch.ones(batch, tokens),
        grids=((1, 1, tokens),) * batch,
    )  # fmt: skip


def compact(states: Tensor, keep: Tensor) -> Tensor:
    """(B, N, ...) without the tokens where (B, N) `keep` is False; every row keeps as many."""
    return states[keep].reshape(states.shape[0], -1, *states.shape[2:])


def check_clip(case: Case) -> None:
    """Survivors and accumulated scores after every layer, and the features that the projector reads."""
    tower = towers.clip_tower(case.setting("config"), case.weights())
    budget, depth = clip_budget(case), len(tower.encoder.layers) - 1
    hidden = tower.pre_layrnorm(tower.embeddings(case["pixel_values"]))
    images, total = hidden.shape[0], hidden.shape[1] - 1
    alive, memory = torch.arange(total).expand(images, -1), dict[str, Tensor]()
    for index in range(depth):
        towers.RECORDER.chunks.clear()
        hidden = tower.encoder.layers[index](hidden, attention_mask=None)
        signals = towers.RECORDER.take()
        selection = RELEASED.prune_encoder(encoder_layer(signals, index, depth, 1, total, budget, memory))
        if selection is not None:
            keep = selection.keep
            hidden = torch.cat([hidden[:, :1], compact(hidden[:, 1:], keep)], dim=1)
            alive = compact(alive, keep)
            memory = {name: compact(scores, keep) for name, scores in memory.items()}
        expect_equal_if_there(case, f"keep_after_layer_{index:02d}", alive)
        score = f"cum_score_after_layer_{index:02d}"
        if score in case:
            expect_close(score, memory[MEMORY] / 2.0**index, case[score], atol=2e-4, rtol=1e-2)
    expect_equal_if_there(case, f"keep_after_layer_{depth:02d}", alive)
    expect_equal("final_keep", alive, case["final_keep"])
    features = hidden if case.metadata.get("select_feature") == "cls_patch" else hidden[:, 1:]
    expect_close("final_features", features, case["final_features"], **FEATURES)


def clip_budget(case: Case) -> int:
    """Patches that the encoder leaves: half the target a crop for anyres, one less where CLS counts."""
    target = case.setting("target_num")
    target = target // 2 if case.metadata.get("image_aspect_ratio") == "anyres" else target
    return target - (case.metadata.get("select_feature") == "cls_patch")


def expect_equal_if_there(case: Case, name: str, got: Tensor) -> None:
    """Compares only what was recorded."""
    if name in case:
        expect_equal(name, got, case[name])


def prune_qwen(tower: torch.nn.Module, pixels: Tensor, grid: Tensor, budget: int) -> tuple[Tensor, list[Tensor]]:
    """The merged features of the first stage patch by patch, as released, and the survivors of each prune."""
    inputs = towers.qwen_block_inputs(tower, pixels, grid)
    hidden, rotary, ends = inputs["hidden_states"], inputs["position_embeddings"], inputs["cu_seqlens"]
    total = hidden.shape[0]
    alive, survivors, memory = torch.arange(total), list[Tensor](), dict[str, Tensor]()
    for index, block in enumerate(tower.blocks):
        towers.RECORDER.chunks.clear()
        reached = ends.clamp(max=hidden.shape[0]).unique()
        hidden = block(hidden, cu_seqlens=reached, position_embeddings=rotary)
        layer = encoder_layer(towers.RECORDER.take(), index, len(tower.blocks), 0, total, budget, memory)
        selection = RELEASED.prune_encoder(layer)
        if selection is not None:
            keep = selection.keep
            hidden, alive, rotary = hidden[keep[0]], alive[keep[0]], [part[keep[0]] for part in rotary]
            memory = {name: compact(scores, keep) for name, scores in memory.items()}
            if alive.numel() < keep.numel():
                survivors.append(alive)
    return tower.merger(hidden), survivors


def check_qwen_vision(case: Case) -> None:
    """Survivors of every prune and the merged features of Qwen2-VL's vision tower."""
    tower = towers.qwen_tower(case.setting("config"), case.weights())
    group = tower.spatial_merge_size**2
    if "visual_target_patches" in case.metadata:
        budget = case.setting("visual_target_patches")
    else:
        budget = 2 * group * case.setting("target_num_arg", "target_num")
    merged, survivors = prune_qwen(tower, case["pixel_values"], case["grid_thw"], budget)
    recorded = sorted(name for name in case.tensors if name.startswith("keep_patches_prune"))
    sizes = [case["pixel_values"].shape[0], *(case[name].numel() for name in recorded)]
    recorded = [name for name, before, after in zip(recorded, sizes, sizes[1:], strict=False) if after < before]
    if len(recorded) != len(survivors):
        raise Mismatch(f"{len(survivors)} prunes, recorded {len(recorded)}")
    for name, alive in zip(recorded, survivors, strict=True):
        expect_equal(name, alive, case[name])
    expect_close("merged_tokens", merged, case["merged_tokens"], **FEATURES)


def decoder_kept(model: torch.nn.Module, hidden: Tensor, positions: Tensor, span: Tensor, last: int, budget: int):
    """Hidden states after the scoring layer, and the kept places inside the image's span, row by row."""
    for index in range(DECODER_LAYER + 1):
        hidden = towers.run_decoder_layer(model, index, hidden, positions)
    query, key, value = towers.RECORDER.take()
    kept = []
    for row in range(hidden.shape[0]):
        layer = DecoderLayer(
            query=query[row], key=key[row], value=value[row], vision=span, last=last,
            scale=query.shape[-1] ** -0.5, total=span.numel(), indices=torch.arange(span.numel()),
            budget=budget, index=DECODER_LAYER, depth=len(model.layers), text=span[:0], memory={},
        )  # fmt: skip
        selection = RELEASED.prune_decoder(layer)
        kept.append(torch.arange(span.numel()) if selection is None else selection.kept)
    return hidden, torch.stack(kept)


def check_decoder(case: Case) -> None:
    """Kept tokens after decoder layer 1 and the output on the shortened sequence, positions renumbered."""
    model = towers.llama(case.setting("config"), case.weights())
    hidden = case["inputs_embeds"]
    start, count = case.setting("visual_start"), case.setting("visual_num")
    positions = torch.arange(hidden.shape[1])[None].expand(hidden.shape[0], -1)
    expect_equal_if_there(case, "position_ids_layer0", positions)
    span, last = torch.arange(start, start + count), case.setting("last_instruct_pos") - 1
    hidden, kept = decoder_kept(model, hidden, positions, span, last, case.setting("target_num"))
    if "hidden_after_layer1_unpruned" in case:
        expect_close("hidden_after_layer1", hidden, case["hidden_after_layer1_unpruned"], **FEATURES)
    expect_equal("keep_index_within_visual", kept, case["keep_index_within_visual"])
    keep = torch.ones(hidden.shape[:2], dtype=torch.bool)
    keep[:, start : start + count] = False
    keep = keep.scatter(1, kept + start, True)
    hidden = compact(hidden, keep)
    positions = positions[:, : hidden.shape[1]]
    expect_equal_if_there(case, "position_ids_layer2", positions)
    for index in range(DECODER_LAYER + 1, len(model.layers)):
        hidden = towers.run_decoder_layer(model, index, hidden, positions)
    expect_close("last_hidden_state", model.norm(hidden), case["last_hidden_state"], **FEATURES)


def check_qwen_full(case: Case) -> None:
    """Kept tokens of both stages on Qwen2-VL, the survivors at the first positions (a released defect)."""
    config, weights = case.setting("config"), case.weights()
    image = config["image_token_id"]
    tower = towers.qwen_tower(config["vision_config"], case.weights("w.visual."))
    text = {name.removeprefix("model."): t for name, t in weights.items() if name.startswith("model.")}
    model = towers.qwen_text(config, text)
    target, group = case.setting("target_num"), tower.spatial_merge_size**2
    merged, _ = prune_qwen(tower, case["pixel_values"], case["image_grid_thw"], 2 * target * group)
    ids = case["input_ids"][0]
    pads = (ids == image).nonzero().flatten()
    entering = torch.ones_like(ids, dtype=torch.bool)
    entering[pads[merged.shape[0] :]] = False
    ids, positions = ids[entering], case["position_ids_full"][..., entering]
    expect_equal_if_there(case, "layer0_position_ids", positions)
    span = (ids == image).nonzero().flatten()
    hidden = model.embed_tokens(ids)
    hidden[span] = merged
    _, kept = decoder_kept(model, hidden[None], positions, span, ids.numel() - 1, target)
    expect_equal("keep_index_within_visual", kept[0], case["keep_index_within_visual"].flatten())
