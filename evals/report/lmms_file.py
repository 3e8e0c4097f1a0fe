"""Results of lmms-eval: `*_results.json`, and the `*_samples_*.jsonl` of the same run beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from vtprune.assets import title_of
from vtprune.errors import FileError, VTPruneError
from vtprune.evals.lmms.model_args import ARGUMENTS, parse_model_args
from vtprune.evals.report.bench_file import quoted, task_score
from vtprune.evals.report.runs import Costs, Row, Run, TaskScore
from vtprune.evals.settings import UNPRUNED, Setting
from vtprune.hooks.weights import untrained
from vtprune.json_files import OBJECT, parse, read_file, read_json
from vtprune.method.resolving import resolve
from vtprune.method.texts import parse_entry

ENDING, SAMPLES = "_results.json", "_samples_"
WHAT = "a results file of lmms-eval"
OWN = "vtprune"
# Arguments of vtprune's model that a number depends on, beside its method.
OWN_DECIDING = ("dtype", "attn_implementation", "positions", "frames", "max_new_tokens")
# Options of the command line that a number depends on, by the names that lmms-eval's file has for them.
DECIDING = ("limit", "offset", "gen_kwargs", "random_seed", "system_instruction", "num_fewshot")
# What else the file says of the code that ran.
CODE = ("lmms_eval_version", "git_hash", "system_instruction", "system_instruction_sha")
# Where a task has several numbers of which the first is not the one that it is known for.
PREFERRED = ("mme_perception_score",)
COMMAND = ("limit", "offset", "gen_kwargs", "batch_size", "device")


class Settings(TypedDict):
    """What was asked for."""

    model: str
    model_args: NotRequired[str | None]


class LmmsFile(TypedDict):
    """The part of such a file that the report reads."""

    results: dict[str, dict[str, Any]]
    config: Settings


LMMS = TypeAdapter(LmmsFile)


@dataclass(frozen=True)
class _Answers:
    """What was logged of a task's questions: scores by metric and question, and costs."""

    scores: Mapping[str, Mapping[str, float]]
    costs: list[dict[str, Any]]


def is_lmms(path: Path) -> bool:
    """Whether a file has the name of such results."""
    return path.name.endswith(ENDING)


def read_lmms(path: Path) -> Run:
    """The run that such a file holds, one setting; raises FileError for a broken file, samples included."""
    data: dict[str, Any] = read_json(LMMS, path, WHAT)
    asked = data["config"]
    results = {task: found for task, found in data["results"].items() if _main(found) is not None}
    if not results:
        raise FileError(f"{path} is not {WHAT}: no task has a number in it")
    logged = {task: _read_samples(path, task) for task in results}
    try:
        setting, identity, model = _setting(asked["model"], asked.get("model_args") or "")
    except VTPruneError as error:
        raise FileError(f"{path}: {error}") from error
    config = {**identity, **{name: asked.get(name) for name in DECIDING}}
    config |= {name: data[name] for name in CODE if data.get(name) is not None}
    row = Row(
        key=json.dumps([setting.label, setting.keep, setting.folder]),
        method=setting.method,
        label=setting.label,
        keep=setting.keep,
        scores={task: _score(found, logged[task].scores) for task, found in results.items()},
        spent={task: _costs(found, logged[task].costs) for task, found in results.items()},
        source=path,
        metrics={task: _numbers(found) for task, found in results.items()},
        untrained=_untrained(setting),
    )
    return Run(
        path=path,
        model=model,
        identity=config,
        rows=(row,),
        questions={task: _count(data, task, logged[task]) for task in results},
        created=str(data.get("date", "")),
        command=_command(asked, list(results)),
        versions={"lmms-eval": str(data["lmms_eval_version"])} if data.get("lmms_eval_version") else {},
    )


def _setting(name: str, text: str) -> tuple[Setting, dict[str, Any], str]:
    """What pruned, what else the numbers depend on, and the model."""
    if name != OWN:
        pairs = [part for part in text.split(",") if part]
        model = next((part.partition("=")[2] for part in pairs if part.startswith("pretrained=")), name)
        identity = {"model": model, "run by": f"lmms-eval --model {name}"}
        identity["model_args"] = ",".join(part for part in pairs if not part.startswith("pretrained="))
        return Setting(UNPRUNED), identity, model
    found = parse_model_args(text, list(ARGUMENTS))
    model = title_of(found.get("pretrained"))
    identity = {"model": model, "run by": f"lmms-eval --model {name}"}
    identity.update({key: value for key, value in found.items() if key in OWN_DECIDING})
    if "config" in found:
        folder = Path(str(found["config"]))
        return Setting(folder.name, title=folder.name, folder=str(folder)), identity, model
    text = str(found.get("method", UNPRUNED))
    stages = parse_entry(text)
    last = stages[-1]
    if len(stages) > 1:
        title = "+".join(stage.text for stage in stages)
        return Setting("+".join(stage.name for stage in stages), title=title), identity, model
    if last.folder:
        return Setting(Path(last.name).name, title=Path(last.name).name, folder=last.name), identity, model
    options = tuple(pair for pair in last.options if pair[0] != "keep")
    keep = dict(last.options).get("keep")
    return Setting(last.name, keep, options), identity, model


