"""The page in a real browser: what a visitor does, and reads back."""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vtprune.assets import EXAMPLE_IMAGE
from vtprune.evals.demo import link
from vtprune.evals.demo.options import Option, options_of
from vtprune.method.facts import ModelFacts

DONE = "document.querySelector('#numbers table') && document.querySelector('#view canvas')"


def ask(page: Any) -> None:
    page.click("#ask-go")
    page.wait_for_function(DONE)
    page.wait_for_selector("#png:not([disabled])")


def fill(page: Any, field: str, value: str) -> None:
    """Types until the value stays: what a tab shows for the first time is set to its own value a moment later."""
    end = time.monotonic() + 20
    page.fill(field, value)
    while True:
        page.press(field, "Tab")
        page.wait_for_timeout(500)
        if page.input_value(field) == value:
            return
        assert time.monotonic() < end, f"{field} never took {value!r}"
        page.fill(field, value)


def busy(address: str) -> int:
    with urllib.request.urlopen(f"{address}/health") as answer:
        found: int = json.load(answer)["answering"]
        return found


def wait_until_idle(address: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while busy(address):
        assert time.monotonic() < end, f"somebody is still being answered after {seconds} s"
        time.sleep(0.1)


def test_a_visitor_uploads_asks_moves_the_slider_and_downloads(page: Any, tmp_path: Path) -> None:
    own = tmp_path / "own.png"
    Image.open(EXAMPLE_IMAGE).convert("RGB").resize((300, 300)).save(own)
    page.click("[aria-label='Remove Image'], [aria-label='Clear']")
    page.set_input_files("#picture input[type=file]", own)
    page.wait_for_selector("#picture img")
    fill(page, "#keep input[type=number]", "40")
    page.fill("#question textarea", "what is written on the yellow square?")
    started = time.monotonic()
    page.click("#ask-go")
    page.wait_for_function("document.querySelector('#unpruned textarea').value == 'h'")
    assert time.monotonic() - started < 5
    page.wait_for_function(DONE)
    assert page.input_value("#pruned textarea") == "h"
    assert "flowcut, keep 40%" in page.inner_text("#numbers")
    assert re.search(r"vision tokens\s+144\s+5[78] \(40%\)", page.inner_text("#numbers"))
    with page.expect_download() as held:
        page.click("#png")
    assert Image.open(held.value.path()).width > 500
    with page.expect_download() as held:
        page.click("#json")
    data = json.loads(Path(held.value.path()).read_text())
    assert [one["answer"]["text"].strip() for one in data["answers"]] == ["h", "h"]
    assert data["answers"][1]["report"]["samples"][0]["images"][0]["grid"] == [1, 12, 12]
    page.get_by_text("The same in Python").click()
    assert "vtprune.wrap(model, 'flowcut:keep=0.4')" in page.inner_text("#code")


def test_the_layers_and_the_fate_of_each_patch_can_be_walked_by_keyboard(page: Any) -> None:
    fill(page, "#keep input[type=number]", "50")
    page.click("#method input")
    page.get_by_role("option", name="pyramid_drop", exact=True).click()
    ask(page)
    slider = page.locator("#view input[type=range]")
    counts = []
    for _ in range(7):
        counts.append(int(page.inner_text("#view .vt-count").split()[0]))
        slider.press("ArrowLeft")
    assert counts == sorted(counts)
    assert counts[-1] == 144 > counts[0]
    page.focus("#view canvas")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#view .vt-fate").startswith("row 1, column 1: ")
    page.keyboard.press("ArrowDown")
    assert page.inner_text("#view .vt-fate").startswith("row 2, column 1: ")
    page.hover("#view canvas", position={"x": 5, "y": 5})
    assert page.inner_text("#view .vt-fate").startswith("row 1, column 1: left before decoder layer ")
    page.click("#view .vt-play")
    page.wait_for_function("document.querySelector('#view .vt-play').textContent == 'Play'")
    assert page.inner_text("#view .vt-count").startswith(f"{counts[0]} of 144")


def test_methods_are_compared_side_by_side(page: Any) -> None:
    page.get_by_role("tab", name="Compare").click()
    page.click("#compare-go")
    page.wait_for_selector("#view-2 canvas")
    titles = [page.inner_text(f"#view-{place} .vt-title") for place in range(3)]
    assert [title.partition(",")[0] for title in titles] == ["flowcut", "pyramid_drop", "grid"]
    assert "pyramid_drop, keep 25%" in page.inner_text("#compare-numbers")


def test_what_is_compared_stands_below_each_other_on_a_phone(browser: Any, address: str) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 900})
    page.goto(address)
    page.get_by_role("tab", name="Compare").click()
    page.click("#compare-go")
    page.wait_for_selector("#view-2 canvas")
    boxes = [page.locator(f"#view-{place} canvas").bounding_box() for place in range(3)]
    page.close()
    assert all(box["width"] > 200 for box in boxes)
    assert boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"] < boxes[2]["y"]


