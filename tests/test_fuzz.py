"""Random models, prompts and methods: each seed is a case, and what must hold is judged without vtprune's own means.

`--cases N` runs more of them, `--first SEED --cases 1` replays one. The judges:

1. Dropping equals masking: the unwrapped model, on a cache that holds everything, with what the report names as
   dropped masked in each layer, merges carried out, gates and D2O's cut redone (`fuzz/reference.py`); where tokens
   return, one pass in which each query sees what its layer had computed by then (`fuzz/returning.py`). Features are
   the wrapped model's where a method acts in its encoder. Not for the released gamma-MoD, which skips text that the
   report does not name, nor for D2O with text=True past the step that still attends to everything.
2. Each row alone equals the row in its batch: tokens and logits; not for released code that shares counts over it.
3. The report equals the cache's tensors and its own lists, and nothing beyond `keep` is kept nor beyond the unpruned
   FLOPs computed, scoring apart; methods that say that they may exceed it: `judges.exceeds`.
4. Unwrapping leaves no hook, attribute, weight or setting, and the logits of a model that was never wrapped.
5. keep=1.0 of a method without weights changes no bit.

Where answers grow (`fuzz/growing.py`, a fourth of the seeds), each row takes the levels that the scores of their runs
by themselves say, and is answered, cached and counted as the last of them alone; 4 holds as well.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.fuzz.growing import attempt_growing
from tests.fuzz.trial import Outcome, attempt

# Seeds in one test, so that several processes share the cases.
CHUNK = 20


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each chunk of seeds, and growing answers, which take a forward for each level and token, for every
    fourth of them."""
    first, cases = (metafunc.config.getoption(name) for name in ("--first", "--cases"))
    end = first + cases
    chunks = [range(start, min(start + CHUNK, end)) for start in range(first, end, CHUNK)]
    found = [*((attempt, chunk) for chunk in chunks), *((attempt_growing, chunk) for chunk in chunks[::4])]
    names = [f"{judged.__name__}-{chunk.start}-{chunk.stop - 1}" for judged, chunk in found]
    metafunc.parametrize(("judged", "seeds"), found, ids=names)


def test_random_cases_pass_all_judges(judged: Callable[[int], Outcome], seeds: range) -> None:
    outcomes = [judged(seed) for seed in seeds]
    wrong = [f"{outcome.case}\n    " + "\n    ".join(outcome.complaints) for outcome in outcomes if outcome.complaints]
    assert not wrong, "\n".join([f"{len(wrong)} of {len(seeds)} cases", *wrong])
    refused = [outcome.refused for outcome in outcomes if outcome.refused]
    assert len(refused) <= len(seeds) / 3 or len(seeds) < CHUNK, "\n".join(["most are refused", *refused])
