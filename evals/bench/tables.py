"""The results as tables: for the terminal and for Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from vtprune.evals.paired import NO_SHARE, Share, mean_share, share_kept
from vtprune.evals.settings import UNPRUNED
from vtprune.method.texts import show_keep

Record = dict[str, Any]
Cell = Callable[[Record], str]


@dataclass(frozen=True)
class Column:
    """A heading, what stands under it, and whether it is text (flush left) or a number."""

    heading: str
    cell: Cell
    text: bool = False


def reference(records: Sequence[Record]) -> Record | None:
    """The record of the unpruned model."""
    return next((record for record in records if record["method"] == UNPRUNED), None)


def is_share(score: dict[str, Any]) -> bool:
    """Whether a score is a share of right answers, to be shown in percent."""
    return 0.0 <= score["value"] <= 1.0


def show_score(score: dict[str, Any], share: bool | None = None) -> str:
    """The value with its standard error, in percent where it is a share (None: where it looks like one)."""
    scale, digits = (100, 1) if (is_share(score) if share is None else share) else (1, 2)
    error = f" ± {scale * score['stderr']:.{digits}f}" if score["stderr"] is not None else ""
    return f"{scale * score['value']:.{digits}f}{error}"


def main_scores(record: Record) -> list[dict[str, Any]]:
    """One score for each task, which stands before those of its categories."""
    found: dict[str, dict[str, Any]] = {}
    for score in record["scores"]:
        found.setdefault(score["task"], score)
    return list(found.values())


def all_shares(records: Sequence[Record], task: str) -> bool:
    """Whether the score of a task is a share of right answers in every record, so that a column has one unit."""
    return all(is_share(score) for record in records for score in main_scores(record) if score["task"] == task)


def kept_score(record: Record, unpruned: Record | None) -> Share | None:
    """The score as a share of the unpruned model's, averaged over tasks, with the error of paired answers where every
    task's number is the mean of its answers' scores."""
    if unpruned is None:
        return None
    full = {score["task"]: (score, numbers) for score, numbers in _answered(unpruned)}
    shares = []
    for score, numbers in _answered(record):
        whole, others = full[score["task"]]
        if whole["value"] <= 0:
            continue
        paired = share_kept(numbers, others) if numbers and len(numbers) == len(others) else None
        shares.append(paired or Share(score["value"] / whole["value"], None))
    return mean_share(shares) if shares else None


def _answered(record: Record) -> list[tuple[dict[str, Any], list[float]]]:
    """The score of each task with the score of each answer, none where that is no mean of these."""
    found, start, numbers = [], 0, record.get("correct", [])
    for score in main_scores(record):
        own = numbers[start : start + score.get("count", 0)]
        start += len(own)
        mean = bool(own) and None not in own and math.isclose(sum(own) / len(own), score["value"], abs_tol=1e-9)
        found.append((score, own if mean else []))
    return found


def _kept_cell(unpruned: Record | None) -> Cell:
    def cell(record: Record) -> str:
        share = kept_score(record, unpruned)
        error = "" if share is None or not share.stderr else f" ± {100 * share.stderr:.1f}"
        return _percent(None if share is None else share.value) + error

    return cell


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _score_cell(task: str, share: bool) -> Cell:
    def cell(record: Record) -> str:
        return next((show_score(score, share) for score in main_scores(record) if score["task"] == task), "-")

    return cell


def _category_cell(name: str, share: bool) -> Cell:
    def cell(record: Record) -> str:
        found = (show_score(score, share) for score in record["scores"][1:] if score["name"] == name)
        return next(found, "-").partition(" ")[0]

    return cell


def _setting_columns() -> list[Column]:
    return [
        Column("method", lambda record: record["label"], text=True),
        Column("keep", lambda record: show_keep(record["keep"])),
    ]


def quality_columns(records: Sequence[Record]) -> list[Column]:
    """Accuracy, overall and by category, against the unpruned model."""
    unpruned = reference(records)
    main = main_scores(records[0])
    shares = {score["task"]: all_shares(records, score["task"]) for score in main}
    heading = {score["task"]: score["task"] if len(main) > 1 else score["metric"] for score in main}
    if len({score["metric"] for score in main}) > 1:
        heading = {score["task"]: f"{score['task']}, {score['metric']}" for score in main}
    categories = [score["name"] for score in records[0]["scores"][1:]] if len(main) == 1 else []
    return [
        *_setting_columns(),
        *[Column(heading[task], _score_cell(task, share)) for task, share in shares.items()],
        Column("of unpruned %", _kept_cell(unpruned)),
        *[Column(name, _category_cell(name, shares[main[0]["task"]])) for name in categories],
    ]


def _tokens(record: Record) -> str:
    tokens = record["tokens"]
    published = tokens.get("published")
    counted = "" if published is None else f" (in its paper: {published:.1f})"
    return f"{tokens['kept']:.1f} of {tokens['before']:.1f}{counted}"


def _prefill(record: Record) -> str:
    prefill = record["prefill"]
    return f"{prefill['ms']:.1f} ({prefill['ratio']:.2f}x)"


def _over(record: Record) -> str:
    over = record["prefill"]["over_scoreless_ms"]
    return "-" if over is None else f"{over:+.1f}"


def cost_columns(records: Sequence[Record]) -> list[Column]:
    """Tokens, FLOPs, cache, time, what the method itself costs, and the dearest picture where that was looked for."""
    worst = [Column("worst FLOPs %", _worst)] if any("worst" in record for record in records) else []
    return [
        *_setting_columns(),
        Column("tokens kept", _tokens),
        Column("FLOPs %", lambda record: _percent(record["flops"]["share"])),
        Column("KV %", lambda record: _percent(record["kv"]["share"])),
        Column("KV % at the end", lambda record: _percent(record["kv"]["end_share"])),
        Column("prefill ms", _prefill),
        Column("scoring % of FLOPs", lambda record: f"{100 * record['flops']['scoring_share']:.2f}"),
        Column("ms over grid", _over),
        *worst,
    ]


def _worst(record: Record) -> str:
    worst = record.get("worst")
    return "-" if worst is None else f"{_percent(worst['share'])} ({worst['picture']})"


def metric_columns(records: Sequence[Record]) -> list[Column]:
    """Every metric of every task, where any has more than one."""
    known = [(task, name) for task, own in records[0].get("metrics", {}).items() for name in own]
    # lmms-eval's own errors, and costs that it was told of, are no metrics.
    names = [(task, name) for task, name in known if "_stderr" not in name and not name.startswith("vtprune_")]
    if len(names) == len({task for task, _ in names}):
        return []
    return [
        *_setting_columns(),
        *[Column(f"{task}: {name.partition(',')[0]}", _metric(task, name)) for task, name in names],
    ]


def _metric(task: str, name: str) -> Cell:
    def cell(record: Record) -> str:
        value = record.get("metrics", {}).get(task, {}).get(name)
        return "-" if value is None else show_score({"value": value, "stderr": None})

    return cell


def task_cost_columns() -> list[Column]:
    """What each task cost."""
    return [
        *_setting_columns(),
        Column("task", lambda record: record["task"], text=True),
        *cost_columns(())[2:6],
        Column("scoring % of FLOPs", lambda record: f"{100 * record['flops']['scoring_share']:.2f}"),
    ]


def by_task(records: Sequence[Record]) -> list[Record]:
    """A row a setting and task, of settings that asked several."""
    return [
        {"label": record["label"], "keep": record["keep"], "task": task, **costs}
        for record in records
        for task, costs in record.get("by_task", {}).items()
    ]


def rich_table(title: str, columns: Sequence[Column], records: Sequence[Record]) -> Table:
    """For the terminal; a rule between methods."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column.heading, justify="left" if column.text else "right", no_wrap=column.text)
    for i, record in enumerate(records):
        last = i + 1 == len(records) or records[i + 1]["label"] != record["label"]
        table.add_row(*(column.cell(record) for column in columns), end_section=last)
    return table


