"""What every test shares: untrained weights are wrapped on purpose, so their warning is for its own tests."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Filters the warning in one place; `pytest.warns` sees it all the same."""
    config.addinivalue_line("filterwarnings", "ignore::vtprune.UntrainedWarning")
