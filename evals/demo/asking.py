"""A question about a picture or a video, answered token by token, unpruned and under one or several methods."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import TextIteratorStreamer

import vtprune
from vtprune.errors import InputError, first_line
from vtprune.evals.demo.models import Loaded, Models
from vtprune.evals.lmms.gen_kwargs import read_generation
from vtprune.evals.lmms.generation import Answer, answer_batch, cut
from vtprune.evals.settings import Setting
from vtprune.evals.speed.overhead import run_once
from vtprune.evals.untrained import quiet_untrained
from vtprune.loading.media import Media, size_text
from vtprune.loading.prompts import check_text, check_videos, encode, place, question
from vtprune.loading.videos import Video
from vtprune.report.report import Report

STOPS = ("\n\n",)
# Characters of a question, and tokens of an answer.
LONGEST_QUESTION, LONGEST_ANSWER = 2000, 128
# A prefill of less milliseconds is timed so many times anew with so many decode steps, in turns with the others; a
# longer one counts as it ran.
QUICK, ROUNDS, STEPS = 400.0, 3, 4


@dataclass(frozen=True)
class Finished:
    """One way to answer, complete: the answer with what it cost, the report, and the milliseconds of a prefill and of
    each token after the first (0 for answers of one token)."""

    label: str
    setting: Setting
    answer: Answer
    report: Report
    prefill_ms: float
    step_ms: float

    @property
    def notes(self) -> list[str]:
        """What the method said of the picture."""
        return self.report.samples[0].images[0].notes


@dataclass
class Progress:
    """What is there so far: the texts by label, those that are complete, and what is under way."""

    texts: dict[str, str] = field(default_factory=dict)
    finished: list[Finished] = field(default_factory=list)
    doing: str = ""
    # All that was asked for.
    complete: bool = False


def check_question(loaded: Loaded, text: str | None) -> str:
    """The question without spaces around it; raises InputError for one that is empty, too long, or holds what the
    model takes for a picture."""
    text = (text or "").strip()
    if not text:
        raise InputError("question: write a question about the picture first")
    if len(text) > LONGEST_QUESTION:
        raise InputError(f"question: at the most {LONGEST_QUESTION:,} characters, this one has {len(text):,}")
    if not text.isprintable() and any("\ud800" <= sign <= "\udfff" for sign in text):
        raise InputError("question: it holds half a character, which is no text; write it again")
    check_text(loaded.processor, text, "question")
    return text


def encoded(loaded: Loaded, media: Media, text: str) -> Any:
    """The inputs of a question; raises InputError as `check_question`, for a picture or a video that cannot be taken,
    and for a video where the model takes none."""
    text = check_question(loaded, text)
    kind = "video" if isinstance(media, Video) else "image"
    if kind == "video":
        check_videos(loaded.processor, kind)
    try:
        return encode(loaded.processor, [question(media, text)])
    except ValueError as error:
        raise InputError(
            f"{kind}: the model's processor refuses this {kind} ({size_text(media)}): {first_line(error)}"
        ) from error


def ask(
    models: Models,
    name: str,
    media: Media,
    text: str,
    *,
    settings: Sequence[Setting],
    labels: Sequence[str],
    timed: bool = True,
) -> Iterator[Progress]:
    """Answers under each setting in turn; the progress after every piece of text, complete in the end. timed: whether
    quick prefills are timed anew.

    Whoever stops listening stops the answer at its next token. Raises VTPruneError for what cannot be asked.
    """
    loaded = models[name]
    inputs = encoded(loaded, media, text)
    progress = Progress()
    with models.lent(name) as model, quiet_untrained():
        for label, setting in zip(labels, settings, strict=True):
            progress.doing = f"{label} answers"
            progress.texts[label] = ""
            yield progress
            for part in stream(model, loaded.processor, inputs, setting, stopped=models.closing.is_set):
                if isinstance(part, str):
                    progress.texts[label] = part
                    yield progress
                else:
                    answer, report = part
                    progress.texts[label] = answer.text.strip()
                    finished = Finished(
                        label, setting, answer, report, prefill_ms=answer.cost.prefill_ms, step_ms=_step_ms(answer)
                    )
                    progress.finished.append(finished)
        # Of a method that reads a prompt several times the answer's own time is that of all attempts.
        timed = timed and not any(one.setting.finds_keep for one in progress.finished)
        if timed and max(one.prefill_ms for one in progress.finished) < QUICK:
            progress.doing = "prefills and decode steps are timed"
            yield progress
            progress.finished = _timed(model, inputs, progress.finished)
    progress.doing, progress.complete = "", True
    yield progress


def stream(
    model: Any, processor: Any, inputs: Any, setting: Setting, *, stopped: Callable[[], bool]
) -> Iterator[str | tuple[Answer, Report]]:
    """The answer so far after every token, and last the whole answer with its report; stopped: asked after each token
    whether to break off."""
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    leaving = threading.Event()
    with ThreadPoolExecutor(1) as pool, vtprune.wrapped(model, setting.method_source):
        running = pool.submit(
            answer_batch,
            model,
            processor.tokenizer,
            inputs,
            generation=read_generation({"until": list(STOPS)}, LONGEST_ANSWER),
            streamer=streamer,
            stopped=lambda: leaving.is_set() or stopped(),
        )
        # What goes wrong would leave the reader of the stream waiting.
        running.add_done_callback(lambda done: streamer.text_queue.put(streamer.stop_signal))
        try:
            text = ""
            for part in streamer:
                text += part
                yield cut(text, STOPS)
            answers = running.result()
        finally:
            leaving.set()
        yield answers[0], vtprune.report(model)


def _step_ms(answer: Answer) -> float:
    """Milliseconds of each token after the first."""
    later = answer.output_tokens - 1
    return max(0.0, 1000 * answer.seconds - answer.cost.prefill_ms) / later if later else 0.0


@torch.inference_mode()
def _timed(model: Any, inputs: Any, finished: Sequence[Finished]) -> list[Finished]:
    """The same with the medians of prefills and steps that ran in turns."""
    given = place(inputs, model)
    times: dict[str, list[tuple[float, float]]] = {one.label: [] for one in finished}
    for turn in range(ROUNDS + 1):
        for one in finished:
            with vtprune.wrapped(model, one.setting.method_source):
                found = run_once(model, given, STEPS)
            if turn:  # turn 0 only warms up
                times[one.label].append(found)
    return [
        replace(
            one,
            prefill_ms=1000 * statistics.median(prefill for prefill, _ in times[one.label]),
            step_ms=1000 * statistics.median(step for _, step in times[one.label]),
        )
        for one in finished
    ]


ROWS = (
    "vision tokens",
    "prefill GFLOPs",
    "KV cache kB, prompt",
    "KV cache kB, at the end",
    "prefill ms",
    "decode ms a token",
)


def costs(finished: Finished) -> list[float]:
    """The numbers of one way to answer, in the order of ROWS."""
    cost = finished.answer.cost
    return [
        cost.kept_tokens,
        cost.flops / 1e9,
        cost.kv_bytes / 1e3,
        cost.kv_bytes_end / 1e3,
        finished.prefill_ms,
        finished.step_ms,
    ]


def cost_table(finished: Sequence[Finished]) -> list[list[str]]:
    """A line a number, a column a way to answer, each but the first with its share of the first."""
    lines = []
    for row, name in enumerate(ROWS):
        numbers = [costs(one)[row] for one in finished]
        cells = [_shown(numbers[0])]
        for number in numbers[1:]:
            share = f" ({100 * number / numbers[0]:.0f}%)" if numbers[0] and number else ""
            cells.append(_shown(number) + share)
        lines.append([name, *cells])
    return lines


def _shown(number: float) -> str:
    return f"{number:,.4g}" if number else "-"
