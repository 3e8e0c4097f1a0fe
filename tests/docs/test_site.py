"""The site as `make docs` builds it: without a warning, and without a word from a network."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import FOLDER, ROOT

needs_mkdocs = pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", FOLDER / "site" / "mkdocs.yml"]
    done = subprocess.run(
        [*command, "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


@needs_mkdocs
@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]* src=\"([^\"]+)\"", text)
        loaded += re.findall(r"<link[^>]* rel=\"(?:stylesheet|preconnect|icon)\"[^>]* href=\"([^\"]+)\"", text)
        assert not [place for place in loaded if place.startswith(("http:", "https:", "//"))], page.name
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert not re.search(r"url\(['\"]?https?:", styles)


@needs_mkdocs
@pytest.mark.slow
def test_every_page_is_there_and_can_be_searched(site: Path) -> None:
    for name in ("index", "contributing", "architecture", "changelog", "support", "tour", "reference", "cost"):
        assert (site / f"{name}.html").is_file()
    assert "deepstack" in (site / "search" / "search_index.json").read_text(encoding="utf-8")
    assert not list(site.rglob("*.py"))


@needs_mkdocs
@pytest.mark.slow
def test_the_reference_says_of_arguments_what_they_are(site: Path) -> None:
    text = (site / "reference.html").read_text(encoding="utf-8")
    assert 'id="vtprune.wrap.wrap"' in text
    assert "<p><code>keep_prompt</code>: instead of" in text
