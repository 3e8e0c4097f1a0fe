"""What the page and the Markdown file say, as headings, tables and pictures: neither knows a result file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vtprune.evals.paired import NO_SHARE, Share
from vtprune.evals.report.comparing import (
    ALPHA,
    DULL,
    Duel,
    category_losses,
    duels,
    front,
    is_dull,
    nothing_to_lose,
    overall_share,
)
from vtprune.evals.report.plots import Spot, Words, pareto_svg
from vtprune.evals.report.published import UNREPORTED, Match, known, matches
from vtprune.evals.report.reading import Found, Group, told_apart
from vtprune.evals.report.runs import Costs, Row, TaskScore, kept_of
from vtprune.method.texts import show_keep

DASH = "-"
UNTRAINED_MARK = " †"
# A change of so many points, or more, has the full colour.
FULL_HEAT = 40.0
FRONT = "For what a setting on the front costs, nothing here scores higher."


@dataclass(frozen=True)
class Cell:
    """Text; heat: from -1 (a loss) to 1 (a gain), None without colour; tone: win, tie, loss, long for sentences, or
    none."""

    text: str
    heat: float | None = None
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """A heading, its columns (`texts` first ones are text), its rows, what explains it, and whether it is long and
    may be folded."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    texts: int = 1
    folded: bool = False


