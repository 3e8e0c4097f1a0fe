"""What lmms-eval puts in front of a question: the user's system instruction, which a task's messages leave out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.utils import apply_template

from vtprune.errors import InputError
from vtprune.loading.prompts import Message

# Stands for an instruction, to see where a chat template writes one.
MARK = "vtprune system instruction"
Render = Callable[[list[Message]], str]


def task_of(to_messages: Any) -> Any:
    """The task whose method writes a request's messages, None for a function that is no task's."""
    return getattr(to_messages, "task", None) or getattr(to_messages, "__self__", None)


class Instructions:
    """Reads the system instruction out of requests.

    lmms-eval builds each request's context from `--system_instruction`, the task's description, examples and the
    question; a chat model is then handed messages without most of it. render: a conversation as the model's chat
    template writes it.
    """

    def __init__(self, render: Render) -> None:
        self._render = render
        self._documents: dict[str, tuple[Any, Any]] = {}

    def of(self, request: Instance) -> str:
        """The system instruction of a request, "" where there is none.

        Raises InputError for one that the chat template has no place for, and for examples, which come without their
        pictures.
        """
        context, to_messages = request.args[:2]
        task = task_of(to_messages)
        if task is None or not isinstance(context, str):
            return ""
        if task.config.num_fewshot and (
            task.config.doc_to_visual is not None or callable(task.config.doc_to_messages)
        ):
            raise InputError(
                f"num_fewshot: lmms-eval hands a chat model no examples in {task.config.task}, whose questions have "
                "pictures; --num_fewshot 0"
            )
        if task.config.num_fewshot:
            # The examples of a task without pictures are in its messages, and drawn anew each time.
            return getattr(getattr(task, "args", None), "system_instruction", None) or ""
        document = self._document(task, request.doc_id)
        example = task.doc_to_text(document)
        if not isinstance(example, str) or context == example:
            return ""
        description = apply_template(task.config.description, document) or "" if task.config.description else ""
        prefix = context.removesuffix(example)
        # A task's own description stays out, as in lmms-eval's other chat models.
        if prefix == description:
            return ""
        return prefix.removesuffix((task.config.fewshot_delimiter or "") + description) if description else prefix

    def _document(self, task: Any, index: int) -> Any:
        """A document of a task without its pictures."""
        name = task.config.task
        if name not in self._documents or self._documents[name][0] is not task:
            self._documents[name] = task, task.eval_docs_no_media
        return self._documents[name][1][index]

    def check(self, instruction: str) -> None:
        """Raises InputError where the chat template does not write a system message."""
        try:
            written = MARK in self._render([turn("system", MARK), turn("user", "?")])
        except Exception as error:
            raise InputError(f"system_instruction: the model's chat template refuses it: {error}") from error
        if not written:
            raise InputError(
                "system_instruction: the model's chat template has no place for a system message, so "
                f"{instruction[:60]!r} would be lost"
            )


def turn(role: str, text: str) -> Message:
    """A message of text alone."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def with_instruction(chat: Sequence[Message], instruction: str) -> list[Message]:
    """A conversation under a system instruction, which takes the place of a task's own."""
    rest = list(chat[1:]) if chat and chat[0]["role"] == "system" else list(chat)
    return [turn("system", instruction), *rest] if instruction else list(chat)
