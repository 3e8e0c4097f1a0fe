"""Copies of a model, many times faster than `copy.deepcopy`: what is no tensor is pickled once."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

from torch import Tensor


class Copier:
    """Makes copies of a model as it is now; tensors are copied themselves, shared ones once."""

    def __init__(self, model: Any) -> None:
        written = io.BytesIO()
        pickler = _Apart(written)
        pickler.dump(model)
        self._pickled, self._tensors = written.getvalue(), pickler.tensors

    def copy(self) -> Any:
        """Another model that shares nothing with the first one."""
        return _Joined(io.BytesIO(self._pickled), self._tensors).load()


class _Apart(pickle.Pickler):
    """Leaves numbers in the place of tensors."""

    def __init__(self, file: Any) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self._places: dict[int, int] = {}

    def persistent_id(self, found: Any) -> int | None:
        if not isinstance(found, Tensor):
            return None
        if id(found) not in self._places:
            self._places[id(found)] = len(self.tensors)
            self.tensors.append(found)
        return self._places[id(found)]


class _Joined(pickle.Unpickler):
    """Puts copies of the tensors in the place of their numbers."""

    def __init__(self, file: Any, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors
        self._copies: dict[int, Tensor] = {}

    def persistent_load(self, place: int) -> Tensor:
        if place not in self._copies:
            self._copies[place] = copy.deepcopy(self._tensors[place])
        return self._copies[place]
