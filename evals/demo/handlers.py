"""What happens when a visitor presses a button: each handler answers with the values of the components it fills."""

from __future__ import annotations

import html
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd
from PIL import Image

from vtprune.errors import InputError
from vtprune.evals.demo.asking import LONGEST_ANSWER, Finished, Progress, ask, cost_table, encoded
from vtprune.evals.demo.curve import Point, curve
from vtprune.evals.demo.downloads import as_json, write
from vtprune.evals.demo.failures import failures
from vtprune.evals.demo.fates import fates
from vtprune.evals.demo.layout import frames_of
from vtprune.evals.demo.models import Models
from vtprune.evals.demo.options import chosen
from vtprune.evals.demo.requests import logged, media_of
from vtprune.evals.demo.snippet import snippet
from vtprune.evals.settings import Setting
from vtprune.loading.media import Media
from vtprune.loading.videos import Video
from vtprune.method.texts import show_keep

# Methods that are compared at once.
COMPARED = 3
UNPRUNED = "unpruned"
# Characters of an answer in a table.
CELL = 80


@dataclass(frozen=True)
class Handlers:
    """folder: where downloads lie until the page has them."""

    models: Models
    folder: Path

    def ask(
        self, path: str, text: str, name: str, how: str, share: float, extra: str, video: str | None = None
    ) -> Iterator[tuple[Any, ...]]:
        """Status, both answers, then the view, the numbers, both downloads and the lines of Python."""
        same = (gr.skip(),) * 5
        with logged("ask", _what(name, how, share, extra)):
            setting = chosen(self.models[name], how, share, extra)
            opened, label = media_of(path, video), label_of(setting)
            for now in self._progress(name, opened, text, [setting]):
                status = f"{now.doing} …" if now.doing else _notes(now)
                last = (status, now.texts.get(UNPRUNED, ""), now.texts.get(label, ""))
                yield *last, *same
            seen = self._seen(name, opened, text)
            drawn = opened if isinstance(opened, Video) else seen[0]
            together = -(-len(opened.frames) // len(seen)) if isinstance(opened, Video) else 1
            # The page has taken both files into its own folder once it asks for more.
            with tempfile.TemporaryDirectory(dir=self.folder) as here:
                picture, data = write(Path(here), drawn, together, text.strip(), model=name, finished=now.finished)
                yield (
                    *last,
                    fates(seen, now.finished[1].report.samples[0].images[0], html.escape(label)),
                    numbers(now.finished),
                    gr.DownloadButton(value=picture, interactive=True),
                    gr.DownloadButton(value=data, interactive=True),
                    snippet(
                        self.models[name],
                        setting,
                        text.strip(),
                        tokens=LONGEST_ANSWER,
                        video="clip.mp4" if isinstance(opened, Video) else "",
                    ),
                )

    def compare(
        self, path: str, text: str, name: str, hows: list[str], share: float, video: str | None = None
    ) -> Iterator[tuple[Any, ...]]:
        """The numbers, and a view a method."""
        same = (gr.skip(),) * COMPARED
        with logged("compare", _what(name, str(hows), share, "")):
            if not hows or not isinstance(hows, list):
                raise InputError(f"methods: choose one, or up to {COMPARED}")
            settings = [chosen(self.models[name], how, share) for how in hows[:COMPARED]]
            opened = media_of(path, video)
            for now in self._progress(name, opened, text, settings):
                yield f"{now.doing} …" if now.doing else numbers(now.finished), *same
            seen = self._seen(name, opened, text)
            views: list[Any] = [
                fates(seen, one.report.samples[0].images[0], html.escape(f"{one.label}: {one.answer.text.strip()}"))
                for one in now.finished[1:]
            ]
            yield numbers(now.finished), *views, *[None] * (COMPARED - len(views))

    def curve(
        self, path: str, text: str, name: str, how: str, share: float, extra: str, video: str | None = None
    ) -> Iterator[tuple[Any, Any]]:
        """The plot and the table below it."""
        with logged("curve", _what(name, how, share, extra)):
            loaded = self.models[name]
            setting = chosen(loaded, how, share, extra)
            if setting.folder or setting.finds_keep:
                own = (
                    "as trained it keeps what it was trained to" if setting.folder else f"{how} finds its keep itself"
                )
                raise InputError(f"method: {own}, so nothing is to be drawn; choose another")
            opened = media_of(path, video)
            for now in curve(self.models, name, opened, text, setting=lambda kept: chosen(loaded, how, kept, extra)):
                yield frame(now), points(now)

    def failures(self, name: str, how: str, share: float, extra: str, count: float) -> Iterator[tuple[Any, Any]]:
        """Status and gallery."""
        with logged("failures", _what(name, how, share, extra)):
            setting, before = chosen(self.models[name], how, share, extra), -1
            for now in failures(self.models, name, setting, int(count)):
                status = (
                    f"{now.asked} of {now.of} asked: {now.plain} right unpruned, {now.pruned} right under "
                    f"{label_of(setting)}, {len(now.failures)} lost to pruning"
                )
                pictures: Any = gr.skip()
                if len(now.failures) != before:
                    before, pictures = len(now.failures), [(one.picture, one.caption) for one in now.failures]
                yield status, pictures

    def answer(
        self, path: str, text: str, name: str, how: str, share: float, extra: str, video: str | None = None
    ) -> dict[str, Any]:
        """Both answers with all that is known of them, for programs."""
        with logged("answer", _what(name, how, share, extra)):
            setting = chosen(self.models[name], how, share, extra)
            for now in self._progress(name, media_of(path, video), text, [setting], timed=False):
                last = now
            found: dict[str, Any] = json.loads(json.dumps({"answers": [as_json(one) for one in last.finished]}))
            return found

    def _progress(
        self, name: str, media: Media, text: str, settings: Sequence[Setting], *, timed: bool = True
    ) -> Iterator[Progress]:
        return ask(
            self.models,
            name,
            media,
            text,
            settings=[Setting("none"), *settings],
            labels=[UNPRUNED, *(label_of(setting) for setting in settings)],
            timed=timed,
        )

    def _seen(self, name: str, media: Media, text: str) -> list[Image.Image]:
        """The picture as the encoder saw it, where that is one picture, or the frames that tokens are drawn over."""
        loaded = self.models[name]
        pixels = None if isinstance(media, Video) else encoded(loaded, media, text).get("pixel_values")
        return frames_of(media, loaded.processor, pixels)


def label_of(setting: Setting) -> str:
    """The method with its options and what it keeps."""
    if setting.folder:
        return f"{setting.method}, as trained"
    return setting.label if setting.keep is None else f"{setting.label}, keep {show_keep(setting.keep)}"


def _what(name: str, how: str, share: float, extra: str) -> str:
    """What a line of the log tells of a request: words of one line, and never the question."""
    text = f"model={name} method={how} keep={share}% options={extra or '-'}"[:200]
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())


