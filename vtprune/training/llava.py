"""Conversations in the format of LLaVA's training sets: JSON or JSON lines, and a folder of images."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from vtprune.errors import FileError, InputError, PictureError, SampleError
from vtprune.json_files import read_file
from vtprune.loading.pictures import open_picture
from vtprune.training.conversations import Conversation

PLACEHOLDER = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
SHOWN = 5
READERS = 8
WHAT = "conversations as JSON or JSON lines"


@dataclass(frozen=True)
class Record:
    """One conversation as the file has it: image paths as written, and messages for a chat template."""

    name: str
    images: tuple[str, ...]
    messages: tuple[dict[str, Any], ...]


class LlavaData:
    """Conversations about pictures, read from `path`; image paths start from `images`.

    Every picture is opened once before anything else happens. `skip_missing` leaves out the records whose pictures are
    missing or broken (`skipped` of them, which `tell` hears); without it, they are an error. Raises InputError, naming
    file and record, for what cannot be read, and for a file without any picture.
    """

    def __init__(
        self,
        path: Path,
        images: Path | None = None,
        *,
        skip_missing: bool = False,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.path, self.folder = path, path.parent if images is None else images
        text = _read(path)
        self._digest = sha256(text.encode()).hexdigest()[:16]
        self.records = [_record(path, number, row) for number, row in enumerate(_rows(path, text))]
        if not any(record.images for record in self.records):
            raise InputError(f"data: no record of {path} has an image; training a vision-language model takes some")
        broken = _broken(self.folder, self.records)
        self.skipped = sum(any(name in broken for name in record.images) for record in self.records)
        if broken:
            self._leave_out(broken, skip_missing, tell)

    def _leave_out(self, broken: dict[str, str], skip: bool, tell: Callable[[str], None]) -> None:
        first = "; ".join(f"{name} ({why})" for name, why in list(broken.items())[:SHOWN])
        more = f"; and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
        text = f"{len(broken)} images are missing or broken in {self.folder}: {first}{more}"
        if not skip:
            raise InputError(f"data: {text}. --skip-missing leaves out the {self.skipped} records that need them")
        self.records = [one for one in self.records if not any(name in broken for name in one.images)]
        if not any(record.images for record in self.records):
            raise InputError(f"data: {text}. No record with an image is left")
        tell(f"{text}. {self.skipped} records were left out, {len(self.records)} are left")

    @property
    def size(self) -> int:
        """How many conversations there are."""
        return len(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Conversation:
        """One of them; raises SampleError for a picture that has gone since the scan."""
        record = self.records[index]
        try:
            images = tuple(open_picture(self.folder / name) for name in record.images)
        except PictureError as error:
            raise SampleError(f"{record.name}: {error}") from error
        return Conversation(images, record.messages, record.name)

    def texts(self) -> Iterator[tuple[str, str]]:
        """Each record's name, and a text of it."""
        for record in self.records:
            for message in record.messages:
                yield from ((record.name, part["text"]) for part in message["content"] if part["type"] == "text")

    def identity(self) -> dict[str, Any]:
        """What makes two of these the same."""
        return {"data": str(self.path), "images": str(self.folder), "data_file": self._digest, "records": self.size}


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
    images, turns = row.get("image") or [], row.get("conversations")
    images = [images] if isinstance(images, str) else images
    if not (isinstance(images, list) and all(isinstance(one, str) for one in images)):
        raise InputError(f"data: {name}: image is a path or a list of paths, got {images!r}")
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        raise InputError(f"data: {name}: conversations is a list of turns, human and gpt in turn, gpt last")
    messages = tuple(_message(name, turn, at) for at, turn in enumerate(turns))
    marks = sum(part["type"] == "image" for message in messages for part in message["content"])
    if marks != len(images):
        raise InputError(f"data: {name}: {marks} {PLACEHOLDER} in its text, but {len(images)} images")
    return Record(name, tuple(images), messages)


def _message(name: str, turn: Any, at: int) -> dict[str, Any]:
    """A turn for a chat template: its text, and an image wherever the placeholder stands."""
    wanted = ("user", "assistant")[at % 2]
    text = turn.get("value") if isinstance(turn, dict) else None
    if not isinstance(text, str) or not _is_unicode(text) or ROLES.get(str(turn.get("from"))) != wanted:
        raise InputError(
            f'data: {name}: turn {at} should be {{"from": "{("human", "gpt")[at % 2]}", "value": text}}, '
            f"got {str(turn)[:80]!r}"
        )
    if wanted == "assistant" and (PLACEHOLDER in text or not text.strip()):
        raise InputError(f"data: {name}: turn {at} is an answer, and answers are text without {PLACEHOLDER}")
    content: list[dict[str, str]] = []
    for place, part in enumerate(text.split(PLACEHOLDER)):
        content += [{"type": "image"}] if place else []
        content += [{"type": "text", "text": part.strip()}] if part.strip() else []
    return {"role": wanted, "content": content}


def _is_unicode(text: str) -> bool:
    """Whether a tokenizer can take a text: JSON can hold halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _broken(folder: Path, records: list[Record]) -> dict[str, str]:
    """The pictures that cannot be read, and why."""
    names = list(dict.fromkeys(name for record in records for name in record.images))
    with ThreadPoolExecutor(READERS) as readers:
        reasons = list(readers.map(partial(_trouble, folder), names))
    return {name: reason for name, reason in zip(names, reasons, strict=True) if reason}


def _trouble(folder: Path, name: str) -> str:
    try:
        open_picture(folder / name, "it")
    except PictureError as error:
        return "not there" if isinstance(error.__cause__, FileNotFoundError) else str(error)
    return ""
