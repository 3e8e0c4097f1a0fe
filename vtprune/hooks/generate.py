"""Hooks of `generate`: the forward that reads a prompt reads nothing else, and a report is that of the prompt."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from vtprune.errors import VTPruneError
from vtprune.hooks.state import Call, ThreadState


class GenerateHooks:
    """What a wrapped model's `generate` does besides.

    decides: the name of a method that decides by every token that it reads, so that none may be taken back, or None.
    """

    def __init__(self, state: ThreadState, decides: str | None) -> None:
        self.state, self.decides = state, decides

    def generate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """`generate`, within which this thread's reports are those of its first forward's sequence: what else a call
        runs the model on (the unconditional branch of guidance, say) was not asked for."""

        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            before = self.state.call
            if before is None:
                self.state.call = Call()
            try:
                return original(*args, **kwargs)
            finally:
                self.state.call = before

        return generate

    def candidate_generator(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The maker of what guesses tokens ahead: its first guesses are thrown away.

        They would be read together with the prompt, and methods would take them for its text and its end. Guesses
        never change what is generated, so all that this costs is one round of them. Raises VTPruneError for a method
        that decides by every token, and for guesses by the model's own first layers.
        """

        @functools.wraps(original)
        def make(*args: Any, **kwargs: Any) -> Any:
            if self.decides is not None:
                raise VTPruneError(
                    f"{self.decides} decides by the attention of every new token what stays, and assisted decoding "
                    "checks several at a time and takes some back; generate without assistant_model and "
                    "prompt_lookup_num_tokens"
                )
            config = kwargs.get("generation_config")
            if getattr(config, "assistant_early_exit", None) is not None:
                raise VTPruneError(
                    "assistant_early_exit runs the first layers of the wrapped model by themselves, where methods "
                    "that act in later layers have no place; generate with an assistant_model or "
                    "prompt_lookup_num_tokens"
                )
            generator = original(*args, **kwargs)
            generator.get_candidates = _after_the_prompt(generator.get_candidates)
            return generator

        return make


def _after_the_prompt(get_candidates: Callable[..., Any]) -> Callable[..., Any]:
    """`get_candidates` whose first call answers with the tokens that it was given."""
    read = False

    @functools.wraps(get_candidates)
    def get(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal read
        # Asked all the same: what it keeps of its own (a cache of the assistant's) is then as after any round in which
        # every guess was wrong.
        guessed = get_candidates(input_ids, *args, **kwargs)
        if read:
            return guessed
        read = True
        return input_ids, None

    return get
