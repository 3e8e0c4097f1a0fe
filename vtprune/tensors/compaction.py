"""Pure functions that compact ragged batches: which tokens go on, and what every parallel tensor becomes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtprune.errors import VTPruneError


def places_of(alive: Tensor, counted: Sequence[int] | None = None) -> Tensor:
    """Places of the True entries of `alive` (B, L) in each row, ascending, padded on the left with -1: (B, n).

    Padding stands on the left so that the last column is every row's last token, as generation expects. counted: (B,)
    how many there are; where that is not known, the device is waited for.
    """
    counts = None
    if counted is None:
        counts = alive.sum(dim=1)
        width = int(counts.max())
    else:
        width = max(counted)
    # A stable sort of the mask, as bytes, moves the places of dropped tokens to the front, kept ones to the back, in
    # order.
    order = torch.sort(alive.view(torch.uint8), dim=1, stable=True).indices[:, alive.shape[1] - width :]
    if counted is not None and min(counted) == width:
        return order
    if counts is None:
        counts = torch.tensor(counted, device=alive.device)
    column = torch.arange(width, device=alive.device)
    return order.masked_fill(column[None] < (width - counts)[:, None], -1)


def gather_tokens(states: Tensor, places: Tensor) -> Tensor:
    """Rows of `states` (B or 1, L, ...) at `places` (B, n); padding (-1) repeats place 0: (B, n, ...)."""
    if places.shape[0] == 1:
        # A row alone has no padding.
        return states.index_select(1, places[0].to(states.device))
    index = places.clamp(min=0).to(states.device)
    batch = index.shape[0]
    if states.shape[0] != batch:
        states = states.expand(batch, *states.shape[1:])
    rows = torch.arange(batch, device=states.device)[:, None]
    return states[rows, index]


def pick(values: Tensor, columns: Tensor) -> Tensor:
    """The `values` (B, n) in the `columns` (B, m), -1 where a column is padding (-1): (B, m)."""
    if columns.shape[0] == 1:
        # A row alone has no padding.
        return values.gather(1, columns)
    return values.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, -1)


def relative_places(places: Tensor, previous: Tensor | None, length: int) -> Tensor:
    """Where the tokens at `places` (B, n) stand among the tokens at `previous` (B, m): (B, n), -1 kept."""
    if previous is None:
        return places
    batch, width = previous.shape
    if batch == 1 and places.shape[0] == 1:
        return torch.searchsorted(previous, places)
    inverse = torch.zeros(batch, length, dtype=torch.long, device=places.device)
    column = torch.arange(width, device=places.device).expand(batch, width)
    # Padding columns write to an extra cell that nobody reads.
    inverse = torch.cat([inverse, inverse[:, :1]], dim=1)
    inverse.scatter_(1, previous.masked_fill(previous < 0, length), column)
    found = inverse.gather(1, places.clamp(min=0))
    return found.masked_fill(places < 0, -1)


def fill_index(places: Tensor, length: int) -> Tensor:
    """For every place 0 .. length - 1 the column of the last token of `places` (B, n) at or before it.

    Places before a row's first kept token take that token. Used to hand hidden states of the full length back:
    a dropped position repeats the last kept one before it. Returns (B, length).
    """
    batch, width = places.shape
    if batch == 1 and width:
        place = torch.arange(length, device=places.device)[None]
        return (torch.searchsorted(places, place, right=True) - 1).clamp(min=0)
    column = torch.arange(width, device=places.device).expand(batch, width)
    marks = torch.full((batch, length + 1), -1, dtype=torch.long, device=places.device)
    marks.scatter_(1, places.masked_fill(places < 0, length), column)
    filled = marks[:, :length].cummax(dim=1).values
    # A row without a token has nothing to repeat; whatever it takes nobody reads.
    first = (places < 0).sum(dim=1, keepdim=True).clamp(max=width - 1)
    return torch.where(filled < 0, first, filled)


def layer_mask(
    mask: Tensor | None, queries: Tensor | None, keys: Tensor | None, offset: int, *, ragged: bool, flash: bool
) -> Tensor | None:
    """The attention mask of one layer, cut from the mask of the whole prompt.

    mask: None, (B, L) or (B or 1, 1, Q, L) over logical places, as the model built it.
    queries: (B, q) places of the layer's queries in the current input, -1 padding, or None for all in order.
    keys: (B, k) logical place of each key, -1 padding, or None for all in order.
    offset: logical length of the cache before this input; ragged: whether some keys may be padding.
    Raises VTPruneError for a flex-attention mask.
    """
    if keys is None:
        return mask
    if mask is not None and not isinstance(mask, Tensor):
        raise VTPruneError(
            "flex_attention block masks cannot be cut per layer; load the model with "
            "attn_implementation='sdpa', 'eager' or 'flash_attention_2'"
        )
    if mask is None:
        # Without a mask the model attends causally, which stays right as long as no entry is padding.
        return _mask_from_places(queries, keys, offset, flash) if ragged else None
    if mask.ndim == 2:
        return mask.gather(1, keys.clamp(min=0).to(mask.device)) * (keys >= 0).to(mask)
    return _cut_4d(mask, queries, keys)


def biased_mask(
    mask: Tensor | None, bias: Tensor, queries: Tensor | None, keys: Tensor | None, offset: int, dtype: torch.dtype
) -> Tensor:
    """One layer's mask as an additive (B, 1, q, k) one, with `bias` added to each key's column.

    mask, queries, keys, offset: of the layer, as in `layer_mask`; bias: (B, P) by logical place, P being the end of
    this input.
    Raises VTPruneError for masks that take no bias.
    """
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 4):
        raise VTPruneError("a bias on attention needs attn_implementation='sdpa' or 'eager'")
    batch, end = bias.shape
    own = bias if keys is None else bias.gather(1, keys.clamp(min=0))
    if mask is None:
        everything = torch.arange(end, device=bias.device).expand(batch, -1)
        queries = everything[:, : end - offset] if queries is None else queries
        keys = everything if keys is None else keys
        mask = _mask_from_places(queries, keys, offset, flash=False)
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    # A sum keeps nothing for the backward pass, so that a checkpoint may find the mask made already.
    return mask + own[:, None, None, :].to(mask)


def _mask_from_places(queries: Tensor | None, keys: Tensor, offset: int, flash: bool) -> Tensor:
    if flash:
        return keys >= 0
    if queries is None:
        queries = (keys[:, -1:] - offset).clamp(min=0)
    places = (queries + offset)[:, None, :, None]
    allowed = (keys >= 0)[:, None, None, :] & (keys[:, None, None, :] <= places)
    return allowed | (queries < 0)[:, None, :, None]


def _cut_4d(mask: Tensor, queries: Tensor | None, keys: Tensor) -> Tensor:
    batch = keys.shape[0]
    keys = keys.to(mask.device)
    mask = mask.expand(batch, *mask.shape[1:])
    if queries is None:
        queries = torch.arange(mask.shape[2], device=mask.device).expand(batch, mask.shape[2])
    queries = queries.to(mask.device)
    rows = torch.arange(batch, device=mask.device)[:, None, None, None]
    heads = torch.arange(mask.shape[1], device=mask.device)[None, :, None, None]
    cut = mask[rows, heads, queries.clamp(min=0)[:, None, :, None], keys.clamp(min=0)[:, None, None, :]]
    open_value, closed_value = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
    cut = cut.masked_fill((keys < 0)[:, None, None, :], closed_value)
    # A padding query must see something, or its softmax is NaN; nobody reads what it computes.
    return cut.masked_fill((queries < 0)[:, None, :, None], open_value)
