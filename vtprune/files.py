"""The one way in which files are written, whole or not at all, into a folder that one run at a time holds, and what
tells that folder from another run's."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from vtprune.errors import BusyError, FileError, VTPruneError, WriteError

PART, DRAFT, LOCK = ".vtprune-*.part", ".vtprune-*.draft", ".vtprune.lock"
# Seconds that a run waits for another one to let go of a folder: enough for one that is just ending.
PATIENCE, POLL = 0.2, 0.05

_own = threading.Lock()
_held: set[str] = set()


def _beside(path: Path, pattern: str) -> Path:
    return path.with_name(pattern.replace("*", secrets.token_hex(4)))


def _flush(path: Path) -> None:
    """Has the system write a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_names(folder: Path) -> None:
    # Not every system can do that to a folder; the files themselves are on the disk by then.
    with suppress(OSError):
        _flush(folder)


def write_with(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Has `write` make a file beside `path`, and moves it there in one step once it is on the disk.

    Makes the folder if it is absent, and follows a link to the file that it stands for. Raises WriteError where that
    does not work; what stood there before is then unchanged.
    """
    target = Path(os.path.realpath(path))
    part = _beside(target, PART)
    try:
        if target.exists() and not target.is_file():
            raise WriteError(f"cannot write {path}: it is a folder or a device")
        target.parent.mkdir(parents=True, exist_ok=True)
        part.touch(exist_ok=False)
        mode = stat.S_IMODE(part.stat().st_mode)
        write(part)
        # Some writers make files that nobody else may read.
        os.chmod(part, mode)
        _flush(part)
        os.replace(part, target)
        _flush_names(target.parent)
    except (OSError, SafetensorError) as error:
        raise WriteError(f"cannot write {path}: {_reason(error)}; what stood there before is unchanged") from error
    finally:
        with suppress(OSError):
            part.unlink()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Replaces a file's content; raises WriteError."""
    write_with(path, lambda part: part.write_bytes(data))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replaces a file's content, as UTF-8; raises WriteError."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike[str], data: Any) -> None:
    """Replaces a file's content with indented JSON; raises WriteError."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Any], metadata: dict[str, str] | None = None
) -> None:
    """Replaces a safetensors file; raises WriteError."""
    from safetensors.torch import save_file

    write_with(path, lambda part: save_file(dict(tensors), part, metadata=metadata))


def read_tensors(path: Path, what: str, hint: str = "") -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors and the metadata of a safetensors file; raises FileError, which says what it should be and what to
    do, for one that is missing or cut short."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise FileError(f"{path} is not {what}: {error}{hint}") from error


def append_text(path: str | os.PathLike[str], text: str) -> None:
    """Adds lines to the end of a file, all or none of them; raises WriteError."""
    try:
        with open(path, "ab") as file:
            end = file.tell()
            try:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    os.truncate(path, end)
                raise
    except OSError as error:
        raise WriteError(f"cannot add to {path}: {_reason(error)}") from error


def write_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Has `write` fill a draft folder, and moves its files and folders into `folder` once all of them are whole.

    For what writes many files by itself, such as `save_pretrained`. Raises WriteError.
    """
    draft = _beside(folder / DRAFT, DRAFT)
    try:
        draft.mkdir(parents=True)
        mode = stat.S_IMODE(draft.stat().st_mode)
        write(draft)
        for path in sorted(draft.iterdir()):
            _settle(path, folder / path.name, mode)
        _flush_names(folder)
    except Exception as error:
        # What is called has exceptions of its own for a full disk.
        raise WriteError(f"cannot write to {folder}: {_reason(error)}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _settle(path: Path, target: Path, mode: int) -> None:
    if path.is_dir():
        target.mkdir(mode, exist_ok=True)
        for inner in sorted(path.iterdir()):
            _settle(inner, target / inner.name, mode)
    else:
        os.chmod(path, mode & 0o666)
        _flush(path)
        os.replace(path, target)


def _unused(path: Path) -> Path:
    """The path, with a number behind its stem where there is something already."""
    target, count = path, 1
    while target.exists():
        count += 1
        target = path.with_name(f"{path.stem}-{count}{path.suffix}")
    return target


def set_aside(path: Path, stamp: str) -> Path:
    """Renames a file so that `stamp` is in its name, which begins with no dot, over nothing that is there; returns the
    new path."""
    target = _unused(path.with_name(f"{path.stem.removeprefix('.')}-{stamp}{path.suffix}"))
    try:
        path.rename(target)
    except OSError as error:
        raise WriteError(f"cannot rename {path}: {_reason(error)}") from error
    return target


def move_into(folder: Path, paths: Iterable[Path]) -> Path:
    """Moves those of the files that are there into a new folder, with a number in its name where there is one already;
    returns it, and raises WriteError."""
    folder = _unused(folder)
    try:
        folder.mkdir()
        for path in paths:
            if path.exists():
                path.rename(folder / path.name)
    except OSError as error:
        raise WriteError(f"cannot move files into {folder}: {_reason(error)}") from error
    return folder


def check_writable(folder: Path) -> None:
    """Creates the folder and a file in it; raises VTPruneError where that does not work."""
    probe = _beside(folder / PART, PART)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        # Whoever holds the folder may have cleared it up.
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise VTPruneError(f"output: cannot write to {folder}: {_reason(error)}") from error


def check_new_file(path: Path) -> None:
    """Raises VTPruneError where a file cannot be written, or is there already and would be lost."""
    if path.exists():
        raise VTPruneError(f"output: {path} is there already; give another --output, or remove it")
    check_writable(path.parent)


def refuse_foreign(folder: Path, own: str, names: Iterable[str], kind: str = "") -> None:
    """Raises VTPruneError for a folder that holds one of `names` without the run's `own` file beside it: it belongs to
    something else, and would be overwritten. kind: what such files are, for the message."""
    if (folder / own).exists():
        return
    found = [name for name in names if (folder / name).exists()]
    if found:
        raise VTPruneError(
            f"output: {folder} holds {kind}{' and '.join(found)}, but no {own}: they are not of such a run, which "
            "would overwrite them; give another --output"
        )


def refuse_changed(
    place: object,
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    *,
    run: str = "run",
    words: Mapping[str, str] = MappingProxyType({}),
    hint: str = "; give another --output",
) -> None:
    """Raises FileError where a run is to go on from another one's files: says what changed between their settings.

    place: where the files are; run: what is made there; words: how to name a setting; hint: what to do.
    """
    changed = [
        f"{words.get(name, name)} was {old.get(name)!r} and is now {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if changed:
        raise FileError(f"{place} holds another {run} ({'; '.join(changed)}){hint}")


@contextmanager
def held(folder: Path, patience: float = PATIENCE) -> Iterator[None]:
    """Holds an output folder, which is made if it is absent, for one run: no other run writes into it meanwhile.

    patience: seconds to wait for another one to let go of it. The system lets go of it when a process ends, however
    that happens. Raises BusyError where another run holds the folder, and VTPruneError where it cannot be written.
    """
    check_writable(folder)
    path = folder / LOCK
    real = os.path.realpath(path)
    busy = f"output: another run is writing into {folder}; wait until it has ended, or give another --output"
    end = time.monotonic() + patience
    # lmms-eval makes the locks of a process reentrant: what this process holds is known here, too.
    while not _taken(real):
        if time.monotonic() > end:
            raise BusyError(busy)
        time.sleep(POLL)
    try:
        with _locked(path, busy, patience):
            _clear_up(folder)
            yield
    finally:
        with _own:
            _held.discard(real)


def _taken(path: str) -> bool:
    """Takes a lock inside this process; False where another of its threads has it."""
    with _own:
        free = path not in _held
        _held.add(path)
    return free


@contextmanager
def _locked(path: Path, busy: str, patience: float) -> Iterator[None]:
    lock = FileLock(path, timeout=patience)
    try:
        lock.acquire(poll_interval=POLL)
    except Timeout as error:
        raise BusyError(busy) from error
    except (OSError, NotImplementedError) as error:
        raise VTPruneError(f"output: cannot lock {path}: {_reason(error)}") from error
    try:
        yield
    finally:
        # While the lock is still held: whoever has opened the file meanwhile sees that it has lost its name.
        with suppress(OSError):
            path.unlink()
        lock.release()


def _clear_up(folder: Path) -> None:
    """Removes what a run that was killed in the middle of writing has left."""
    for path in folder.glob(PART):
        with suppress(OSError):
            path.unlink()
    for path in folder.glob(DRAFT):
        shutil.rmtree(path, ignore_errors=True)