def _notes(now: Progress) -> str:
    """What the method said of the picture, and where it has to be trained."""
    last = now.finished[-1]
    return " ".join([*last.notes, last.setting.untrained]).strip()


def numbers(finished: Sequence[Finished]) -> str:
    """A table of what each way to answer costs."""
    heads = ["", *(one.label for one in finished)]
    answers = ["answer", *(one.answer.text.strip()[:CELL] for one in finished)]
    return table(heads, [answers, *cost_table(finished)])


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table of plain text."""
    rows = [heads, ["---", *["---:"] * (len(heads) - 1)], *([plain(cell) for cell in line] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plain(text: str) -> str:
    """The text as Markdown shows it unchanged."""
    return html.escape(" ".join(text.split())).replace("|", "&#124;").replace("`", "&#96;").replace("*", "&#42;")


def frame(found: Sequence[Point]) -> pd.DataFrame:
    """The points as a plot takes them."""
    lines = [
        {"keep %": point.keep, "confidence": value, "of": of}
        for point in found
        if not point.refused
        for of, value in (("its own answer", point.own), ("the unpruned answer", point.plain))
    ]
    return pd.DataFrame(lines, columns=["keep %", "confidence", "of"])


def points(found: Sequence[Point]) -> str:
    """The points as a table."""
    lines = [
        [f"{point.keep:g}%", point.refused, "", ""]
        if point.refused
        else [f"{point.keep:g}%", point.text[:CELL], f"{point.own:.3f}", f"{point.plain:.3f}"]
        for point in found
    ]
    return table(["keep", "answer", "confidence", "in the unpruned answer"], lines)
