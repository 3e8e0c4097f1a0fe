"""The options of the fuzz, warnings that tests cause on purpose, and what the fast tests leave out of the matrix."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path

import pytest

from tests import support
from tests.clip_towers import TOWERS
from tests.models import ANYRES, HYBRIDS, MODELS, SHOWN, TOWER_ONLY
from tests.sampling import Case, sample
from vtprune.method.pruner import Pruner
from vtprune.method.stages import BeforeDecoder, BetweenLayers, InCache, InEncoder, InLayers

HERE = Path(__file__).parent
STAGES = (InEncoder, BeforeDecoder, BetweenLayers, InLayers, InCache)
# Where what differs in a tower is seen.
OF_TOWERS = ("adapters", "cost", "encoder", "report", "test_oracle.py", "test_properties.py", "test_support.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", type=int, default=80, help="how many seeds tests/test_fuzz.py runs")
    parser.addoption("--support", type=Path, help="where tests/test_support.py, run in full, writes its table")
    parser.addoption("--first", type=int, default=0, help="the first of them; with --cases 1 one case alone")


def _case(item: pytest.Function) -> Case | None:
    """The test's name and its value on each axis, one for each `parametrize`; None where there are not two."""
    lean = item.get_closest_marker("lean")
    of = _stages if lean is not None and lean.kwargs.get("by") == "stages" else _name
    marks = list(item.iter_markers("parametrize"))
    if len(marks) < 2:
        return None
    names = [mark.args[0] if isinstance(mark.args[0], str) else ",".join(mark.args[0]) for mark in marks]
    params = item.callspec.params
    axes = {axis: _value([params[name.strip()] for name in axis.split(",")], of) for axis in names}
    return item.originalname, axes


def _value(values: list[object], of: Callable[[Pruner], object]) -> tuple[str, str]:
    """What an axis has at a test: its kind, which settings of one method share (or methods of the same stages), and
    the whole of it."""
    kinds = [of(one) if isinstance(one, Pruner) else one for one in values]
    return repr(kinds), repr(values)


def _name(pruner: Pruner) -> str:
    return pruner.name


def _stages(pruner: Pruner) -> list[str]:
    return [stage.__name__ for stage in STAGES if isinstance(pruner, stage)]


def _is_of_a_tower_elsewhere(item: pytest.Function) -> bool:
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return params.get("kind") in TOWER_ONLY.union(ANYRES) and item.path.relative_to(HERE).parts[0] not in OF_TOWERS


# What the tests of the support table found, by cell.
FOUND: dict[support.Cell, list[str]] = defaultdict(list)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call":
        return
    for name, value in report.user_properties:
        if name == "support":
            method, kind, shown, text = value
            FOUND[method, kind, shown].append(text if report.passed else "failed")


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--support")
    # Of several processes the one that hears of all tests writes.
    if path is not None and not hasattr(session.config, "workerinput"):
        own = {cell: texts for cell, texts in FOUND.items() if not cell[0].startswith("test_")}
        kinds = {kind: list(SHOWN) for kind in (*MODELS, *ANYRES, *HYBRIDS)}
        support.write(path, own, {**kinds, support.ALONE: list(TOWERS)})


def pytest_configure(config: pytest.Config) -> None:
    """Untrained weights are wrapped on purpose, so their warning is for its own tests: `pytest.warns` sees it."""
    config.addinivalue_line("filterwarnings", "ignore::vtprune.UntrainedWarning")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and _is_of_a_tower_elsewhere(item):
            item.add_marker(pytest.mark.slow)
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.browser)
    groups: dict[object, list[tuple[pytest.Item, Case]]] = defaultdict(list)
    for item in items:
        case = _case(item) if isinstance(item, pytest.Function) else None
        if case is not None and item.get_closest_marker("slow") is None:
            groups[item.path].append((item, case))
    for group in groups.values():
        lean = {case[0] for item, case in group if item.get_closest_marker("lean") is not None}
        kept = sample([case for _, case in group], lean, kind=itemgetter(0))
        for place, (item, _) in enumerate(group):
            if place not in kept:
                item.add_marker(pytest.mark.slow)
