"""Positions of pruned prompts against those that transformers gives the whole one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.streams import few
from vtprune.serving.places import planned, replaced, with_places, without_places
from vtprune.serving.tapping import Tap

# Text, then an image of (h, w) of which so many tokens are kept, and so on; the last text is never empty.
prompts = st.lists(
    st.tuples(st.integers(0, 4), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99)), min_size=1, max_size=4
)
IMAGE = 1


def told(parts: list[tuple[int, int, int, int]], last: int) -> tuple[Tensor, list[Tensor], Tensor, list[int]]:
    """Of a prompt: ids of the pruned one, the kept places of each image, and which tokens of the whole one are left;
    and the widths."""
    ids, kept, left, widths, at = [], [], [], [], 0
    for text, height, width, seed in parts:
        ids += [0] * text
        left += range(at, at + text)
        total, generator = height * width, torch.Generator().manual_seed(seed)
        count = 1 + seed % total
        chosen = torch.randperm(total, generator=generator)[:count].sort().values
        kept.append(chosen)
        widths.append(width)
        ids += [IMAGE] * count
        left += (at + text + chosen).tolist()
        at += text + total
    ids += [0] * last
    left += range(at, at + last)
    return torch.tensor(ids), kept, torch.tensor(left), widths


@few
@given(parts=prompts, last=st.integers(1, 5), chunk=st.integers(1, 70), dtype=st.sampled_from(["bfloat16", "float32"]))
def test_a_prompt_in_chunks_has_the_positions_of_the_whole_one(
    parts: list[tuple[int, int, int, int]], last: int, chunk: int, dtype: str
) -> None:
    ids, kept, left, widths = told(parts, last)
    spans, at = [], 0
    for (text, height, width, _), chosen in zip(parts, kept, strict=True):
        spans.append((at + text, len(chosen), height * width))
        at += text + len(chosen)
    positions, ahead = planned(len(ids), spans)
    text = ids == 0
    assert torch.equal(positions[0, text], left[text])
    assert ahead + len(ids) == left[-1] + 1
    coded = [
        with_places(torch.zeros(len(one), 2, dtype=getattr(torch, dtype)), one, width)
        for one, width in zip(kept, widths, strict=True)
    ]
    # Read in chunks, twice over, as after a preemption.
    for start in [*range(0, len(ids), chunk)] * 2:
        rows = []
        for (first, count, _), one, width in zip(spans, coded, widths, strict=True):
            part = one[max(0, start - first) : max(0, min(count, start + chunk - first))]
            if len(part):
                _, row, column = without_places(part)
                rows.append((row * width + column,) * 2)
        positions = replaced(ids == IMAGE, rows, positions, start=start)
    assert torch.equal(positions[1], left)
    assert torch.equal(positions[2], left)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_holds_the_place_of_every_token(dtype: torch.dtype) -> None:
    width = 1031
    kept = torch.tensor([0, 1, 127, 128, 255, 256, 257, 1030, 1031, 300 * width + 777, 1030 * width + 1030])
    vectors, row, column = without_places(with_places(torch.ones(len(kept), 3, dtype=dtype), kept, width))
    assert torch.equal(row * width + column, kept)
    assert torch.equal(vectors, torch.ones(len(kept), 3, dtype=dtype))


class Attention(nn.Module):
    """Of 2 heads, called as vLLM calls its own."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return query


@pytest.mark.parametrize("flat", [True, False])
def test_a_tap_notes_what_attention_is_given_while_it_listens(flat: bool) -> None:
    module = Attention()
    tap = Tap(module, heads=2)
    states = torch.randn(3, 1, 5, 2, 4)
    given_states = states.flatten(3) if flat else states
    module(*given_states)
    with tap.listening() as noted:
        module(given_states[0], key=given_states[1], value=given_states[2])
    module(*given_states)
    for found, wanted in zip(tap.by_head(noted), states, strict=True):
        assert torch.equal(found, wanted.transpose(1, 2))
