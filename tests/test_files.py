"""One writer of files, and one run at a time in an output folder."""

from __future__ import annotations

import ast
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from vtprune.errors import VTPruneError, WriteError
from vtprune.files import (
    append_text,
    check_new_file,
    held,
    refuse_foreign,
    set_aside,
    write_bytes,
    write_folder,
    write_text,
    write_with,
)

ROOT = Path(__file__).parents[1]
HOLD = """import sys, time
from pathlib import Path
from vtprune.files import held
with held(Path(sys.argv[1])):
    """


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another process that holds a folder, once it does."""
    code = HOLD + "(Path(sys.argv[1]) / '.vtprune-dead.part').touch(); print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_folder_is_held_by_one_run_and_free_again_when_its_process_is_killed(tmp_path: Path) -> None:
    process = holder(tmp_path / "out")
    try:
        with pytest.raises(VTPruneError, match=r"another run is writing into .*out; wait .* another --output"):
            held(tmp_path / "out").__enter__()
        with held(tmp_path / "other"):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with held(tmp_path / "out"):
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".vtprune.lock"]
    assert not list((tmp_path / "out").iterdir())


def test_threads_of_one_process_exclude_each_other_too(tmp_path: Path) -> None:
    refused: list[str] = []

    def second() -> None:
        try:
            with held(tmp_path):
                pass
        except VTPruneError as error:
            refused.append(str(error))

    with held(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        second()
    assert len(refused) == 2
    second()
    assert len(refused) == 2


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")

    def half(part: Path) -> None:
        part.write_text("ha")
        raise OSError(28, os.strerror(28))

    with pytest.raises(WriteError, match="No space left on device"):
        write_with(path, half)
    with pytest.raises(WriteError, match="No space left on device"):
        write_folder(tmp_path, lambda draft: half(draft / "a.json"))
    assert path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]


def test_files_are_readable_by_others_and_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "real" / "a.json")
    write_with(tmp_path / "link.json", lambda part: (part.write_text("x"), part.chmod(0o600)))
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real" / "a.json").read_text() == "x"
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE((tmp_path / "real" / "a.json").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    with pytest.raises(WriteError, match="a folder or a device"):
        write_bytes(tmp_path / "real", b"")


def test_lines_are_added_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines"
    append_text(path, "one\n")

    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(WriteError, match="No space left"):
            append_text(path, "two\n")
    assert path.read_text() == "one\n"


def test_nothing_that_is_there_is_lost(tmp_path: Path) -> None:
    for text in ("first", "second"):
        write_text(tmp_path / "r.json", text)
        set_aside(tmp_path / "r.json", "old")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "r-old.json": "first", "r-old-2.json": "second"
    }  # fmt: skip
    with pytest.raises(VTPruneError, match=r"r-old\.json is there already"):
        check_new_file(tmp_path / "r-old.json")
    with pytest.raises(VTPruneError, match=r"holds r-old\.json, but no mine\.json"):
        refuse_foreign(tmp_path, "mine.json", ("r-old.json", "table.md"))
    write_text(tmp_path / "mine.json", "")
    refuse_foreign(tmp_path, "mine.json", ("r-old.json",))


# What writes to a path by itself, and the modes of `open` that do.
WRITERS = {"write_text", "write_bytes", "rename", "renames", "mkstemp", "NamedTemporaryFile", "to_parquet"}


def _writes(node: ast.Call) -> bool:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
    if name == "open" and any(isinstance(one, ast.Constant) and set(str(one.value)) & set("wax") for one in node.args):
        return all(len(str(one.value)) <= 3 for one in node.args if isinstance(one, ast.Constant))
    return (bool(owner) and name in WRITERS) or (owner == "os" and name == "replace")


def test_nothing_else_writes_files() -> None:
    found = []
    for folder in ("vtprune", "adapters", "evals", "assets"):
        for path in (ROOT / folder).rglob("*.py"):
            if path != ROOT / "vtprune" / "files.py":
                calls = (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call))
                found += [f"{path}:{call.lineno}" for call in calls if _writes(call)]
    assert not found
