"""What a run shows while it works: a bar on a terminal, a line a step, with the time, everywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from vtprune.console.output import is_quiet

# Seconds after which a long step says how far it has come, where there is no bar to see.
PATIENCE = 60.0


def clock(seconds: float) -> str:
    """1:05 for 65 seconds, 1:00:05 for an hour and five."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


class Bars:
    """Bars on a terminal, none elsewhere, and lines on both; nothing at all where the command is quiet.

    staying: whether the bars are still there in the end, with an estimate of what is left in them. Lines go out as
    soon as they are printed: the console flushes them.
    """

    def __init__(self, console: Console, *, shown: bool = True, staying: bool = False) -> None:
        shown = shown and not is_quiet()
        self.console, self.shown = console, shown
        self._bars: Progress | None = None
        if shown and console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            left = (TimeRemainingColumn(),) if staying else ()
            self._bars = Progress(*columns, *left, console=console, transient=not staying)

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    @property
    def drawn(self) -> bool:
        """Whether there are bars to see."""
        return self._bars is not None

    def bar(self, name: str, total: int | None, done: int = 0) -> TaskID:
        """One more bar."""
        return TaskID(0) if self._bars is None else self._bars.add_task(name, total=total, completed=done)

    def move(self, bar: TaskID, **changes: Any) -> None:
        """Changes what a bar shows: description, completed, advance, total."""
        if self._bars is not None:
            self._bars.update(bar, **changes)

    def empty(self, bar: TaskID, total: int | None) -> None:
        """Begins a bar again."""
        if self._bars is not None:
            self._bars.reset(bar, total=total)

    def say(self, text: str, style: str | None = None) -> None:
        """A line, on a terminal too."""
        if self.shown:
            self.console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


class Steps(Bars):
    """The steps of a run (settings, trials, samples), `done` of `total` made before it began; a step may have parts,
    such as answers."""

    def __init__(self, console: Console, unit: str, total: int, done: int = 0, *, parts: str = "") -> None:
        super().__init__(console)
        self.total, self.made, self.parts = total, done, parts
        self._before, self._part, self._whole = done, 0, 0
        self._started = self._said = self._step = time.monotonic()
        self._name = ""
        self._bar = self.bar(unit, total, done)
        self._part_bar = self.bar(parts, None) if parts else None

    def begin(self, name: str, parts: int | None = None) -> None:
        """The next step, by its name, and how many parts it has."""
        self._name, self._part, self._whole = name, 0, parts or 0
        self._step = self._said = time.monotonic()
        self.move(self._bar, description=name)
        if self._part_bar is not None:
            self.empty(self._part_bar, parts)

    def part(self, count: int, whole: int | None = None) -> None:
        """So many more parts of the step; whole: how many it has, where that was not known before."""
        self._part += count
        self._whole = whole or self._whole
        if self._part_bar is not None:
            self.move(self._part_bar, advance=count, total=self._whole or None)
        if not self.drawn and time.monotonic() - self._said > PATIENCE:
            self._said = time.monotonic()
            of = f" of {self._whole}" if self._whole else ""
            self.say(f"[{self.made + 1}/{self.total}] {self._name}: {self._part}{of} {self.parts} so far")

    def end(self, text: str) -> None:
        """The step is made; text: what came of it."""
        self.made += 1
        self.move(self._bar, advance=1)
        if self.drawn:
            return
        now = time.monotonic()
        spent = now - self._started
        left = spent / (self.made - self._before) * (self.total - self.made)
        rest = f", about {clock(left)} left" if left else ""
        self.say(f"[{self.made}/{self.total}] {text}; {now - self._step:.1f} s, {clock(spent)} in all{rest}")


class Estimate:
    """Says once, from the first batches of a run, how long all of it will take.

    settings: how many are to be run; tell: takes the line. The first batch warms up; the second one counts.
    """

    def __init__(self, settings: int, tell: Callable[[str], None]) -> None:
        self.settings, self.tell = settings, tell
        self._calls = 0
        self._last = 0.0

    def answered(self, count: int, questions: int) -> None:
        """So many more answers, of so many questions of the setting."""
        now = time.monotonic()
        self._calls += 1
        if self._calls == 3 and count:
            each = (now - self._last) / count
            self.tell(
                f"about {clock(each * questions * self.settings)} for all of it, by the {1000 * each:.0f} ms that "
                "the first answers took each; the timing of every setting comes on top"
            )
        self._last = now
