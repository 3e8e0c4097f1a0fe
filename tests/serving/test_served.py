"""vLLM's answers with vtprune's pruners against transformers' with `vtprune.wrap`: token for token.

`make serve-test` runs these. The two live in environments of their own, so that requests and answers travel in files;
all engines run in one process, one after the other.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.serving.cases import (
    KEEP,
    LLAVA,
    METHODS,
    Reference,
    asked,
    distance,
    llava_pairs,
    llava_requests,
    qwen_requests,
    unsteady,
    write_covipal,
    write_pictures,
    write_qwen,
    write_stock_llava,
)

PYTHON = os.environ.get("VTPRUNE_VLLM_PYTHON", "")
# Pictures of the bundled set, each with its question; all of them are asked with each method.
PICTURES = int(os.environ.get("VTPRUNE_SERVED_PICTURES", "30"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="vLLM lives in an environment of its own: make serve-test makes it"),
]
TOLERANCE = 1e-4
QWEN_KEEP = 9
Request = dict[str, Any]


@dataclass(frozen=True)
class Pass:
    """Requests that an engine is given at once; again: they were asked before, so that blocks are in its cache."""

    name: str
    requests: list[Request]
    again: bool = False


@dataclass(frozen=True)
class Served:
    """What the engines were asked, by job, and what they answered."""

    passes: dict[str, list[Pass]]
    positions: dict[str, str]
    answers: dict[str, Any]
    references: dict[str, Reference]

    def reference(self, job: str) -> Reference:
        """Of the job's model."""
        return self.references[job.split("-")[0]]


def llava_passes(rows: list[dict[str, Any]]) -> list[Pass]:
    found = [Pass(name, llava_requests(rows, asked(name))) for name in METHODS]
    found += [
        Pass(f"{name} again", llava_requests(rows[:8], asked(name)), again=True) for name in ("divprune", "cdpruner")
    ]
    found.append(Pass("divprune, another keep", llava_requests(rows[:4], asked("divprune", keep=16))))
    mixed = [
        request
        for number, name in enumerate(METHODS)
        for request in llava_requests(rows[:2], asked(name, keep=20 + 3 * number))
    ]
    found.append(Pass("all methods at once", mixed))
    for name in ("divprune", "grid", "pool"):
        pairs = llava_pairs(rows, asked(name))
        found += [Pass(f"{name}, two pictures", pairs), Pass(f"{name}, two pictures again", pairs, again=True)]
    return found


def qwen_passes(folder: Path, methods: tuple[str, ...]) -> list[Pass]:
    found = []
    for again in (False, True):
        for name in methods:
            requests = qwen_requests(folder, asked(name, keep=QWEN_KEEP))
            found.append(Pass(f"{name}{' again' if again else ''}", requests, again=again))
    return found


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("served")
    qwen, stock = write_qwen(folder / "qwen"), write_stock_llava(folder / "stock")
    rows, covipal = write_pictures(folder, PICTURES), write_covipal(folder / "covipal")
    small = {"max_num_batched_tokens": 64}
    passes = {
        "llava-original": llava_passes(rows),
        "llava-compact": llava_passes(rows),
        "llava-covipal": [
            Pass(name, llava_requests(rows, {"folder": str(covipal)}), again=name != "covipal")
            for name in ("covipal", "covipal again")
        ],
        "qwen-original": qwen_passes(folder, METHODS),
        "qwen-chunks": qwen_passes(folder, ("divprune", "pool", "fopru")),
        "llava-stock": [Pass("none", llava_requests(rows, asked("none")))],
        "qwen-stock": [Pass("none", qwen_requests(folder, asked("none")))],
    }
    models = {"llava": str(LLAVA), "qwen": str(qwen)}
    positions = {job: "compact" if job == "llava-compact" else "original" for job in passes}
    options = {"llava-original": small, "qwen-chunks": {"max_num_batched_tokens": 32}}
    jobs = {
        job: {
            "model": str(stock) if job == "llava-stock" else models[job.split("-")[0]],
            "pruner": None if job.endswith("stock") else str(covipal) if job.endswith("covipal") else "divprune",
            "settings": {"positions": positions[job], "most": 1.0, **({} if "covipal" in job else {"keep": KEEP})},
            "options": options.get(job, {}),
            "passes": [one.requests for one in own],
        }
        for job, own in passes.items()
    }
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("engine.py")
    with (folder / "log").open("w") as log:
        subprocess.run(
            [PYTHON, str(script), str(folder / "jobs.json"), str(folder)],
            check=True,
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONPATH": ""},
        )
    answers = {job: json.loads((folder / f"{job}.json").read_text()) for job in passes}
    return Served(passes, positions, answers, {name: Reference(Path(path)) for name, path in models.items()})


