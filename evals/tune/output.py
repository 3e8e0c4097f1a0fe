"""What a search leaves for people: the table at its end, and search.png."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from vtprune.console.figures import COLOURS, figure_png, plain
from vtprune.console.output import notice
from vtprune.evals.tune.store import (
    FAILED,
    FILE,
    INFEASIBLE,
    MEASURED,
    PLOT,
    Search,
    Trial,
)
from vtprune.files import write_bytes
from vtprune.method.config import CONFIG_NAME

COLUMNS = 3
DIGITS = 5


def write_outputs(search: Search, budget: str, console: Console) -> None:
    """Prints the table and what there is to say about it, and writes the plot."""
    console.print(result_table(search))
    for line in remarks(search):
        console.print(line, style="dim", highlight=False)
    title = f"{search.config['method']} at {budget}, {search.config['model']}"
    search.save_best()
    write_bytes(search.folder / PLOT, search_png(search.trials, search.data["space"], title))
    names = (CONFIG_NAME, FILE, PLOT)
    notice(console, "wrote " + ", ".join(str(search.folder / name) for name in names))


def result_table(search: Search) -> Table:
    """The defaults beside the best setting: hyper-parameters, both sets, tokens and FLOPs."""
    best, first = search.best, search.trials[0]
    assert best is not None
    check = search.data["check"] or {}
    table = Table(title=f"Search of {search.config['method']}", title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("defaults", justify="right")
    table.add_column(f"found (trial {best['number']})", justify="right")
    for name in search.data["space"]:
        table.add_row(name, *(_value(trial, name) for trial in (first, best)))
    config = search.config
    table.add_section()
    table.add_row(f"cosine, {config['samples']} searched", _digits(first["objective"]), _digits(best["objective"]))
    if check:
        held_out = ((check.get(name) or {}).get("objective") for name in ("defaults", "found"))
        table.add_row(f"cosine, {check['samples']} held out", *map(_digits, held_out))
    table.add_section()
    table.add_row("vision tokens kept", _kept(first), _kept(best))
    table.add_row("FLOPs, % of unpruned", _percent(first), _percent(best))
    return table


def remarks(search: Search) -> list[str]:
    """What the numbers are, and whether the found setting is better where the search did not look."""
    best, trials = search.best, search.trials
    assert best is not None
    lines = [
        "The cosine is of the last prompt token's final hidden state with and without pruning, a mean over samples; "
        "1 is what the unpruned model does."
    ]
    for state, word in ((INFEASIBLE, "could not be met"), (FAILED, "gave no number")):
        count = sum(trial["state"] == state for trial in trials)
        if count:
            lines.append(f"{count} of {len(trials)} settings {word} (the reasons are in {search.path}).")
    check = search.data["check"] or {}
    if best["number"] == 0:
        lines.append(f"No setting did better than the defaults (trials: {len(trials)}).")
    elif check.get("gain") is not None:
        error = check["gain_stderr"]
        within = "" if error is None else f" ± {error:.{DIGITS}f} (one standard error)"
        lines.append(f"Held out, the found setting gains {check['gain']:+.{DIGITS}f}{within} on the defaults.")
        if error is None or abs(check["gain"]) < 2 * error:
            lines.append("That is no measurable difference; more held-out samples (--check-samples) could tell.")
        elif check["gain"] < 0:
            lines.append("It fits the searched samples and not the others: search on more (--samples).")
    return lines


def _value(trial: Trial, name: str) -> str:
    """A hyper-parameter; where a method leaves it open, it is derived from the budget or the model."""
    value = trial["params"].get(name, trial["pruner"][name])
    if value is None and name not in trial["params"]:
        return "derived"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.{DIGITS}f}"


def _kept(trial: Trial) -> str:
    return f"{trial['kept']:.1f} of {trial['tokens']:.1f}" if "kept" in trial else "-"


def _percent(trial: Trial) -> str:
    return f"{100 * trial['flops_share']:.1f}" if "flops_share" in trial else "-"


def search_png(trials: list[Trial], space: dict[str, dict[str, Any]], title: str) -> bytes:
    """The objective over trials with the best so far, and over each hyper-parameter; the defaults as a line.

    space: the tunables by name, as search.json has them.
    """
    measured, first = [trial for trial in trials if trial["state"] == MEASURED], trials[0]
    columns = min(COLUMNS, 1 + len(space))
    rows = -(-(1 + len(space)) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows), layout="constrained", dpi=150)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    _over_trials(panels[0], measured)
    for axes, (name, tunable) in zip(panels[1:], space.items(), strict=False):
        _over_parameter(axes, name, tunable, measured)
    panels[0].plot([], [], "*", color=COLOURS[1], markersize=10, label="found")
    for axes in panels[: 1 + len(space)]:
        if first["state"] == MEASURED:
            axes.axhline(first["objective"], color="black", linewidth=1, linestyle="--", label="defaults")
        plain(axes)
    for axes in panels[1 + len(space) :]:
        axes.set_axis_off()
    panels[0].legend(frameon=False, fontsize=8)
    for row in range(rows):
        panels[row * columns].set_ylabel("mean cosine with the unpruned state", fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure_png(figure)


def _over_trials(axes: Axes, measured: list[Trial]) -> None:
    numbers, values = [trial["number"] for trial in measured], [trial["objective"] for trial in measured]
    axes.plot(numbers, values, "o", color=COLOURS[0], markersize=4, label="trials")
    axes.step(numbers, list(accumulate(values, max)), where="post", color=COLOURS[1], label="best so far")
    axes.set_xlabel("trial")


def _over_parameter(axes: Axes, name: str, tunable: dict[str, Any], measured: list[Trial]) -> None:
    """Choices stand side by side under their names."""
    shown = [trial for trial in measured if name in trial["params"]]
    xs = [trial["params"][name] for trial in shown]
    if tunable["choices"]:
        places = [repr(choice) for choice in tunable["choices"]]
        xs = [places.index(repr(value)) for value in xs]
        axes.set_xticks(range(len(places)), places)
        axes.set_xlim(-0.5, len(places) - 0.5)
    elif tunable["log"]:
        axes.set_xscale("log")
    axes.plot(xs, [trial["objective"] for trial in shown], "o", color=COLOURS[0], markersize=4)
    best = max(measured, key=lambda trial: trial["objective"])
    places = [x for x, trial in zip(xs, shown, strict=True) if trial is best]
    axes.plot(places, [best["objective"]] * len(places), "*", color=COLOURS[1], markersize=12)
    axes.set_xlabel(name)
