"""The rank of attention maps, by which gamma-MoD chooses the decoder layers that it routes (arXiv 2410.13859).

A layer whose maps have a low rank repeats itself: what its tokens exchange could be had from fewer of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from vtprune.adapters import adapter_for
from vtprune.errors import VTPruneError
from vtprune.hooks.layers import after_layers
from vtprune.hooks.taps import Taps
from vtprune.tensors.attention import full_precision
from vtprune.wrap import is_wrapped


def head_ranks(attention: Tensor) -> Tensor:
    """(H,) ranks of the attention maps (H, L, L) below their diagonals.

    The diagonal, what a token gives itself, counts as 0, so row 0 is empty and no rank is above L - 1. The tolerance
    is that of torch.linalg.matrix_rank in fp32: L * eps * the largest singular value.
    """
    return torch.linalg.matrix_rank(attention.float().tril(-1))


def arank(attention: Tensor) -> float:
    """The mean over heads of the rank of a layer's attention maps (H, L, L)."""
    return float(head_ranks(attention).double().mean())


def causal_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """(H, L, L) softmaxed attention of queries and keys (H, L, d), each token to itself and those before it, fp32."""
    logits = torch.matmul(query.float() * scale, key.float().transpose(-1, -2))
    hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
    return logits.masked_fill(hidden, float("-inf")).softmax(dim=-1)


def rank_layers(
    model: Any, batches: Iterable[dict[str, Any]], on_sample: Callable[[int], None] = lambda count: None
) -> list[float]:
    """The ARank of each decoder layer, the mean over all rows of `batches`, which are inputs of the model.

    Queries and keys are taken from the layers' projections, one layer and one row at a time, so that the memory for
    maps stays at O(H L^2); padding is left out. The softmax is fp32 (the reference: of the model's type, cast
    afterwards; it prints the rank of a batch's first row and leaves the mean to the reader). `on_sample` hears of rows
    that are done. Raises VTPruneError for a wrapped model, and where there is no row.
    """
    if is_wrapped(model):
        raise VTPruneError("ranks are those of the model itself; call vtprune.unwrap(model) first")
    ranker = _Ranker(model)
    try:
        for batch in batches:
            on_sample(ranker.feed(batch))
    finally:
        ranker.remove()
    if not ranker.rows:
        raise VTPruneError("no samples to rank the decoder layers on; give at least one")
    return [total / ranker.rows for total in ranker.totals]


class _Ranker:
    """Hooks on a model's decoder that add up the ranks of each layer while it runs."""

    def __init__(self, model: Any) -> None:
        self.model, self._adapter = model, adapter_for(model)
        if self._adapter.state_layers:
            raise VTPruneError(
                "ranks are of attention maps, and the linear-attention layers of this decoder have none; rank the "
                "layers of a decoder with attention in all of them"
            )
        layers: list[Any] = list(self._adapter.decoder_layers)
        self.totals, self.rows = [0.0] * len(layers), 0
        self._states: dict[str, Tensor] = {}
        self._real: list[Tensor] = []
        self._taps = Taps(lambda: self._states)
        self._taps.follow("decoder", lambda: [self._adapter.decoder_taps(layer).modules for layer in layers])
        self._handles = after_layers(layers, self._add)

    @torch.inference_mode()
    def feed(self, batch: dict[str, Any]) -> int:
        """Runs a batch of inputs and answers its rows."""
        mask = batch.get("attention_mask")
        ids = batch["input_ids"]
        real = torch.ones_like(ids) if mask is None else mask
        self._real = [row.nonzero().flatten() for row in real]
        self._adapter.inner(**batch, use_cache=False)
        self.rows += len(ids)
        return len(ids)

    def _add(self, index: int, arguments: dict[str, Any]) -> None:
        with full_precision(self._states["q"].device):
            turn = arguments["position_embeddings"]
            query = self._adapter.decoder_query(self._states, turn)
            key = self._adapter.repeated(self._adapter.decoder_keys(self._states, turn))
            for row, real in enumerate(self._real):
                some = real.to(query.device)
                maps = causal_attention(query[row][:, some], key[row][:, some], self._adapter.decoder_scale)
                self.totals[index] += arank(maps)
        self._states.clear()

    def remove(self) -> None:
        """Takes the hooks off."""
        self._taps.remove()
        for handle in self._handles:
            handle.remove()


def choose(
    ranks: Sequence[float],
    *,
    count: int | None = None,
    share: float | None = None,
    dense: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """The layers to route: the `count` of lowest rank, ascending; ties go to the first layers.

    share: their share of all layers instead, rounded down. dense: layers that compute everything whatever their rank;
    None is the first and the last one. Raises VTPruneError unless one of `count` and `share` is given and as many
    layers are left.
    """
    depth = len(ranks)
    if (count is None) == (share is None):
        raise VTPruneError("say how many layers to route: by a count or by a share of the layers, one of them")
    kept = {0, depth - 1} if dense is None else set(dense)
    free = [layer for layer in range(1, depth) if layer not in kept]
    if share is not None:
        if not 0 < share <= 1:
            raise VTPruneError(f"the share of layers to route is above 0 and at most 1, got {share!r}")
        count = min(len(free), max(1, int(share * depth + 1e-6)))
    assert count is not None
    if isinstance(count, bool) or not 1 <= count <= len(free):
        raise VTPruneError(
            f"{count} layers cannot be routed: of {depth} decoder layers, {depth - len(free)} compute everything "
            f"(the first one always does), so it is 1 to {len(free)}"
        )
    return tuple(sorted(sorted(free, key=lambda layer: (ranks[layer], layer))[:count]))
