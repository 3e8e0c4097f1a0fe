"""Published numbers beside ours: published.csv, read against its shape, and what matches a row of a report.

The file holds what papers, and the code that goes with them, print of vision-language models; numbers of language
models and of image classifiers are left out. `UNREPORTED` names the methods of which no such number is known here.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import StringConstraints, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from vtprune.errors import FileError
from vtprune.evals.report.reading import Group
from vtprune.evals.report.runs import Row
from vtprune.json_files import first_fault, read_file
from vtprune.method.texts import parse_method

PUBLISHED = Path(__file__).parents[1] / "published.csv"
# How the note of a method begins that vtprune does not have.
NOT_BUILT = "not built"
# Methods without a row, and why: the dull ones are nobody's.
UNREPORTED = {
    "auto": "it is ours, and spends what a calibration says",
    "covipal": "no table of it could be read",
    "d2o": "its paper measures language models",
    "dart": "its README prints savings alone",
    "evs": "no table of it could be read",
    "fopru": "its summary gives round figures alone",
    "frame_pool": "printed together with a trained mixer alone",
    "frame_skip": "printed together with a trained mixer alone",
    "gamma_mod": "it is trained; printed are changes of averages alone",
    "gemfilter": "its paper measures language models",
    "holitom": "its abstract names a share of FLOPs, not of tokens",
    "iared2": "printed of classifiers alone",
    "lazyllm": "its paper measures language models",
    "mue": "printed of an encoder-decoder that was trained for it",
    "mustdrop": "no table of it could be read",
    "pmod": "it is trained; no table of it could be read",
    "pyramid_drop": "its README prints savings alone",
    "spatten": "its paper measures language models",
    "tome": "its paper classifies pictures, and measures no language model",
    "random_ltd": "its paper measures language models and classifiers of images",
    "turbo": "its abstract gives round figures alone",
    "yopo": "it is trained; its README prints shares of FLOPs alone",
    "vtw": "no table of it could be read",
    "vispruner": "its abstract gives round figures alone",
    "vflowopt": "its README gives round figures alone",
}
# A token count, or a share of all tokens, may be off by this share of itself.
TOKENS_WITHIN = 0.01
STANDARD_ERRORS = 2
# In the units of the printed number, percent nearly everywhere: two errors wider than this reproduce anything.
WIDEST = 3.0
# What the last parts of ids are called elsewhere, in lower case.
FAMILIES = {
    "llava-v1.5-7b": "llava-1.5-7b-hf",
    "llava-v1.5-13b": "llava-1.5-13b-hf",
    "llava-v1.6-vicuna-7b": "llava-v1.6-vicuna-7b-hf",
    "llava-onevision-qwen2-7b-ov": "llava-onevision-qwen2-7b-ov-hf",
    "internvl3-8b": "internvl3-8b-hf",
}
# What the authors' code does is the published method, too.
RELEASED = ("variant", "released")
SHARE, MEAN = "% of unpruned", "mean accuracy"

Text = Annotated[str, StringConstraints(min_length=1)]
Count = Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+)?%?$")]
Number = Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+)?$")]


class _Line(TypedDict):
    """A row of published.csv."""

    method: Text
    paper: Annotated[str, StringConstraints(pattern=r"^\d{4}\.\d{5}$")]
    model: Text
    tokens_kept: Count
    setting: Text
    task: Text
    metric: Text
    value: Number
    unpruned_value: Annotated[str, StringConstraints(pattern=r"^(\d+(\.\d+)?)?$")]
    source: Text
    note: str


LINE = TypeAdapter(_Line)
COLUMNS = tuple(_Line.__annotations__)


@dataclass(frozen=True)
class Published:
    """A number as it is printed, in percent where it is a share.

    method: its name, with the options that make it a method that is published under another one; paper: of the
    method, as an arXiv id; model: an id on Hugging Face; tokens_kept: a count, or a share of all tokens
    with a percent sign; task, metric: in the paper's words; value and unpruned_value ("" where it is not said) keep
    their digits, which tell how exact they are; source: the table or the file.
    """

    method: str
    paper: str
    model: str
    tokens_kept: str
    setting: str
    task: str
    metric: str
    value: str
    unpruned_value: str
    source: str
    note: str

    @property
    def name(self) -> str:
        """Of the method without its options."""
        return self.method.partition(":")[0]

    @property
    def built(self) -> bool:
        """Whether vtprune has the method."""
        return not self.note.startswith(NOT_BUILT)

    @property
    def precision(self) -> float:
        """Half a unit of the last digit."""
        return 0.5 * 10.0 ** -len(self.value.partition(".")[2])


@dataclass(frozen=True)
class Benchmark:
    """Where lmms-eval has a paper's number: any of these tasks, the sum of these metrics, times scale."""

    tasks: tuple[str, ...]
    metrics: tuple[str, ...]
    scale: float = 1.0


