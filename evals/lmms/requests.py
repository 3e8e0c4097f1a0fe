"""What lmms-eval hands in, in the one form that a chat model's requests to generate have.

Such a request's `args` are (context, to_messages, options, document's place, task, split). Requests for likelihoods,
and all those of tasks that were loaded for a `simple` model, come with a function for the pictures instead.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.task import ConfigurableMessagesTask

from vtprune.errors import InputError
from vtprune.evals.lmms.collecting import Question
from vtprune.evals.lmms.instructions import Instructions, task_of
from vtprune.evals.lmms.journal import request_key


class ContextMessages:
    """The messages of a request that has no function for them: what it shows, then its context.

    task: the task of lmms-eval that it belongs to; next_text: what a task says of later rounds, where it has any.
    """

    def __init__(self, context: str, doc_to_visual: Callable[..., Any], next_text: Callable[..., Any] | None) -> None:
        self.task = task_of(doc_to_visual)
        self.context, self._visual, self._next = context, doc_to_visual, next_text

    def __call__(self, doc: Any, **later: Any) -> Any:
        """The messages; of a later round what `ConfigurableMessagesTask.doc_to_messages` answers then."""
        if not later:
            return self._turn(self._visual(doc), self.context)
        assert self._next is not None
        shown, text, terminal, previous, info = self._next(doc, **later)
        return (None if terminal else self._turn(shown, text)), bool(terminal), previous, info

    @staticmethod
    def _turn(shown: Sequence[Any] | None, text: str) -> Any:
        return ConfigurableMessagesTask._build_user_turn(shown, text)


def once_each(requests: Sequence[Instance], change: Callable[[Instance], Instance]) -> list[Instance]:
    """The changed requests; one that is asked several times is one afterwards, too."""
    changed: dict[int, Instance] = {}
    for request in requests:
        if id(request) not in changed:
            changed[id(request)] = change(request)
    return [changed[id(request)] for request in requests]


def as_chat(request: Instance, options: Any, instructions: Instructions) -> Instance:
    """A request that comes with a function for its pictures, as a chat model's request with these options."""
    context, _, doc_to_visual, *rest = request.args
    next_text = rest[0] if len(rest) == 4 else None
    messages = ContextMessages(context, doc_to_visual, next_text)
    changed = with_args(request, (context, messages, options, *rest[-3:]))
    # The instruction is a message of its own, and the rest of the context the user's.
    instruction = instructions.of(changed)
    rest_of_context = context.removeprefix(instruction)
    if instruction and messages.task is not None:
        rest_of_context = rest_of_context.removeprefix(messages.task.config.fewshot_delimiter or "")
    messages.context = rest_of_context
    return changed


def with_args(request: Instance, args: tuple[Any, ...]) -> Instance:
    """The same request with other arguments."""
    return Instance(request.request_type, args, request.idx, metadata=request.metadata)


def questions_of(requests: Sequence[Instance], *, alike: bool = False) -> list[Question]:
    """What the journal knows each request by; one that is asked several times is a question each time.

    alike: whether all may share a batch, whatever their options.
    """
    times: Counter[int] = Counter()
    found = []
    for request in requests:
        context, _, options, doc_id, task, _ = request.args
        times[id(request)] += 1
        again = {"repeat": times[id(request)]} if times[id(request)] > 1 else {}
        key = request_key(task, doc_id, context, {**options, **again})
        kind = "" if alike else json.dumps(options, sort_keys=True, default=str)
        found.append(Question(key, kind, len(context)))
    return found


def check_no_cache(requests: Sequence[Instance]) -> None:
    """Raises InputError where lmms-eval keeps answers that are no single text: its cache cannot give them back."""
    for task in {id(task): task for task in (task_of(request.args[1]) for request in requests)}.values():
        if getattr(getattr(task, "args", None), "use_cache", None):
            raise InputError(
                f"use_cache: leave it out; lmms-eval's cache keeps texts, and {task.config.task} asks how likely "
                "answers are, or in rounds"
            )
