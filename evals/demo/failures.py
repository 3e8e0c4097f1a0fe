"""The bundled benchmark's pictures on which a method fails where the unpruned model does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

import vtprune
from vtprune.assets import SHAPES_EVAL
from vtprune.errors import InputError
from vtprune.evals.ask.overlay import draw_kept, side_by_side
from vtprune.evals.demo.asking import LONGEST_ANSWER, STOPS
from vtprune.evals.demo.models import Models
from vtprune.evals.lmms.gen_kwargs import read_generation
from vtprune.evals.lmms.generation import answer_batch
from vtprune.evals.lmms.shapes_task import normalise
from vtprune.evals.settings import Setting
from vtprune.evals.untrained import quiet_untrained
from vtprune.loading.model import default_batch
from vtprune.loading.prompts import encode, question
from vtprune.report.report import ImageReport
from vtprune.shapes.dataset import EvalRow, read_eval_rows

FEWEST, MOST = 10, 300


@dataclass(frozen=True)
class Failure:
    """One question on which the method fails: the row, what was answered, and the picture beside what was kept."""

    row: EvalRow
    said: str
    picture: Image.Image

    @property
    def caption(self) -> str:
        """The question, what is right and what was said."""
        return f"{self.row.question} {self.row.answer}; pruned: {self.said}"


@dataclass(frozen=True)
class Found:
    """How many of the benchmark's questions were asked, how many the unpruned model and the method answered right, and
    the failures among them."""

    asked: int
    of: int
    plain: int
    pruned: int
    failures: tuple[Failure, ...]


def _beside(image: Image.Image, report: ImageReport) -> Image.Image:
    """The picture beside what was kept of it, of one size."""
    kept = draw_kept(image, report)
    return side_by_side([image.resize(kept.size, Image.Resampling.NEAREST), kept])


def failures(models: Models, name: str, setting: Setting, count: int) -> Iterator[Found]:
    """What is found so far, batch by batch, of the first `count` questions; raises InputError for a model that was not
    made for them, or a count out of range."""
    loaded = models[name]
    if not loaded.bundled:
        raise InputError(f"failures: the drawn benchmark is for the bundled models; {name} was not trained on it")
    if not FEWEST <= count <= MOST:
        raise InputError(f"failures: from {FEWEST} to {MOST} questions are asked, not {count}")
    rows = read_eval_rows(SHAPES_EVAL)[:count]
    found = Found(0, len(rows), plain=0, pruned=0, failures=())
    yield found
    with models.lent(name) as model, quiet_untrained():
        size = default_batch(model)
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            images = [row.open_image() for row in batch]
            inputs = encode(
                loaded.processor, [question(i, row.question) for i, row in zip(images, batch, strict=True)]
            )
            answers = []
            for chosen in (Setting("none"), setting):
                with vtprune.wrapped(model, chosen.method_source):
                    generation = read_generation({"until": list(STOPS)}, LONGEST_ANSWER)
                    answers.append(answer_batch(model, loaded.processor.tokenizer, inputs, generation=generation))
                    report = vtprune.report(model)
            right = [
                [normalise(one.text) == normalise(row.answer) for one, row in zip(own, batch, strict=True)]
                for own in answers
            ]
            new = [
                Failure(
                    row,
                    answers[1][place].text.strip(),
                    _beside(images[place], report.samples[place].images[0]),
                )
                for place, row in enumerate(batch)
                if right[0][place] and not right[1][place]
            ]
            found = Found(
                found.asked + len(batch),
                len(rows),
                plain=found.plain + sum(right[0]),
                pruned=found.pruned + sum(right[1]),
                failures=(*found.failures, *new),
            )
            yield found