# By the names that papers use. What is not here cannot be compared: its answers go to a server, or to a judge.
BENCHMARKS: Mapping[tuple[str, str], Benchmark] = {
    ("GQA", "accuracy"): Benchmark(("gqa",), ("exact_match",), 100),
    ("MMBench", "accuracy"): Benchmark(("mmbench_en_dev_static", "mmbench_en_dev"), ("gpt_eval_score",)),
    ("MMBench-CN", "accuracy"): Benchmark(("mmbench_cn_dev",), ("gpt_eval_score",)),
    ("MME", "perception + cognition"): Benchmark(("mme",), ("mme_perception_score", "mme_cognition_score")),
    ("MME", "perception"): Benchmark(("mme",), ("mme_perception_score",)),
    # LLaVA's own table, which papers take the unpruned model's 85.9 from, gives the F1 score.
    ("POPE", "F1"): Benchmark(("pope",), ("pope_f1_score",), 100),
    ("ScienceQA", "accuracy"): Benchmark(("scienceqa_img",), ("exact_match",), 100),
    ("TextVQA", "accuracy"): Benchmark(("textvqa_val",), ("exact_match",), 100),
    ("SEED-Bench", "accuracy, all"): Benchmark(("seedbench",), ("seed_all",), 100),
    ("MMMU", "accuracy"): Benchmark(("mmmu_val",), ("mmmu_acc",), 100),
    ("NoCaps", "CIDEr"): Benchmark(("nocaps_val",), ("nocaps_CIDEr",), 100),
    ("Flickr30k", "CIDEr"): Benchmark(("flickr30k_test",), ("flickr_CIDEr",), 100),
    ("ChartQA", "relaxed accuracy"): Benchmark(("chartqa",), ("relaxed_overall",), 100),
    ("DocVQA", "ANLS"): Benchmark(("docvqa_val",), ("anls",), 100),
    ("MVBench", "accuracy"): Benchmark(("mvbench",), ("mvbench_accuracy",)),
    ("LongVideoBench", "accuracy"): Benchmark(("longvideobench_val_v",), ("lvb_acc",), 100),
    ("MLVU", "accuracy"): Benchmark(("mlvu_dev",), ("mlvu_percetion_score",)),
    ("VideoMME", "accuracy"): Benchmark(("videomme",), ("videomme_perception_score",)),
}
# The metric of a task whose name stands in a mean over several.
USUAL = {"MME": "perception + cognition", "POPE": "F1"}


@dataclass(frozen=True)
class Match:
    """A published number and ours, None where the setting was not run; ours and unpruned in the paper's units."""

    published: Published
    row: Row | None = None
    ours: float | None = None
    stderr: float | None = None
    unpruned: float | None = None

    @property
    def tolerance(self) -> float:
        """How far ours may be off: half a unit of the printed number's last digit, and two standard errors of ours."""
        return self.published.precision + STANDARD_ERRORS * (self.stderr or 0.0)

    @property
    def told(self) -> bool:
        """Whether ours was measured on enough questions to say anything."""
        return self.ours is not None and STANDARD_ERRORS * (self.stderr or 0.0) <= WIDEST

    @property
    def reproduced(self) -> bool:
        """Whether ours is as near as that."""
        return (
            self.told
            and self.ours is not None
            and abs(self.ours - float(self.published.value)) <= self.tolerance + 1e-9
        )

    @property
    def verdict(self) -> str:
        """What the report says of it; an asterisk where no standard error of ours is known."""
        if self.ours is None:
            return "not run"
        if not self.told:
            return f"too few questions: {self.ours:.1f} ± {self.stderr:.1f}"
        within = f"{self.tolerance:.{1 if self.tolerance >= 0.1 else 2}f}" + ("" if self.stderr is not None else "*")
        if self.reproduced:
            return f"reproduced within {within}"
        return f"not reproduced: {self.ours - float(self.published.value):+.1f}, tolerance {within}"


def read_published(path: Path = PUBLISHED) -> list[Published]:
    """Every row of the file; raises FileError, which names the row, for the first one that is not of its shape."""
    text = read_file(path, "published numbers").decode("utf-8", errors="replace")
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey="too many", strict=True)
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise FileError(f"{path}, row 1, does not name the columns {', '.join(COLUMNS)}")
    found = []
    try:
        for number, line in enumerate(reader, 2):
            found.append(Published(**_checked(line, path, number)))
    except csv.Error as error:
        raise FileError(f"{path}, row {len(found) + 2}, is not CSV: {error}") from error
    return found


