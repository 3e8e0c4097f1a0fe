"""Tasks that ask again, with what was answered in hand: every round is a prompt of its own, as the task writes it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lmms_eval.api.instance import Instance

from vtprune.errors import SampleError
from vtprune.evals.lmms.collecting import Question
from vtprune.evals.lmms.generation import Answer
from vtprune.evals.lmms.instructions import task_of
from vtprune.evals.lmms.requests import with_args

# A task whose text is the same whatever the round never says that it is over.
MOST_ROUNDS = 100


class Written:
    """Messages that a task has written already, in the place of the function that does."""

    def __init__(self, messages: Any, to_messages: Callable[..., Any]) -> None:
        self.task = task_of(to_messages)
        self._messages = messages

    def __call__(self, doc: Any) -> Any:
        """The messages."""
        return self._messages


@dataclass
class Talk:
    """One request, and its rounds so far.

    question: as a single answer to the request would be known by; said: the answers that the task goes by, which it
    may rewrite; info: what the task hands itself from round to round; asked: the request of the round that is due,
    None after the last one.
    """

    request: Instance
    question: Question
    answers: list[Answer] = field(default_factory=list)
    said: list[Any] = field(default_factory=list)
    info: Any = None
    asked: Instance | None = None

    def turn(self, doc: Any) -> None:
        """Asks the task for the next round, by the document."""
        context, to_messages, *rest = self.request.args
        self.asked = None
        if not self.answers:
            messages = to_messages(doc)
        else:
            found = to_messages(
                doc, round_idx=len(self.answers), previous_output=list(self.said), previous_round_info=self.info
            )
            if not isinstance(found, tuple) or len(found) != 4:
                return
            messages, over, said, self.info = found
            self.said = list(said) if isinstance(said, list | tuple) else self.said
            if over:
                return
        self.asked = with_args(self.request, (context, Written(messages, to_messages), *rest))

    def due(self) -> Question:
        """What the journal knows the round by that is due; it depends on what was said before."""
        before = hashlib.sha256(json.dumps(self.said, default=str).encode()).hexdigest()[:16]
        return replace(self.question, key=f"{self.question.key}/round-{len(self.answers)}-{before}")

    def take(self, answer: Answer) -> None:
        """Goes on with an answer to the round that was due."""
        self.answers.append(answer)
        self.said.append(answer.text)


def talk_through(
    talks: Sequence[Talk],
    turn: Callable[[Talk], None],
    ask: Callable[[list[Question], list[Instance]], Sequence[Answer]],
    name: Callable[[Instance], str],
) -> None:
    """Answers some requests to their ends, the rounds of all of them together; raises SampleError, by the `name` of
    the request, for one without an end."""
    going = list(talks)
    while True:
        for talk in going:
            turn(talk)
        going = [talk for talk in going if talk.asked is not None]
        if not going:
            return
        if len(going[0].answers) >= MOST_ROUNDS:
            raise SampleError(f"{name(going[0].request)}: its task has not ended after {MOST_ROUNDS} rounds")
        requests = [talk.asked for talk in going if talk.asked is not None]
        for talk, answer in zip(going, ask([talk.due() for talk in going], requests), strict=True):
            talk.take(answer)
