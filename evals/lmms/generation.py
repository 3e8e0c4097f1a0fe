"""Answers to one batch, with what each cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import vtprune
from vtprune.evals.lmms.efficiency import RowCost, row_costs
from vtprune.evals.lmms.gen_kwargs import Generation
from vtprune.loading.devices import accelerators_of
from vtprune.loading.prompts import place


@dataclass(frozen=True)
class Answer:
    """One answer and its cost; seconds: its share of the batch's wall-clock time."""

    text: str
    input_tokens: int
    output_tokens: int
    seconds: float
    cost: RowCost

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> Answer:
        """Reads `to_dict` back."""
        return cls(**{**entry, "cost": RowCost(**entry["cost"])})


def synchronise(device: torch.device) -> None:
    """Waits for the GPU, so that a clock read next is true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class FirstTokenClock(StoppingCriteria):
    """Notes when the first token of a generation was there; stops nothing."""

    def __init__(self) -> None:
        self.time: float | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """All False, one per row."""
        if self.time is None:
            synchronise(input_ids.device)
            self.time = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class StopAtText(StoppingCriteria):
    """Stops each row once its answer holds one of the stop texts."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompt: int) -> None:
        self.tokenizer, self.stops, self.prompt = tokenizer, stops, prompt
        # A stop text that ends now lies in the last so many tokens: none is shorter than a byte.
        self.window = max(len(stop.encode()) for stop in stops) + 8

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(rows,) bool."""
        tail = input_ids[:, max(self.prompt, input_ids.shape[1] - self.window) :]
        texts = self.tokenizer.batch_decode(tail, skip_special_tokens=True)
        hit = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(hit, device=input_ids.device)


class StopWhen(StoppingCriteria):
    """Breaks all rows off once it is asked to."""

    def __init__(self, asked: Callable[[], bool]) -> None:
        self.asked = asked

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(rows,) bool."""
        return torch.full((len(input_ids),), self.asked(), device=input_ids.device)


def end_tokens(model: Any) -> set[int]:
    """The tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return set()
    return {ends} if isinstance(ends, int) else set(ends)


def until_end(ids: list[int], ends: set[int]) -> int:
    """How many tokens the row generated, its end token included."""
    return next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop text."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


@dataclass(frozen=True)
class Generated:
    """What `generate` gave for a batch: each row's tokens behind the prompt, its prompt's length without padding, its
    cost, and its share of the wall-clock time."""

    rows: list[list[int]]
    lengths: list[int]
    costs: list[RowCost]
    seconds: float


def generate_measured(
    model: Any, tokenizer: Any, inputs: Any, *, criteria: Sequence[StoppingCriteria] = (), **arguments: Any
) -> Generated:
    """Runs `generate` of a wrapped model on a left-padded batch that lies on its device; arguments: of `generate`."""
    prompt = inputs["input_ids"].shape[1]
    clock = FirstTokenClock()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    devices = [device for device in accelerators_of(model) if device.type == "cuda"]
    for device in devices:
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    ids = model.generate(
        **inputs, **arguments, pad_token_id=pad, stopping_criteria=StoppingCriteriaList([clock, *criteria])
    )
    for device in devices:
        synchronise(device)
    seconds = time.perf_counter() - start
    rows = ids[:, prompt:].tolist()
    first, later = (clock.time or start) - start, ids.shape[1] - prompt - 1
    costs = row_costs(
        vtprune.report(model),
        first,
        step_seconds=(seconds - first) / later if later > 0 else None,
        peak_bytes=sum(map(torch.cuda.max_memory_allocated, devices)) if devices else None,
    )
    # Each row's beams stand together in the report, and the first has its prompt's cost.
    costs = costs[:: arguments["num_beams"]]
    return Generated(rows, inputs["attention_mask"].sum(dim=1).tolist(), costs, seconds / len(rows))


def answer_batch(
    model: Any,
    tokenizer: Any,
    inputs: Any,
    *,
    generation: Generation,
    streamer: BaseStreamer | None = None,
    stopped: Callable[[], bool] | None = None,
) -> list[Answer]:
    """Answers of a wrapped model to a left-padded batch.

    streamer: is told each token of a batch of one; stopped: asked after each token whether to break off.
    """
    inputs = place(inputs, model)
    criteria: list[StoppingCriteria] = []
    stops = generation.stops
    if stops:
        criteria.append(StopAtText(tokenizer, stops, inputs["input_ids"].shape[1]))
    if stopped is not None:
        criteria.append(StopWhen(stopped))
    found = generate_measured(
        model,
        tokenizer,
        inputs,
        criteria=criteria,
        **generation.arguments,
        **({} if streamer is None else {"streamer": streamer}),
    )
    texts = tokenizer.batch_decode(found.rows, skip_special_tokens=True)
    ends = end_tokens(model)
    return [
        Answer(cut(text, stops), length, until_end(row, ends), seconds=found.seconds, cost=cost)
        for text, length, row, cost in zip(texts, found.lengths, found.rows, found.costs, strict=True)
    ]