def markdown_table(columns: Sequence[Column], records: Sequence[Record]) -> str:
    """The same as Markdown."""
    lines = [
        "| " + " | ".join(column.heading for column in columns) + " |",
        "|" + "|".join("---" if column.text else "---:" for column in columns) + "|",
    ]
    lines += ["| " + " | ".join(column.cell(record) for column in columns) + " |" for record in records]
    return "\n".join(lines)


def notes(data: dict[str, Any]) -> list[str]:
    """What the columns mean and where the numbers come from."""
    config, versions, machine = data["config"], data["versions"], data["machine"]
    lines = [
        f"{len(data['questions'])} questions ({', '.join(config['tasks'])}), model {config['model']}, "
        f"{machine['dtype']} on {machine['device']}.",
        "± is the standard error; that of a share of the unpruned score is of the same questions' answers in pairs. "
        "Tokens, FLOPs of the prefill (vision tower included) and KV bytes of the "
        "prompt and at the end of the answer (what waits beside the cache included) are what the report of each "
        "generation says was achieved, not what was asked for.",
        "Prefill is the median at batch 1 and its ratio to the unwrapped model, measured in turns on the "
        f"same prompts ({machine['processor']}, {machine['threads']} threads). 'ms over grid' is the time "
        "above the grid baseline, which scores nothing, at the same keep.",
        "Versions: " + ", ".join(f"{name} {value}" for name, value in versions.items()) + ".",
    ]
    empty = _nothing_to_lose(list(data["settings"].values()))
    if empty and len(config["tasks"]) > 1:
        lines.append(f"{NO_SHARE} {', '.join(empty)}.")
    if config.get("worst"):
        lines.append(
            "Worst is the share of the unpruned FLOPs on the dearest of four pictures that are hard to prune (noise, "
            "a checkerboard, a page of words, a crowd of small things): counts that follow from scores follow from "
            "the picture."
        )
    if machine.get("processes", 1) > 1:
        lines.append(f"{machine['processes']} processes shared the machine, and disturbed each other's times.")
    lines += [f"{label}: {text}." for label, text in data.get("untrained", {}).items()]
    lines += [f"Left out: {name}: {reason}." for name, reason in data.get("left_out", {}).items()]
    return lines


def _nothing_to_lose(records: Sequence[Record]) -> list[str]:
    unpruned = reference(records)
    return [] if unpruned is None else [score["task"] for score in main_scores(unpruned) if score["value"] <= 0]


def markdown(data: dict[str, Any], records: Sequence[Record]) -> str:
    """table.md: both tables, those by task and of every metric where there are several, and the notes."""
    parts = [
        ("Accuracy", quality_columns(records), records),
        ("Every metric", metric_columns(records), records),
        ("Cost", cost_columns(records), records),
        ("Cost by task", task_cost_columns(), by_task(records)),
    ]
    shown = [f"# {title}\n\n{markdown_table(columns, rows)}" for title, columns, rows in parts if columns and rows]
    return "\n\n".join([*shown, "\n".join(f"- {line}" for line in notes(data)), ""])
