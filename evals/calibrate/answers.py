"""What a model answers at each level, and how sure it was of the first token; what was answered is not asked again."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import FiniteFloat, TypeAdapter
from transformers import LogitsProcessorList
from typing_extensions import TypedDict

import vtprune
from vtprune.errors import FileError, RunError, first_line
from vtprune.evals.calibrate.asked import Asked
from vtprune.evals.lmms.generation import StopAtText, cut, end_tokens, generate_measured, until_end
from vtprune.evals.lmms.loglikelihood import Forced
from vtprune.files import append_text
from vtprune.hooks.growing import FirstToken
from vtprune.json_files import parse, read_file
from vtprune.loading.prompts import encode_named, place, question
from vtprune.method.pruner import Pruner
from vtprune.method.stages import Growing
from vtprune.pruners.auto.ladder import Table
from vtprune.wrap import methods_of

ANSWERS = "answers.jsonl"
WHAT = "an answer of a calibration"
# By what an answer is compared with the whole model's: all of it, or token by token as the whole model goes on.
LOSSES = ("answer", "tokens")


class Heard(TypedDict):
    """One answer: its text, its tokens, how sure its first one was (1 under a method that grows), what it cost; share:
    of the whole model's tokens those that it would have given, where these were forced on it."""

    key: str
    text: str
    ids: list[int]
    probability: FiniteFloat
    margin: FiniteFloat
    flops: FiniteFloat
    encoder: FiniteFloat
    kv: FiniteFloat
    tokens: int
    share: FiniteFloat


HEARD = TypeAdapter(Heard)


def normalise(text: str) -> str:
    """What is compared of two answers: without case, outer blanks, and the stop at their end."""
    return re.sub(r"\s+", " ", text).strip().strip(".").lower()


class Agreeing(Forced):
    """`Forced`, which also counts in how many places the model would have given the same token."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.hits = self.counts.sum(dim=1) * 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """(rows, V) scores that leave one choice."""
        step = input_ids.shape[1] - self.prompt
        self.hits += (scores.argmax(dim=-1) == self.tokens[:, step]) & self.counts[:, step]
        return super().__call__(input_ids, scores)

    @property
    def shares(self) -> list[float]:
        """Of each row's tokens, the share that it would have given."""
        found: list[float] = (self.hits / self.counts.sum(dim=1)).tolist()
        return found


