"""`vtprune ask`: one question about one picture or video, answered with and without pruning."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table

import vtprune
from vtprune.console.output import notice
from vtprune.errors import InputError, PictureError, first_line
from vtprune.evals.ask.overlay import compare, seen_image
from vtprune.evals.ask.sheet import compare_frames
from vtprune.evals.lmms.gen_kwargs import read_generation
from vtprune.evals.lmms.generation import Answer, answer_batch
from vtprune.evals.settings import (
    UNPRUNED,
    Setting,
    build_settings,
    holds_method,
    takes_keep,
)
from vtprune.evals.speed.timing import PrefillTimes, measure_prefill
from vtprune.evals.untrained import quiet_untrained
from vtprune.files import check_writable, write_bytes
from vtprune.loading.media import Media, read_media, size_text
from vtprune.loading.model import load_model
from vtprune.loading.pictures import exif_of
from vtprune.loading.prompts import check_text, check_videos, encode, question
from vtprune.loading.videos import FRAMES, Video, is_video
from vtprune.method.texts import folder_text, parse_entry, show_keep
from vtprune.report.report import Report

STOPS = ("\n\n",)
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
# The EXIF tag that says which program made a picture, and what stands there in those that are written here.
SOFTWARE, MADE_BY = 0x0131, "vtprune ask"
DEFAULT_METHOD, DEFAULT_KEEP = "flowcut", 0.25


@dataclass(frozen=True)
class Asked:
    """Both answers, the report of the pruned one, prefill times of both, and the picture."""

    unpruned: Answer
    pruned: Answer
    report: Report
    prefill: PrefillTimes
    picture: Image.Image


def check_output(output: Path, media: Path) -> None:
    """Raises InputError for a picture that cannot be written, or that would take the place of another one than an
    earlier answer's."""
    if output.suffix.lower() not in FORMATS:
        raise InputError(f"output: {output} should end in .png, .jpg or .webp")
    if output.exists() and not _is_ours(output):
        same = ", the picture that is asked about" if media.exists() and os.path.samefile(output, media) else ""
        raise InputError(
            f"output: {output} is there already and not of an earlier answer{same}; give another --output"
        )
    check_writable(output.parent)


def _is_ours(path: Path) -> bool:
    """Whether a file is a picture that was written here, by what its EXIF data say."""
    try:
        return exif_of(path).get(SOFTWARE) == MADE_BY
    except PictureError:
        return False


def compare_answers(
    model: Any,
    processor: Any,
    media: Media,
    text: str,
    pruner: Any,
    *,
    max_new_tokens: int = 128,
    label: str = "pruned",
) -> Asked:
    """Asks an unwrapped model and the same model under the pruner, which may be all that `vtprune.wrap` takes."""
    check_text(processor, text, "question")
    kind = "video" if isinstance(media, Video) else "image"
    if kind == "video":
        check_videos(processor, kind)
    try:
        inputs = encode(processor, [question(media, text)])
    except ValueError as error:
        raise InputError(
            f"{kind}: the model's processor refuses this {kind} ({size_text(media)}): {first_line(error)}"
        ) from error
    answers = []
    for chosen in (vtprune.NoPruning(), pruner):
        with vtprune.wrapped(model, chosen):
            answers += answer_batch(
                model,
                processor.tokenizer,
                inputs,
                generation=read_generation({"until": list(STOPS)}, max_new_tokens),
            )
            report = vtprune.report(model)
    times = measure_prefill(model, [inputs], {"unpruned": None, "pruned": pruner}, rounds=5)
    kept = report.samples[0].images[0]
    title = (
        f"{text}\n{label}: {kept.achieved_tokens:.4g} of {kept.tokens} vision tokens\n"
        f"unpruned: {answers[0].text.strip()}\npruned: {answers[1].text.strip()}"
    )
    if isinstance(media, Video):
        # Frames that make one row of tokens.
        deep = getattr(processor.video_processor, "temporal_patch_size", None) or 1
        picture = compare_frames(media, deep, report, title)
    else:
        picture = compare(seen_image(media, processor, inputs.get("pixel_values")), report, title)
    unpruned, pruned = answers
    return Asked(unpruned, pruned, report=report, prefill=times, picture=picture)