def test_the_curve_is_drawn_from_all_patches_to_few(page: Any) -> None:
    page.get_by_role("tab", name="Curve").click()
    page.click("#curve-go")
    page.wait_for_function("document.querySelectorAll('#points tr').length == 11")
    lines = page.inner_text("#points").splitlines()
    assert "confidence" in lines[0]
    keep, first, confidence, agreement = lines[1].split()
    assert (keep, first) == ("100%", "h")
    assert confidence == agreement
    assert float(confidence) > 0.99
    assert page.locator("#curve canvas, #curve svg").count()


def test_failures_show_what_was_lost(page: Any) -> None:
    page.get_by_role("tab", name="Failures").click()
    fill(page, "#count input[type=number]", "20")
    fill(page, "#keep input[type=number]", "5")
    page.click("#failures-go")
    page.wait_for_function("document.querySelector('#failures-status').innerText.startsWith('20 of 20')")
    asked = re.search(r"(\d+) right unpruned, (\d+) right under .*, (\d+) lost", page.inner_text("#failures-status"))
    assert asked is not None
    plain, pruned, lost = map(int, asked.groups())
    assert plain > pruned
    assert lost >= plain - pruned
    page.wait_for_selector("#gallery img")
    assert "; pruned: " in page.inner_text("#gallery")


def test_a_run_can_be_cancelled(page: Any, address: str) -> None:
    page.get_by_role("tab", name="Failures").click()
    fill(page, "#count input[type=number]", "300")
    page.click("#failures-go")
    page.wait_for_function("/^[1-9]\\d* of 300/.test(document.querySelector('#failures-status').innerText)")
    page.click("#failures-cancel")
    page.wait_for_function("document.querySelector('#failures-status').innerText == 'Cancelled.'")
    wait_until_idle(address, 10)


def test_a_tab_that_is_closed_in_the_middle_leaves_nobody_waiting(browser: Any, address: str) -> None:
    page = browser.new_page()
    page.goto(address)
    page.get_by_role("tab", name="Failures").click()
    fill(page, "#count input[type=number]", "300")
    page.click("#failures-go")
    page.wait_for_function("/^[1-9]\\d* of 300/.test(document.querySelector('#failures-status').innerText)")
    page.close()
    wait_until_idle(address, 15)


def test_one_control_changes_one_option(page: Any) -> None:
    # What a link says is set a moment after the page is there.
    page.wait_for_timeout(1500)
    page.click("#method input")
    page.get_by_role("option", name="fastv", exact=True).click()
    page.get_by_text("Options", exact=True).click()
    page.get_by_label("ratio").wait_for()
    page.wait_for_timeout(1500)
    # Typed, as filling a field at once is no input to the page.
    page.get_by_label("layers").first.press_sequentially("2")
    page.wait_for_function("document.querySelector('#options textarea, #options input')?.value == 'layers=(2,)'")
    fill(page, "#keep input[type=number]", "80")
    ask(page)
    assert "fastv:layers=(2,), keep 80%" in page.inner_text("#numbers")


