"""The loss of a batch: cross-entropy over the answers' tokens, and what the method adds."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vtprune.decoder.prompt import IGNORED
from vtprune.errors import VTPruneError
from vtprune.wrap import auxiliary_loss, is_wrapped, mark_answers


class Objective(nn.Module):
    """A wrapped model with its loss, in one module: what processes keep in step sees all that the loss hangs on."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype
        self._wrapped = is_wrapped(model)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The sum of the cross-entropies over the labels (B, L) of a batch, and the method's auxiliary loss, in fp32.

        Logits are computed in the columns before a label alone. Raises VTPruneError for a batch without labels.
        """
        labels = batch["labels"][:, 1:]
        columns = (labels != IGNORED).any(dim=0).nonzero()[:, 0]
        if not columns.numel():
            raise VTPruneError("a batch holds no answer to learn from")
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        if self._wrapped:
            mark_answers(self.model, batch["labels"])
        half = self.dtype != torch.float32
        with torch.autocast(labels.device.type, self.dtype) if half else nullcontext():
            logits = self.model(**inputs, logits_to_keep=columns, use_cache=False).logits
        targets = labels[:, columns].flatten()
        loss = cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=IGNORED, reduction="sum")
        extra = auxiliary_loss(self.model) if self._wrapped else None
        return loss, loss.new_zeros(()) if extra is None else extra.to(loss)


def count_targets(batch: dict[str, Tensor]) -> int:
    """How many tokens of a batch are predicted."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())
