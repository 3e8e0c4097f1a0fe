"""python -m tests.saved: writes the files of this folder anew, with the code as it is now."""

from __future__ import annotations

import io
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

import vtprune
from tests.matrix import CACHE, DROPS, GATED, PRUNERS, RELEASED, Drops, label
from tests.saved import (
    ANSWERS,
    BENCH,
    BENCH_ANSWERS,
    BENCH_CUT,
    BENCH_FINISHED,
    BENCH_RUN,
    CONFIG,
    CONFIGS,
    PICTURES,
    TRAINED,
    TUNE,
    TUNE_RUN,
    TUNE_TRIALS,
    answer,
    load_model,
)
from vtprune.assets import SHAPES_EVAL

# Methods joined by +, as the command line takes them.
TEXTS = (
    "visionzip:keep=64+fastv:keep=0.25",
    "turbo:keep=0.6+divprune:keep=0.4+pyramid_drop:keep=0.2",
    "flowcut:keep=72+d2o:keep=0.3",
    "holov:keep=0.5+sparsevlm:keep=0.3+d2o:keep=0.2",
)
LISTS = ([Drops(encoder=(0, 2)), vtprune.FastV(keep=0.3)],)
# Small, so that the files are.
BRINGING = (vtprune.PMoD(), vtprune.GammaMoD(), vtprune.CoViPAL(keep=0.4, width=16, heads=2), vtprune.IARED2(keep=0.3))
SPREAD = 0.3
# Rows of the bundled evaluation set whose pictures are asked about, and how far noise moves their pixels: no two
# patches are then alike, so that no choice hangs on the last digit of a score.
ROWS, NOISE = (3, 8), 12

# `python -m vtprune.cli` by the name of the installed command, which is what its files then say.
COMMAND = (
    sys.executable,
    "-c",
    "import sys, runpy; sys.argv[0] = 'vtprune'; runpy.run_module('vtprune.cli', run_name='__main__')",
)


def write_pictures() -> None:
    rows = pq.read_table(SHAPES_EVAL).to_pylist()
    PICTURES.mkdir(parents=True)
    for place, row in enumerate(ROWS):
        pixels = np.asarray(Image.open(io.BytesIO(rows[row]["image"]["bytes"])).convert("RGB"), dtype=int)
        noise = np.random.default_rng(place).integers(-NOISE, NOISE + 1, size=pixels.shape)
        Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8)).save(PICTURES / f"{place}.png", optimize=True)


def name_of(text: str) -> str:
    return re.sub(r"[^a-z0-9.+]+", "-", text.lower()).strip("-")


def write_configs(model: Any, inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Every method's config; returns the answers by their folders' names, and the texts that stand for some."""
    pruners = [*PRUNERS, *CACHE, *GATED, *RELEASED, *DROPS]
    sources: dict[str, Any] = {name_of(label(pruner)): pruner for pruner in pruners}
    assert len(sources) == len(pruners), "two methods have one name"
    sources |= {name_of("+".join(map(label, stages))): stages for stages in LISTS}
    texts = {name_of(text): text for text in TEXTS}
    answers = {}
    for name, source in {**sources, **texts}.items():
        with vtprune.wrapped(model, source):
            vtprune.save_config(model, CONFIGS / name)
            answers[name] = answer(model, inputs)
        print(name, answers[name]["tokens"], flush=True)
    return answers, texts


def write_trained(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Folders with weights that nothing but chance has moved; returns the answers by the folders' names."""
    answers = {}
    own = {name for name, _ in model.named_parameters()}
    for pruner in BRINGING:
        generator = torch.Generator().manual_seed(0)
        with vtprune.wrapped(model, pruner):
            untrained = answer(model, inputs)
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    if name not in own:
                        weight.add_(torch.randn(weight.shape, generator=generator), alpha=SPREAD)
            vtprune.save(model, TRAINED / pruner.name)
            answers[pruner.name] = answer(model, inputs)
        assert answers[pruner.name]["logits"] != untrained["logits"], pruner.name
        print("trained", pruner.name, answers[pruner.name]["tokens"], untrained["tokens"], flush=True)
    return answers


def start(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    environment = {**os.environ, **offline, "LMMS_EVAL_DATASETS_CACHE": str(folder / "cache")}
    return subprocess.Popen([*COMMAND, *words], cwd=folder, env=environment)


def write_bench() -> None:
    """A run whose first settings are done and whose last one was interrupted while it was answered."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        output = folder / BENCH_RUN.name
        assert start(folder, "bench", "--methods", BENCH_FINISHED, *BENCH).wait() == 0
        running = start(folder, "bench", "--methods", f"{BENCH_FINISHED},{BENCH_CUT}", *BENCH)
        while not any(path.stat().st_size for path in output.glob(BENCH_ANSWERS)) and running.poll() is None:
            time.sleep(0.001)
        running.send_signal(signal.SIGINT)
        status = running.wait()
        (journal,) = output.glob(BENCH_ANSWERS)
        results = json.loads((output / "results.json").read_text())
        answered = len(journal.read_text().splitlines())
        assert status == 130, "it ended before it could be interrupted; try again"
        assert answered < len(results["questions"]), "it was interrupted too late; try again"
        assert len(results["settings"]) == 2
        keep(output, BENCH_RUN)


def write_tune() -> None:
    with tempfile.TemporaryDirectory() as name:
        assert start(Path(name), "tune", *TUNE, "--trials", str(TUNE_TRIALS)).wait() == 0
        keep(Path(name) / TUNE_RUN.name, TUNE_RUN)


def keep(folder: Path, target: Path) -> None:
    """Copies a run's folder, but for its large pictures, and without the name of this machine's system."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.png", "*.lock"))
    for path in target.rglob("*.json"):
        path.write_text(path.read_text().replace(platform.platform(), platform.system()))


def main() -> None:
    warnings.simplefilter("ignore", vtprune.UntrainedWarning)
    for folder in (CONFIGS, TRAINED, PICTURES, BENCH_RUN, TUNE_RUN):
        shutil.rmtree(folder, ignore_errors=True)
    write_pictures()
    model, inputs = load_model()
    configs, texts = write_configs(model, inputs)
    trained = write_trained(model, inputs)
    parts = []
    for title, content in (("texts", texts), ("configs", configs), ("trained", trained)):
        lines = [f"{json.dumps(name)}: {json.dumps(one)}" for name, one in content.items()]
        parts.append(f"{json.dumps(title)}: {{\n" + ",\n".join(lines) + "\n}")
    ANSWERS.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    write_bench()
    write_tune()
    assert all((folder / CONFIG).is_file() for folder in CONFIGS.iterdir())


if __name__ == "__main__":
    main()
