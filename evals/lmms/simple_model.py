"""`--model vtprune --force_simple` of lmms-eval: for tasks that ask how likely given answers are.

lmms-eval hands such tasks (`output_type: multiple_choice`) to models of its older kind alone, which are given a text
and a function for the pictures where others are given messages.
"""

from __future__ import annotations

from lmms_eval.api.instance import GenerationResult, Instance

from vtprune.evals.lmms.model import VTPrune
from vtprune.evals.lmms.requests import as_chat, once_each


class VTPruneSimple(VTPrune):
    """The same model, for tasks that were loaded for a simple one."""

    is_simple = True

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """As `VTPrune.generate_until`; what a request shows comes first, then its context."""
        return super().generate_until(once_each(requests, self._as_chat))

    def generate_until_multi_round(self, requests: list[Instance]) -> list[GenerationResult]:
        """As `VTPrune.generate_until_multi_round`."""
        return super().generate_until_multi_round(once_each(requests, self._as_chat))

    def _as_chat(self, request: Instance) -> Instance:
        return as_chat(request, request.args[1], self._instructions)