@dataclass(frozen=True)
class Picture:
    """An SVG and what stands below it; key: the colours of the methods on the front."""

    svg: str
    note: str
    key: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Section:
    """What is said of one group."""

    anchor: str
    title: str
    subtitle: str
    lead: Sequence[str]
    tables: Sequence[Table]
    pictures: Sequence[Picture]
    notes: Sequence[str]
    commands: Sequence[str]
    facts: Sequence[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """All of it; broken: one line for each place that could not be read."""

    sections: Sequence[Section]
    broken: Sequence[str]
    notes: Sequence[str]


def make_report(found: Found) -> Report:
    """The content for what was read."""
    headings = told_apart(found.groups)
    sections = [
        _section(f"part-{place}", group, heading)
        for place, (group, heading) in enumerate(zip(found.groups, headings, strict=True), 1)
    ]
    return Report(sections, found.broken, _closing_notes(found.groups))


def _section(anchor: str, group: Group, heading: str) -> Section:
    tables = [_accuracy(group), _cost(group)]
    for task in group.tasks:
        tables += [*_categories(group, task), *_duels(group, task)]
    tables += _published(group)
    counts = ", ".join(f"{task} ({count} questions)" for task, count in group.questions.items())
    return Section(
        anchor=anchor,
        title=group.model,
        subtitle=f"{counts}; {heading}",
        lead=_lead(group),
        tables=[table for table in tables if table.rows],
        pictures=_pictures(anchor, group),
        notes=_notes(group),
        commands=list(dict.fromkeys(run.command for run in group.runs if run.command)),
        facts=_facts(group),
    )


def _name(row: Row) -> Cell:
    return Cell(("unpruned" if row.unpruned else row.label) + (UNTRAINED_MARK if row.untrained else ""))


def _keep(row: Row) -> Cell:
    return Cell(DASH if row.unpruned else show_keep(row.keep))


def _with_error(value: float, error: float | None, digits: int = 1) -> str:
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _scale(group: Group, task: str) -> float:
    """100 for shares of right answers, 1 for points: the same for every setting of a task."""
    return 100.0 if all(row.scores[task].is_share for row in group.rows if task in row.scores) else 1.0


def _score(score: TaskScore | None, scale: float) -> Cell:
    if score is None:
        return Cell(DASH)
    return Cell(_with_error(scale * score.value, None if score.stderr is None else scale * score.stderr))


def _share(share: Share | None) -> Cell:
    if share is None:
        return Cell(DASH)
    return Cell(_with_error(100 * share.value, None if share.stderr is None else 100 * share.stderr))


def _accuracy(group: Group) -> Table:
    """Every task's score, and what is left of the unpruned one."""
    several = len(group.tasks) > 1
    metrics = {task: next(row.scores[task].metric for row in group.rows if task in row.scores) for task in group.tasks}
    columns = ["method", "keep"]
    for task in group.tasks:
        unit = ", %" if _scale(group, task) == 100 else ""
        columns.append(f"{task}: {metrics[task]}{unit}" if several else f"{metrics[task]}{unit}")
        columns += [f"{task}: % of unpruned"] if several else []
    columns.append("% of unpruned" + (", mean of tasks" if several else ""))
    full = group.unpruned
    rows = []
    for row in group.rows:
        cells = [_name(row), _keep(row)]
        for task in group.tasks:
            cells.append(_score(row.scores.get(task), _scale(group, task)))
            if several:
                cells.append(_share(kept_of(row.scores.get(task), full.scores.get(task) if full else None)))
        rows.append([*cells, _share(overall_share(group, row))])
    note = (
        "± is one standard error. That of a share of the unpruned score is of the paired answers: what is equally "
        "hard for both does not count."
    )
    return Table("Accuracy", columns, rows, note, texts=2)


def _cost(group: Group) -> Table:
    columns = ["method", "keep", "tokens kept", "FLOPs %", "KV %, prompt", "KV %, end", "prefill ms"]
    note = (
        "Tokens are those of a question's images or videos, the mean over questions; of tasks that lmms-eval "
        "measured, every number is the mean over tasks. FLOPs of the prefill (vision tower included) and bytes of the "
        "cache, after the prompt and after the answer, are shares of the unpruned model's. In brackets: tokens as the "
        "method's paper counts them; the prefill as a multiple of the unpruned one's."
    )
    rows = [[_name(row), _keep(row), *_cost_cells(row.costs)] for row in group.rows if row.costs != Costs()]
    return Table("Cost", columns, rows, note, texts=2)


def _cost_cells(costs: Costs) -> list[Cell]:
    tokens = DASH if costs.kept is None else f"{costs.kept:.1f}"
    if costs.kept is not None and costs.before is not None:
        tokens += f" of {costs.before:.1f}"
    if costs.published is not None:
        tokens += f" ({costs.published:.1f})"
    prefill = DASH if costs.prefill_ms is None else f"{costs.prefill_ms:.1f}"
    if costs.prefill_ratio is not None:
        prefill += f" ({costs.prefill_ratio:.2f}x)"
    shares = [Cell(DASH if share is None else f"{100 * share:.1f}") for share in (costs.flops, costs.kv, costs.kv_end)]
    return [Cell(tokens), *shares, Cell(prefill)]


def _categories(group: Group, task: str) -> list[Table]:
    names, changes = category_losses(group, task)
    if len(names) < 2 or group.unpruned is None:
        return []
    scale = _scale(group, task)
    full = [one.value for one in group.unpruned.categories if one.task == task]
    rows = [[Cell("unpruned"), Cell(DASH), *(Cell(f"{scale * value:.1f}") for value in full)]]
    for row in group.rows:
        if row.key in changes:
            rows.append([_name(row), _keep(row), *(_change(change, scale) for change in changes[row.key])])
    note = (
        "Change against the unpruned model, in points: orange is lost, blue is gained, and the full colour stands for "
        f"{FULL_HEAT:.0f} points or more."
    )
    title = "Lost by category" + (f": {task}" if len(group.tasks) > 1 else "")
    return [Table(title, ["method", "keep", *names], rows, note, texts=2)]


def _change(change: float | None, scale: float) -> Cell:
    if change is None:
        return Cell(DASH)
    points = scale * change
    return Cell(_signed(points), heat=max(-1.0, min(1.0, points / FULL_HEAT)))


def _signed(points: float) -> str:
    """With its sign, unless that is lost in rounding."""
    return f"{points:+.1f}" if round(points, 1) else "0.0"


def _duels(group: Group, task: str) -> list[Table]:
    found = duels(group, task)
    if not found:
        return []
    scale = _scale(group, task)
    baselines = [name for name in DULL if any(one.baseline.method == name for one in found)]
    own: dict[str, dict[str, Duel]] = {}
    for one in found:
        own.setdefault(one.row.key, {})[one.baseline.method] = one
    rows = [
        [_name(row), _keep(row), *(_duel(own[row.key].get(name), scale) for name in baselines)]
        for row in group.rows
        if row.key in own
    ]
    note = (
        "Difference to the baseline that was given the same keep, on the same questions, ± its standard error, and a "
        "two-sided p-value: the exact McNemar test's for right or wrong, else that of flipping signs. A win (▲) or a "
        f"loss (▼) has p < {ALPHA} after Holm's correction over the table's {len(found)} differences; everything "
        "else is a tie (=), which says that these questions cannot tell the two apart."
    )
    title = "Against dull baselines" + (f": {task}" if len(group.tasks) > 1 else "")
    return [Table(title, ["method", "keep", *(f"against {name}" for name in baselines)], rows, note, texts=2)]


SIGNS = {"win": "▲ win", "tie": "= tie", "loss": "▼ loss"}


def _duel(one: Duel | None, scale: float) -> Cell:
    if one is None:
        return Cell(DASH)
    error = "" if one.found.stderr is None else f" ± {scale * one.found.stderr:.1f}"
    p = "p < 0.001" if one.p < 0.001 else f"p = {one.p:.3f}"
    return Cell(f"{SIGNS[one.verdict]} {_signed(scale * one.found.mean)}{error}, {p}", tone=one.verdict)


def _published(group: Group) -> list[Table]:
    found = matches(group, known())
    run = [match for match in found if match.ours is not None]
    rest = [match for match in found if match.ours is None]
    note = (
        "Reproduced: within half a unit of the printed number's last digit and two standard errors of ours, at the "
        "same number of tokens (within 1%). In brackets: the unpruned model's score; where ours differs from theirs, "
        "so does the setting. *: no standard error of ours is known, so that the printed digits alone count."
    )
    columns = ["method", "tokens", "benchmark", "published"]
    return [
        Table(
            "Published numbers beside ours",
            [*columns, "ours", "verdict", "source"],
            [[*_printed(match), *_compared(match), _source(match)] for match in run],
            note,
            texts=3,
        ),
        Table(
            "Published numbers that were not run",
            [*columns, "source"],
            [[*_printed(match), _source(match)] for match in rest],
            "Not run: no result here has this method, this many tokens and this benchmark; or its answers are judged "
            "elsewhere.",
            texts=3,
            folded=True,
        ),
    ]


def _printed(match: Match) -> list[Cell]:
    one = match.published
    theirs = one.value + (f" ({one.unpruned_value})" if one.unpruned_value else "")
    benchmark = f"mean of {one.task.replace('+', ', ')}" if "+" in one.task else one.task
    method = one.method if match.row is None else match.row.label
    return [Cell(method), Cell(one.tokens_kept), Cell(f"{benchmark}: {one.metric}"), Cell(theirs)]


def _compared(match: Match) -> list[Cell]:
    assert match.ours is not None
    ours = _with_error(match.ours, match.stderr) + ("" if match.unpruned is None else f" ({match.unpruned:.1f})")
    tone = "win" if match.reproduced else "loss" if match.told else ""
    return [Cell(ours), Cell(match.verdict, tone=tone)]


def _source(match: Match) -> Cell:
    one = match.published
    parts = [one.source, one.setting, *([one.note] if one.note else []), f"method: arXiv {one.paper}"]
    return Cell("; ".join(parts), tone="long")


def _lead(group: Group) -> list[str]:
    """The front in a sentence."""
    height = _height(group)
    costly = [row for row in group.rows if not row.unpruned]
    names = [row.name for row in front(costly, lambda row: row.costs.flops, lambda row: (height(row) or (None,))[0])]
    lines = []
    if names:
        lines.append(f"On the front by FLOPs: {', '.join(names)}. {FRONT}")
    if group.unpruned is None:
        lines.append("The unpruned model is not among the results, so nothing is said of shares of it.")
    return lines


Height = tuple[float, float | None]


def _height(group: Group) -> Callable[[Row], Height | None]:
    """What the plots' y axis shows: the score of the only task, else the mean share of the unpruned scores."""
    task, several = group.tasks[0], len(group.tasks) > 1
    scale = _scale(group, task)

    def of(row: Row) -> Height | None:
        if several:
            share = overall_share(group, row)
            return None if share is None else (100 * share.value, None if share.stderr is None else 100 * share.stderr)
        score = row.scores.get(task)
        if score is None:
            return None
        return scale * score.value, None if score.stderr is None else scale * score.stderr

    return of


def _pictures(anchor: str, group: Group) -> list[Picture]:
    height = _height(group)
    if len(group.tasks) > 1:
        label = "score, % of unpruned, mean of tasks"
    else:
        task = group.tasks[0]
        label = group.rows[0].scores[task].metric + (", %" if _scale(group, task) == 100 else "")
    panels: list[tuple[str, str, Callable[[Row], float | None]]] = [
        ("FLOPs", "FLOPs, % of unpruned", lambda row: row.costs.flops),
        ("KV cache", "KV cache after the answer, % of unpruned", lambda row: row.costs.kv_end),
    ]
    found = []
    for name, axis, cost in panels:
        words = Words(axis, label, f"{label} against {axis}: {group.model}", f"{anchor}-{name}")
        picture = _picture(group, cost, height, words=words)
        if picture is not None:
            found.append(picture)
    return found


def _picture(
    group: Group, cost: Callable[[Row], float | None], height: Callable[[Row], Height | None], *, words: Words
) -> Picture | None:
    pruned = [row for row in group.rows if not row.unpruned]
    best = {row.key for row in front(pruned, cost, lambda row: (height(row) or (None,))[0])}
    spots = []
    for row in pruned:
        spent, reached = cost(row), height(row)
        if spent is not None and reached is not None:
            spots.append(Spot(row.label, row.name, 100 * spent, *reached, dull=is_dull(row), front=row.key in best))
    if not spots:
        return None
    svg, colours = pareto_svg(spots, None if group.unpruned is None else height(group.unpruned), words)
    note = f"In colour: methods with a setting on the front, which is in bold. {FRONT} Bars: one standard error."
    return Picture(svg, note, [(colour, line) for line, colour in colours.items()])


def _notes(group: Group) -> list[str]:
    notes = [f"{UNTRAINED_MARK.strip()} {row.untrained}." for row in group.rows if row.untrained]
    notes += [note for run in group.runs for note in run.notes]
    notes += [f"{text}." for text in group.twice]
    empty = nothing_to_lose(group)
    if empty and len(group.tasks) > 1:
        notes.append(f"{NO_SHARE} {', '.join(empty)}.")
    if len({_machine(run.machine) for run in group.runs if run.machine}) > 1:
        notes.append("Prefill times come from several machines, and are not to be compared with each other.")
    return list(dict.fromkeys(notes))


def _machine(machine: object) -> str:
    facts = machine if isinstance(machine, dict) else {}
    names = [str(facts[name]) for name in ("processor", "gpu", "platform") if facts.get(name)]
    if facts.get("threads"):
        names.append(f"{facts['threads']} threads")
    return ", ".join([*names, *(str(facts[name]) for name in ("dtype", "device") if facts.get(name))])


def _facts(group: Group) -> list[tuple[str, str]]:
    """Where the numbers come from."""
    facts = [("Read from", ", ".join(str(run.path) for run in group.runs))]
    machines = dict.fromkeys(_machine(run.machine) for run in group.runs if run.machine)
    facts += [("Machine", text) for text in machines]
    told = dict.fromkeys(
        ", ".join(f"{name} {value}" for name, value in run.versions.items()) for run in group.runs if run.versions
    )
    return facts + [("Versions", text) for text in told]


def _closing_notes(groups: Sequence[Group]) -> list[str]:
    numbers = known()
    shown = sorted({row.method for group in groups for row in group.rows} & UNREPORTED.keys())
    models = len({one.model for one in numbers})
    lines = [
        f"{len(numbers)} published numbers of {len({one.method for one in numbers})} methods on {models} models come "
        "with vtprune; a table above shows those of its model."
    ]
    if shown:
        told = "; ".join(f"{name} ({UNREPORTED[name]})" for name in shown)
        lines.append(f"No published benchmark number is known here for {told}.")
    return lines
