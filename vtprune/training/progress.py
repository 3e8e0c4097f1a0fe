"""What a run shows: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from vtprune.evals.bench.progress import clock
from vtprune.training.state import Progress


class Display:
    """Steps, loss and answer tokens a second; nothing in processes other than the main one."""

    def __init__(self, console: Console, steps: int, *, shown: bool) -> None:
        self.console, self.steps, self.shown = console, steps, shown
        self._bars: Bars | None = None
        if shown and console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self._bars = Bars(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
            self._task = self._bars.add_task("training", total=steps)

    def __enter__(self) -> Display:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def tick(self, progress: Progress) -> None:
        """One more step."""
        if self._bars is not None:
            self._bars.update(self._task, completed=progress.step)

    def log(self, progress: Progress) -> None:
        """One more point of the curve."""
        self.tick(progress)
        point, rate = progress.curve[-1], progress.tokens / max(progress.seconds, 1e-9)
        extra = f" + {point['auxiliary']:.4f}" if point["auxiliary"] else ""
        text = f"loss {point['loss']:.4f}{extra}  {rate:.0f} answer tokens/s"
        if self._bars is not None:
            self._bars.update(self._task, description=text)
        else:
            left = (self.steps - progress.step) * progress.seconds / max(progress.step, 1)
            spent = f"{clock(progress.seconds)} in all, about {clock(left)} left"
            self.say(f"step {progress.step}/{self.steps}  {text}  lr {point['rate']:.2e}  {spent}")

    def validated(self, progress: Progress) -> None:
        """One more validation."""
        point = progress.validation[-1]
        self.say(f"step {point['step']}/{self.steps}  validation loss {point['loss']:.4f}")

    def say(self, text: str) -> None:
        """A line."""
        if self.shown:
            self.console.print(text, highlight=False, soft_wrap=True)
