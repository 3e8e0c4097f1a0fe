"""DyCoke's cases: the tokens that temporal merging leaves of a video."""

from __future__ import annotations

from tests.golden.case import Case, UnknownCase, expect_equal
from vtprune.pruners.dycoke import compared, keep_unlike


def run(case: Case) -> None:
    """Raises Mismatch where other tokens stay, UnknownCase for another kind of case."""
    if "features" not in case or "kept" not in case:
        raise UnknownCase(f"no DyCoke case has tensors {', '.join(case.tensors)}")
    frames, places = case.setting("frames"), case.setting("tokens_per_frame")
    features = case["features"].unflatten(0, (frames, places))
    count = int((1 - case.setting("ratio")) * places)
    kept = keep_unlike(features, compared(frames, released=True), count)
    # The code leaves the tokens of a reduced frame in the order of their similarity.
    expect_equal("tokens that stay", kept, case["kept"].sort().values)
