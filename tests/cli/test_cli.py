"""The command line: what it takes, what it prints, and how it fails."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import vtprune
from tests.checkpoint import png, random_checkpoint
from vtprune.adapters import adapters
from vtprune.cli.app import app
from vtprune.errors import InputError
from vtprune.evals.settings import Setting, ablations, build_settings
from vtprune.method import catalogue
from vtprune.method.texts import (
    is_folder,
    parse_keep,
    parse_method,
    show_keep,
)


def run(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


def fails(result: Result, status: int, *fragments: str) -> None:
    """One line on stderr with the fragments, and nothing of a traceback."""
    assert result.exit_code == status, result.output
    message = result.stderr.strip()
    assert message.startswith("vtprune: ")
    assert len(message.splitlines()) == 1
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize(
    ("text", "keep"),
    [("64", 64), ("1", 1), ("1.0", 1.0), ("0.25", 0.25), ("100%", 1.0), ("25%", 0.25), (" 5.5 % ", 0.055)],
)
def test_keep_is_read(text: str, keep: int | float) -> None:
    found = parse_keep(text)
    assert found == pytest.approx(keep)
    assert type(found) is type(keep)


@pytest.mark.parametrize("text", ["0", "-3", "0.0", "1.5", "101%", "nan", "inf", "many", "", "%", "1e400", "²"])
def test_keep_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="keep: cannot take"):
        parse_keep(text)


@pytest.mark.parametrize("keep", [64, 1, 1.0, 0.25, 0.11])
def test_shown_keep_reads_back(keep: int | float) -> None:
    assert parse_keep(show_keep(keep)) == pytest.approx(keep)


def test_a_method_takes_options() -> None:
    name, options = parse_method("flowcut:variant=released:stages=2")
    assert (name, options) == ("flowcut", (("variant", "released"), ("stages", 2)))
    with pytest.raises(InputError, match="name:option=value"):
        parse_method("flowcut:released")
    assert parse_method("cdpruner:clip=hf-hub:a/b:theta=0.5") == (
        "cdpruner",
        (("clip", "hf-hub:a/b"), ("theta", 0.5)),
    )
    assert not is_folder("cdpruner:clip=/some/folder")
    assert is_folder("some/folder")


def test_settings_start_with_the_unpruned_model_and_repeat_nothing() -> None:
    settings = build_settings(["grid", "none", "grid"], [0.25, 16, 0.25])
    assert settings == [Setting("none"), Setting("grid", 0.25), Setting("grid", 16)]
    assert Setting("grid", 1).key() != Setting("grid", 1.0).key()


def test_a_method_may_bring_its_own_keep() -> None:
    settings = build_settings(["grid", "flowcut:stages=2:keep=5%"], [0.25, 16])
    assert settings[1:] == [Setting("grid", 0.25), Setting("grid", 16), Setting("flowcut", 0.05, (("stages", 2),))]
    with pytest.raises(InputError, match="cannot take '1\\.5'"):
        build_settings(["grid:keep=1.5"], [0.25])


def test_a_run_of_everything_shows_what_merging_buys() -> None:
    settings = build_settings(ablations(), [0.5])[1:]
    assert {setting.method for setting in settings} >= {"visionzip", "vflowopt", "turbo", "mustdrop", "sparsevlm"}
    # The bundled model's first layer holds all tokens of a staged method, a quarter of what its layers process.
    staged = ("sparsevlm", "vscan")
    assert {s.keep for s in settings if s.method in staged} == {0.5}
    assert {s.keep for s in settings if s.method not in staged} == {0.11}
    assert all(setting.options[0][1] is False for setting in settings)


def test_version_and_help() -> None:
    assert run("--version").output.strip() == f"vtprune {vtprune.__version__}"
    for command in ("bench", "ask", "list"):
        result = run(command, "--help")
        assert result.exit_code == 0
        assert "Usage" in result.output


def test_list_names_every_method_and_model() -> None:
    result = run("list")
    assert result.exit_code == 0, result.output
    words = result.output
    for name, info in vtprune.available().items():
        assert name in words
        assert info.arxiv in words
    for name, _, _ in adapters():
        assert name in words


def test_list_names_every_option_with_its_default() -> None:
    lines = run("list", "--options").output.splitlines()
    start = next(number for number, line in enumerate(lines) if "visionzip" in line)
    shown = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines[start : start + 6]]
    assert shown[0] == ["visionzip", "keep", "int | float | None", "None"]
    assert ["", "cls", "bool", "True"] in shown
    for name in vtprune.available():
        assert any(name in line for line in lines)
    assert any("attn_implementation" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--keep", "0"], ["keep", "'0'"]),
        (["--keep", ","], ["keep", "at least one"]),
        (["--methods", "flowcutt"], ["unknown pruner 'flowcutt'", "did you mean 'flowcut'"]),
        (["--methods", "flowcut:nothing=1"], ["no option nothing"]),
        (["--methods", "flowcut:variant=newest"], ["variant", "newest"]),
        (["--model", "/no/such/folder"], ["/no/such/folder", "config.json"]),
        (["--tasks", "vtprune_shape"], ["'vtprune_shape'", "did you mean vtprune_shapes"]),
        (["--device", "abacus"], ["device", "abacus"]),
        (["--dtype", "float8"], ["dtype", "float8"]),
        (["--limit", "-1"], ["limit"]),
        (["--include-path", "/no/such/folder"], ["include-path"]),
    ],
)
def test_bench_refuses_bad_input(tmp_path: Path, arguments: list[str], fragments: list[str]) -> None:
    model = [] if "--model" in arguments else ["--model", random_checkpoint()]
    fails(run("bench", "--output", tmp_path / "out", *model, *arguments), 2, *fragments)


def test_bench_checks_the_output_folder_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    result = run("bench", "--model", "/no/such/folder", "--output", tmp_path / "file" / "out")
    fails(result, 2, "output: cannot write to")


def test_an_unforeseen_error_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, object]:
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(catalogue, "methods", broken)
    fails(run("list"), 1, "ZeroDivisionError: on purpose", "--traceback")
    assert isinstance(run("list", "--traceback").exception, ZeroDivisionError)


@pytest.mark.parametrize("size", [(96, 96), (1, 1), (20000, 10), (33, 700)])
def test_ask_answers_about_any_size(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "image.png").write_bytes(png(*size))
    output = tmp_path / "kept.png"
    arguments = ["--model", random_checkpoint(), "--output", output, "--max-new-tokens", "3"]
    result = run("ask", tmp_path / "image.png", "what color is the circle?", *arguments, "--keep", "25%")
    assert result.exit_code == 0, result.output
    for word in ("unpruned", "flowcut", "vision tokens", "25.0%", "GFLOPs", "KV cache", "prefill ms"):
        assert word in result.output
    picture = Image.open(output)
    assert picture.width == 12 * 48 * 2 + 16
    assert picture.height > 12 * 48 + 200


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16"])
def test_ask_takes_any_kind_of_picture(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "image.tiff"
    Image.new(mode, (40, 30)).save(path)
    arguments = ["--model", random_checkpoint(), "--output", tmp_path / "kept.jpg", "--max-new-tokens", "1"]
    result = run("ask", path, "what is this?", *arguments, "--method", "pool", "--keep", "16")
    assert result.exit_code == 0, result.output


def test_ask_refuses_bad_input(tmp_path: Path) -> None:
    whole, model = png(96, 96), ["--model", random_checkpoint()]
    path = tmp_path / "image.png"
    fails(run("ask", path, "what?", *model), 2, f"no file {path}")
    path.write_bytes(whole[: len(whole) // 2])
    fails(run("ask", path, "what?", *model), 2, f"cannot read {path}")
    path.write_text("no picture")
    fails(run("ask", path, "what?", *model), 2, f"cannot read {path}")
    path.write_bytes(whole)
    fails(run("ask", path, "what?", *model, "--method", "none"), 2, "name another")
    fails(run("ask", path, "what?", *model, "--output", tmp_path / "a.txt"), 2, "should end in")
    fails(run("ask", path, "what?", *model, "--keep", "2.0"), 2, "keep")
