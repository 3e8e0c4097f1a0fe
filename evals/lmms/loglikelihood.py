"""How likely a wrapped model finds given continuations of its prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from vtprune.evals.lmms.generation import Answer, generate_measured
from vtprune.loading.prompts import place


@dataclass(frozen=True)
class Likelihood(Answer):
    """A continuation as `text`, and what it cost as an answer would.

    logprob: the sum of the natural logarithms of its tokens' probabilities; greedy: whether greedy decoding would have
    given it.
    """

    logprob: float
    greedy: bool


class Forced(LogitsProcessor):
    """Makes `generate` give each row's continuation, and notes how likely each of its tokens was.

    continuations: token ids, at least one a row; prompt: the length of the padded prompts.
    """

    def __init__(self, continuations: Sequence[Sequence[int]], prompt: int, device: torch.device) -> None:
        longest = max(map(len, continuations))
        # A row that is through goes on with any token: nothing that it is given then is looked at.
        rows = [[*row, *[row[-1]] * (longest - len(row))] for row in continuations]
        self.tokens = torch.tensor(rows, device=device)
        lengths = torch.tensor([len(row) for row in continuations], device=device)
        self.counts = torch.arange(longest, device=device) < lengths[:, None]
        self.prompt = prompt
        self.logprobs = torch.zeros(len(rows), device=device)
        self.greedy = torch.ones(len(rows), dtype=torch.bool, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(rows, V) scores that leave one choice."""
        step = input_ids.shape[1] - self.prompt
        wanted, counts = self.tokens[:, step], self.counts[:, step]
        found = torch.log_softmax(scores.float(), dim=-1).gather(1, wanted[:, None])[:, 0]
        self.logprobs += torch.where(counts, found, 0)
        self.greedy &= (scores.argmax(dim=-1) == wanted) | ~counts
        return torch.full_like(scores, -torch.inf).scatter(1, wanted[:, None], 0)


def likelihoods(
    model: Any, tokenizer: Any, inputs: Any, *, texts: Sequence[str], continuations: Sequence[Sequence[int]]
) -> list[Likelihood]:
    """How likely a wrapped model finds the continuations (texts, and the same as token ids) of a left-padded batch.

    The model generates them, token by token, with every choice taken out of its hands. One forward of prompt and
    continuation would be no such thing: methods that read the last row of text as the question would read the answer;
    and one forward of the continuation on the prompt's cache is not what generation does where each step chooses which
    tokens return (LazyLLM), or where the first one decides what is cut from the cache (D2O).
    """
    inputs = place(inputs, model)
    forced = Forced(continuations, inputs["input_ids"].shape[1], inputs["input_ids"].device)
    with plain_generation(model):
        found = generate_measured(
            model,
            tokenizer,
            inputs,
            logits_processor=LogitsProcessorList([forced]),
            max_new_tokens=forced.tokens.shape[1],
            num_beams=1,
            do_sample=False,
        )
    told = zip(texts, map(len, continuations), strict=True)
    measured = zip(found.lengths, found.costs, strict=True)
    numbers = zip(forced.logprobs.tolist(), forced.greedy.tolist(), strict=True)
    return [
        Likelihood(text, length, tokens, seconds=found.seconds, cost=cost, logprob=logprob, greedy=greedy)
        for (text, tokens), (length, cost), (logprob, greedy) in zip(told, measured, numbers, strict=True)
    ]


@contextmanager
def plain_generation(model: Any) -> Iterator[None]:
    """`generate` without what a checkpoint's own generation config adds: penalties change probabilities, and an end
    token inside a continuation would end it."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def continuation_ids(tokenizer: Any, prompt: str, continuation: str) -> list[int]:
    """The tokens of a continuation behind a prompt.

    They are those that the text of both has behind the prompt's own; where it has others for the prompt, since a token
    reaches across, or none behind it, those of the continuation by itself.
    """
    before: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    both: list[int] = tokenizer(prompt + continuation, add_special_tokens=False)["input_ids"]
    if both[: len(before)] == before and len(both) > len(before):
        return both[len(before) :]
    alone: list[int] = tokenizer(continuation, add_special_tokens=False)["input_ids"]
    return alone
