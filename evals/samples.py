"""The pictures, videos and questions that a model is looked at with: drawn shapes, or a folder of the user's own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
from PIL import Image
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from vtprune.assets import BUNDLED, folder_of
from vtprune.errors import FileError, InputError, first_line
from vtprune.json_files import parse, read_file
from vtprune.loading.media import Media, read_media
from vtprune.loading.pictures import SUFFIXES as PICTURES
from vtprune.loading.prompts import encode, place
from vtprune.loading.prompts import question as asking
from vtprune.loading.videos import FRAMES, Video
from vtprune.loading.videos import SUFFIXES as VIDEOS
from vtprune.shapes.questions import CATEGORIES, QA, ask
from vtprune.shapes.render import render
from vtprune.shapes.scene import Scene, sample_scene

METADATA = "metadata.jsonl"
DEFAULT_QUESTION = "Describe the image."
# Seed spaces of their own, beside those of training and evaluation: no picture is met in both.
SEARCH_SPACE, CHECK_SPACE = 53, 59


class Captioned(TypedDict):
    """A line of metadata.jsonl."""

    file_name: str
    question: NotRequired[str | None]


CAPTIONED = TypeAdapter(Captioned)


@dataclass(frozen=True)
class Sample:
    """A picture or a video, and a question about it; name: what a message calls it."""

    name: str
    media: Media
    question: str


@dataclass(frozen=True)
class Calibration:
    """What a search measures on, and what it never sees before its end; source: where both came from."""

    search: list[Sample]
    check: list[Sample]
    source: str

    def fingerprint(self) -> str:
        """Identifies every pixel, every frame's time and every question of both sets."""
        digest = hashlib.sha256()
        for samples in (self.search, self.check):
            digest.update(f"{len(samples)};".encode())
            for sample in samples:
                _add(digest, sample)
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Wanted:
    """How many samples to search on and how many to hold out, the seed that they are drawn with, and how many frames
    of each video are taken (None: 16)."""

    search: int
    check: int
    seed: int
    frames: int | None = None


def gather(
    wanted: Wanted,
    *,
    data: Path | None,
    question: str | None,
    model: str | None,
    tell: Callable[[str], None] = lambda text: None,
) -> Calibration:
    """The samples of a folder, or drawn ones for a bundled model; `tell` hears of a folder that holds fewer.

    Raises InputError where options do not go together, and as `read_folder` does.
    """
    if data is not None:
        return read_folder(data, DEFAULT_QUESTION if question is None else question, wanted, tell)
    for option, value in (("question", question), ("frames", wanted.frames)):
        if value is not None:
            raise InputError(f"{option}: --{option} goes with pictures or videos of your own (--data FOLDER)")
    if folder_of(model) not in map(str, BUNDLED.values()):
        raise InputError(
            "data: give a folder of pictures or videos of the kind that the model will see (--data FOLDER)"
        )
    return draw_shapes(wanted)


def _add(digest: Any, sample: Sample) -> None:
    media = sample.media
    if isinstance(media, Video):
        digest.update(f"{media.seconds}{media.fps}{media.total}{sample.question}".encode())
        for frame in media.frames:
            digest.update(f"{frame.size}".encode() + frame.tobytes())
    else:
        digest.update(f"{media.size}{sample.question}".encode() + media.tobytes())


def draw_shapes(wanted: Wanted) -> Calibration:
    """Freshly drawn scenes with one question each, the categories in turn; no answer is used."""
    search = [_drawn(SEARCH_SPACE, wanted.seed, i) for i in range(wanted.search)]
    return Calibration(search, [_drawn(CHECK_SPACE, wanted.seed, i) for i in range(wanted.check)], "drawn shapes")


def _drawn(space: int, seed: int, index: int) -> Sample:
    rng = np.random.default_rng([space, seed, index])
    scene = sample_scene(rng)
    return Sample(f"shapes {index}", Image.fromarray(render(scene)), _ask(scene, rng, index).question)


