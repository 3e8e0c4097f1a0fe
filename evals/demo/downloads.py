"""What can be downloaded of an answer: the picture of what was kept, and everything as JSON."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from PIL import Image

from vtprune.evals.ask.ask import encoded
from vtprune.evals.ask.overlay import compare
from vtprune.evals.demo.asking import Finished
from vtprune.files import write_bytes, write_json
from vtprune.provenance import versions


def write(folder: Path, image: Image.Image, text: str, *, model: str, finished: list[Finished]) -> tuple[str, str]:
    """The paths of a PNG and of a JSON file in a folder; the last of the answers is the pruned one."""
    unpruned, pruned = finished[0], finished[-1]
    kept = pruned.report.samples[0].images[0]
    title = (
        f"{text}\n{pruned.label}: {kept.achieved_tokens:.4g} of {kept.tokens} vision tokens\n"
        f"unpruned: {unpruned.answer.text.strip()}\npruned: {pruned.answer.text.strip()}"
    )
    name = re.sub(r"\W+", "-", pruned.setting.method).strip("-")
    picture, data = folder / f"{name}.png", folder / f"{name}.json"
    write_bytes(picture, encoded(compare(image, pruned.report, title), ".png"))
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
