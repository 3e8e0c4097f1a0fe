"""Questions in batches: what a journal knows is not asked again, and what was answered is written down at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vtprune.evals.lmms.generation import Answer
from vtprune.evals.lmms.journal import Journal


@dataclass(frozen=True)
class Question:
    """What is asked once. key: as the journal knows it; kind: questions of one kind may share a batch; length: those
    of similar length do."""

    key: str
    kind: str
    length: int


def collect(
    questions: Sequence[Question],
    answer: Callable[[list[int]], Sequence[Answer]],
    *,
    batch_size: int,
    journal: Journal | None,
    progress: Callable[[int], None],
) -> list[dict[str, Any]]:
    """The answers to all questions in their order, as `Answer.to_dict` writes them.

    answer: is given the places of the questions of a batch; progress: is told how many answers came.
    """
    found: dict[int, dict[str, Any]] = {}
    groups: dict[str, list[int]] = defaultdict(list)
    for place, question in enumerate(questions):
        known = journal.get(question.key) if journal is not None else None
        if known is not None:
            found[place] = known
        else:
            groups[question.kind].append(place)
    progress(len(found))
    for places in groups.values():
        # Rows of similar length share a batch, so that little of it is padding.
        places.sort(key=lambda place: -questions[place].length)
        for start in range(0, len(places), batch_size):
            batch = places[start : start + batch_size]
            entries = [one.to_dict() for one in answer(batch)]
            found.update(zip(batch, entries, strict=True))
            if journal is not None:
                journal.add({questions[place].key: entry for place, entry in zip(batch, entries, strict=True)})
            progress(len(batch))
    return [found[place] for place in range(len(questions))]