def table(asked: Asked, label: str) -> Table:
    """What both answers cost."""
    full, pruned, prefill = asked.unpruned.cost, asked.pruned.cost, asked.prefill
    result = Table()
    result.add_column("")
    for heading in ("unpruned", label, "share"):
        result.add_column(heading, justify="right")
    result.add_row("answer", asked.unpruned.text.strip(), asked.pruned.text.strip(), "")
    for name, before, after, digits in (
        ("vision tokens", full.kept_tokens, pruned.kept_tokens, 1),
        ("prefill GFLOPs", full.flops / 1e9, pruned.flops / 1e9, 3),
        ("KV cache kB, prompt", full.kv_bytes / 1e3, pruned.kv_bytes / 1e3, 1),
        ("KV cache kB, at the end", full.kv_bytes_end / 1e3, pruned.kv_bytes_end / 1e3, 1),
        ("prefill ms", prefill.median("unpruned"), prefill.median("pruned"), 2),
    ):
        shown = f"{before:.{digits}f}", f"{after:.{digits}f}"
        # Of the two numbers as they stand beside it.
        result.add_row(name, *shown, f"{100 * float(shown[1]) / float(shown[0]):.1f}%")
    return result


def run_ask(
    path: Path,
    text: str,
    console: Console,
    *,
    method: str | None = None,
    keep: int | float | None = None,
    keep_video: int | float | None = None,
    frames: int | None = None,
    fps: float | None = None,
    output: Path,
    model_name: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    max_new_tokens: int = 128,
) -> Asked:
    """Answers, prints the table and writes the picture; raises VTPruneError or RunError.

    path: a picture, a video or a folder of frames. method None: what lies in the model's folder, else flowcut; keep
    None: 25%, where the method does not say its own. Of a video: keep_video is kept instead (None: keep) of so many
    frames (None: 16); fps: of a folder's frames, how many are a second (None: 2).
    """
    if method is None:
        method = DEFAULT_METHOD if model_name is None or not holds_method(model_name) else folder_text(model_name)
    if keep is not None and not takes_keep(method) and method != UNPRUNED:
        raise InputError(f"keep: {method} says how much it keeps itself; leave out --keep")
    if not is_video(path):
        for name, value in (("keep-video", keep_video), ("frames", frames)):
            if value is not None:
                raise InputError(f"{name}: {path} is taken for a picture; leave out --{name}, which is of videos")
    if keep_video is not None:
        method = _with_keep_video(method, keep_video)
    setting = build_settings([method], [DEFAULT_KEEP if keep is None else keep])[-1]
    if setting.method == UNPRUNED:
        raise InputError("method: 'none' is what the other method is compared with; name another")
    media = read_media(path, "video" if is_video(path) else "image", FRAMES if frames is None else frames, fps=fps)
    check_output(output, path)
    model, processor = load_model(model_name or setting.own_model or None, device=device, dtype=dtype)
    with quiet_untrained():
        asked = compare_answers(
            model,
            processor,
            media,
            text,
            pruner=setting.method_source,
            max_new_tokens=max_new_tokens,
            label=_label(setting),
        )
    console.print(table(asked, setting.label))
    if setting.untrained:
        console.print(setting.untrained, highlight=False, soft_wrap=True)
    for note in asked.report.samples[0].images[0].notes:
        console.print(note, style="dim", highlight=False)
    before = output.exists()
    write_bytes(output, encoded(asked.picture, output.suffix))
    notice(console, f"wrote {output}{', in place of the one before' if before else ''}")
    return asked


def _with_keep_video(method: str, keep: int | float) -> str:
    """The method's text with what it keeps of videos; raises InputError where that is said already."""
    last = parse_entry(method)[-1]
    if last.folder or "keep_video" in dict(last.options):
        raise InputError(f"keep-video: {method} says how much it keeps itself; leave out --keep-video")
    return f"{method}{',' if last.options else ':'}keep_video={keep!r}"


def _label(setting: Setting) -> str:
    """The method and what it keeps, for the picture's title."""
    return setting.label if setting.keep is None else f"{setting.label}, keep {show_keep(setting.keep)}"


def encoded(picture: Image.Image, suffix: str) -> bytes:
    """The picture as the bytes of a file with this suffix, marked as one that was written here."""
    exif = Image.Exif()
    exif[SOFTWARE] = MADE_BY
    buffer = io.BytesIO()
    picture.save(buffer, format=FORMATS[suffix.lower()], exif=exif)
    return buffer.getvalue()
