"""Result files as `vtprune bench` and lmms-eval write them, small and made up."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vtprune.evals.bench.results import FORMAT

CATEGORIES = ("counting", "reading")
CONFIG = {
    "model": "a/model", "model_files": "", "tasks": ["shapes"], "data": "d", "limit": 8, "seed": 0, "dtype": "auto",
    "device": None, "attn_implementation": None, "batch_size": None, "max_new_tokens": 16, "code": "c",
}  # fmt: skip
ALL_RIGHT = (1.0,) * 8


def record(
    method: str, keep: float | None, correct: Sequence[float], *, flops: float = 0.5, label: str | None = None
) -> dict[str, Any]:
    """A setting whose questions are of two categories in turn."""
    mean = sum(correct) / len(correct)
    main = {"name": "shapes", "task": "shapes", "metric": "accuracy", "value": mean, "stderr": 0.1}
    scores = [main]
    for place, name in enumerate(CATEGORIES):
        own = correct[place::2]
        scores.append({**main, "name": name, "value": sum(own) / len(own)})
    return {
        "method": method,
        "label": label or method,
        "keep": keep,
        "scores": scores,
        "tokens": {"before": 144.0, "kept": 144.0 * (keep or 1.0), "published": None},
        "flops": {"share": flops, "scoring_share": 0.0},
        "kv": {"share": flops, "end_share": flops},
        "prefill": {"ms": 10.0, "ratio": flops, "over_scoreless_ms": None},
        "correct": list(correct),
        "metrics": {"shapes": {"accuracy,none": mean}},
    }


def settings(*records: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By keys that differ."""
    return {f"{one['label']}-{one['keep']}": one for one in records}


UNPRUNED = record("none", None, ALL_RIGHT, flops=1.0)


def bench(folder: Path, *records: dict[str, Any], config: Mapping[str, Any] | None = None, **more: Any) -> Path:
    """A folder of `vtprune bench`, with the unpruned model in it."""
    data = {
        "format": FORMAT,
        "created": "2026-01-01T00:00:00+00:00",
        "config": {**CONFIG, **(config or {})},
        "command": "/somewhere/bin/vtprune bench --limit 8",
        "questions": [
            {"task": "shapes", "doc_id": place, "category": CATEGORIES[place % 2]} for place in range(len(ALL_RIGHT))
        ],
        "settings": settings(UNPRUNED, *records),
        "versions": {"vtprune": "0.1.0"},
        "machine": {"processor": "a chip", "threads": 1, "dtype": "float32", "device": "cpu"},
        **more,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(data))
    return folder


def lmms(
    folder: Path,
    results: Mapping[str, Mapping[str, Any]],
    *,
    model_args: str,
    model: str = "vtprune",
    date: str = "20260101_000000",
    samples: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    **config: Any,
) -> Path:
    """A folder of lmms-eval: the results of a run, and its samples where they are given."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = {"model": model, "model_args": model_args, "limit": 4.0, "random_seed": 0, "gen_kwargs": "", **config}
    data = {"results": results, "config": asked, "lmms_eval_version": "0.7.3", "date": date}
    (folder / f"{date}_results.json").write_text(json.dumps(data))
    for task, lines in (samples or {}).items():
        text = "".join(json.dumps({"doc_id": place, **line}) + "\n" for place, line in enumerate(lines))
        (folder / f"{date}_samples_{task}.jsonl").write_text(text)
    return folder


def costs(kept: float, flops: float) -> dict[str, float]:
    """The rows that vtprune adds to a task."""
    return {
        "vtprune_tokens_kept,none": kept,
        "vtprune_tokens_percent,none": 100 * kept / 576,
        "vtprune_flops_percent,none": flops,
        "vtprune_kv_percent,none": flops,
        "vtprune_kv_end_percent,none": flops,
        "vtprune_prefill_ms,none": 90.0,
    }
