"""One forward on a cache whose vision tokens may return: which ones each layer attends to, and which it computes.

A token that a layer computes is, from then on, either in the KV cache of the next layer or in its auxiliary cache
(`Waiting`), so every layer computes it once at the most. Returning tokens stand in front of the input's own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtprune.cache.slots import Slots
from vtprune.cache.waiting import (
    WHOLE,
    Step,
    Tokens,
    VisionLog,
    Waiting,
)
from vtprune.decoder.prompt import numbers_in_rows
from vtprune.decoder.run import DecoderRun, Entering, LayerView, Shaper
from vtprune.errors import VTPruneError
from vtprune.method.checks import answered, check_scores
from vtprune.method.choosing import best_of_each
from vtprune.tensors.compaction import (
    gather_tokens,
    layer_mask,
    pick,
    places_of,
    relative_places,
)

if TYPE_CHECKING:
    from vtprune.cache.layer import PrunedLayer
    from vtprune.decoder.prompt import ImageSpan, PromptInfo
    from vtprune.method.pruner import Pruner


def check_revival(
    layers: list[PrunedLayer], method: Pruner | None, tapped: frozenset[int], *, flash: bool, windows: bool
) -> None:
    """Raises VTPruneError where tokens cannot return: masks that say one thing for all queries, windows, or a cache
    that a model wrapped otherwise goes on with."""
    chosen = {index - 1 for index, layer in enumerate(layers) if layer.waiting is not None}
    if method is None or not chosen <= tapped:
        raise VTPruneError(
            "this KV cache was filled by a model wrapped with a method that lets tokens return; continue with the "
            "same method and settings, or start a new cache"
        )
    if flash:
        raise VTPruneError(
            f"{method.name}: a token that returns attends to what stood before it, which flash attention has no mask "
            "for; load the model with attn_implementation='sdpa' or 'eager'"
        )
    if windows:
        raise VTPruneError(
            f"{method.name}: tokens cannot return to layers with sliding windows; use a method whose dropped tokens "
            "stay dropped, such as pyramid_drop"
        )


class Revival(Shaper):
    """The vision tokens of one forward, where they may return: the shaper that puts them in front of the input's own.

    log: the tokens that stood in the cache before this forward (None: none that could return); part: (B, V) those
    that take part at the layer under way; flying: those of them that it computes.
    """

    def __init__(self, layers: list[PrunedLayer], prompt: PromptInfo, name: str) -> None:
        self.layers, self.prompt, self.name = layers, prompt, name
        self.log = layers[0].log
        self.flying: Tokens | None = None
        self._narrowed = False
        self._decided = False
        self._width = 0
        self._widths: dict[int, int] = {}
        self._mask: tuple[Any, ...] = ()
        self._left_out = False
        if self.log is not None:
            self._start(self.log)

    def _start(self, log: VisionLog) -> None:
        batch, count = log.places.shape
        length = self.prompt.offset + self.prompt.length
        self.part = log.places >= 0
        token = torch.arange(count, device=log.places.device).expand(batch, count)
        # Padding (-1), which a row that was once one of several has too, writes to a cell that nobody reads; the last
        # one is of no token.
        index = torch.full((batch, length + 2), count, device=log.places.device)
        index.scatter_(1, log.places % (length + 1), token)
        self._index, self._rows = index, torch.arange(batch, device=index.device)[:, None]
        self._until = torch.full_like(log.places, len(self.layers), dtype=torch.int16)
        self._first = self._until

    def enter(self, run: DecoderRun, index: int, states: Tensor) -> Entering:
        """The input's own tokens, behind those that return."""
        flying = self.flying
        if flying is not None and not self._decided:
            flying = replace(flying, states=states[:, : self._width])
        entering = run.alive_at(index, states[:, self._width :])
        together = not self._decided and entering.layout.relative is None and not entering.layout.vectors
        self.flying, self._decided = flying, False
        self._widths[index] = self._width = 0 if flying is None else flying.count
        return replace(entering, front=flying, joined=states if together else None)

    def leave(self, index: int, states: Tensor) -> Tensor:
        """Without the tokens that returned to layer `index`."""
        width = self.width(index)
        return states[:, width:] if width else states

    def width(self, index: int) -> int:
        """How many tokens returned to layer `index`, in front of the others."""
        return self._widths.get(index, 0)

    def mask(self, given: Any, places: Tensor | None, slots: Slots | None) -> Tensor | None:
        """The mask (B, 1, r + q, K) of a layer with keys at `slots` (B, K) and own queries at `places` (B, q) of the
        input (None: all): these see text and the tokens that take part, a returning one all that the layer holds at
        its own place and before it. None where every token takes part and none returns."""
        if not self._narrowed or slots is None:
            return None
        front = None if self.flying is None else self.flying.places
        key = (given, slots, self.part, front)
        if not self._mask or any(one is not two for one, two in zip(key, self._mask[0], strict=True)):
            self._mask = (key, self._new_mask(given, places, slots.tensor))
        made: Tensor = self._mask[1]
        return made

    def _new_mask(self, given: Any, places: Tensor | None, slots: Tensor) -> Tensor:
        offset = self.prompt.offset
        own = layer_mask(given, places, slots, offset, ragged=True, flash=False) if given is not None else None
        if own is None and places is None and self.prompt.length == 1:
            # Nothing stands after a step's one token.
            own = (slots >= 0)[:, None, None, :]
        elif own is None:
            if places is None:
                places = torch.arange(self.prompt.length, device=slots.device).expand(slots.shape[0], -1)
            own = (slots[:, None, None, :] <= (places + offset)[:, None, :, None]) & (slots >= 0)[:, None, None, :]
            own = own | (places < 0)[:, None, :, None]
        tokens = self._tokens(slots, slots.shape[1])
        hidden = ~torch.cat([self.part, torch.ones_like(self.part[:, :1])], dim=1).gather(1, tokens)
        closed: Any = False if own.dtype == torch.bool else torch.finfo(own.dtype).min
        own = own.masked_fill(hidden[:, None, None, :].to(own.device), closed)
        if self.flying is None:
            return own
        front = self.flying.places
        held = (slots >= 0) & self.prompt.real_so_far().gather(1, slots.clamp(min=0))
        seen = held[:, None, :] & (slots[:, None, :] <= front[:, :, None])
        if len(front) > 1:
            # A padding query must see something, or its softmax is NaN; nobody reads what it computes.
            seen = seen | (front < 0)[:, :, None]
        seen = seen[:, None].to(own.device)
        if own.dtype != torch.bool:
            seen = torch.zeros_like(seen, dtype=own.dtype).masked_fill(~seen, closed)
        return torch.cat([seen.expand(-1, own.shape[1], -1, -1), own], dim=2)

    def _tokens(self, slots: Tensor | None, entries: int) -> Tensor:
        """(B, K) which of the log's tokens each entry of a layer is, V for text and padding."""
        # Padding, at -1, reads the last cell.
        return self._index[:, :entries] if slots is None else self._index[self._rows, slots]

    def _among(self, slots: Tensor | None, entries: int) -> Tensor:
        """(B, V) whether a token is among these entries."""
        batch, count = self.part.shape
        found = torch.zeros(batch, count + 1, dtype=torch.bool, device=self.part.device)
        return found.scatter_(1, self._tokens(slots, entries), True)[:, :-1]

    def decides(self, index: int) -> bool:
        """Whether tokens of the cache are chosen anew after layer `index`."""
        return self.log is not None and self.layers[index + 1].waiting is not None

    def decide(self, view: LayerView, *, query: Tensor, last: Tensor, scale: float) -> None:
        """Chooses, after a layer, the tokens that the next layers attend to, and takes up those that they lack.

        view: the layer, with the returning tokens in front; query: (B, H, r + q, d) of it; last: (B,) each row's last
        token among its own ones; scale: of its softmax. Raises ScoreError for NaN.
        """
        index = view.index
        following = self.layers[index + 1]
        waiting = following.waiting
        assert self.log is not None
        assert waiting is not None
        keys = self.layers[index].keys
        assert keys is not None
        # What waits, or takes part, has gradients; which tokens these are has none.
        weights = _attention(query, keys, last + self._width, scale=scale, mask=view.mask)
        weights = check_scores(weights, self.name, still=True)
        wanted = self._wanted(weights.to(self.part.device), self.layers[index].slots, waiting.limits(self.log.images))
        pool = waiting.tokens
        entries = following.keys.shape[-2] if following.keys is not None else 0
        missing = wanted & ~self._among(following.slots, entries)
        counts, new = missing.sum(dim=1), missing
        if self.flying is not None:
            landed = replace(self.flying, states=view.hidden[:, : self._width])
            flew = self._among(landed.places, landed.count)
            left, new = flew & ~wanted, missing & ~flew
            # How many come and how many go depends on the scores: the device is asked for both at once.
            both = answered(torch.cat([counts, left.sum(dim=1)]))
            coming, going = both[: len(counts)], both[len(counts) :]
            following.waiting = self._leave(waiting, landed, left, going)
            pool = pool.join(landed)
        else:
            coming = answered(counts)
        # What is wanted took part.
        self._until = self._until.masked_fill(self.part ^ wanted, index + 1)
        self._first = self._first.masked_fill(new, index + 1)
        self.part, self._narrowed, self._decided = wanted, True, True
        self.flying = self._take(pool, missing, coming)

    def _wanted(self, weights: Tensor, slots: Tensor | None, limits: Tensor) -> Tensor:
        """(B, V) of the tokens that take part those with the highest `weights` (B, K), up to `limits` (B, I) an image;
        ties go to the lowest place."""
        assert self.log is not None
        scores = weights.new_zeros(self.part.shape[0], self.part.shape[1] + 1)
        scores = scores.scatter(1, self._tokens(slots, weights.shape[1]), weights)[:, :-1]
        return best_of_each(scores, self.log.owner.masked_fill(~self.part, -1), limits)

    def _take(self, pool: Tokens, chosen: Tensor, counts: list[int]) -> Tokens | None:
        """Of the pool the tokens `chosen` (B, V), `counts` (B,) of them, in the order of their places."""
        if not max(counts):
            return None
        tokens = places_of(chosen, counts)
        batch, count = chosen.shape
        column = torch.arange(pool.count, device=chosen.device).expand(batch, -1)
        at = torch.zeros(batch, count + 1, dtype=torch.long, device=chosen.device)
        at.scatter_(1, self._tokens(pool.places, pool.count), column)
        return pool.take(pick(at, tokens))

    def _leave(self, waiting: Waiting, landed: Tokens, left: Tensor, counts: list[int]) -> Waiting:
        tokens = self._take(landed, left, counts)
        return waiting if tokens is None else waiting.add(tokens, self.prompt.offset)

    def record(self, view: LayerView, spans: list[ImageSpan]) -> None:
        """Notes what was left out after a layer of the images that came with this input; view: without the returning
        tokens."""
        gone = torch.zeros(self.prompt.batch, self.prompt.length, dtype=torch.bool, device=self.prompt.device)
        for span, kept in zip(spans, view.kept, strict=True):
            came = span.places.index_select(0, kept)
            gone[span.row].index_fill_(0, came, True).index_fill_(0, span.standing, False)
        counts = [0] * self.prompt.batch
        for span, kept in zip(spans, view.kept, strict=True):
            counts[span.row] += kept.numel() - span.kept.numel()
        if not max(counts):
            return
        places = places_of(gone, counts)
        self._left_out = True
        offset = self.prompt.offset
        at = relative_places(places, view.places, self.prompt.length)
        parts = (gather_tokens(part, at) for part in (view.hidden, *view.embeddings))
        tokens = Tokens(torch.where(places < 0, places, places + offset), *parts)
        layer = self.layers[view.index + 1]
        numbers = self._numbers(spans)
        batch, images = gone.shape[0], self._images(spans)
        if layer.waiting is None:
            wanted = torch.full((batch, images), WHOLE, device=gone.device)
            layer.waiting = Waiting(tokens, torch.full_like(tokens.places[0], offset), wanted)
        else:
            layer.waiting = layer.waiting.add(tokens, offset)
        wanted = layer.waiting.limits(images).clone()
        for span, number in zip(spans, numbers, strict=True):
            wanted[span.row, number] = span.kept.numel()
        layer.waiting = replace(layer.waiting, wanted=wanted)

    def _numbers(self, spans: list[ImageSpan]) -> list[int]:
        """Which of its row's images each new one is."""
        first = 0 if self.log is None else self.log.images
        return [first + number for number in numbers_in_rows(spans)]

    def _images(self, spans: list[ImageSpan]) -> int:
        return max(self._numbers(spans)) + 1

    def close(self, spans: list[ImageSpan]) -> None:
        """Leaves with the cache what this forward attended to, and the images that came with it."""
        log, prompt = self.log, self.prompt
        if log is not None:
            log = replace(log, steps=(*log.steps, Step(prompt.offset, self._until, self._first)))
        if self._left_out:
            entered = torch.zeros(prompt.batch, prompt.length, dtype=torch.bool, device=prompt.device)
            number = torch.zeros_like(entered, dtype=torch.long)
            counts = [0] * prompt.batch
            for span, own in zip(spans, self._numbers(spans), strict=True):
                entered[span.row].index_fill_(0, span.places.index_select(0, span.entered), True)
                number[span.row].index_fill_(0, span.places, own)
                counts[span.row] += span.entered.numel()
            places = places_of(entered, counts)
            owner = number.gather(1, places.clamp(min=0))
            places = torch.where(places < 0, places, places + prompt.offset)
            images = self._images(spans)
            log = VisionLog(places, owner, images) if log is None else log.add(places, owner, images)
        self.layers[0].log = log


@torch.no_grad()
def _attention(query: Tensor, keys: Tensor, columns: Tensor, *, scale: float, mask: Tensor | None) -> Tensor:
    """(B, K) softmaxed attention of the queries (B, H, Q, d) in `columns` (B,) to the keys of a cache (B, H', K, d),
    in fp32, mean over heads; mask: (B or 1, 1 or H, Q, K) bool or additive."""
    batch, heads = query.shape[:2]
    last = gather_tokens(query.transpose(1, 2), columns[:, None]).float()
    grouped = last.reshape(batch * keys.shape[1], heads // keys.shape[1], -1)
    turned = keys.float().flatten(0, 1).transpose(-1, -2)
    # Nothing is added to the product.
    logits = torch.baddbmm(grouped.new_empty(1, 1, 1), grouped, turned, beta=0, alpha=scale).view(batch, heads, -1)
    if mask is not None:
        row = gather_tokens(mask.transpose(1, 2), columns[:, None])[:, 0]
        logits = logits.masked_fill(~row, float("-inf")) if row.dtype == torch.bool else logits + row.float()
    return logits.softmax(dim=-1).mean(dim=1)