def steady(served: Served, job: str, one: Pass) -> list[int]:
    """The requests of a pass in which rounding decides nothing: of VisPruner, which drops one of two tokens that are
    all but alike, round by round, those whose choice is the same with a little noise."""
    requests = list(enumerate(one.requests))
    if not job.startswith("llava"):
        return [number for number, _ in requests]
    reference = served.reference(job)
    return [
        number
        for number, request in requests
        if request["method"].get("method") != "vispruner" or not unsteady(reference, request)
    ]


def compared(served: Served, job: str) -> list[str]:
    """What differs from transformers, by pass; and a line for each that says how near they are."""
    assert "error" not in served.answers[job], served.answers[job]
    wrong, reference = [], served.reference(job)
    for one, answers in zip(served.passes[job], served.answers[job], strict=True):
        assert len(answers) == len(one.requests), f"{job}, {one.name}: {answers}"
        wanted = [reference.answer(request, served.positions[job]) for request in one.requests]
        judged = steady(served, job, one)
        assert len(judged) >= 0.8 * len(answers)
        away = [distance(answers[number], wanted[number]) for number in judged]
        cached = sum(answer["cached"] for answer in answers)
        print(f"{job:15} {one.name:26} {len(away):3} requests, at most {max(away):.1e} away, {cached} tokens cached")
        if max(away) > TOLERANCE:
            wrong.append(f"{one.name}: {sum(far > TOLERANCE for far in away)} of {len(away)}")
        if one.again and job != "llava-stock" and not cached:
            wrong.append(f"{one.name}: nothing came from the prefix cache")
    return wrong


@pytest.mark.parametrize("job", ["llava-original", "llava-compact", "llava-covipal", "qwen-original", "qwen-chunks"])
def test_every_answer_is_that_of_a_wrapped_model(served: Served, job: str) -> None:
    assert compared(served, job) == []


@pytest.mark.parametrize("job", ["llava-original", "llava-compact", "llava-covipal", "qwen-original"])
def test_the_kept_tokens_are_those_of_a_wrapped_model(served: Served, job: str) -> None:
    first = [one for one in served.passes[job] if not one.again][: len(METHODS)]
    for one, answers in zip(first, served.answers[job], strict=False):
        judged = steady(served, job, one)
        wanted = {
            tuple(kept)
            for number in judged
            for kept in served.reference(job).answer(one.requests[number], served.positions[job])["kept"]
        }
        found = {tuple(kept) for kept in answers[0]["choices"]}
        wanted = set() if one.name == "none" else wanted
        # A choice that rounding decides is another one.
        assert wanted <= found, f"{job}, {one.name}"
        assert len(found - wanted) <= len(one.requests) - len(judged), f"{job}, {one.name}"


@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_keeping_everything_is_vllms_own_model(served: Served, family: str) -> None:
    (stock,) = served.answers[f"{family}-stock"]
    for job in (one for one in served.passes if one.startswith(family) and one.endswith(("original", "compact"))):
        pairs = list(zip(served.answers[job][0], stock, strict=True))
        assert max(distance(*pair) for pair in pairs) <= 1e-5, job
        assert [one["prompt"] for one, _ in pairs] == [two["prompt"] for _, two in pairs]


def test_prompts_are_as_short_as_what_is_kept(served: Served) -> None:
    by_name = {
        one.name: answers
        for one, answers in zip(served.passes["llava-original"], served.answers["llava-original"], strict=True)
    }
    whole, cut = by_name["none"][0]["prompt"], by_name["divprune"][0]["prompt"]
    assert whole - cut == 144 - KEEP