def _untrained(setting: Setting) -> str:
    """What is said of a method that brings weights, where no folder brings them; nothing of one that is not known."""
    if setting.folder:
        return ""
    try:
        return untrained(resolve(setting.title) if setting.title else setting.pruners())
    except (VTPruneError, TypeError):
        return ""


def _number(value: Any) -> float | None:
    known = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if known else None


def _numbers(found: Mapping[str, Any]) -> dict[str, float]:
    return {key: number for key, value in found.items() if "," in key and (number := _number(value)) is not None}


def _main(found: Mapping[str, Any]) -> str | None:
    """The name of a task's main number with its filter: a preferred one, or the first that is no cost and no error."""
    own = [key for key in _numbers(found) if not key.startswith(f"{OWN}_") and "_stderr" not in key]
    told = [key for key in own if key.partition(",")[0] in PREFERRED]
    return next(iter(told or own), None)


def _score(found: Mapping[str, Any], answers: Mapping[str, Mapping[str, float]]) -> TaskScore:
    key = _main(found)
    assert key is not None
    metric, _, variant = key.partition(",")
    errors = (_number(found.get(f"{metric}_{name},{variant}")) for name in ("stderr_clt", "stderr"))
    stderr = next((error for error in errors if error is not None), None)
    score = {"metric": metric, "value": float(found[key]), "stderr": stderr}
    return task_score(score, dict(answers.get(metric, {})))


def _read_samples(path: Path, task: str) -> _Answers:
    """What lies beside the results; nothing where samples were not logged."""
    beside = path.with_name(f"{path.name.removesuffix(ENDING)}{SAMPLES}{task}.jsonl")
    scores: dict[str, dict[str, float]] = {}
    costs: list[dict[str, Any]] = []
    if not beside.is_file():
        return _Answers(scores, costs)
    for line in _lines(beside):
        question = f"{task}/{line.get('doc_id')}"
        for name, value in line.items():
            score = _number(value["score"] if isinstance(value, dict) and "score" in value else value)
            if score is not None and name != "doc_id":
                scores.setdefault(name, {})[question] = score
        counts = line.get("token_counts")
        if isinstance(counts, list) and counts and isinstance(counts[0], dict) and "kept_tokens" in counts[0]:
            costs.append(counts[0])
    return _Answers(scores, costs)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(read_file(path, "samples of lmms-eval").split(b"\n"), 1):
        if line.strip():
            yield parse(OBJECT, line, f"{path}, line {number}", "a sample of lmms-eval")


def _count(data: Mapping[str, Any], task: str, answers: _Answers) -> int:
    told = data.get("n-samples", {}).get(task, {}).get("effective")
    return told if isinstance(told, int) else max((len(one) for one in answers.scores.values()), default=0)


def _costs(found: Mapping[str, Any], logged: list[dict[str, Any]]) -> Costs:
    """Ratios of the sums over a task's questions where they were logged; else the task's own rows."""
    if logged:
        return _summed(logged)

    def row(name: str, scale: float = 1.0) -> float | None:
        value = _number(found.get(f"{OWN}_{name},none"))
        return None if value is None else value / scale

    kept, share = row("tokens_kept"), row("tokens_percent", 100)
    return Costs(
        before=kept / share if kept is not None and share else None,
        kept=kept,
        flops=row("flops_percent", 100),
        kv=row("kv_percent", 100),
        kv_end=row("kv_end_percent", 100),
        prefill_ms=row("prefill_ms"),
    )


def _summed(costs: list[dict[str, Any]]) -> Costs:
    def total(name: str) -> float | None:
        values = [_number(cost.get(name)) for cost in costs]
        told = [value for value in values if value is not None]
        return math.fsum(told) if len(told) == len(values) else None

    def mean(name: str) -> float | None:
        found = total(name)
        return None if found is None else found / len(costs)

    def share(part: str, whole: str) -> float | None:
        one, all_of_it = total(part), total(whole)
        return one / all_of_it if one is not None and all_of_it else None

    return Costs(
        before=mean("visual_tokens"),
        kept=mean("kept_tokens"),
        published=mean("published_tokens"),
        flops=share("flops", "flops_full"),
        kv=share("kv_bytes", "kv_bytes_full"),
        kv_end=share("kv_bytes_end", "kv_bytes_end_full"),
        prefill_ms=mean("prefill_ms"),
    )


def _command(asked: Mapping[str, Any], tasks: list[str]) -> str:
    """The command that asks for the same."""
    start = ["vtprune", "lmms-eval"] if asked["model"] == OWN else ["python", "-m", "lmms_eval", "eval"]
    parts = [*start, "--model", asked["model"]]
    if asked.get("model_args"):
        parts += ["--model_args", str(asked["model_args"])]
    parts += ["--tasks", ",".join(tasks)]
    for name in COMMAND:
        value = asked.get(name)
        if value not in (None, "", 0):
            parts += [f"--{name}", f"{value:g}" if isinstance(value, float) else str(value)]
    if asked.get("random_seed"):
        parts += ["--seed", str(asked["random_seed"])]
    return quoted([*parts, "--log_samples", "--output_path", "results"])
