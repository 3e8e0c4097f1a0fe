"""Options of the suite."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """How much of the fuzz runs (`tests/test_fuzz.py`)."""
    parser.addoption("--cases", type=int, default=200, help="random cases of the fuzz")
    parser.addoption("--first", type=int, default=0, help="seed of the first of them; with --cases 1, a replay")
