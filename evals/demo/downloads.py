"""What can be downloaded of an answer: the picture of what was kept, and everything as JSON."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vtprune.evals.ask.ask import encoded
from vtprune.evals.ask.overlay import compare
from vtprune.evals.ask.sheet import compare_frames
from vtprune.evals.demo.asking import Finished
from vtprune.files import write_bytes, write_json
from vtprune.loading.media import Media
from vtprune.loading.videos import Video
from vtprune.provenance import versions


def write(
    folder: Path, media: Media, together: int, text: str, *, model: str, finished: list[Finished]
) -> tuple[str, str]:
    """The paths of a PNG and of a JSON file in a folder; the last of the answers is the pruned one. together: frames
    that the encoder takes as one."""
    unpruned, pruned = finished[0], finished[-1]
    kept = pruned.report.samples[0].images[0]
    title = (
        f"{text}\n{pruned.label}: {kept.achieved_tokens:.4g} of {kept.tokens} vision tokens\n"
        f"unpruned: {unpruned.answer.text.strip()}\npruned: {pruned.answer.text.strip()}"
    )
    name = re.sub(r"\W+", "-", pruned.setting.method).strip("-")
    picture, data = folder / f"{name}.png", folder / f"{name}.json"
    if isinstance(media, Video):
        drawn = compare_frames(media, together, pruned.report, title)
    else:
        drawn = compare(media, pruned.report, title)
    write_bytes(picture, encoded(drawn, ".png"))
    write_json(data, {"model": model, "question": text, "answers": [as_json(one) for one in finished], **versions()})
    return str(picture), str(data)


def as_json(finished: Finished) -> dict[str, Any]:
    """One way to answer with all that is known of it."""
    return {
        "label": finished.label,
        "method": [one.to_dict() for one in finished.setting.pruners()],
        "answer": finished.answer.to_dict(),
        "prefill_ms": finished.prefill_ms,
        "decode_ms_per_token": finished.step_ms,
        "report": finished.report.to_dict(),
    }
