"""auto: each image at the smallest budget whose answer can be trusted, as calibrated on samples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vtprune.errors import InputError, VTPruneError
from vtprune.method.growth import Growth, Origin
from vtprune.method.registry import create_checked, register
from vtprune.method.stages import Growing
from vtprune.pruners.auto.calibration import CALIBRATION_NAME, CalibrationFile, settle, settled_in
from vtprune.pruners.auto.promise import Settled
from vtprune.pruners.parts.checks import check_choice, is_number

HOW = "run `vtprune calibrate --model MODEL --data FOLDER`, and wrap the model with the folder that it writes"


@register(
    "auto",
    paper="Conformal Risk Control",
    arxiv="2208.02814",
    licence="MIT",
    needs="a calibration of the model (vtprune calibrate)",
)
@dataclass(frozen=True)
class Auto(Growing):
    """The fewest tokens with which answers stay the whole model's, with a promise how many do.

    An answer is read at a small budget first. Where the model is not sure enough of its first token the next budget
    is tried, and at last the whole image; the encoder runs once where its work does not depend on the budget. Method,
    budgets and the threshold come from a calibration (`vtprune calibrate`), and so does the proof: by conformal risk
    control (arXiv 2208.02814) at least `agreement` of the answers are those of the whole model, in expectation; where
    a `confidence` is given, by learn-then-test (arXiv 2110.01052), with this probability over calibrations.

    The promise is of greedy answers, of the model and the kind of pictures and questions that it was calibrated with,
    and of all of them together: 98% on average can hide 80% of one kind. task: that of one task of the calibration
    alone; None: it holds for each of them. adaptive=False: one budget for all images. calibration: the folder, None:
    that which the model comes with. promise: what `vtprune calibrate` wrote down of it; it must be what the
    calibration says. `keep` is not taken, as it is what is found.

    Our own; CALM (arXiv 2207.07061) and Fast yet Safe (arXiv 2405.20915) calibrate early exits in this way.
    """

    agreement: float = 0.98
    confidence: float | None = None
    adaptive: bool = True
    task: str | None = None
    calibration: str | None = None
    promise: dict[str, Any] | None = None

    default_keep = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None or self.keep_video is not None:
            raise VTPruneError(f"{self.name} finds out how much to keep; give agreement, and leave keep out")
        for option, value in (("agreement", self.agreement), ("confidence", self.confidence)):
            if value is not None and (not is_number(value) or not 0 < value < 1):
                hint = "; all of them is what the unpruned model does" if value == 1 else ""
                raise VTPruneError(f"{self.name}: {option} is a share between 0 and 1 (0.98), got {value!r}{hint}")
        check_choice(self.name, "adaptive", self.adaptive, (True, False))

    def at(self, folder: Path) -> Auto:
        """The same with the calibration that lies in a folder, unless it names one."""
        if self.calibration is not None or not (folder / CALIBRATION_NAME).is_file():
            return self
        return replace(self, calibration=str(folder.resolve()))

    def growth(self) -> Growth:
        """Raises InputError where there is no calibration, or one that cannot vouch for this."""
        if self.calibration is None:
            raise InputError(f"{self.name} needs a calibration, and this model comes with none: {HOW}")
        data, found = settled_in(Path(self.calibration), **self._options)
        promise = found.promise.to_dict()
        if self.promise is not None and self.promise != promise:
            raise InputError(
                f"{self.name}: {self.calibration} does not give the promise that stands in its config; run "
                "vtprune calibrate again"
            )
        alone = settled_in(Path(self.calibration), **{**self._options, "adaptive": False})[1].levels[0]
        method = dict(data["method"])
        inner = create_checked(method.pop("method"), {**method, "keep": alone})
        return Growth(
            inner, found.levels, threshold=found.threshold, score=found.score, fixed=alone,
            origin=_origin(data), promise=str(found.promise),
        )  # fmt: skip

    def settled(self, data: CalibrationFile) -> Settled:
        """What a calibration says of these options."""
        return settle(data, **self._options)

    @property
    def _options(self) -> dict[str, Any]:
        """Those that `settle` takes."""
        return {name: getattr(self, name) for name in ("agreement", "confidence", "adaptive", "task")}


def _origin(data: CalibrationFile) -> Origin:
    return Origin(
        base=data["base"],
        dtype=data["dtype"],
        most_tokens=max(*data["tuning"]["tokens"], *data["calibration"]["tokens"]),
        generation=data["generation"],
    )
