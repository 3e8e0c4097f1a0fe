"""MuE's cases: where stacks stop by the authors' rule, which compares the states of a whole batch as one vector.

The cosine is the method's own, given the batch as one image. What the authors do about text and in the
decoder has no place in vtprune, and is redone here: what leaves the stacks, whose keys and values skipped layers are
handed, and how the decoder's threshold falls.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from tests.golden.case import Case, UnknownCase, expect_close, expect_equal
from vtprune.pruners.mue import image_cosines


@torch.no_grad()
def run(case: Case) -> None:
    """Raises Mismatch where a result differs, UnknownCase for another kind of case."""
    if "encoder_out" in case:
        check_encoder(case)
    elif "cache_owner" in case:
        check_decoder_step(case)
    elif "threshold" in case:
        check_threshold(case)
    else:
        raise UnknownCase("neither an encoder, nor a step of a decoder, nor thresholds")


def stops_after(states: Tensor, theta: float) -> int:
    """Layers that run, of states (L + 1, T, B, C), all tokens of a batch as one vector: up to the first one with a
    cosine above theta."""
    flat = states.flatten(1, 2)
    one = torch.zeros(len(flat) - 1, flat.shape[1], dtype=torch.long)
    cosines = image_cosines(flat[1:], flat[:-1], one, 1).flatten().tolist()
    return next((layer for layer, cosine in enumerate(cosines, start=1) if cosine > theta), len(cosines))


def check_encoder(case: Case) -> None:
    """Layers run for the image and for the text, and the states that they leave."""
    left = []
    for part, theta in (("image", "img_thres"), ("text", "txt_thres")):
        states = case[f"{part}_states"]
        ran = stops_after(states, float(case[theta]))
        expect_equal(f"exit_{part}", torch.tensor(ran), case[f"exit_{part}"])
        left.append(states[ran])
    expect_close("encoder_out", torch.cat(left), case["encoder_out"], atol=0, rtol=0)


def check_decoder_step(case: Case) -> None:
    """Layers run in one step, the normed state that is left, and the logits of the layers before the last one."""
    states = case["states"]
    ran = stops_after(states, float(case["decoder_thres"]))
    expect_equal("exit_layer", torch.tensor(ran), case["exit_layer"])
    normed = layer_norm(states, states.shape[-1:]).transpose(1, 2)
    expect_close("out", normed[ran], case["out"], atol=1e-6)
    layers = torch.arange(len(case["cache_owner"]))
    expect_equal("cache_owner", layers.clamp(max=ran - 1), case["cache_owner"])
    before = normed[1 : 1 + len(case["layer_logits"])]
    expect_close("layer_logits", before @ case["output_weight"].T, case["layer_logits"], atol=1e-5)


def check_threshold(case: Case) -> None:
    """The decoder's threshold at each step: none in the first third, then a falling one."""
    theta, last = float(case["decoder_thres"]), int(case["max_len"])
    steps = [
        1.0 if step < (last + 1) / 3 else 0.9 * theta + 0.1 * math.exp(-(step + 1) / (last + 1))
        for step in range(last + 1)
    ]
    expect_close("threshold", torch.tensor(steps, dtype=torch.float64), case["threshold"], atol=1e-12)
