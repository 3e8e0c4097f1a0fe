"""The proof that pruning is exact on decoders with linear attention: each row alone, without the dropped tokens.

There a token that was dropped is not masked, but never part of what its layer folds into a state. So each layer of the
unpruned decoder is run by itself on the tokens that the report says it had, as one sequence with the steps behind it:
with no cache, no padding, a causal mask of its own in layers with attention, and the positions of the whole prompt.
Where tokens merge, the layer is fed the merged vector at the survivor's place; what was cut from a layer's cache is
masked for the steps. Nothing here uses vtprune's own compaction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import vtprune
from tests.oracle import STEPS, embeddings_of, full_mask, next_tokens, places_of, positions_of
from vtprune.report.report import SampleReport


@torch.no_grad()
def run_deleted(
    kind: str, model: Any, inputs: dict[str, Tensor], report: vtprune.Report, features: Any = None
) -> Tensor:
    """Logits (B, L + STEPS, V) of the unwrapped model in one pass, 0 where a token was dropped or is padding.

    features: image features to feed instead of the model's own (from an encoder that dropped tokens).
    """
    ids = torch.cat([inputs["input_ids"], next_tokens(inputs["input_ids"].shape[0])], dim=1)
    embeds = embeddings_of(model, inputs, ids, features)
    positions = positions_of(kind, model, inputs, ids.shape[1])
    real = full_mask(inputs, STEPS).bool()
    logits = torch.zeros(*ids.shape, model.config.text_config.vocab_size)
    for row, sample in enumerate(report.samples):
        states, places = _row(model, sample, ids[row], real[row], embeds=embeds[row], positions=positions[:, row])
        logits[row, places] = model.lm_head(states)
    return logits


def _row(
    model: Any, sample: SampleReport, ids: Tensor, real: Tensor, *, embeds: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """The states (n, D) of the tokens that are left of one row, and their places (n,)."""
    decoder = model.model.language_model
    cos, sin = decoder.rotary_emb(embeds[None], positions[:, None])
    images = _images(sample, ids)
    whole = embeds.clone()
    for index, layer in enumerate(decoder.layers):
        for image, own in images:
            for merge in image.merged:
                if merge.stage == "decoder" and merge.layer == index:
                    weights = torch.tensor(merge.weights)[:, None]
                    whole[own[merge.into]] = (whole[own[merge.members]] * weights).sum(dim=0)
        alive, cached = real.clone(), real.clone()
        for image, own in images:
            alive[own] = cached[own] = False
            alive[own[image.kept_per_layer[index]]] = True
            cached[own[image.cached_per_layer[index]]] = True
        places = alive.nonzero().flatten()
        mask = None
        if model.config.text_config.layer_types[index] == "full_attention":
            seen = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
            seen[-STEPS:] &= cached
            mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[places][:, places][None, None]
        turned = cos[:, places], sin[:, places]
        whole[places] = layer(whole[None, places], position_embeddings=turned, attention_mask=mask)[0]
    return decoder.norm(whole[places]), places


def _images(sample: SampleReport, ids: Tensor) -> list[tuple[Any, Tensor]]:
    """The images and videos of a row, each with the places of its tokens."""
    return list(zip(sample.images, places_of(ids, sample), strict=True))
