"""The pages name what there is, and link to what exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import vtprune
from tests.docs.pages import FOLDER, PAGES, ROOT, links, name_of, text_of
from vtprune.adapters import adapters
from vtprune.method import catalogue

README, METHODS, MODELS = ROOT / "README.md", FOLDER / "methods.md", FOLDER / "models.md"
SETTINGS = FOLDER / "site" / "mkdocs.yml"


def anchors(page: Path) -> set[str]:
    """The headings of a page as links name them."""
    titles = re.findall(r"^#+ (.*)$", text_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_the_readme_is_a_door() -> None:
    assert len(text_of(README).splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


def test_every_page_can_be_reached_from_the_readme() -> None:
    linked = {(README.parent / target.partition("#")[0]).resolve() for target in links(README)}
    assert set(FOLDER.glob("*.md")) <= linked


@pytest.mark.parametrize("page", [README, METHODS], ids=name_of)
def test_the_tables_of_methods_name_each_with_its_paper(page: Path) -> None:
    rows = [line for line in text_of(page).splitlines() if line.startswith("| `")]
    for name, info in catalogue.own_methods().items():
        assert any(f"`{name}`" in row.split("|")[1] and info.arxiv in row for row in rows), name


def test_the_table_of_models_names_each_class() -> None:
    for name, classes, _ in adapters():
        for one in classes:
            assert f"`{one}`" in text_of(MODELS), (name, one)


def test_the_reference_has_every_public_name() -> None:
    told = set(re.findall(r"^::: [\w.]+\.(\w+)$", text_of(FOLDER / "reference.md"), flags=re.MULTILINE))
    assert set(vtprune.__all__) - {"__version__"} <= told


def test_the_tables_of_results_agree() -> None:
    rows = {}
    for page in (FOLDER / "benchmark.md", README):
        # Of one model; the page goes on with the other one's.
        for line in text_of(page).partition("## On the bundled Qwen")[0].splitlines():
            cells = [cell.strip() for cell in line.split("|")[1:-1]]
            if "±" in line and cells and cells[0].startswith("`"):
                name = cells[0].partition(",")[0]
                # Tokens, accuracy, then FLOPs and KV at their places in each table.
                flops, cache = (cells[9], cells[10]) if page != README else (cells[3], cells[4])
                rows.setdefault((name, cells[1]), []).append((cells[2], flops, cache))
    shared = {key: found for key, found in rows.items() if len(found) > 1}
    assert len(shared) == 5
    assert all(len(set(found)) == 1 for found in shared.values()), shared


def test_the_site_fetches_nothing_and_shows_every_page() -> None:
    settings = yaml.load(text_of(SETTINGS), Loader=yaml.BaseLoader)
    assert settings["theme"]["font"] == "false"
    shown = re.findall(r"[\w-]+\.md", str(settings["nav"]))
    assert {page.name for page in FOLDER.glob("*.md")} <= set(shown)
    assert "extra_javascript" not in settings
