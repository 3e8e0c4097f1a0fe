"""Conversations in the format of LLaVA's training sets: JSON or JSON lines, and a folder of images and videos."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from vtprune.errors import FileError, InputError, PictureError, SampleError, VideoError
from vtprune.json_files import read_file
from vtprune.loading.pictures import open_picture
from vtprune.loading.videos import FRAMES, open_video
from vtprune.training.conversations import Conversation

PLACEHOLDERS = {"image": "<image>", "video": "<video>"}
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
SHOWN = 5
READERS = 8
WHAT = "conversations as JSON or JSON lines"


@dataclass(frozen=True)
class Record:
    """One conversation as the file has it: image and video paths as written, and messages for a chat template."""

    name: str
    images: tuple[str, ...]
    videos: tuple[str, ...]
    messages: tuple[dict[str, Any], ...]

    @property
    def files(self) -> tuple[str, ...]:
        """The paths of all that it shows."""
        return self.images + self.videos


class LlavaData:
    """Conversations about pictures and videos, read from `path`; image and video paths start from `images`.

    Every picture and video is opened once before anything else happens. `skip_missing` leaves out the records whose
    files are missing or broken (`skipped` of them, which `tell` hears); without it, they are an error. frames: of each
    video, at the most. Raises InputError, naming file and record, for what cannot be read, and for a file without any
    picture or video.
    """

    def __init__(
        self,
        path: Path,
        images: Path | None = None,
        *,
        skip_missing: bool = False,
        frames: int = FRAMES,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.path, self.folder, self.frames = path, path.parent if images is None else images, frames
        text = _read(path)
        self._digest = sha256(text.encode()).hexdigest()[:16]
        self.records = [_record(path, number, row) for number, row in enumerate(_rows(path, text))]
        if not any(record.files for record in self.records):
            raise InputError(
                f"data: no record of {path} has an image or a video; training a vision-language model takes some"
            )
        broken = _broken(self.folder, self.records)
        self.skipped = sum(any(name in broken for name in record.files) for record in self.records)
        if broken:
            self._leave_out(broken, skip_missing, tell)

    def _leave_out(self, broken: dict[str, str], skip: bool, tell: Callable[[str], None]) -> None:
        first = "; ".join(f"{name} ({why})" for name, why in list(broken.items())[:SHOWN])
        more = f"; and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
        files = "files" if self.videos else "images"
        text = f"{len(broken)} {files} are missing or broken in {self.folder}: {first}{more}"
        if not skip:
            raise InputError(f"data: {text}. --skip-missing leaves out the {self.skipped} records that need them")
        self.records = [one for one in self.records if not any(name in broken for name in one.files)]
        if not any(record.files for record in self.records):
            raise InputError(f"data: {text}. No record with an image or a video is left")
        tell(f"{text}. {self.skipped} records were left out, {len(self.records)} are left")

    @property
    def size(self) -> int:
        """How many conversations there are."""
        return len(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Conversation:
        """One of them; raises SampleError for a picture or a video that has gone since the scan."""
        record = self.records[index]
        try:
            images = tuple(open_picture(self.folder / name) for name in record.images)
            videos = tuple(open_video(self.folder / name, self.frames) for name in record.videos)
        except (PictureError, VideoError) as error:
            raise SampleError(f"{record.name}: {error}") from error
        return Conversation(images, record.messages, record.name, videos)

    @property
    def videos(self) -> bool:
        """Whether there are videos."""
        return any(record.videos for record in self.records)

    def texts(self) -> Iterator[tuple[str, str]]:
        """Each record's name, and a text of it."""
        for record in self.records:
            for message in record.messages:
                yield from ((record.name, part["text"]) for part in message["content"] if part["type"] == "text")

    def identity(self) -> dict[str, Any]:
        """What makes two of these the same."""
        same = {"data": str(self.path), "images": str(self.folder), "data_file": self._digest, "records": self.size}
        return {**same, "frames": self.frames} if self.videos else same


def _read(path: Path) -> str:
    try:
        return read_file(path, WHAT).decode()
    except (FileError, UnicodeDecodeError) as error:
        raise InputError(f"data: cannot read {path}: {error}") from error


