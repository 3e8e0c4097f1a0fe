"""The measurement of a server at a tiny size: that it runs, and compares like with like; no seconds are looked at."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from tests.serving.cases import LLAVA
from tests.serving.test_served import PYTHON, pytestmark  # noqa: F401

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": "",
}


def test_both_engines_answer_the_same_requests_and_one_with_shorter_prompts(tmp_path: Path) -> None:
    output = tmp_path / "timing.json"
    options = "--method divprune --keep 36 --requests 6 --alone 2 --tokens 2 --side 96 --dtype float32 --length 512"
    options += " --eager --dummy"
    words = [PYTHON, "-m", "vtprune.serving.timing", str(LLAVA), *options.split(), "--output", str(output)]
    told = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT}, check=False)
    assert told.returncode == 0, told.stderr[-2000:]
    found = json.loads(output.read_text())["found"]
    assert list(found) == ["unpruned", "divprune at 36"]
    whole, pruned = found.values()
    assert whole["prompt_tokens"] - pruned["prompt_tokens"] == 144 - 36
    for one in found.values():
        assert one["first_token_s"] > 0
        assert one["requests_a_second"] > 0
        assert f"first token after {1e3 * one['first_token_s']:.1f} ms" in told.stdout
