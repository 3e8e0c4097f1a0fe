"""Gradients of a wrapped model against central differences of its own loss, in fp64, while it chooses the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import vtprune
from tests.models import IMAGE, PAST

# The largest one within which the model chooses the same is taken.
STEPS = (1e-6, 1e-7, 1e-8)
Loss = Callable[[], Tensor]


class _Doubles(TorchFunctionMode):
    """Leaves fp64 tensors in fp64 where models and methods turn to fp32, whose rounding would drown a difference."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            if func is Tensor.to:
                args = tuple(torch.float64 if one is torch.float32 else one for one in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
            if getattr(func, "__name__", "") == "_grouped_mm":
                return _grouped(*args[:2], offs=kwargs["offs"])
        return func(*args, **kwargs)


def _grouped(rows: Tensor, weights: Tensor, *, offs: Tensor) -> Tensor:
    """The product of each group of rows (n, D) with its own weights (g, D, E); torch's own takes no fp64 on processors
    with AVX-512."""
    groups = torch.tensor_split(rows, offs.tolist()[:-1])
    return torch.cat([group @ weight for group, weight in zip(groups, weights, strict=True)])


@contextmanager
def doubles() -> Iterator[None]:
    """Computes in fp64 throughout."""
    with _Doubles():
        yield


def parts_of(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters of the tower, the projector, the decoder, and the method."""
    found: dict[str, list[nn.Parameter]] = {"method": [], "projector": [], "tower": [], "decoder": []}
    marks = {"vtprune": "method", "projector": "projector", "merger": "projector", "vision_tower": "tower"}
    for name, weight in model.named_parameters():
        part = next((part for mark, part in {**marks, "visual": "tower"}.items() if mark in name), "decoder")
        found[part].append(weight)
    return {part: weights for part, weights in found.items() if weights}


def shake(model: nn.Module) -> None:
    """Moves the weights that a method brought away from zero, as training would."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "vtprune" in name:
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))


def text_labels(inputs: dict[str, Tensor]) -> Tensor:
    """Labels on all text but the first token of a row, which padding would have to predict."""
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    left_out = (mask == 0) | (mask.cumsum(dim=1) == 1) | (inputs["input_ids"] == IMAGE)
    return inputs["input_ids"].masked_fill(left_out, -100)


def choices(model: nn.Module) -> list[Any]:
    """All that a wrapped model chose, by its report."""
    images = [image for sample in vtprune.report(model).samples for image in sample.images]
    return [
        (one.kept_per_layer, one.cached_per_layer, one.steps, [(m.into, m.members) for m in one.merged])
        for one in images
    ]


def generation_loss(model: nn.Module, inputs: dict[str, Tensor], steps: int) -> Loss:
    """A smooth number of the logits of all text of a prompt and of some decode steps after it."""
    generator = torch.Generator().manual_seed(6)
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    text = (mask == 1) & (inputs["input_ids"] != IMAGE)
    mixed = torch.randn(100, generator=generator, dtype=torch.float64)
    tokens = torch.randint(3, 80, (len(mask), steps), generator=generator)

    def loss() -> Tensor:
        out = model(**inputs, use_cache=True)
        cache, logits, seen = out.past_key_values, [out.logits[text]], mask
        for step in range(steps):
            seen = torch.cat([seen, seen.new_ones(len(seen), 1)], dim=1)
            out = model(input_ids=tokens[:, step : step + 1], **{PAST: cache}, attention_mask=seen)
            logits.append(out.logits[:, -1])
        return (torch.cat(logits) @ mixed).tanh().sum()

    return loss


def disagreements(model: nn.Module, loss: Loss) -> dict[str, float]:
    """How far the gradient of each part, along a random direction, is from the central difference, relatively.

    Raises AssertionError where the model chooses otherwise a step away, so that there is no difference to take.
    """
    model.zero_grad()
    loss().backward()
    chosen, found = choices(model), {}
    generator = torch.Generator().manual_seed(7)
    for part, weights in parts_of(model).items():
        sizes = [weight.detach().abs().mean().clamp(min=0.01) for weight in weights]
        ways = [
            size * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
            for size, weight in zip(sizes, weights, strict=True)
        ]
        pairs = [(weight, way) for weight, way in zip(weights, ways, strict=True)]
        slope = sum(float((weight.grad * way).sum()) for weight, way in pairs if weight.grad is not None)
        for step in STEPS:
            ends = [(_moved(pairs, sign * step, loss), choices(model)) for sign in (1, -1)]
            if all(found_there == chosen for _, found_there in ends):
                break
        else:
            raise AssertionError("the model chooses otherwise however small the step")
        difference = (ends[0][0] - ends[1][0]) / (2 * step)
        found[part] = abs(slope - difference) / (abs(difference) + 1e-3)
    return found


def _moved(pairs: list[tuple[nn.Parameter, Tensor]], step: float, loss: Loss) -> float:
    # The loss is computed with gradients on: some methods do something else in training.
    for weight, way in pairs:
        weight.data.add_(step * way)
    value = float(loss().detach())
    for weight, way in pairs:
        weight.data.sub_(step * way)
    return value
