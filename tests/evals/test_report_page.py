"""The page of `vtprune report` in a browser: it fits a phone, asks for nothing, and runs nothing that a file says."""

from __future__ import annotations

from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.evals.report_files import ALL_RIGHT, bench, lmms, record
from vtprune.evals.report.content import make_report
from vtprune.evals.report.reading import read_all
from vtprune.evals.report.writing import render_html, render_markdown

EVIL = '<script>document.title="run"</script><img src="http://example.com/x.png">$\\frac{1}{2}$|&'
LONG = "fastv:layers=(2,5),renumbers=True,a_long_name_of_an_option=a_long_value_of_it"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of two parts, with names that are long and names that are markup."""
    folder = tmp_path_factory.mktemp("report")
    half = (1.0, 0.0) * 4
    records = [record(name, keep, half, flops=keep + 0.2) for name in ("random", "grid", "x") for keep in (0.5, 0.25)]
    bench(
        folder / "bench",
        *records,
        record(EVIL, 0.25, ALL_RIGHT, flops=0.3),
        record("fastv", 0.25, ALL_RIGHT, label=LONG, flops=0.25),
        left_out={EVIL: EVIL},
        command=f"vtprune bench {EVIL} {LONG}",
    )
    lmms(folder / "lmms", {EVIL[:20]: {"acc,none": 0.5}}, model_args=f"pretrained={EVIL.replace(',', '')}", model=EVIL)
    (folder / "broken").mkdir()
    report = make_report(read_all([folder / "bench", folder / "lmms", folder / "broken"]))
    assert len(report.sections) == 2
    (folder / "report.html").write_text(render_html(report), encoding="utf-8")
    (folder / "report.md").write_text(render_markdown(report), encoding="utf-8")
    return folder / "report.html"


@pytest.fixture(params=[(390, 844), (1280, 900)], ids=["phone", "desktop"])
def opened(request: pytest.FixtureRequest, browser: Any, path: Path) -> Iterator[tuple[Any, list[str]]]:
    """The page at a size, and what it asked for."""
    width, height = request.param
    page = browser.new_page(viewport={"width": width, "height": height})
    asked: list[str] = []
    page.on("request", lambda found: asked.append(found.url))
    page.goto(path.as_uri())
    yield page, asked
    page.close()


def test_the_page_is_no_wider_than_the_screen_and_asks_for_nothing(opened: tuple[Any, list[str]], path: Path) -> None:
    page, asked = opened
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.locator("figure svg").count() == 2
    assert asked == [path.as_uri()]
    assert page.title() == "vtprune report"


def test_pictures_lie_within_the_screen_with_letters_that_can_be_read(opened: tuple[Any, list[str]]) -> None:
    page, _ = opened
    width = page.evaluate("window.innerWidth")
    for place in range(page.locator("figure svg").count()):
        picture = page.locator("figure svg").nth(place)
        box = picture.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        sizes = picture.locator("text").evaluate_all("all => all.map(one => one.getBoundingClientRect().height)")
        assert sizes
        assert min(sizes) >= 8


def test_labels_of_a_picture_do_not_overlap(opened: tuple[Any, list[str]]) -> None:
    page, _ = opened
    boxes = (
        page.locator("figure svg")
        .first.locator("text")
        .evaluate_all(
            "all => all.map(one => one.getBoundingClientRect()).map(box => [box.left, box.top, box.right, box.bottom])"
        )
    )
    for place, one in enumerate(boxes):
        for other in boxes[place + 1 :]:
            wide = min(one[2], other[2]) - max(one[0], other[0])
            high = min(one[3], other[3]) - max(one[1], other[1])
            assert wide <= 2 or high <= 2, (one, other)


def test_what_comes_from_files_is_text(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<img" not in page
    assert page.count("&lt;script&gt;") >= 4
    markdown = path.with_suffix(".md").read_text(encoding="utf-8")
    outside = [line for line in markdown.splitlines() if not line.startswith("    ")]
    assert not [line for line in outside if "<script" in line.replace("\\<", "")]


class Elements(HTMLParser):
    """The elements of a page and their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_nothing_in_the_page_names_a_place_to_fetch_from(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    elements = Elements(page).found
    assert not {tag for tag, _ in elements} & {"script", "img", "image", "link", "iframe", "object", "embed", "base"}
    links = {own[name] for _, own in elements for name in ("href", "xlink:href", "src", "srcset") if name in own}
    assert not {link for link in links if not (link or "").startswith("#")}
    assert page.count("url(") == page.count("url(#")
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_both_schemes_have_readable_text(browser: Any, path: Path) -> None:
    for scheme, light in (("light", True), ("dark", False)):
        page = browser.new_page(color_scheme=scheme)
        page.goto(path.as_uri())
        colours = page.evaluate(
            "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        )
        ink, ground = (sum(map(int, one[4:-1].split(","))) for one in colours)
        assert (ground > ink) == light
        drawn = page.locator("figure svg text").first.evaluate("one => getComputedStyle(one).fill")
        assert drawn == colours[0]
        page.close()
