"""Which cases of the matrix of methods, models and settings `make test` runs; `make test-all` runs them all."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from itertools import combinations

Case = tuple[str, Mapping[str, Hashable]]


def _itself(value: Hashable) -> Hashable:
    return value


def sample(
    cases: Sequence[Case], lean: Container[str] = (), kind: Callable[[Hashable], Hashable] = _itself
) -> set[int]:
    """Places of few cases that together still meet every pair.

    A case is a test's name and its value on each of its axes; kind: what values of an axis have in common, as settings
    of one method do. Every test keeps each value of each of its axes, and every two kinds that meet in some test of
    the group meet in a kept one: a test of three axes or more is sampled pairwise, tests of the same two axes share
    their pairs. Of the tests `lean`, whose cases are dear, each kind is kept, and none need meet in pairs. The choice
    is greedy, and the same for the same cases.
    """
    covers: list[set[Hashable]] = []
    for test, axes in cases:
        values = sorted(axes.items(), key=lambda axis: axis[0])
        kinds = [(axis, kind(value)) for axis, value in values]
        if test in lean:
            covers.append({(test, one) for one in kinds})
        else:
            covers.append({(test, one) for one in values} | set(combinations(kinds, 2)))
    kept: set[int] = set()
    met: set[Hashable] = set()
    # What a case adds only shrinks, so that one whose stale count was largest and still holds is the best.
    queue = [(-len(cover), place) for place, cover in enumerate(covers)]
    heapq.heapify(queue)
    while queue:
        stale, place = heapq.heappop(queue)
        gain = len(covers[place] - met)
        if gain == -stale:
            kept.add(place)
            met |= covers[place]
        elif gain:
            heapq.heappush(queue, (-gain, place))
    return kept
