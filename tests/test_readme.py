"""What the README shows first can be pasted and runs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_first_snippet_runs_offline_on_the_bundled_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    exec(compile(snippets()[0], "README.md", "exec"), {})
    answer, report = capsys.readouterr().out.strip().splitlines()
    assert answer.strip().lower() == "h"
    assert len(ast.literal_eval(report)["samples"][0]["images"][0]["kept"]) == 36


def test_the_second_snippet_differs_in_the_model_and_the_picture_alone() -> None:
    first, second = (compile(code, "README.md", "exec").co_names for code in snippets()[:2])
    assert set(second) <= {*first, "name"}
    assert set(first) - set(second) <= {"EXAMPLE_IMAGE", "TINY_LLAVA", "assets", "question", "vtprune.assets",
                                        "report", "to_dict"}  # fmt: skip
