"""The OpenAI server of vLLM, started with a method."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from vtprune.errors import InputError
from vtprune.serving.arguments import engine_args

# The module itself: the command `vllm serve` of 0.32 asks for a package called vllm, which builds for CPUs are not.
SERVER = "vllm.entrypoints.openai.api_server"
OURS = ("--model", "--hf-overrides", "--hf-overrides.", "--video-pruning-rate")


def server_command(
    model: str,
    method: str,
    *,
    keep: int | float | None = None,
    positions: str = "original",
    most: int | float | None = None,
    others: Sequence[str] = (),
) -> list[str]:
    """The command of a server; others: vLLM's own options. Raises VTPruneError for what cannot be served, InputError
    for an option that is vtprune's to set."""
    taken = [word for word in others if word.replace("_", "-").startswith(OURS)]
    if taken:
        raise InputError(f"{taken[0].split('=')[0]} is set by vtprune serve; leave it out")
    options = {} if keep is None else {"keep": keep}
    given: dict[str, Any] = engine_args(model, method, positions=positions, most=most, **options)
    words = ["--model", given["model"], "--hf-overrides", json.dumps(given["hf_overrides"])]
    if "video_pruning_rate" in given:
        words += ["--video-pruning-rate", str(given["video_pruning_rate"])]
    return [sys.executable, "-m", SERVER, *words, *others]


def run_server(command: Sequence[str]) -> None:
    """The server takes the place of this process, so that signals reach it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], list(command))
