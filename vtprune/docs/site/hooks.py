"""What mkdocs does beyond its settings: pages that lie elsewhere in the checkout, the notebook as a page, and links.

A link in a page names a file of the checkout, so that it can be followed there too; here it becomes a link to the page
that shows this file. Files that no page shows (the code) are named without a link.
"""

from __future__ import annotations

import base64
import json
import posixpath
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[3]
FOLDER = "vtprune/docs"
# Page of the site: the file that it shows.
ELSEWHERE = {
    "index.md": "README.md",
    "architecture.md": "ARCHITECTURE.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "cost.md": "vtprune/cost/cost.md",
    "schedules.md": "vtprune/method/schedules.md",
    "training-in-full.md": "vtprune/training/training.md",
    "support.md": "adapters/support.md",
    "tiny-llava.md": "assets/tiny-llava/README.md",
    "tiny-llava-pmod.md": "assets/tiny-llava-pmod/README.md",
    "tiny-llava-covipal.md": "assets/tiny-llava-covipal/README.md",
    "tiny-qwen.md": "assets/tiny-qwen/README.md",
    "tiny-llava-auto.md": "assets/tiny-llava-auto/README.md",
    "tiny-qwen-auto.md": "assets/tiny-qwen-auto/README.md",
    "tour.md": f"{FOLDER}/tour.ipynb",
}
SHOWN_BY = {source: page for page, source in ELSEWHERE.items()}
PICTURES = ("assets/*.png", "assets/*/*.png", "vtprune/method/pictures/*.png")
# Folder in the checkout: where an installation has it.
PACKAGES = {"vtprune": "vtprune", "adapters": "vtprune/adapters", "evals": "vtprune/evals"}
FENCED = re.compile(r"(^ *```.*?^ *```$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?P<text>!?\[[^\]]*\])\((?P<target>[^)\s]+)\)|(?P<image><img src=)\"(?P<source>[^\"]+)\"")


def on_startup(**_: Any) -> None:
    """Lays the sources out as an installation does, for the reader of docstrings, which follows no links.

    This comes before any plugin is configured: the reader asks only then which of its folders exist.
    """
    tree = ROOT / "build" / "docs-source"
    shutil.rmtree(tree, ignore_errors=True)
    for folder, package in PACKAGES.items():
        for path in (ROOT / folder).rglob("*.py"):
            copy = tree / package / path.relative_to(ROOT / folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that lie elsewhere, and the pictures that pages show."""
    for page, source in ELSEWHERE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        if source.endswith(".ipynb"):
            text, pictures = _notebook(json.loads(text), source)
            for name, content in pictures.items():
                files.append(File.generated(config, name, content=content))
        files.append(File.generated(config, page, content=text))
    for pattern in PICTURES:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links between files into links between pages, and lists into what this Markdown reads as such."""
    source = ELSEWHERE.get(page.file.src_uri, f"{FOLDER}/{page.file.src_uri}")

    def linked(match: re.Match[str]) -> str:
        target = match["target"] or match["source"]
        if target.startswith(("#", "http://", "https://")):
            return match[0]
        path, _, anchor = target.partition("#")
        place = _place(posixpath.normpath(posixpath.join(posixpath.dirname(source), path)), files, source)
        if match["image"]:
            return f'{match["image"]}"{place}"'
        if place is None:
            return match["text"][1:-1]
        return f"{match['text']}({place}{'#' if anchor else ''}{anchor})"

    parts = FENCED.split(_indented(markdown))
    parts[::2] = [LINK.sub(linked, part) for part in parts[::2]]
    return "".join(parts)


def _indented(markdown: str) -> str:
    """What belongs to an item of a numbered list by four spaces instead of three, an empty line before the next."""
    text = re.sub(r"^   (?=[^ ])", "    ", markdown, flags=re.MULTILINE)
    return re.sub(r"(?<=\n)(    .*\n)(?=\d+\. )", r"\1\n", text)


def _place(path: str, files: Files, source: str) -> str | None:
    """The page or picture that shows a file of the checkout, None where none does."""
    if path in SHOWN_BY:
        return SHOWN_BY[path]
    name = path.removeprefix(f"{FOLDER}/")
    if files.get_file_from_path(name) is not None:
        return name
    if not (ROOT / path).exists():
        raise PluginError(f"{source} links to {path}, which does not exist")
    return None


def _notebook(notebook: dict[str, Any], source: str) -> tuple[str, dict[str, bytes]]:
    """The text of a notebook's page, and the pictures in its outputs by their names."""
    pictures: dict[str, bytes] = {}
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        for kind, content in _outputs(cell):
            if kind == "image/png":
                name = f"tour/{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(content)
                parts.append(f"![What the cell draws](/{name})".replace("(/", "("))
            else:
                parts.append(f"```text\n{content.rstrip()}\n```")
    return "\n\n".join(parts), pictures


def _outputs(cell: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for output in cell["outputs"]:
        data = output.get("data", {"text/plain": output.get("text", "")})
        kind = "image/png" if "image/png" in data else "text/plain"
        yield kind, "".join(data[kind])