def _checked(line: dict[Any, Any], path: Path, number: int) -> dict[str, str]:
    try:
        LINE.validate_python(line, strict=True)
    except ValidationError as error:
        raise FileError(f"{path}, row {number}, is not a published number: {first_fault(error)}") from error
    if "too many" in line:
        raise FileError(
            f"{path}, row {number}, has more values than the {len(COLUMNS)} columns; quote those with commas"
        )
    return dict(line)


@cache
def known() -> tuple[Published, ...]:
    """The numbers that come with vtprune."""
    return tuple(read_published())


def family(model: str) -> str:
    """The part of an id or of a folder's path that identifies a model, whoever has copied it."""
    last = model.rstrip("/").rpartition("/")[2].lower()
    return FAMILIES.get(last, last)


def matches(group: Group, numbers: Sequence[Published]) -> list[Match]:
    """Each published number of the group's model beside ours, those that were not run among them."""
    own = [one for one in numbers if family(one.model) == family(group.model)]
    return [match for one in own for match in _matched(group, one)]


def _matched(group: Group, one: Published) -> list[Match]:
    rows = [row for row in group.rows if _is_of(row, one) and _keeps(row, one.tokens_kept)]
    found = []
    for row in rows:
        ours = _number(row, one, group.unpruned)
        if ours is not None:
            full = None if group.unpruned is None else _number(group.unpruned, one, group.unpruned)
            unpruned = None if full is None else full[0]
            found.append(Match(one, row, *ours, unpruned=unpruned))
    return found or [Match(one)]


def _is_of(row: Row, one: Published) -> bool:
    """Whether a row is the published method: with the options that it has, and no others but its released variant."""
    return row.method == one.name and _options(row.label, one.name) - {RELEASED} == _options(one.method, one.name)


def _options(text: str, name: str) -> set[tuple[str, Any]]:
    """The options of a method's text; a folder's label has none."""
    return set(parse_method(text)[1]) if text.startswith(f"{name}:") else set()


def _keeps(row: Row, wanted: str) -> bool:
    """Whether a row kept as many tokens as a paper says, by our count or by the paper's."""
    before = row.costs.before
    counts = [count for count in (row.costs.kept, row.costs.published) if count is not None]
    if wanted.endswith("%"):
        target = float(wanted[:-1]) / 100
        counts = [count / before for count in counts] if before else []
    else:
        target = float(wanted)
    return any(abs(count - target) <= TOKENS_WITHIN * target for count in counts)


def _number(row: Row, one: Published, unpruned: Row | None) -> tuple[float, float | None] | None:
    """Ours for a published number, with its standard error: of one task, or the mean of several."""
    parts = one.task.split("+")
    if one.metric not in (SHARE, MEAN):
        return _of_task(row, BENCHMARKS.get((one.task, one.metric)))
    found = [_of_part(row, part, one.metric, unpruned) for part in parts]
    if any(part is None for part in found):
        return None
    told = [part for part in found if part is not None]
    errors = [error for _, error in told if error is not None]
    error = math.sqrt(math.fsum(each**2 for each in errors)) / len(told) if len(errors) == len(told) else None
    return math.fsum(value for value, _ in told) / len(told), error


def _of_part(row: Row, task: str, metric: str, unpruned: Row | None) -> tuple[float, float | None] | None:
    benchmark = BENCHMARKS.get((task, USUAL.get(task, "accuracy")))
    ours = _of_task(row, benchmark)
    if ours is None or metric == MEAN:
        return ours
    full = None if unpruned is None else _of_task(unpruned, benchmark)
    if full is None or not full[0]:
        return None
    # Sums and F1 scores have no answers to pair, so the share's error is that of ours alone.
    return 100 * ours[0] / full[0], None if ours[1] is None else 100 * ours[1] / full[0]


def _of_task(row: Row, benchmark: Benchmark | None) -> tuple[float, float | None] | None:
    if benchmark is None:
        return None
    for task in benchmark.tasks:
        told = row.metrics.get(task, {})
        keys = [next((key for key in told if key.partition(",")[0] == metric), None) for metric in benchmark.metrics]
        if all(key is not None for key in keys):
            value = math.fsum(told[key] for key in keys if key is not None)
            return benchmark.scale * value, _error(row, task, benchmark)
    return None


def _error(row: Row, task: str, benchmark: Benchmark) -> float | None:
    """The standard error where the number is one metric that has one."""
    if len(benchmark.metrics) > 1:
        return None
    metric, told = benchmark.metrics[0], row.metrics[task]
    main = row.scores.get(task)
    if main is not None and main.metric == metric and main.stderr is not None:
        return benchmark.scale * main.stderr
    names = (f"{metric}_stderr_clt", f"{metric}_stderr")
    found = next((told[key] for name in names for key in told if key.partition(",")[0] == name), None)
    return None if found is None else benchmark.scale * found
