"""How much the command line says, and how shells complete it."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.checkpoint import png, random_checkpoint
from tests.cli.test_cli import fails
from vtprune.cli.app import app
from vtprune.console.output import is_quiet, is_verbose
from vtprune.method import catalogue


def run(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


def asked(folder: Path, *before: str) -> Result:
    (folder / "image.png").write_bytes(png(96, 96))
    words = ["ask", folder / "image.png", "what?", "--model", random_checkpoint(), "--output", folder / "kept.png"]
    return run(*before, *words, "--max-new-tokens", "1")


def test_a_quiet_command_prints_results_alone(tmp_path: Path) -> None:
    usual, quiet = asked(tmp_path), asked(tmp_path, "--quiet")
    assert "wrote" in usual.output
    assert "vision tokens" in quiet.output
    assert "wrote" not in quiet.output
    assert asked(tmp_path, "-q").exit_code == 0
    assert not is_quiet()


def test_steps_are_no_results(tmp_path: Path) -> None:
    words = ["arank", "--samples", "2", "--count", "2", "--output", tmp_path / "arank.json"]
    usual, quiet = run(*words), run("-q", *words)
    assert "[2/2]" in usual.output
    assert "[2/2]" not in quiet.output
    assert "wrote" not in quiet.output
    assert [line for line in quiet.output.splitlines() if line.startswith("layers=")]


def test_a_quiet_command_says_what_went_wrong(tmp_path: Path) -> None:
    fails(run("--quiet", "ask", tmp_path / "none.png", "what?"), 2, "no file")


def test_a_verbose_command_shows_where_an_error_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, object]:
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(catalogue, "methods", broken)
    fails(run("list"), 1, "ZeroDivisionError: on purpose")
    assert isinstance(run("--verbose", "list").exception, ZeroDivisionError)
    assert not is_verbose()


def test_a_verbose_command_lets_libraries_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    def warning() -> dict[str, object]:
        warnings.warn("soon gone", PendingDeprecationWarning, stacklevel=2)
        return {}

    monkeypatch.setattr(catalogue, "methods", warning)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("ignore")
        run("list")
        assert not shown
        run("-v", "list")
        assert [str(one.message) for one in shown] == ["soon gone"]


def test_quiet_and_verbose_contradict_each_other() -> None:
    fails(run("-q", "-v", "list"), 2, "--quiet and --verbose")


def in_a_shell(*arguments: str, **variables: str) -> str:
    """What the command answers a shell."""
    code = f"import sys\nsys.argv = {['vtprune', *arguments]}\nfrom vtprune.cli.app import main\nmain()"
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1", **variables}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_a_script(shell: str) -> None:
    assert "_VTPRUNE_COMPLETE" in in_a_shell("--show-completion", shell)
    assert "--install-completion" in run("--help").output


def test_the_script_completes_commands_and_options() -> None:
    shell = {"_VTPRUNE_COMPLETE": "complete_bash"}
    assert in_a_shell(**shell, COMP_WORDS="vtprune be", COMP_CWORD="1").split() == ["bench"]
    assert "--keep-video" in in_a_shell(**shell, COMP_WORDS="vtprune ask --ke", COMP_CWORD="2").split()
