"""Rotary embeddings are those of the model, whatever part of a head they turn."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vtprune.tensors.rotary import rotate


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_states_are_turned_as_the_model_turns_them(kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    states, angles = torch.randn(2, 3, 7, 8, generator=generator), torch.randn(2, 7, 4, generator=generator)
    cos, sin = (torch.cat([part, part], dim=-1).to(kind) for part in (angles.cos(), angles.sin()))
    expected = apply_rotary_pos_emb(states.to(kind), states.to(kind), cos, sin)[0]
    found = rotate(states.to(kind), cos[:, None], sin[:, None])
    assert found.dtype == kind
    # The model rounds once more.
    torch.testing.assert_close(found, expected, atol=1e-2 if kind == torch.bfloat16 else 1e-6, rtol=1e-2)


def test_what_lies_behind_the_turning_part_stays_and_nothing_is_written_into() -> None:
    states, cos = torch.arange(24.0).view(1, 1, 2, 12), torch.zeros(2, 8)
    before = states.clone()
    found = rotate(states, cos, torch.ones(2, 8))
    assert torch.equal(states, before)
    assert torch.equal(found[..., 8:], states[..., 8:])
    assert torch.equal(found[..., :8], torch.cat([-states[..., 4:8], states[..., :4]], dim=-1))


def test_gradients_flow_through_both_halves() -> None:
    states = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda own: rotate(own, angles.cos(), angles.sin()), states)