def _ask(scene: Scene, rng: np.random.Generator, index: int) -> QA:
    """A question of the category whose turn it is, or of the next one that the scene allows."""
    while True:
        for i in range(len(CATEGORIES)):
            found = ask(scene, rng, CATEGORIES[(index + i) % len(CATEGORIES)])
            if found is not None:
                return found


def read_folder(
    folder: Path, question: str, wanted: Wanted, tell: Callable[[str], None] = lambda text: None
) -> Calibration:
    """Up to so many samples to search on, and held-out ones of other pictures and videos.

    metadata.jsonl may give {"file_name": ..., "question": ...} a line, where the name may be that of a folder with the
    frames of a video; `question` goes with those that have none. `tell` hears of a folder that holds fewer than was
    asked for. Raises InputError for a folder without pictures or videos, a metadata line that cannot be read, and a
    file that is missing or broken.
    """
    if not folder.is_dir():
        raise InputError(f"data: {folder} is not a folder")
    count, check = wanted.search, wanted.check
    rows = _listed(folder, question)
    names = list(dict.fromkeys(name for name, _ in rows))
    if not names and (folder / METADATA).is_file():
        raise InputError(f"data: {folder / METADATA} names no picture and no video")
    if not names:
        endings = ", ".join(suffix[1:] for suffix in PICTURES + VIDEOS)
        raise InputError(f"data: no picture and no video in {folder} ({endings})")
    if check and len(names) < 2:
        raise InputError(
            f"data: {folder} holds one picture or video; a held-out check takes a second one, or --check-samples 0"
        )
    rng = np.random.default_rng(wanted.seed)
    mixed = [names[i] for i in rng.permutation(len(names))]
    share = round(len(names) * count / (count + check))
    searched = set(mixed[: min(max(share, 1), len(names) - bool(check))])
    pools: tuple[list[tuple[str, str]], list[tuple[str, str]]] = ([], [])
    for i in rng.permutation(len(rows)):
        pools[rows[i][0] not in searched].append(rows[i])
    chosen = pools[0][:count], pools[1][:check]
    if len(chosen[0]) < count or len(chosen[1]) < check:
        counts = f"{len(chosen[0])} to search on, {len(chosen[1])} held out"
        tell(f"fewer pictures and videos than asked for in {folder}: {counts}")
    frames = FRAMES if wanted.frames is None else wanted.frames
    search, held_out = (
        [Sample(name, read_media(folder / name, "data", frames), text) for name, text in part] for part in chosen
    )
    return Calibration(search, held_out, str(folder))


def batches(model: Any, processor: Any, samples: Sequence[Sample]) -> Iterator[dict[str, Any]]:
    """One sample at a time, on the model's device; raises InputError for one that the processor refuses."""
    for sample in samples:
        try:
            batch = encode(processor, [asking(sample.media, sample.question)])
        except Exception as error:
            raise InputError(f"data: the processor refuses {sample.name}: {first_line(error)}") from error
        yield place(batch, model)


def _listed(folder: Path, question: str) -> list[tuple[str, str]]:
    """Every (file name, question) of the folder, in a fixed order."""
    metadata = folder / METADATA
    if metadata.is_file():
        return [_row(metadata, i, line, question) for i, line in _lines(metadata)]
    paths = (path for path in folder.rglob("*") if path.is_file() and path.suffix.lower() in PICTURES + VIDEOS)
    return sorted((path.relative_to(folder).as_posix(), question) for path in paths)


def _lines(path: Path) -> list[tuple[int, bytes]]:
    try:
        content = read_file(path, "questions about pictures and videos")
    except FileError as error:
        raise InputError(f"data: {error}") from error
    return [(i, line) for i, line in enumerate(content.split(b"\n"), 1) if line.strip()]


def _row(path: Path, number: int, line: bytes, question: str) -> tuple[str, str]:
    try:
        row = parse(CAPTIONED, line, f"{path}, line {number}", '{"file_name": ..., "question": ...}')
    except FileError as error:
        raise InputError(f"data: {error}") from error
    return row["file_name"], row.get("question") or question