def _rows(path: Path, text: str) -> list[Any]:
    """The records of JSON (a list) or of JSON lines; raises InputError that names the line."""
    place = str(path)
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = []
            for number, line in enumerate(text.split("\n"), 1):
                place = f"{path}, line {number}"
                rows += [json.loads(line)] if line.strip() else []
    except (ValueError, RecursionError) as error:
        raise InputError(f"data: {place} is neither a JSON list nor JSON lines (cut short?): {error}") from error
    if not rows:
        raise InputError(f"data: {path} holds no record")
    return list(rows)


def _record(path: Path, number: int, row: Any) -> Record:
    """One record; raises InputError that names it."""
    name = f"{path}, record {number}"
    if not isinstance(row, dict):
        raise InputError(f'data: {name}: a record is {{"image": …, "conversations": […]}}, got {str(row)[:80]!r}')
    if "id" in row:
        name = f"{name} (id {row['id']})"
    shown = {kind: _paths(name, kind, row.get(kind)) for kind in PLACEHOLDERS}
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        raise InputError(f"data: {name}: conversations is a list of turns, human and gpt in turn, gpt last")
    marks = _marks(shown, turns)
    messages = tuple(_message(name, turn, at, marks) for at, turn in enumerate(turns))
    parts = [part["type"] for message in messages for part in message["content"]]
    for mark, kind in marks.items():
        if parts.count(kind) != len(shown[kind]):
            raise InputError(f"data: {name}: {parts.count(kind)} {mark} in its text, but {len(shown[kind])} {kind}s")
    return Record(name, shown["image"], shown["video"], messages)


def _paths(name: str, kind: str, given: Any) -> tuple[str, ...]:
    """The paths that a record gives under "image" or "video"."""
    paths = [given] if isinstance(given, str) and given else given or []
    if not (isinstance(paths, list) and all(isinstance(one, str) for one in paths)):
        raise InputError(f"data: {name}: {kind} is a path or a list of paths, got {paths!r}")
    return tuple(paths)


def _marks(shown: dict[str, tuple[str, ...]], turns: list[Any]) -> dict[str, str]:
    """What stands for what in a record's text. A video's place is often written as that of an image, and a text
    without a video may hold its mark as a word."""
    image, video = PLACEHOLDERS.values()
    if not shown["video"]:
        return {image: "image"}
    written = any(isinstance(turn, dict) and video in str(turn.get("value")) for turn in turns)
    return {image: "image", video: "video"} if written or shown["image"] else {image: "video"}


def _message(name: str, turn: Any, at: int, marks: dict[str, str]) -> dict[str, Any]:
    """A turn for a chat template: its text, and an image or a video wherever its mark stands."""
    wanted = ("user", "assistant")[at % 2]
    text = turn.get("value") if isinstance(turn, dict) else None
    if not isinstance(text, str) or not _is_unicode(text) or ROLES.get(str(turn.get("from"))) != wanted:
        raise InputError(
            f'data: {name}: turn {at} should be {{"from": "{("human", "gpt")[at % 2]}", "value": text}}, '
            f"got {str(turn)[:80]!r}"
        )
    if wanted == "assistant" and (any(mark in text for mark in marks) or not text.strip()):
        raise InputError(f"data: {name}: turn {at} is an answer, and answers are text without {' or '.join(marks)}")
    content: list[dict[str, str]] = []
    for part in re.split(f"({'|'.join(marks)})", text):
        if part in marks:
            content.append({"type": marks[part]})
        elif part.strip():
            content.append({"type": "text", "text": part.strip()})
    return {"role": wanted, "content": content}


def _is_unicode(text: str) -> bool:
    """Whether a tokenizer can take a text: JSON can hold halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _broken(folder: Path, records: list[Record]) -> dict[str, str]:
    """The pictures and videos that cannot be read, and why."""
    names = list(dict.fromkeys(name for record in records for name in record.files))
    videos = {name for record in records for name in record.videos}
    with ThreadPoolExecutor(READERS) as readers:
        reasons = list(readers.map(lambda name: _trouble(folder, name, video=name in videos), names))
    return {name: reason for name, reason in zip(names, reasons, strict=True) if reason}


def _trouble(folder: Path, name: str, *, video: bool) -> str:
    try:
        if video:
            open_video(folder / name, 1, name="it")
        else:
            open_picture(folder / name, "it")
    except (PictureError, VideoError) as error:
        return "not there" if isinstance(error.__cause__, FileNotFoundError) else str(error)
    return ""
