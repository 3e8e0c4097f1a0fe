"""Layers of a cache that hold a state in place of entries: what a linear-attention layer has made of its tokens."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from vtprune.errors import VTPruneError


class StateLayer(LinearAttentionLayer):
    """The convolution window and the recurrent state of a linear-attention layer, which follow the cache's rows.

    A token that reached the layer is part of both for good, and one that was dropped before it never was: there are no
    places to know, and nothing can be cut or taken back. What the rows of a cache have to remember lies with its
    attention layers (`cache.books`).
    folded: whether some row ended in padding after a forward that dropped tokens, which a later token would find in
    its state.
    """

    folded = False

    @classmethod
    def adopt(cls, layer: LinearAttentionLayer) -> StateLayer:
        """A StateLayer with the states of an ordinary linear-attention layer."""
        new = cls(number_of_states=layer.number_of_states)
        new.__dict__.update(layer.__dict__)
        return new

    def twin(self) -> StateLayer:
        """The same states in a layer of its own: they are written to in place."""
        new = StateLayer.adopt(self)
        for name, value in vars(self).items():
            if isinstance(value, dict):
                setattr(
                    new, name, {key: one.clone() if isinstance(one, Tensor) else one for key, one in value.items()}
                )
        return new

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(state.nbytes for state in self.held())

    def held(self) -> list[Tensor]:
        """Every state, once the layer has any: windows (B, C, K) and recurrent ones (B, H, dk, dv)."""
        both = (*self.conv_states.values(), *self.recurrent_states.values())
        return [state for state in both if state is not None]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the given rows."""
        self._map_rows(lambda rows: rows[indices.to(rows.device)])

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        for held in (self.conv_states, self.recurrent_states):
            held.update({index: change(state) for index, state in held.items() if state is not None})

    def reset(self) -> None:
        """Empties the layer."""
        super().reset()
        self.folded = False

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing where no token is to go; raises VTPruneError otherwise, as a recurrent state has no way back."""
        if tokens_to_remove:
            raise VTPruneError(
                "this KV cache holds recurrent states of linear-attention layers, which no token can be taken out of; "
                "keep a copy of the cache from before it, or start a new one"
            )
        if self.record_past:
            super().crop(0)
