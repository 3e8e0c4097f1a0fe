"""What a calibration asks: drawn questions, a folder's, or those of lmms-eval's tasks; no answers are used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vtprune.errors import InputError
from vtprune.evals.bench.suite import LIKELIHOODS, open_suite
from vtprune.evals.lmms.gen_kwargs import Generation, read_generation
from vtprune.evals.samples import Sample, Wanted, gather
from vtprune.loading.pictures import open_picture, whole_images
from vtprune.loading.videos import Video

STOPS = ("\n\n",)
MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Asked:
    """A question about a picture or a video; picture: identifies what it shows; task: "" outside of tasks."""

    sample: Sample
    picture: str
    generation: Generation
    task: str = ""

    @property
    def key(self) -> str:
        """Identifies what is asked, and how it is answered."""
        options = [self.generation.stops, self.generation.arguments]
        text = json.dumps([self.picture, self.sample.question, options], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Split:
    """What settings are chosen on, and what vouches for one: no picture is in both; source: where they come from."""

    tuning: list[Asked]
    calibration: list[Asked]
    source: str


@dataclass(frozen=True)
class Source:
    """Where questions come from. data: a folder, names of tasks, or None for drawn shapes; parquet: a folder with
    TASK.parquet for tasks whose data cannot be fetched."""

    data: str | None = None
    question: str | None = None
    model: str | None = None
    frames: int | None = None
    max_new_tokens: int | None = None
    tasks_from: Path | None = None
    include_path: Path | None = None
    generation: Generation = field(init=False)

    def __post_init__(self) -> None:
        longest = MAX_NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens
        object.__setattr__(self, "generation", read_generation({"until": list(STOPS)}, longest))

    def split(self, tuning: int, calibration: int, seed: int, tell: Callable[[str], None]) -> Split:
        """So many questions of each kind, or what there is; raises InputError where there is nothing."""
        if self.data is None or Path(self.data).is_dir():
            return self._of_samples(Wanted(tuning, calibration, seed, self.frames), tell)
        for name, value in (("question", self.question), ("frames", self.frames)):
            if value is not None:
                raise InputError(f"{name}: --{name} goes with pictures or videos of your own (--data FOLDER)")
        names = [name.strip() for name in self.data.split(",") if name.strip()]
        return _dealt(list(self._of_suite(names)), tuning, calibration, seed=seed, source=self.data)

    def _of_samples(self, wanted: Wanted, tell: Callable[[str], None]) -> Split:
        folder = None if self.data is None else Path(self.data)
        found = gather(wanted, data=folder, question=self.question, model=self.model, tell=tell)
        search, check = (
            [Asked(one, _picture(one.media), self.generation) for one in part] for part in (found.search, found.check)
        )
        # A picture that lies in a folder twice would stand on both sides.
        seen = {one.picture for one in search}
        return Split(search, [one for one in check if one.picture not in seen], found.source)

    def _of_suite(self, names: Sequence[str]) -> Iterator[Asked]:
        with open_suite(names, None, 0, self.include_path, data=self.tasks_from) as suite:
            if suite.simple:
                raise InputError(f"data: {self.data} asks how likely given answers are, and answers are compared here")
            for name in names:
                task = suite.manager.load_task_or_group([name], "chat").get(name)
                if not hasattr(task, "OUTPUT_TYPE") or task.OUTPUT_TYPE in LIKELIHOODS:
                    raise InputError(f"data: {name} is a group of tasks; name the tasks themselves")
                yield from self._of_task(name, task)

    def _of_task(self, name: str, task: Any) -> Iterator[Asked]:
        options = dict(task.config.generation_kwargs or {})
        if self.max_new_tokens is not None:
            options["max_new_tokens"] = self.max_new_tokens
        generation = read_generation(options, MAX_NEW_TOKENS)
        docs = task.test_docs() if task.has_test_docs() else task.validation_docs()
        for place, doc in enumerate(docs):
            with whole_images():
                shown = task.doc_to_visual(doc)
                if len(shown) != 1 or not isinstance(shown[0], Image.Image):
                    raise InputError(f"data: questions of {name} show other things than one picture")
                picture = open_picture(shown[0])
            sample = Sample(f"{name} {place}", picture, task.doc_to_text(doc))
            yield Asked(sample, _picture(picture), generation, name)


def _dealt(asked: list[Asked], tuning: int, calibration: int, *, seed: int, source: str) -> Split:
    """Pictures are dealt to both sides, the share of each as was asked for."""
    rng = np.random.default_rng(seed)
    pictures = list(dict.fromkeys(one.picture for one in asked))
    mixed = [pictures[place] for place in rng.permutation(len(pictures))]
    searched = set(mixed[: max(1, round(len(mixed) * tuning / (tuning + calibration)))])
    order = [asked[place] for place in rng.permutation(len(asked))]
    sides = [one for one in order if one.picture in searched], [one for one in order if one.picture not in searched]
    return Split(sides[0][:tuning], sides[1][:calibration], source)


def _picture(media: Any) -> str:
    digest = hashlib.sha256()
    if isinstance(media, Video):
        digest.update(f"{media.seconds}{media.fps}{media.total}".encode())
        for frame in media.frames:
            digest.update(f"{frame.size}".encode() + frame.tobytes())
    else:
        digest.update(f"{media.size}{media.mode}".encode() + media.tobytes())
    return digest.hexdigest()[:24]
