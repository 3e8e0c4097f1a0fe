"""The second frozen set: where things are, long answers, four forms of one question, two pictures, and clips.

Each part is a set of its own, apart from the first 1,500 questions (`dataset.py`), which stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vtprune.files import write_with
from vtprune.shapes.clips import CLIP_FORMS, sample_clip
from vtprune.shapes.dataset import png_bytes
from vtprune.shapes.describing import ask_description, description_score
from vtprune.shapes.forms import FACTS, FORMS_OF_ONE, ask_fact, draw_fact, says_fact
from vtprune.shapes.grounding import STEPS, ask_box, ask_point, is_right_box
from vtprune.shapes.pairs import PAIR_FORMS
from vtprune.shapes.questions import QA, normalise, pick
from vtprune.shapes.scene import SIZE, SPLITS, Scene, sample_scene

# The pictures of this set are drawn apart from those of the first one.
STREAM = 5
# Half of the pictures have the usual size, the others one of these, in pixels.
OTHER_SIZES = ((64, 96), (96, 64), (128, 96), (96, 128), (128, 128))
PAIR_SIZES = ((64, 64), (96, 64), (64, 96), (96, 96))


@dataclass(frozen=True)
class MoreRow:
    """One question; `media` holds PNG bytes of a picture, of two, or of a clip's frames; `scenes` the layouts as JSON.

    category: the form of the question; form: of the four forms of one question what it is about, else the same;
    fact: what those four have in common, "" elsewhere.
    """

    id: str
    media: list[bytes]
    question: str
    answer: str
    category: str
    form: str
    fact: str
    scenes: list[str]


def more_vocabulary() -> list[str]:
    """Every word that these questions and answers are written in, beside those of the first set."""
    templates = """find what at describe or in picture has more first second which way does move moves that
        become start end up down seconds"""
    return sorted({*templates.split(), *map(str, range(STEPS + 1))})


def score_more(category: str, form: str, *, answer: str, truth: str) -> float:
    """How right an answer is, from 0 to 1: F1 of a description, else 1.0 or 0.0."""
    if category == "describe":
        return description_score(answer, truth)
    if category == "box":
        return float(is_right_box(answer, truth))
    if category == "describe_one":
        return float(says_fact(answer, truth, form))
    return float(normalise(answer) == normalise(truth))


def _rng(part: str, seed: int, index: int) -> np.random.Generator:
    return np.random.default_rng([SPLITS["eval"], seed, index, STREAM, list(PARTS).index(part)])


def _picture(rng: np.random.Generator, index: int) -> Scene:
    return sample_scene(rng, *((SIZE, SIZE) if index % 2 == 0 else pick(rng, OTHER_SIZES)))


Asked = tuple[list[Scene], QA, str]


def _grounding(seed: int) -> Iterator[Asked]:
    """100 boxes and 100 places, both about one picture."""
    index = found = 0
    while found < 100:
        rng = _rng("grounding", seed, index)
        scene = _picture(rng, index)
        box, point = ask_box(scene, rng), ask_point(scene, rng)
        index += 1
        if box is not None:
            found += 1
            yield [scene], box, ""
            yield [scene], point, ""


def _descriptions(seed: int) -> Iterator[Asked]:
    """100 pictures of three things at least."""
    index = found = 0
    while found < 100:
        rng = _rng("descriptions", seed, index)
        scene = _picture(rng, index)
        index += 1
        if len(scene.things) >= 3:
            found += 1
            yield [scene], ask_description(scene), ""


def _forms(seed: int) -> Iterator[Asked]:
    """Four forms of 25 facts of each kind; of the yes-or-no ones every other one is true."""
    index = found = 0
    while found < 100:
        rng = _rng("forms", seed, index)
        scene, kind = sample_scene(rng), list(FACTS)[found % len(FACTS)]
        fact = draw_fact(scene, rng, kind)
        index += 1
        if fact is None:
            continue
        wanted = "yes" if found // len(FACTS) % 2 else "no"
        for form in FORMS_OF_ONE:
            qa = ask_fact(fact, form, rng)
            while form == "yes_no" and qa.answer != wanted:
                qa = ask_fact(fact, form, rng)
            yield [scene], qa, f"fact-{found:03d}"
        found += 1


def _balanced(
    part: str, seed: int, each: int, *, draw: Callable[[np.random.Generator], tuple[Any, list[Scene]]], forms: Any
) -> Iterator[Asked]:
    """`each` questions of every form, its answers as often as one another to within one, one question a draw."""
    quota = {
        (name, answer): each // len(answers) + (i < each % len(answers))
        for name, (_, answers) in forms.items()
        for i, answer in enumerate(answers)
    }
    index = 0
    while any(quota.values()):
        rng = _rng(part, seed, index)
        shown, scenes = draw(rng)
        index += 1
        for name in rng.permutation(list(forms)):
            qa = forms[name][0](shown, rng)
            if qa is not None and quota[qa.form, qa.answer]:
                quota[qa.form, qa.answer] -= 1
                yield scenes, qa, ""
                break


def _pair(rng: np.random.Generator) -> tuple[Any, list[Scene]]:
    pair = (sample_scene(rng, *pick(rng, PAIR_SIZES)), sample_scene(rng, *pick(rng, PAIR_SIZES)))
    return pair, list(pair)


def _clip(rng: np.random.Generator) -> tuple[Any, list[Scene]]:
    clip = sample_clip(rng)
    return clip, list(clip.frames)


# By part: what the set is called, and how its questions are drawn.
PARTS: dict[str, Callable[[int], Iterator[Asked]]] = {
    "grounding": _grounding,
    "descriptions": _descriptions,
    "forms": _forms,
    "pairs": lambda seed: _balanced("pairs", seed, 50, draw=_pair, forms=PAIR_FORMS),
    "clips": lambda seed: _balanced("clips", seed, 40, draw=_clip, forms=CLIP_FORMS),
}


def build_more_rows(part: str, seed: int = 0) -> list[MoreRow]:
    """The questions of one part in their fixed order, in which any first few of them are of every form."""
    asked = list(PARTS[part](seed))
    mixed = np.random.default_rng([SPLITS["eval"], seed, STREAM]).permutation(len(asked))
    return [
        MoreRow(
            id=f"{part}-{number:04d}",
            media=[png_bytes(scene) for scene in scenes],
            question=qa.question,
            answer=qa.answer,
            category=qa.category if fact else qa.form,
            form=qa.form,
            fact=fact,
            scenes=[scene.to_json() for scene in scenes],
        )
        for number, (scenes, qa, fact) in enumerate(asked[i] for i in mixed)
    ]


def write_more_rows(rows: list[MoreRow], path: Path) -> None:
    """Write one part as parquet; `media` has the layout and the metadata of a list of `datasets.Image`.

    Raises WriteError.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features, Image, List, Value

    texts = ("id", "question", "answer", "category", "form", "fact")
    kinds = {**{name: Value("string") for name in texts}, "media": List(Image()), "scenes": List(Value("string"))}
    columns: dict[str, Any] = {name: [getattr(row, name) for row in rows] for name in texts}
    columns["media"] = [[{"bytes": png, "path": None} for png in row.media] for row in rows]
    columns["scenes"] = [row.scenes for row in rows]
    table = pa.table(columns, schema=Features(kinds).arrow_schema)
    # A dictionary that holds every distinct picture: several rows share one.
    write_with(path, lambda part: pq.write_table(table, part, compression="zstd", dictionary_pagesize_limit=1 << 26))


def read_more_rows(path: Path) -> list[MoreRow]:
    """Read one part back, in its fixed order."""
    import pyarrow.parquet as pq

    table = pq.read_table(path).to_pylist()
    return [MoreRow(**{**row, "media": [one["bytes"] for one in row["media"]]}) for row in table]
