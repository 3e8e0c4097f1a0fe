"""What a training shows: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from rich.console import Console

from vtprune.console.progress import Bars, clock
from vtprune.training.state import Progress


class Display(Bars):
    """Steps, loss and answer tokens a second; nothing in processes other than the main one."""

    def __init__(self, console: Console, steps: int, *, shown: bool) -> None:
        super().__init__(console, shown=shown, staying=True)
        self.steps, self._bar = steps, self.bar("training", steps)

    def tick(self, progress: Progress) -> None:
        """One more step."""
        self.move(self._bar, completed=progress.step)

    def log(self, progress: Progress) -> None:
        """One more point of the curve."""
        self.tick(progress)
        point, rate = progress.curve[-1], progress.tokens / max(progress.seconds, 1e-9)
        extra = f" + {point['auxiliary']:.4f}" if point["auxiliary"] else ""
        text = f"loss {point['loss']:.4f}{extra}  {rate:.0f} answer tokens/s"
        if self.drawn:
            self.move(self._bar, description=text)
        else:
            left = (self.steps - progress.step) * progress.seconds / max(progress.step, 1)
            spent = f"{clock(progress.seconds)} in all, about {clock(left)} left"
            self.say(f"step {progress.step}/{self.steps}  {text}  lr {point['rate']:.2e}  {spent}")

    def validated(self, progress: Progress) -> None:
        """One more validation."""
        point = progress.validation[-1]
        self.say(f"step {point['step']}/{self.steps}  validation loss {point['loss']:.4f}")
