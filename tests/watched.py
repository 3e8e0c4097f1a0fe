"""What methods were shown by a wrapped model, and what was reported of each image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtprune
from tests.models import make
from vtprune.method.views import VisionStream
from vtprune.report.report import ImageReport


def images_of(model: Any) -> list[ImageReport]:
    """The reports of all images of the last forward, in order."""
    return [image for sample in vtprune.report(model).samples for image in sample.images]


def streams_of(kind: str, inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[Any]:
    """What a method that reads attention is shown of each image."""
    seen: list[VisionStream] = []
    original = vtprune.FoPru.select
    monkeypatch.setattr(vtprune.FoPru, "select", lambda self, stream: (seen.append(stream), original(self, stream))[1])
    with torch.no_grad(), vtprune.wrapped(make(kind), "fopru", keep=0.5, **options) as model:
        model(**inputs)
    return seen
