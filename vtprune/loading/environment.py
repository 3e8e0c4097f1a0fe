"""What is said to the libraries before they are first imported: no bars of their own, and no network without need."""

from __future__ import annotations

import os


def prepare_environment(offline: bool) -> None:
    """Keeps tokenizers, datasets and lmms-eval quiet and, where nothing is to be fetched, off the network."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if offline:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
            os.environ[name] = "1"