class Answers:
    """The answers of one model, with the file that they are written down in.

    identity: what every answer depends on beside the setting and the question. Lines that are none, as the last one of
    a killed run, are left out and answered again.
    """

    def __init__(self, model: Any, processor: Any, folder: Path, *, identity: Sequence[Any], batch: int) -> None:
        self.model, self.processor, self.batch = model, processor, batch
        self.path = folder / ANSWERS
        self._identity = identity
        self._known: dict[str, Heard] = {}
        if self.path.exists():
            self._load()

    def _load(self) -> None:
        for number, line in enumerate(read_file(self.path, WHAT).split(b"\n"), 1):
            if line.strip():
                try:
                    found: Heard = parse(HEARD, line, f"{self.path}, line {number}", WHAT)
                except FileError:
                    continue
                self._known[found["key"]] = found
        append_text(self.path, "\n")

    def of(
        self,
        pruner: Pruner | None,
        asked: Sequence[Asked],
        told: Callable[[int], None],
        *,
        forced: Sequence[Heard] | None = None,
    ) -> list[Heard]:
        """The answers to all questions under a method, None for the whole model; forced: the whole model's, which are
        then what is answered, and compared token by token. told: hears how many came."""
        keys = [self._key(pruner, one, forced is not None) for one in asked]
        groups: dict[str, list[int]] = defaultdict(list)
        for at, (key, one) in enumerate(zip(keys, asked, strict=True)):
            if key not in self._known:
                groups[json.dumps([one.generation.stops, one.generation.arguments], sort_keys=True)].append(at)
        told(len(keys) - sum(map(len, groups.values())))
        chosen = vtprune.NoPruning() if pruner is None else pruner
        with vtprune.wrapped(self.model, chosen):
            for places in groups.values():
                for start in range(0, len(places), self.batch):
                    own = places[start : start + self.batch]
                    some = None if forced is None else [forced[at] for at in own]
                    found = self._answer([asked[at] for at in own], [keys[at] for at in own], some)
                    self._known.update({one["key"]: one for one in found})
                    append_text(self.path, "".join(json.dumps(one) + "\n" for one in found))
                    told(len(own))
        return [self._known[key] for key in keys]

    def _key(self, pruner: Pruner | None, asked: Asked, forced: bool) -> str:
        method = None if pruner is None else pruner.to_dict()
        text = json.dumps([self._identity, method, asked.key, forced], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _answer(self, asked: Sequence[Asked], keys: Sequence[str], forced: Sequence[Heard] | None) -> list[Heard]:
        chats = [question(one.sample.media, one.sample.question) for one in asked]

        def refused(at: int | None, reason: str) -> Exception:
            name = "a batch" if at is None else asked[at].sample.name
            return RunError(f"data: the processor refuses {name}: {reason}")

        inputs = place(encode_named(self.processor, chats, refused), self.model)
        length, device = inputs["input_ids"].shape[1], inputs["input_ids"].device
        generation, first = asked[0].generation, FirstToken()
        # A method that grows looks at first tokens itself, and takes no processors of others.
        grows = any(isinstance(one, Growing) for one in methods_of(self.model))
        forcing = None if forced is None else Agreeing([one["ids"] for one in forced], length, device)
        arguments = dict(generation.arguments)
        if forcing is not None:
            arguments["max_new_tokens"] = forcing.tokens.shape[1]
        forced_on = [] if forcing is None else [forcing]
        stopping = [StopAtText(self.processor.tokenizer, generation.stops, length)] if generation.stops else []
        try:
            found = generate_measured(
                self.model,
                self.processor.tokenizer,
                inputs,
                criteria=[] if forcing is not None else stopping,
                **({} if grows else {"logits_processor": LogitsProcessorList([first, *forced_on])}),
                **arguments,
            )
        except vtprune.VTPruneError:
            raise
        except Exception as error:
            raise RunError(f"data: {asked[0].sample.name} and what was asked with it: {first_line(error)}") from error
        report = vtprune.report(self.model)
        shares = [1.0] * len(asked) if forcing is None else forcing.shares
        ends = end_tokens(self.model)
        rows = [row[: until_end(row, ends)] for row in found.rows]
        texts = self.processor.tokenizer.batch_decode(rows, skip_special_tokens=True)
        sure, lead = ([1.0] * len(asked) if one is None else one.tolist() for one in (first.probability, first.margin))
        return [
            Heard(
                key=key,
                text=cut(texts[at], generation.stops),
                ids=rows[at],
                probability=sure[at],
                margin=lead[at],
                flops=report.samples[at].flops,
                encoder=report.samples[at].encoder_flops,
                kv=report.samples[at].kv_bytes_prefill,
                tokens=sum(image.tokens for image in report.samples[at].images),
                share=shares[at],
            )
            for at, key in enumerate(keys)
        ]


def table_of(asked: Sequence[Asked], levels: Sequence[Sequence[Heard]], whole: Sequence[Heard], loss: str) -> Table:
    """What each level did with each question beside the whole model."""
    every = [*levels, whole]

    def column(name: str, of: Sequence[Sequence[Heard]]) -> np.ndarray:
        rows = [[float(one[name]) for one in level] for level in of]  # type: ignore[literal-required]
        return np.array(rows).T

    if loss == "tokens":
        losses = 1 - column("share", levels)
    else:
        wanted = [normalise(one["text"]) for one in whole]
        said = [[normalise(one["text"]) for one in level] for level in levels]
        losses = (np.array(said) != np.array(wanted)).astype(float).T
    places = {picture: at for at, picture in enumerate(dict.fromkeys(one.picture for one in asked))}
    return Table(
        pictures=np.array([places[one.picture] for one in asked]),
        tasks=np.array([one.task for one in asked]),
        losses=losses,
        probability=column("probability", levels),
        margin=column("margin", levels),
        flops=column("flops", every),
        encoder=column("encoder", every),
        kv=column("kv", every),
        tokens=np.array([one["tokens"] for one in whole]),
    )
