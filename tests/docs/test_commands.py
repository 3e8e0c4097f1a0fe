"""Every command that a page shows is one that vtprune, make or a module takes; the cheap ones are run."""

from __future__ import annotations

import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner, Result

from tests.docs.pages import PAGES, ROOT, commands, name_of, text_of
from vtprune.assets import ASSETS
from vtprune.cli.app import app

GROUP: Any = get_command(app)
# Of the click that typer uses, which may be its own.
wrong = sys.modules[typer.BadParameter.__module__]
# Its options are lmms-eval's own.
PASSED_ON = "lmms-eval"


def shown(program: str) -> list[tuple[Path, list[str], bool]]:
    return [(page, words[1:], whole) for page in PAGES for words, whole in commands(page) if words[0] == program]


def check(words: list[str], *, whole: bool) -> None:
    """Raises UsageError where vtprune takes no such words; whole: nothing may be missing either."""
    with typer.Context(GROUP) as context:
        if not words or words[0].startswith("-"):
            GROUP.make_parser(context).parse_args(list(words))
            return
        name, command, rest = GROUP.resolve_command(context, words)
        if name == PASSED_ON:
            return
        assert command is not None
        try:
            command.make_context(name, [word for word in rest if word not in ("...", "…")], parent=context)
        except wrong.MissingParameter:
            if whole:
                raise
        except wrong.BadOptionUsage as error:
            # An option that is only named: `vtprune bench --tasks`.
            if whole or isinstance(error, wrong.NoSuchOption) or rest[-1] != error.option_name:
                raise


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_taken(page: Path) -> None:
    for words, whole in commands(page):
        if words[0] == "vtprune":
            check(words[1:], whole=whole)


def test_a_command_that_is_not_taken_is_found() -> None:
    check(["bench", "--tasks"], whole=False)
    for words in (["bench", "--task", "gqa"], ["benchmark"], ["ask", "--keep", "1"], ["--loud"]):
        with pytest.raises(wrong.UsageError):
            check(words, whole=True)


def test_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^([\w-]+)(?: [\w-]+)*:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    targets |= set(re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[0].split())
    found = {words[0] for _, words, _ in shown("make")}
    assert {"bench", "test", "docs"} <= found
    assert found <= targets


def test_modules_that_are_run_exist_and_take_their_options() -> None:
    found = [words for _, words, _ in shown("python") if words[:1] == ["-m"] and words[1].startswith("vtprune")]
    assert len(found) > 8
    for _, module, *rest in found:
        spec = importlib.util.find_spec(module)
        assert spec is not None, module
        assert spec.origin is not None
        file = Path(spec.origin)
        source = "".join(path.read_text() for path in (file.parent.glob("*.py") if file.name[0] == "_" else [file]))
        for word in rest:
            option = word.partition("=")[0]
            if option.startswith("--"):
                argument = option[2:].replace("-", "_")
                assert re.search(rf'"{option}["/]|\b{argument}:', source), f"{module} {option}"


def test_extras_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for page in PAGES:
        for extras in re.findall(r"\.\[([\w,]+)\]'", text_of(page)):
            assert set(extras.split(",")) <= set(project["optional-dependencies"]), name_of(page)


def run(*words: str) -> Result:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, list(words))
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in that has the checkout's assets."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(ASSETS)
    return tmp_path


@pytest.mark.parametrize(
    "words", [["--version"], ["list"], ["list", "--options"], *([name, "--help"] for name in GROUP.commands)]
)
def test_what_only_says_something_runs(words: list[str]) -> None:
    if words[0] != PASSED_ON:
        assert run(*words).output


def of_readme(name: str) -> list[str]:
    (found,) = [words for page, words, whole in shown("vtprune") if page.name == "README.md" and page.parent == ROOT
                and whole and words[0] == name]  # fmt: skip
    return found


def test_the_readmes_question_is_answered(folder: Path) -> None:
    assert "flowcut" in run(*of_readme("ask")).output
    assert (folder / "ask.png").is_file()


@pytest.mark.slow
def test_the_readmes_bench_runs(folder: Path) -> None:
    assert "visionzip" in run(*of_readme("bench")).output
    assert (folder / "my-bench" / "table.md").is_file()


@pytest.mark.slow
def test_the_readmes_evaluation_runs(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(*of_readme("lmms-eval"))
    assert "vtprune_flops_percent" in capfd.readouterr().out
