"""The notebook runs from its first cell to its last one, offline, and says what its pages say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import FOLDER

TOUR = json.loads((FOLDER / "tour.ipynb").read_text(encoding="utf-8"))
CELLS: list[dict[str, Any]] = [cell for cell in TOUR["cells"] if cell["cell_type"] == "code"]


def told(cell: dict[str, Any]) -> str:
    """What a cell printed when the notebook was made."""
    return "".join("".join(output.get("text", "")) for output in cell["outputs"])


@pytest.mark.slow
def test_the_tour_runs_and_prints_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(CELLS):
        capsys.readouterr()
        exec(compile("".join(cell["source"]), f"tour.ipynb, cell {number}", "exec", dont_inherit=True), names)
        assert capsys.readouterr().out.split() == told(cell).split(), number


def test_the_tour_is_small_and_shows_what_came_of_it() -> None:
    assert (FOLDER / "tour.ipynb").stat().st_size < 100_000
    assert all(cell["outputs"] for cell in CELLS)
    assert sum("image/png" in output.get("data", {}) for cell in CELLS for output in cell["outputs"]) == 2
