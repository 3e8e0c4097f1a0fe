"""The records of encoded images and videos, which travel with their features: into `generate`, through its expansion
for beams, and into a later call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vtprune.encoder.encoding import EncodedImage

# The attribute of a feature tensor that holds the EncodedImage whose features it is; where a model puts the features
# of several into one tensor, the list of theirs.
RECORD = "_vtprune_image"


def note_records(output: Any, images: Sequence[EncodedImage]) -> None:
    """Leaves with the features of an encoder's output, a list of (n, D) or one (I, n, D), whose they are."""
    features = output.pooler_output
    if isinstance(features, Tensor):
        setattr(features, RECORD, list(images))
        return
    for tensor, image in zip(features, images, strict=True):
        setattr(tensor, RECORD, image)


def records_of(output: Any) -> list[EncodedImage | None]:
    """What was left with the features, None for those that nothing is known of."""
    features = output.pooler_output
    if isinstance(features, Tensor):
        return list(getattr(features, RECORD, [None] * len(features)))
    return [getattr(tensor, RECORD, None) for tensor in features]


def expanding(original: Callable[..., Any]) -> Callable[..., Any]:
    """`generate`'s expansion of what was encoded ahead, for beams and returned sequences: features that are one tensor
    go through it one by one, so that their records go with them."""

    @functools.wraps(original)
    def expand(input_ids: Tensor, outputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        whole = [one for one in outputs.values() if isinstance(getattr(one, "pooler_output", None), Tensor)]
        for output in whole:
            records = records_of(output)
            output.pooler_output = list(output.pooler_output)
            for tensor, record in zip(output.pooler_output, records, strict=True):
                setattr(tensor, RECORD, record)
        expanded = original(input_ids, outputs, *args, **kwargs)
        for output in whole:
            records = records_of(output)
            output.pooler_output = torch.stack(output.pooler_output)
            setattr(output.pooler_output, RECORD, records)
        return expanded

    return expand
