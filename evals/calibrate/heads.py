"""How much of its attention each head of a decoder gives to vision, by which YOPO keeps it (arXiv 2410.06169)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from vtprune.adapters import adapter_for
from vtprune.errors import VTPruneError
from vtprune.hooks.layers import after_layers
from vtprune.hooks.taps import Taps
from vtprune.tensors.attention import CausalSight, attention_sums, full_precision
from vtprune.wrap import is_wrapped


def vision_ratios(sums: Tensor, vision: Tensor, kv_heads: int) -> Tensor:
    """(Hkv,) the attention that goes to vision over that which goes to all else, of the heads that share each
    key-value head together; sums: (H, n) what each token gets of all rows; vision: (n,) bool."""
    shared = sums.unflatten(0, (kv_heads, -1)).sum(dim=1)
    return shared[:, vision].sum(dim=1) / shared[:, ~vision].sum(dim=1)


def reading_heads(ratios: Tensor, *, threshold: float, agree: float = 0.4, whole: int = 2) -> dict[int, list[int]]:
    """The heads to keep by layer, of ratios (S, L, Hkv): those above `threshold` in more than the share `agree` of the
    samples. The first `whole` layers, which keep all, are not named."""
    votes = (ratios > threshold).double().mean(dim=0)
    return {layer: (votes[layer] > agree).nonzero().flatten().tolist() for layer in range(whole, ratios.shape[1])}


def measure(
    model: Any, batches: Iterable[dict[str, Any]], on_sample: Callable[[int], None] = lambda count: None
) -> Tensor:
    """(S, L, Hkv) `vision_ratios` of each row that shows anything, over all of its queries.

    Queries and keys are taken from the layers' projections, so that no attention map is held. `on_sample` hears of
    rows that are done. Raises VTPruneError for a wrapped model, one with linear attention, and where no row
    shows anything.
    """
    if is_wrapped(model):
        raise VTPruneError("heads are measured in the model itself; call vtprune.unwrap(model) first")
    measuring = _Measuring(model)
    try:
        for batch in batches:
            on_sample(measuring.feed(batch))
    finally:
        measuring.remove()
    if not measuring.rows:
        raise VTPruneError("no samples that show anything to measure heads on; give at least one")
    return torch.stack([torch.stack(layers) for layers in measuring.rows])


class _Measuring:
    """Hooks on a model's decoder that measure each layer while it runs; rows: by row, the ratios (Hkv,) by layer."""

    def __init__(self, model: Any) -> None:
        self._adapter = adapter_for(model)
        if self._adapter.state_layers:
            raise VTPruneError("heads are of attention, and most layers of this decoder have none (linear attention)")
        layers: list[Any] = list(self._adapter.decoder_layers)
        self.rows: list[list[Tensor]] = []
        self._states: dict[str, Tensor] = {}
        self._seen: list[tuple[Tensor, Tensor, list[Tensor]]] = []
        self._taps = Taps(lambda: self._states)
        self._taps.follow("decoder", lambda: [self._adapter.decoder_taps(layer).modules for layer in layers])
        self._handles = after_layers(layers, self._add)

    @torch.inference_mode()
    def feed(self, batch: dict[str, Any]) -> int:
        """Runs a batch of inputs and answers its rows."""
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids))
        shown = torch.isin(ids, torch.tensor([one.token for one in self._adapter.sources()], device=ids.device))
        self._seen = [(row.nonzero().flatten(), own, []) for row, own in zip(mask, shown, strict=True)]
        self._adapter.inner(**batch, use_cache=False)
        self.rows += [found for real, own, found in self._seen if bool(own[real].any())]
        return len(ids)

    def _add(self, index: int, arguments: dict[str, Any]) -> None:
        kv_heads = self._adapter.cost.decoder.kv_heads
        with full_precision(self._states["q"].device):
            turn = arguments["position_embeddings"]
            query = self._adapter.decoder_query(self._states, turn)
            key = self._adapter.repeated(self._adapter.decoder_keys(self._states, turn))
            for row, (real, vision, found) in enumerate(self._seen):
                some = real.to(query.device)
                own = query[row][:, some], key[row][:, some]
                sums = attention_sums(*own, CausalSight(query.device), self._adapter.decoder_scale)
                found.append(vision_ratios(sums, vision[real].to(sums.device), kv_heads).cpu())
        self._states.clear()

    def remove(self) -> None:
        """Takes the hooks off."""
        self._taps.remove()
        for handle in self._handles:
            handle.remove()
