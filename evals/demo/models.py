"""The models of a demo, lent to several visitors at once: each works on a replica, which shares the weights alone."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtprune.adapters import adapter_for
from vtprune.assets import BUNDLED, TRAINED, folder_of
from vtprune.errors import InputError
from vtprune.evals.settings import Setting, folder_setting, holds_method
from vtprune.loading.model import load_model
from vtprune.method.facts import ModelFacts


@dataclass(frozen=True)
class Loaded:
    """One model: what the page calls it, where it came from, and what it was trained with, if anything."""

    name: str
    source: str
    model: Any
    processor: Any
    facts: ModelFacts
    trained: Setting | None

    @property
    def bundled(self) -> bool:
        """Whether it came with vtprune, and knows the drawn benchmark."""
        return self.source in {str(path) for path in (*BUNDLED.values(), *TRAINED)}


def replica(model: Any) -> Any:
    """A model of the same modules and the very same weights, with hooks and state of its own."""
    shared = {id(part): part for part in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


class Models:
    """The models by name, each lent to so many visitors at once as replicas were asked for.

    closing: set once the page closes; busy: visitors who are being answered.
    """

    def __init__(self, loaded: Sequence[Loaded]) -> None:
        self._loaded = {one.name: one for one in loaded}
        self._idle: dict[str, list[Any]] = {name: [] for name in self._loaded}
        self._lock = threading.Lock()
        # Answers under way break off at their next token once this is set.
        self.closing = threading.Event()
        self.busy = 0

    @property
    def names(self) -> list[str]:
        """In the order in which they were given."""
        return list(self._loaded)

    def __getitem__(self, name: str) -> Loaded:
        """Raises InputError for a model that is not served here."""
        if name not in self.names:
            raise InputError(f"model: this page has {', '.join(self.names)}, not {str(name)[:80]!r}")
        return self._loaded[name]

    @contextmanager
    def lent(self, name: str) -> Iterator[Any]:
        """A replica that nobody else has meanwhile."""
        original, idle = self[name].model, self._idle[name]
        with self._lock:
            # Copying reads modules that nobody else may be changing; the original is never wrapped.
            lent = idle.pop() if idle else replica(original)
            self.busy += 1
        try:
            yield lent
        finally:
            with self._lock:
                idle.append(lent)
                self.busy -= 1


def load_models(names: Sequence[str], *, device: str | None = None, dtype: str = "auto") -> Models:
    """Loads what `--model` names, or the bundled models; raises InputError for what cannot be loaded or pruned."""
    sources = [folder_of(name) for name in names] or [str(path) for path in (*BUNDLED.values(), *TRAINED)]
    loaded: list[Loaded] = []
    for source in sources:
        model, processor = load_model(source, device=device, dtype=dtype)
        trained = folder_setting(source) if holds_method(source) else None
        name = Path(source).name if Path(source).is_dir() else source
        if any(one.name == name for one in loaded):
            raise InputError(f"model: two models are called {name!r}; name each folder once, and otherwise")
        facts = adapter_for(model).facts()
        loaded.append(Loaded(name, source, model=model, processor=processor, facts=facts, trained=trained))
    return Models(loaded)
