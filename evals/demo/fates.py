"""What became of each patch: what the page draws over the picture, and says of the patch under the pointer."""

from __future__ import annotations

import base64
import bisect
import io
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from vtprune.evals.demo.layout import layout
from vtprune.method.kinds import VIDEO
from vtprune.report.report import ImageReport, MergeReport

# Longest side in pixels of the picture that the page is given.
LONGEST = 1024


def fates(pictures: Sequence[Image.Image], report: ImageReport, label: str) -> dict[str, Any]:
    """Plain JSON: the picture (of a video its frames, side by side), the cell of it that each patch is drawn in, who
    is alive before the decoder and in each of its layers, the group that each patch was merged into (-1: none) with
    the patch that holds it, and a sentence for each patch. pictures: one, or one a frame."""
    placed = layout(pictures, report)
    groups = [-1] * report.tokens
    holders = []
    for number, merge in enumerate(report.merged):
        holders.append(merge.into)
        for member in merge.members:
            groups[member] = number
    layers = [report.kept, *report.kept_per_layer]
    return {
        "label": label,
        "image": data_url(placed.picture),
        "columns": placed.columns,
        "rows": placed.rows,
        "cells": placed.cells,
        "alive": [_marks(kept, report.tokens) for kept in layers],
        "counts": [len(kept) for kept in layers],
        "groups": groups,
        "holders": holders,
        "words": [sentence(report, token) for token in range(report.tokens)],
    }


def data_url(image: Image.Image) -> str:
    """The picture, made smaller where it is large, as an address that holds it."""
    small = image.copy()
    small.thumbnail((LONGEST, LONGEST))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _marks(kept: Sequence[int], tokens: int) -> str:
    """ "1" for each token that is there, "0" for the others."""
    marks = np.zeros(tokens, dtype=np.uint8)
    marks[list(kept)] = 1
    return "".join(map(str, marks.tolist()))


def sentence(report: ImageReport, token: int) -> str:
    """Where a patch is, at which layer it left, and whom it flowed into."""
    return f"{place(report, token)}: {_fate(report, token)}{_later(report, token)}."


def place(report: ImageReport, token: int) -> str:
    """Rows and columns count from 1."""
    parts = report.parts or [report.grid]
    starts = list(itertools.accumulate(map(math.prod, parts), initial=0))
    part = bisect.bisect_right(starts, token) - 1
    (depth, height, width), rest = parts[part], token - starts[part]
    frame, rest = divmod(rest, height * width)
    row, column = divmod(rest, width)
    shown = f"row {row + 1}, column {column + 1}"
    if report.kind == VIDEO or depth > 1:
        return f"frame {part + frame + 1}, {shown}"
    return shown if len(parts) == 1 else f"{'the picture itself' if part == 0 else 'its crops'}, {shown}"


def _fate(report: ImageReport, token: int) -> str:
    into = [merge for merge in report.merged if token in merge.members and merge.into != token]
    holds = sum(len(set(merge.members) - {token}) for merge in report.merged if merge.into == token)
    flowed = f"flowed into {place(report, into[-1].into)} {_when(into[-1])}" if into else ""
    if token in report.cls_tokens:
        return "the encoder's CLS token goes on in its place"
    if token not in report.kept:
        return flowed or "never entered the decoder"
    there = [index for index, kept in enumerate(report.kept_per_layer) if token in kept]
    depth = len(report.kept_per_layer)
    merged = f", holding {holds} other{'s' * (holds > 1)}" if holds else ""
    if len(there) == depth:
        return f"stays in all {depth} decoder layers{merged}"
    if there == list(range(len(there))):
        left = f"left before decoder layer {len(there)} (counted from 0)"
        return f"{left} and {flowed}" if flowed else f"{left}{merged}"
    return f"computed in {len(there)} of {depth} decoder layers ({_runs(there)}){merged}"


def _later(report: ImageReport, token: int) -> str:
    """What became of it after the prompt was read: whether it returned, and whose caches it left."""
    parts = []
    for number, step in enumerate(report.steps, 1):
        if any(
            token in attended and token not in kept
            for attended, kept in zip(step.attended_per_layer, report.kept_per_layer, strict=True)
        ):
            parts.append(f"returned at decode step {number}")
            break
    heads = [head for layer in report.cached_per_head for head in layer]
    if heads:
        holding = sum(token in head for head in heads)
        parts.append(f"after the prompt in {holding} of the {len(heads)} cut caches of heads")
    return "".join(f"; {part}" for part in parts)


def _when(merge: MergeReport) -> str:
    if merge.stage == "encoder":
        return f"in layer {merge.layer} of the vision encoder"
    return f"before decoder layer {merge.layer}" if merge.layer else "before the decoder"


def _runs(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 as "0-2, 5"."""
    parts = []
    for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        found = [number for _, number in run]
        parts.append(str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}")
    return ", ".join(parts)
