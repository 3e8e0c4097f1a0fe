"""The answer and its confidence against keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import vtprune
from vtprune.cache.adopting import cache_in, with_cache
from vtprune.errors import VTPruneError
from vtprune.evals.demo.asking import encoded, stream
from vtprune.evals.demo.models import Models
from vtprune.evals.settings import Setting
from vtprune.evals.untrained import quiet_untrained
from vtprune.loading.media import Media
from vtprune.loading.prompts import place

# Percent of the image's tokens.
KEEPS = (100.0, 75.0, 50.0, 35.0, 25.0, 18.0, 11.0, 7.0, 4.0, 2.0)


@dataclass(frozen=True)
class Point:
    """keep: in percent; text: the answer; own: the geometric mean of the probabilities that the model gave to the
    tokens of its answer; plain: of those of the unpruned model's answer; refused: why there is no answer."""

    keep: float
    text: str = ""
    own: float = math.nan
    plain: float = math.nan
    refused: str = ""


def curve(
    models: Models, name: str, media: Media, text: str, *, setting: Callable[[float], Setting]
) -> Iterator[list[Point]]:
    """The points so far, from all tokens to few; setting: what a keep in percent asks for. A keep that the method
    cannot reach is refused by itself. Raises VTPruneError for what cannot be asked at all."""
    loaded = models[name]
    inputs = encoded(loaded, media, text)
    points: list[Point] = []
    with models.lent(name) as model, quiet_untrained():
        plain = None
        for keep in KEEPS:
            try:
                one = Setting("none") if keep == KEEPS[0] else setting(keep)
                answer = ""
                for part in stream(model, loaded.processor, inputs, one, stopped=models.closing.is_set):
                    answer = part if isinstance(part, str) else part[0].text.strip()
                    yield points
                own = loaded.processor.tokenizer(answer, add_special_tokens=False, return_tensors="pt").input_ids
                plain = own if plain is None else plain
                with vtprune.wrapped(model, one.method_source):
                    points = [
                        *points,
                        Point(keep, answer, _confidence(model, inputs, own), _confidence(model, inputs, plain)),
                    ]
            except VTPruneError as error:
                if keep == KEEPS[0]:
                    raise
                points = [*points, Point(keep, refused=str(error))]
            yield points


@torch.inference_mode()
def _confidence(model: Any, inputs: Any, answer: torch.Tensor) -> float:
    """The geometric mean of the probabilities of an answer's tokens (1, T) after the prompt, as decode steps on its
    cache give them; NaN for an answer of no token."""
    given = place(inputs, model)
    count = answer.shape[1]
    if not count:
        return math.nan
    out = model(**given, use_cache=True, logits_to_keep=1)
    mask, found = given["attention_mask"], []
    for step in range(count):
        token = answer[:, step : step + 1].to(mask.device)
        found.append(out.logits[0, -1].float().log_softmax(dim=-1)[token[0, 0]])
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        if step + 1 < count:
            step_inputs = with_cache(model.forward, {"input_ids": token, "attention_mask": mask}, cache_in(out))
            out = model(**step_inputs, use_cache=True)
    return float(torch.stack(found).mean().exp())
