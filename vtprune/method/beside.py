"""What lies beside a model's weights, on this machine only: its image statistics and its tokenizer."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, TypeGuard

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def local_json(source: str, name: str) -> dict[str, Any]:
    """The JSON object in a file beside the model, {} if there is none."""
    from transformers.utils import cached_file

    try:
        path = cached_file(source, name, local_files_only=True, _raise_exceptions_for_missing_entries=False)
        data = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


@functools.lru_cache(maxsize=16)
def image_statistics(source: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation (RGB) that the processor in a folder or in the hub's local cache normalises
    pixels with, or None; nothing is downloaded."""
    if not source:
        return None
    for name in PROCESSOR_FILES:
        data = local_json(source, name)
        inner = data.get("image_processor")
        data = inner if isinstance(inner, dict) else data
        mean, std = data.get("image_mean"), data.get("image_std")
        if _three_numbers(mean) and _three_numbers(std):
            return tuple(map(float, mean)), tuple(map(float, std))
    return None


def _three_numbers(values: Any) -> TypeGuard[list[float]]:
    return isinstance(values, list) and len(values) == 3 and all(isinstance(one, int | float) for one in values)


@functools.lru_cache(maxsize=16)
def tokenizer_of(source: str) -> Any | None:
    """The tokenizer in a folder or in the hub's local cache, or None; nothing is downloaded."""
    from transformers import AutoTokenizer

    # Where there are no files transformers makes up an empty tokenizer.
    if not source or not any(local_json(source, name) for name in TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError):
        return None