def test_a_link_opens_the_page_as_it_stood(browser: Any, address: str) -> None:
    page = browser.new_page()
    page.goto(f"{address}/?method=visionzip&keep=37&options=merge=False&question=how%20many%20squares%20are%20there?")
    page.wait_for_function("document.querySelector('#method input')?.value == 'visionzip'")
    page.wait_for_function("document.querySelector('#keep input[type=number]')?.value == '37'")
    assert page.input_value("#question textarea") == "how many squares are there?"
    page.get_by_text("Options", exact=True).click()
    page.wait_for_function("document.querySelector('#options textarea, #options input')?.value == 'merge=False'")
    page.get_by_label("contextual").first.wait_for()
    assert not page.get_by_label("merge").is_checked()
    page.get_by_label("cls").click()
    page.wait_for_function(
        "/^merge=False,cls=False$/.test(document.querySelector('#options textarea, #options input')?.value)"
    )
    page.wait_for_function("/cls%3DFalse/.test(location.href)")
    page.close()


def test_the_controls_are_those_of_the_link_however_slowly_others_are_drawn(
    browser: Any, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []

    def drawing(method: str, facts: ModelFacts) -> list[Option]:
        drawn.append(method)
        # The method that the page starts with, if anything should still draw it, comes last.
        time.sleep(0.0 if method == "visionzip" else 2.0)
        return options_of(method, facts)

    monkeypatch.setattr("vtprune.evals.demo.page.options_of", drawing)
    page = browser.new_page()
    page.goto(f"{address}/?method=visionzip")
    page.get_by_text("Options", exact=True).click()
    page.get_by_label("contextual").first.wait_for()
    page.wait_for_timeout(2500)
    assert drawn == ["visionzip"]
    assert page.get_by_label("contextual").first.is_visible()
    page.close()


def test_what_is_typed_at_once_stays_however_late_the_page_has_read_its_address(
    browser: Any, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, late = link.read, threading.Event()

    def slowly(*args: Any) -> link.Choice:
        late.wait(20)
        return read(*args)

    monkeypatch.setattr(link, "read", slowly)
    page = browser.new_page()
    page.goto(address)
    page.wait_for_selector("#picture img")
    page.fill("#question textarea", "how many shapes are there?")
    late.set()
    page.wait_for_timeout(2000)
    assert page.input_value("#question textarea") == "how many shapes are there?"
    page.close()


def test_what_cannot_be_done_is_said_in_a_sentence(page: Any) -> None:
    page.fill("#question textarea", " ")
    page.click("#ask-go")
    page.wait_for_function("document.body.innerText.includes('question: write a question about the picture first')")
    assert "Traceback" not in page.content()


def test_every_control_has_a_name(page: Any) -> None:
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('input:not([type=file]), textarea, button, canvas, select')]
        .filter(one => one.offsetParent !== null)
        .filter(one => !(one.labels?.length || one.ariaLabel || one.title || one.innerText?.trim()
            || one.closest('label') || one.getAttribute('aria-labelledby')))
        .map(one => one.outerHTML.slice(0, 200))"""
    )
    assert nameless == []


@pytest.mark.parametrize(("width", "theme"), [(390, "dark"), (1280, "light")])
def test_a_picture_of_the_page_at_the_widths_of_a_phone_and_a_desktop(
    browser: Any, address: str, pictures: Path, tmp_path: Path, width: int, theme: str
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 1000})
    page.goto(f"{address}/?method=vflowopt&keep=20&__theme={theme}")
    page.wait_for_selector("#picture img")
    page.wait_for_function("document.querySelector('#method input')?.value == 'vflowopt'")
    ask(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("document.activeElement.blur()")
    page.screenshot(path=pictures / "demo.png" if theme == "light" else tmp_path / "phone.png", full_page=True)
    page.close()
