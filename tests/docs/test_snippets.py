"""Every block of Python that a page shows runs, in the order of its page, or says why it does not and compiles."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

import vtprune
from tests.clips import write_clip
from tests.docs.pages import PAGES, ROOT, blocks, name_of
from vtprune.assets import ASSETS, BUNDLED
from vtprune.method import registry

README, QUICKSTART = ROOT / "README.md", ROOT / "vtprune" / "docs" / "quickstart.md"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in, offline, with what blocks read, and without a trace in vtprune afterwards."""
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    registry.available()
    monkeypatch.setattr(registry, "_pruners", dict(registry._pruners))
    (tmp_path / "assets").symlink_to(ASSETS)
    write_clip(tmp_path / "clip.mp4")
    return tmp_path


def first_block() -> Any:
    return blocks(README, "python")[0].compiled()


def test_the_first_snippet_runs_offline_on_the_bundled_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(first_block(), {})
    answer, report = capsys.readouterr().out.strip().splitlines()
    assert answer.strip().lower() == "h"
    assert len(ast.literal_eval(report)["samples"][0]["images"][0]["kept"]) == 36


def test_the_snippet_for_llava_differs_in_the_model_and_the_picture_alone() -> None:
    (other,) = blocks(QUICKSTART, "python")
    first, second = first_block().co_names, other.compiled().co_names  # type: ignore[attr-defined]
    assert set(second) <= {*first, "name"}
    assert set(first) - set(second) <= {"EXAMPLE_IMAGE", "TINY_LLAVA", "assets", "question", "vtprune.assets",
                                        "report", "to_dict"}  # fmt: skip


def test_the_second_snippet_of_the_readme_is_a_command() -> None:
    assert len(blocks(README, "python")) == 1


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_snippets_run_in_the_order_of_their_page(page: Path, folder: Path) -> None:
    names: dict[str, Any] = {"__name__": "__main__", "folder": page.parent}
    exec(first_block(), names)
    bundled, own = names["model"], names["processor"]
    for block in blocks(page, "python"):
        code: Any = block.compiled()
        if block.why_not:
            continue
        names |= {"model": bundled, "processor": own}
        if block.model:
            place = BUNDLED[block.model]
            names["model"] = AutoModelForImageTextToText.from_pretrained(place)
            names["processor"] = AutoProcessor.from_pretrained(place)
        exec(code, names)
        for model in (bundled, names["model"]):
            if vtprune.is_wrapped(model):
                vtprune.unwrap(model)


def test_what_is_not_run_is_little() -> None:
    skipped = [block for page in PAGES for block in blocks(page, "python") if block.why_not]
    ran = [block for page in PAGES for block in blocks(page, "python") if not block.why_not]
    assert all(len(block.why_not) > 10 for block in skipped)
    assert len(ran) >= len(skipped)
