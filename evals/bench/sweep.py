"""One setting after another on one loaded model."""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import vtprune
from vtprune.errors import InputError, RunError, explain, first_line
from vtprune.evals.bench.cells import of_each
from vtprune.evals.bench.grid import alone
from vtprune.evals.bench.results import Results
from vtprune.evals.bench.scores import all_metrics, metric_names, task_scores
from vtprune.evals.bench.suite import Suite
from vtprune.evals.bench.worst import hard_costs
from vtprune.evals.lmms.journal import Journal
from vtprune.evals.lmms.model import VTPrune
from vtprune.evals.settings import DOWNSCALE, UNPRUNED, Setting
from vtprune.evals.speed.timing import measure_prefill
from vtprune.loading.model import load_model
from vtprune.method.registry import available, create
from vtprune.method.texts import show_keep

TIMED_SAMPLES = 6
# Prefill times are compared with this baseline too: it selects without scoring anything.
SCORELESS = "grid"


class NothingCut(RunError):
    """A setting that could cut no image of all the questions; the message says why."""


@dataclass
class Sweep:
    """A loaded model, the questions, where the results go, and who hears of answers that could not be read back."""

    lm: VTPrune
    suite: Suite
    results: Results
    seed: int
    tell: Callable[[str], None]
    # By task the metric that its tables show; the task's first one where it is not here.
    metrics: Mapping[str, str] = field(default_factory=dict)
    # Whether pictures that are hard to prune are measured besides.
    worst: bool = False

    def __post_init__(self) -> None:
        self.whole = self.lm.processor

    def run(self, setting: Setting) -> dict[str, Any]:
        """Evaluates and times one setting, whose cell is held, and writes cell and record; raises RunError, NothingCut
        where it pruned nothing."""
        cell = self.results.cell(setting)
        journal = Journal(cell.answers)
        for line in journal.bad:
            self.tell(line)
        started = time.perf_counter()
        with _told(setting), self._model_of(setting):
            with vtprune.wrapped(self.lm.model, setting.method_source):
                raw = self._evaluate(setting, journal, cell.folder)
                hard = hard_costs(self.lm.model, self.lm.processor) if self.worst else {}
            raw["samples"] = self._in_order(raw["samples"])
            samples = _samples(raw)
            record = self._record(setting, raw, samples)
            if hard:
                record["worst"] = self._dearest(setting, hard)
            record["prefill"] = self._time(setting)
        record["seconds"] = round(time.perf_counter() - started, 3)
        cell.write(self._about(setting, record), samples, record)
        self.results.set(setting.key(), record, [sample["question"] for sample in samples])
        journal.discard()
        return record

    def _in_order(self, samples: dict[str, Any]) -> dict[str, Any]:
        """Tasks as they were named, those of a group by their names: lmms-eval's order is another one in every run."""
        place = {task: at for at, task in enumerate(self.suite.tasks)}
        return dict(sorted(samples.items(), key=lambda item: (place.get(item[0], len(place)), item[0])))

    def _about(self, setting: Setting, record: dict[str, Any]) -> dict[str, Any]:
        """What a cell was made with."""
        asked = {"method": setting.method, "label": setting.label, "keep": setting.keep, "pruner": record["pruner"]}
        data = self.results.data
        same = {name: data[name] for name in ("config", "versions", "machine", "command") if name in data}
        return {"key": setting.key(), "setting": asked, **same}

    @contextmanager
    def _model_of(self, setting: Setting) -> Iterator[None]:
        """The model that a setting's weights were trained with, in the place of the sweep's own; for smaller pictures
        a processor that makes them."""
        if setting.method == DOWNSCALE:
            processor = self.lm.processor
            self.lm.processor = downscaled(processor, setting)
            try:
                yield
            finally:
                self.lm.processor = processor
            return
        if not setting.own_model:
            yield
            return
        shared = self.lm.model
        self.lm.model, _ = load_model(
            setting.own_model, device=str(shared.device), dtype=str(shared.dtype).removeprefix("torch."),
            attn_implementation=self.results.config["attn_implementation"],
        )  # fmt: skip
        try:
            yield
        finally:
            self.lm.model = shared

    def _evaluate(self, setting: Setting, journal: Journal, folder: Path) -> dict[str, Any]:
        from lmms_eval.evaluator import simple_evaluate

        self.lm.journal = journal
        # Its progress bars go to stderr and cannot be turned off once tqdm has been imported.
        with alone(), redirect_stderr(io.StringIO()):
            raw = simple_evaluate(
                model=self.lm,
                model_args=f"method={setting.label},keep={setting.keep}",
                tasks=list(self.suite.tasks),
                task_manager=self.suite.manager,
                force_simple=self.suite.simple,
                limit=self.suite.limit,
                bootstrap_iters=0,
                log_samples=True,
                random_seed=self.seed,
                numpy_random_seed=self.seed,
                torch_random_seed=self.seed,
                fewshot_random_seed=self.seed,
                # Some tasks write what a server would score beside the results.
                cli_args=argparse.Namespace(output_path=str(folder), process_with_media=False),
            )
        if not raw or not raw.get("samples"):
            raise RunError("lmms-eval returned no samples")
        result: dict[str, Any] = raw
        return result

    def _record(self, setting: Setting, raw: dict[str, Any], samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        costs = [sample["cost"] for sample in samples]
        if all(cost.get("kept_whole") for cost in costs):
            raise NothingCut(f"no image could be cut to its budget: {costs[0]['kept_whole']}")
        scores = []
        for task, own in raw["samples"].items():
            own = sorted(own, key=lambda sample: sample["doc_id"])
            scores += task_scores(task, raw["results"][task], own, self.metrics.get(task))
        found = [score.to_dict() for score in scores]
        return {
            "method": setting.method,
            "label": setting.label,
            "keep": setting.keep,
            "stage": setting.stage,
            "pruner": setting.described(),
            "scores": found,
            "metrics": {task: all_metrics(raw["results"][task]) for task in raw["samples"]},
            **self._costs(setting, costs),
            **self._costs_by_task(setting, samples),
            **of_each(samples, found),
        }

    def _costs(self, setting: Setting, costs: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What the answers cost; of smaller pictures beside the pictures as they were, which came first."""
        return self._beside_whole(setting, summarise(costs), self.results.settings.get(Setting(UNPRUNED).key()))

    def _costs_by_task(self, setting: Setting, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The costs of each task apart, where there are several."""
        groups: dict[str, list[dict[str, Any]]] = {}
        for sample in samples:
            groups.setdefault(sample["question"]["task"], []).append(sample["cost"])
        if len(groups) < 2:
            return {}
        whole = self.results.settings.get(Setting(UNPRUNED).key(), {}).get("by_task", {})
        found = {
            task: self._beside_whole(setting, summarise(costs), whole.get(task)) for task, costs in groups.items()
        }
        return {"by_task": found}

    @staticmethod
    def _beside_whole(setting: Setting, found: dict[str, Any], whole: dict[str, Any] | None) -> dict[str, Any]:
        """Costs of smaller pictures as shares of those of the pictures as they were; others as they are."""
        if setting.method != DOWNSCALE or whole is None:
            return found
        tokens, flops, kv = found["tokens"], found["flops"], found["kv"]
        tokens["before"] = whole["tokens"]["before"]
        tokens["share"] = tokens["kept"] / tokens["before"]
        flops["unpruned"], kv["unpruned_bytes"] = whole["flops"]["unpruned"], whole["kv"]["unpruned_bytes"]
        flops["share"], kv["share"] = flops["mean"] / flops["unpruned"], kv["mean_bytes"] / kv["unpruned_bytes"]
        kv["end_share"] = kv["end_bytes"] / whole["kv"]["end_bytes"]
        return found

    def _dearest(self, setting: Setting, costs: dict[str, dict[str, float]]) -> dict[str, Any]:
        """Of the hard pictures the one with the highest share of the unpruned FLOPs; of smaller pictures the share of
        those of the pictures as they were, which came first."""
        whole = self.results.settings.get(Setting(UNPRUNED).key(), {}).get("worst", {}).get("pictures", costs)
        base = whole if setting.method == DOWNSCALE else costs
        shares = {name: cost["flops"] / base[name]["flops_full"] for name, cost in costs.items()}
        picture = max(shares, key=lambda name: shares[name])
        return {"picture": picture, "share": shares[picture], "pictures": costs}

    def _time(self, setting: Setting) -> dict[str, float | None]:
        """Median prefill at batch 1 beside the unwrapped model's and the scoreless baseline's."""
        inputs = self._timed()
        if setting.method == DOWNSCALE:
            return self._time_smaller(inputs)
        pruners: dict[str, Any] = {"unpruned": None, "ours": setting.method_source}
        scored = setting.method not in (UNPRUNED, SCORELESS) and SCORELESS in available() and not setting.finds_keep
        if scored:
            pruners["scoreless"] = create(SCORELESS, keep=setting.keep)
        times = measure_prefill(self.lm.model, inputs, pruners)
        return {
            "ms": times.median("ours"),
            "unpruned_ms": times.median("unpruned"),
            "ratio": times.ratio("ours", "unpruned"),
            "over_scoreless_ms": times.difference("ours", "scoreless") if scored else None,
        }

    def _timed(self) -> list[Any]:
        """Prompts that are evenly spread over the questions, so that each of several tasks has its share."""
        requests = self.lm.requests
        count = min(TIMED_SAMPLES, len(requests))
        places = [place * len(requests) // count for place in range(count)]
        return [self.lm.inputs_of([requests[place]]) for place in places]

    def _time_smaller(self, inputs: Sequence[Any]) -> dict[str, float | None]:
        """The same of `inputs` with smaller pictures, each beside its prompt with the pictures as they were."""
        smaller, self.lm.processor = self.lm.processor, self.whole
        try:
            whole = self._timed()
        finally:
            self.lm.processor = smaller
        ours, plain = (
            measure_prefill(self.lm.model, prompts, {"any": None}).median("any") for prompts in (inputs, whole)
        )
        return {"ms": ours, "unpruned_ms": plain, "ratio": ours / plain, "over_scoreless_ms": None}


def downscaled(processor: Any, setting: Setting) -> Any:
    """A processor that makes smaller pictures, as a setting says; raises VTPruneError where the model takes none."""
    assert setting.keep is not None
    return vtprune.downscale(processor, setting.keep, **dict(setting.options))


def _samples(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """Of every question of every task, in their order, what it was, the answer, its scores and its cost."""
    found = []
    for task, samples in raw["samples"].items():
        metrics = metric_names(raw["results"][task])
        for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
            doc = sample["doc"]
            extra = {name: doc[name] for name in ("id", "question", "category") if name in doc}
            found.append(
                {
                    "question": {"task": task, "doc_id": sample["doc_id"], "target": sample["target"], **extra},
                    "answer": _answer(sample),
                    "scores": {name: sample[name] for name in metrics if name in sample},
                    "cost": mean_cost(sample["token_counts"]),
                }
            )
    return found


def _answer(sample: dict[str, Any]) -> Any:
    """What a model answered; of several given answers, whose loss each response holds, the likeliest."""
    responses = sample["filtered_resps"]
    if len(responses) == 1:
        return responses[0]
    each = len(sample["arguments"]) // len(responses)
    best = min(range(len(responses)), key=lambda place: responses[place][0])
    return str(sample["arguments"][each * best + 1]).strip()


def mean_cost(costs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The cost of a sample: that of its answer, or of one of the given answers, the mean of them."""
    if len(costs) == 1:
        return costs[0]

    def mean(name: str) -> Any:
        values = [cost[name] for cost in costs]
        known = all(isinstance(value, int | float) for value in values)
        return statistics.fmean(values) if known else values[0]

    return {name: mean(name) for name in costs[0]}


def summarise(costs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over samples, and ratios of the sums."""

    def total(name: str) -> float:
        return float(sum(cost[name] for cost in costs))

    def share(part: str, whole: str) -> float:
        return total(part) / total(whole) if total(whole) else 1.0

    count = len(costs)
    published = [cost["published_tokens"] for cost in costs if cost.get("published_tokens") is not None]
    return {
        "tokens": {
            "before": total("visual_tokens") / count,
            "kept": total("kept_tokens") / count,
            "share": share("kept_tokens", "visual_tokens"),
            "fewest": min(cost["kept_tokens"] for cost in costs),
            "most": max(cost["kept_tokens"] for cost in costs),
            "published": statistics.fmean(published) if published else None,
        },
        "flops": {
            "mean": total("flops") / count,
            "unpruned": total("flops_full") / count,
            "share": share("flops", "flops_full"),
            "scoring_share": share("scoring_flops", "flops"),
        },
        "kv": {
            "mean_bytes": total("kv_bytes") / count,
            "unpruned_bytes": total("kv_bytes_full") / count,
            "share": share("kv_bytes", "kv_bytes_full"),
            "end_bytes": total("kv_bytes_end") / count,
            "end_share": share("kv_bytes_end", "kv_bytes_end_full"),
        },
        "batched_prefill_ms": statistics.fmean(cost["prefill_ms"] for cost in costs),
    }


@contextmanager
def _told(setting: Setting) -> Any:
    """Names the setting in whatever goes wrong: on the way it is a failure, no longer bad input."""
    try:
        yield
    except NothingCut:
        raise
    except RunError as error:
        raise RunError(f"{setting.label} at keep={setting.keep}: {error}") from error
    except Exception as error:
        raise RunError(f"{setting.label} at keep={setting.keep}: {explain(error)}") from error


def check_settings(
    model: Any, processor: Any, settings: Sequence[Setting], *, lenient: bool
) -> tuple[list[Setting], dict[str, str]]:
    """The settings that this model takes, tried by wrapping it, and why it does not take the others.

    A setting that it does not take raises InputError, or is left out if `lenient`.
    """
    taken, refused = [], {}
    for setting in settings:
        try:
            if setting.own_model:
                taken.append(setting)
                continue
            if setting.method == DOWNSCALE:
                downscaled(processor, setting)
            with vtprune.wrapped(model, setting.method_source):
                taken.append(setting)
        except vtprune.UnsupportedModelError as error:
            raise InputError(f"model: {first_line(error)}") from error
        except vtprune.VTPruneError as error:
            if not lenient:
                raise InputError(f"{setting.label}: {first_line(error)}") from error
            keep = "" if setting.keep is None else f" at {show_keep(setting.keep)}"
            refused[setting.label + keep] = first_line(error)
    return taken, refused
