"""The frozen evaluation set: balanced answers, disjoint from training, one parquet file."""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vtprune.files import write_with
from vtprune.loading.pictures import open_picture
from vtprune.shapes.questions import CATEGORIES, FORMS, QA
from vtprune.shapes.render import render
from vtprune.shapes.scene import Scene, make_scene, scene_rng

MAX_PER_IMAGE = 3


@dataclass(frozen=True)
class EvalRow:
    """One evaluation question; `image` holds PNG bytes, `scene` the layout as JSON."""

    id: str
    image: bytes
    question: str
    answer: str
    category: str
    form: str
    scene: str

    def open_image(self) -> Image.Image:
        """The picture, RGB 96x96."""
        return open_picture(self.image, f"the picture of {self.id}")


def png_bytes(scene: Scene) -> bytes:
    """The rendered scene as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(render(scene)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def quotas(per_category: int) -> dict[tuple[str, str], int]:
    """How many questions each (form, answer) gets, the same for every answer of a form to within one."""
    table: dict[tuple[str, str], int] = {}
    for forms in FORMS.values():
        sizes = [round(per_category * form.share) for form in forms.values()]
        sizes[0] += per_category - sum(sizes)
        for (name, form), size in zip(forms.items(), sizes, strict=True):
            each, rest = divmod(size, len(form.answers))
            for i, answer in enumerate(form.answers):
                table[name, answer] = each + (i < rest)
    return table


def _fill(per_category: int, seed: int) -> list[tuple[int, QA]]:
    """Walk through evaluation scenes and take the questions whose quota is still open: (scene index, QA)."""
    open_quota = quotas(per_category)
    remaining = sum(open_quota.values())
    rows: list[tuple[int, QA]] = []
    index = 0
    while remaining:
        scene, rng = make_scene("eval", seed, index), scene_rng("eval", seed, index, stream=1)
        forms = [form for group in FORMS.values() for form in group.values()]
        wanted = (forms[i].make(scene, rng) for i in rng.permutation(len(forms)))
        taken = 0
        for qa in wanted:
            if qa is not None and taken < MAX_PER_IMAGE and open_quota[qa.form, qa.answer]:
                open_quota[qa.form, qa.answer] -= 1
                rows.append((index, qa))
                taken += 1
        remaining -= taken
        index += 1
    return rows


def _interleave(rows: list[tuple[int, QA]], rng: np.random.Generator) -> list[tuple[int, QA]]:
    """Shuffle so that every run of one row per category is balanced: so is any prefix, to within one."""
    groups: dict[str, list[tuple[int, QA]]] = defaultdict(list)
    for i in rng.permutation(len(rows)):
        groups[rows[i][1].category].append(rows[i])
    rounds = zip(*(groups[category] for category in CATEGORIES), strict=True)
    return [group[i] for group in rounds for i in rng.permutation(len(group))]


def build_eval_rows(per_category: int = 300, seed: int = 0) -> list[EvalRow]:
    """Generate the evaluation questions in their fixed order."""
    rows = _interleave(_fill(per_category, seed), scene_rng("eval", seed, 0, stream=2))
    scenes = {index: make_scene("eval", seed, index) for index, _ in rows}
    images = {index: png_bytes(scene) for index, scene in scenes.items()}
    return [
        EvalRow(f"shapes-{i:05d}", images[s], scene=scenes[s].to_json(), **vars(qa)) for i, (s, qa) in enumerate(rows)
    ]


def overlap_with_training(per_category: int, eval_seed: int, train_seed: int, train_scenes: int) -> int:
    """How many evaluation scenes have the layout or the exact pixels of one of the training scenes."""
    indices = {index for index, _ in _fill(per_category, eval_seed)}
    scenes = [make_scene("eval", eval_seed, index) for index in indices]
    keys, textures = {s.key() for s in scenes}, {s.texture for s in scenes}
    train = (make_scene("train", train_seed, index) for index in range(train_scenes))
    # Equal pixels need an equal texture seed, so only those few are drawn to be compared.
    pixels = {render(s).tobytes() for s in scenes}
    return sum(s.key() in keys or (s.texture in textures and render(s).tobytes() in pixels) for s in train)


def write_eval_rows(rows: list[EvalRow], path: Path) -> None:
    """Write the parquet file; `image` has the layout and the schema metadata of `datasets.Image`.

    Raises WriteError.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features, Image, Value

    names = ("id", "question", "answer", "category", "form", "scene")
    features = Features({"id": Value("string"), "image": Image(), **{name: Value("string") for name in names[1:]}})
    columns = {name: [getattr(row, name) for row in rows] for name in names}
    images = [{"bytes": row.image, "path": None} for row in rows]
    table = pa.table({"id": columns["id"], "image": images, **columns}, schema=features.arrow_schema)
    # A dictionary that holds every distinct image: two or three rows share one.
    write_with(path, lambda part: pq.write_table(table, part, compression="zstd", dictionary_pagesize_limit=1 << 26))


def read_eval_rows(path: Path) -> list[EvalRow]:
    """Read the parquet file back, in its fixed order."""
    import pyarrow.parquet as pq

    table = pq.read_table(path).to_pylist()
    return [EvalRow(**{**row, "image": row["image"]["bytes"]}) for row in table]


def blind_baseline(rows: Iterable[EvalRow]) -> dict[str, float]:
    """Accuracy per category of the best answer to each question form, without looking at the image."""
    answers: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for row in rows:
        answers[row.category][row.form][row.answer] += 1
    return {
        category: sum(max(counter.values()) for counter in forms.values())
        / sum(counter.total() for counter in forms.values())
        for category, forms in answers.items()
    }
