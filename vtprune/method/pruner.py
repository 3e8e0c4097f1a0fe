"""The base class of every method: a frozen dataclass of hyper-parameters. What it does, and when, say its stages."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from numbers import Integral
from typing import Any, ClassVar, Self, final

from vtprune.errors import VTPruneError
from vtprune.method.catalogue import PrunerInfo
from vtprune.method.facts import PUBLISHED, ModelFacts, Work
from vtprune.method.kinds import VIDEO


@dataclass(frozen=True)
class Tunable:
    """The values that a search may give to a hyper-parameter: numbers from `low` to `high`, or `choices`.

    whole: only ints; log: equal ratios count as equal steps; start: what stands for the hyper-parameter where it is
    None, if that is known.
    """

    low: float = 0.0
    high: float = 1.0
    whole: bool = False
    log: bool = False
    choices: tuple[str | int | float | bool | None, ...] = ()
    start: float | None = None


Grid3 = tuple[int, int, int]


class Counted(Enum):
    """Which tokens of an image `keep` counts."""

    ENTERING = "those that enter the decoder"
    MEAN_OF_LAYERS = "the mean over decoder layers of those that a layer processes"
    AHEAD_OF_DROPS = "the same mean, where a layer after which tokens drop counts as if they had dropped already"
    LEFT = "those that the last layer processes"
    CACHED = "the mean over heads of those in the caches that are cut"

    def of(self, counts: list[int]) -> float:
        """The number of them, from the tokens that each decoder layer processed. What heads hold, layers cannot say:
        CACHED then counts as ENTERING."""
        if self is Counted.MEAN_OF_LAYERS:
            return sum(counts) / len(counts)
        if self is Counted.AHEAD_OF_DROPS:
            return sum([*counts[1:], counts[-1]]) / len(counts)
        return float(counts[-1] if self is Counted.LEFT else counts[0])


def checked_keep(keep: Any, name: str = "keep") -> int | float | None:
    """A keep with any whole number (numpy's, say) as an int; raises VTPruneError unless it is None, an int of at
    least 1, or a float in (0, 1]; name: of the option."""
    if keep is None:
        return None
    per = {"keep_video": "video", "keep_prompt": "prompt"}.get(name, "image")
    hint = f"{name} takes a count of vision tokens per {per} (an int of at least 1) or a fraction (a float in (0, 1])"
    if isinstance(keep, bool) or not isinstance(keep, Integral | float):
        raise VTPruneError(f"{hint}, got {keep!r}")
    if isinstance(keep, Integral) and keep < 1:
        raise VTPruneError(f"{hint}, got {keep!r}")
    if isinstance(keep, float) and not (math.isfinite(keep) and 0 < keep <= 1):
        raise VTPruneError(f"{hint}, got {keep!r}")
    return int(keep) if isinstance(keep, Integral) else keep


def budget_of(keep: int | float, tokens: int) -> int:
    """How many of `tokens` a keep asks for: min(keep, tokens), or max(1, round(keep * tokens))."""
    if isinstance(keep, int):
        return min(keep, tokens)
    return min(tokens, max(1, round(keep * tokens)))


def checked_grid(grid: Sequence[int]) -> Grid3:
    """A grid (h, w) as (1, h, w), one of three numbers as it is; raises VTPruneError for anything else."""
    sizes = tuple(int(size) for size in grid)
    if len(sizes) not in (2, 3) or min(sizes) < 1:
        raise VTPruneError(f"a grid is (h, w) or (t, h, w) in vision tokens, got {sizes}")
    return (sizes[-3] if len(sizes) == 3 else 1, sizes[-2], sizes[-1])


@dataclass(frozen=True)
class Pruner(ABC):
    """A method and its hyper-parameters; subclasses derive from the stages that they act in (`method/stages.py`).

    keep: vision tokens to keep per image, a count (int) or a fraction of the image's tokens (float in
    (0, 1]); None is the paper's own setting (`default_keep`). keep_video: the same for each video, where it is to
    differ from an image; None: `keep` holds for both.
    """

    keep: int | float | None = None
    keep_video: int | float | None = field(default=None, kw_only=True)
    # What `bind` met; part of what makes two pruners equal, and of no config.
    model: ModelFacts = field(default=PUBLISHED, init=False, repr=False)
    # This method with `keep_video` for its `keep`, once it is bound; None where one `keep` holds for all.
    _for_videos: Pruner | None = field(default=None, init=False, repr=False, compare=False)

    info: ClassVar[PrunerInfo]
    # Which tokens `keep` counts; and which ones the paper's own numbers count, where these are others.
    counted: ClassVar[Counted] = Counted.ENTERING
    published: ClassVar[Counted | None] = None

    def __post_init__(self) -> None:
        for name in ("keep", "keep_video"):
            object.__setattr__(self, name, checked_keep(getattr(self, name), name))
        variant = getattr(self, "variant", None)
        if variant is not None and variant not in self.info.variants:
            choices = ", ".join(map(repr, self.info.variants))
            raise VTPruneError(f"{self.name}: variant is one of {choices}, got {variant!r}")

    @property
    @final
    def name(self) -> str:
        """The registry name."""
        return self.info.name

    @property
    def default_keep(self) -> int | float | None:
        """What a `keep` of None stands for: the paper's own setting, or a quarter for a method that does not say; None
        where something else (a threshold, say) decides what stays."""
        return 0.25

    @property
    def renumbers(self) -> bool:
        """Whether positions are numbered anew without the dropped tokens, as some released code does."""
        return False

    def resolve(self) -> dict[str, Any]:
        """Values for the fields whose meaning depends on `self.model`, by name, where they are None; raises
        VTPruneError for a setting that the model cannot meet (a layer beyond the decoder, say)."""
        return {}

    @final
    def bind(self, model: ModelFacts) -> Self:
        """This pruner for one model: the only way in which a method meets one. Raises what `resolve` raises."""
        bound = self._of(model, self._of(model, {}).resolve())
        if self.keep_video is not None:
            twin = dataclasses.replace(self, keep=self.keep_video, keep_video=None)
            object.__setattr__(bound, "_for_videos", twin.bind(model))
        return bound

    def _of(self, model: ModelFacts, fields: dict[str, Any]) -> Self:
        bound = dataclasses.replace(self, **fields)
        object.__setattr__(bound, "model", model)
        return bound

    def budget(self, tokens: int) -> int:
        """Vision tokens of an image of `tokens` that are left in the end."""
        keep = asked(self)
        return tokens if keep is None else budget_of(keep, tokens)

    def _entering(self, grid: Grid3) -> int:
        """`count`, of a method that can be served; raises VTPruneError where its options say that it cannot."""
        return self.budget(math.prod(grid))

    @final
    def count(self, grid: Sequence[int]) -> int:
        """How many vision tokens of an image enter the decoder, exactly, before anything but its grid is known.

        grid: (h, w) in vision tokens, or (1, h, w). Raises VTPruneError for a method of which that cannot be said, or
        that no server can hand what it reads.
        """
        shape = checked_grid(grid)
        if self.info.unserved:
            raise VTPruneError(
                f"{self.name} {self.info.unserved}: an image's grid alone does not say what a server would keep"
            )
        return self._entering(shape)

    def search_space(self, tokens: float) -> dict[str, Tunable]:
        """The hyper-parameters that a search may set, by field name, at this `keep` and for images of `tokens`; none
        by default."""
        return {}

    def flops(self, work: Work) -> int:
        """FLOPs (2 a multiply-accumulate) of the matrix products that the method adds for one image."""
        return 0

    @final
    def to_dict(self) -> dict[str, Any]:
        """The hyper-parameters as plain JSON types, with the method's name first; raises VTPruneError for a value that
        is none, such as a model in memory."""
        options = {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.init}
        if self.keep_video is None:
            del options["keep_video"]
        for name, value in options.items():
            if not _is_plain(value):
                raise VTPruneError(
                    f"{self.name}: {name} cannot be written as JSON: a {type(value).__name__} in memory cannot be "
                    "written to a config; pass the folder, name or number that stands for it"
                )
        return {"method": self.name, **options}


def asked(pruner: Pruner) -> int | float | None:
    """The share or count that a pruner was asked for, None where something else decides."""
    return pruner.default_keep if pruner.keep is None else pruner.keep


def forms(pruner: Pruner) -> tuple[Pruner, ...]:
    """A bound method as it treats images and, where that differs, as it treats videos."""
    twin = pruner._for_videos
    return (pruner,) if twin is None else (pruner, twin)


def form_for(pruner: Pruner, kind: str) -> Pruner:
    """A bound method as it treats what is of this kind: videos by its `keep_video`, if it has one."""
    return forms(pruner)[-1] if kind == VIDEO else pruner


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, str | int | float | bool)
