"""`generate` at rising levels: rows whose first token is not sure enough are asked again with more of the image."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import GenerationMode
from transformers.generation.streamers import BaseStreamer

from vtprune.adapters.base import Adapter
from vtprune.cache.adopting import cache_in, logical_length
from vtprune.errors import PromiseWarning, VTPruneError
from vtprune.hooks.records import RECORD
from vtprune.hooks.state import ThreadState
from vtprune.method.growth import Growth
from vtprune.method.plan import Plans
from vtprune.method.stages import encoder_layers
from vtprune.report.grown import Attempt, Grown

# Inputs with a row for each row of the batch, by the dimension of the rows.
ROWS = {
    "inputs": 0,
    "input_ids": 0,
    "inputs_embeds": 0,
    "attention_mask": 0,
    "token_type_ids": 0,
    "mm_token_type_ids": 0,
    "position_ids": -2,
}
# Options of `generate` that change which token follows, with what they are where they change nothing.
IDLE: Mapping[str, tuple[Any, ...]] = {
    "repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "min_new_tokens": (None, 0),
    "min_length": (None, 0),
    "bad_words_ids": (None,),
    "guidance_scale": (None, 1.0),
    "sequence_bias": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
}
LONGEST = "max_new_tokens"


class FirstToken(LogitsProcessor):
    """Notes how sure a model is of the first token of each row: (B,) its probability, and by how much it leads the
    second one; changes nothing."""

    def __init__(self) -> None:
        self.probability: Tensor | None = None
        self.margin: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores (B, V) as they are."""
        if self.probability is None:
            top = scores.float().softmax(dim=-1).topk(2, dim=-1).values
            self.probability, self.margin = top[:, 0], top[:, 0] - top[:, 1]
        return scores


class Doubt(StoppingCriteria):
    """Stops rows after their first token where that is not sure enough; together: all of them where any is not.

    open: says of each row, once its prompt was read, whether more of what it shows would change anything; others: the
    caller's own criteria, which hear of nothing that is thrown away as a whole.
    """

    def __init__(
        self,
        first: FirstToken,
        growth: Growth,
        *,
        open: Callable[[], Sequence[bool]],
        together: bool,
        others: Sequence[Any],
    ) -> None:
        self.first, self.growth, self.together = first, growth, together
        self.open, self.others = open, others
        self.refused: Tensor | None = None
        self.vain = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(B,) bool."""
        now = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        if self.refused is None:
            open = self.open()
            if any(open):
                sure = getattr(self.first, self.growth.score).to(now.device)
                # What is no number is not sure.
                now = ~(sure >= self.growth.threshold) & torch.tensor(open, device=now.device)
                now = now.any().expand(len(now)) if self.together else now
                self.vain = bool(now.all())
            self.refused = now
        if self.vain:
            return now
        for other in self.others:
            now = now | other(input_ids, scores, **kwargs)
        return now


class HeldStreamer(BaseStreamer):
    """Hands on the tokens of the attempt that answers, and the prompt once."""

    def __init__(self, streamer: BaseStreamer) -> None:
        self.streamer = streamer
        self.doubt: Doubt | None = None
        self._prompted = False
        self._fresh = True
        self._waiting: list[Any] = []

    def begin(self, doubt: Doubt) -> None:
        """What comes next is of a new attempt."""
        self.doubt, self._fresh, self._waiting = doubt, True, []

    def put(self, value: Any) -> None:
        """The prompt first, then tokens, the first of which may come before it is known to be sure."""
        if self._fresh:
            self._fresh = False
            if not self._prompted:
                self._prompted = True
                self.streamer.put(value)
            return
        self._waiting.append(value)
        self._hand_on()

    def end(self) -> None:
        """The attempt's end, which is the answer's unless it was refused."""
        self._hand_on()
        if self.doubt is not None and not self.doubt.vain:
            self.streamer.end()

    def _hand_on(self) -> None:
        if self.doubt is None or self.doubt.refused is None or self.doubt.vain:
            return
        for value in self._waiting:
            self.streamer.put(value)
        self._waiting = []


@dataclass(frozen=True)
class _Shown:
    """What a batch shows: of each kind what the encoder made, and the row of each image; tokens: of the row with the
    most of them."""

    outputs: dict[str, Any]
    rows: dict[str, list[int]]
    tokens: int


class GrowingHooks:
    """`generate` of a model whose method runs at several levels.

    last: the record of its last call, whichever thread made it.
    """

    def __init__(self, adapter: Adapter, growth: Growth, plans: Plans, *, state: ThreadState, name: str) -> None:
        self.adapter, self.growth, self.plans, self.state, self.name = adapter, growth, plans, state, name
        self.last: Grown | None = None
        # What the tower does depends on the level where the method acts inside it.
        self._shared = not encoder_layers(growth.method.bind(adapter.facts()))
        self._told: set[str] = set()

    def generate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Raises VTPruneError for a call whose answers are not greedy."""
        signature = inspect.signature(original)

        @functools.wraps(original)
        @torch.no_grad()
        def generate(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            given = {**given, **given.pop("kwargs", {})}
            known = any(given.get(name) is not None for name in ("inputs", "input_ids", "inputs_embeds"))
            if self.state.level is not None or not known or not self._shows(given):
                return original(**given)
            if given.get("logits_processor"):
                # They may count what they see, and answers are not the model's own.
                self._warn("logits_processor", f"such answers are given at keep={self.growth.fixed!r}", "...")
                return original(**given)
            self._check(given)
            return self._grow(original, given)

        return generate

    def _shows(self, given: Mapping[str, Any]) -> bool:
        pixels = [given.get(source.pixels) for source in self.adapter.sources()]
        return any(one is not None for one in pixels) or bool(given.get("mm_encoder_outputs"))

    def _grow(self, original: Callable[..., Any], given: dict[str, Any]) -> Any:
        growth, cache = self.growth, cache_in(given)
        size = len(_text(given)[1])
        # What the caller holds is of the batch as a whole.
        together = cache is not None or bool(self._config(given).return_dict_in_generate)
        streamer = given.pop("streamer", None)
        held = None if streamer is None else HeldStreamer(streamer)
        given.pop("logits_processor", None)
        others = list(given.pop("stopping_criteria", None) or ())
        before = 0 if cache is None else logical_length(cache)
        rows, attempts, found, shown = list(range(size)), [], {}, None
        for level in growth.levels:
            final = level == growth.levels[-1]
            with self.state.at_level(level):
                if shown is None or not self._shared:
                    shown = self._encode(given)
                    self._check_tokens(shown)
                first = FirstToken()
                doubt = Doubt(
                    first,
                    growth,
                    open=functools.partial(self._open, len(rows), final=final),
                    together=together,
                    others=others,
                )
                if held is not None:
                    held.begin(doubt)
                output = original(
                    **self._of_rows(given, shown, rows, size),
                    logits_processor=LogitsProcessorList([first]),
                    stopping_criteria=StoppingCriteriaList([doubt]),
                    **({} if held is None else {"streamer": held}),
                )
            # Other threads may be generating on this model.
            attempts.append(Attempt(level, tuple(rows), self.state.generation))
            refused = [False] * len(rows) if doubt.refused is None else doubt.refused.tolist()
            found.update({row: (output, place) for place, row in enumerate(rows) if not refused[place]})
            rows = [row for place, row in enumerate(rows) if refused[place]]
            if not rows:
                break
            if cache is not None:
                cache.crop(before - logical_length(cache))
        self.last = Grown(self.name, tuple(attempts), self._shared)
        self._check_length(max(attempt.generation.steps for attempt in attempts) + 1)
        outputs = {id(output): output for output, _ in found.values()}
        if len(outputs) == 1 and len(attempts[-1].rows) == size:
            return output
        return self._joined([found[row] for row in range(size)], given)

    def _joined(self, rows: Sequence[tuple[Tensor, int]], given: Mapping[str, Any]) -> Tensor:
        """The sequences of all rows, padded behind their ends."""
        config = self._config(given)
        pad = config.pad_token_id
        if pad is None:
            ends = config.eos_token_id
            pad = 0 if ends is None else ends[0] if isinstance(ends, list) else ends
        longest = max(output.shape[1] for output, _ in rows)
        joined = rows[0][0].new_full((len(rows), longest), pad)
        for row, (output, place) in enumerate(rows):
            joined[row, : output.shape[1]] = output[place]
        return joined

    def _config(self, given: Mapping[str, Any]) -> Any:
        """The generation config that a call asks for."""
        options = {name: value for name, value in given.items() if name != "generation_config"}
        config, _ = self.adapter.model._prepare_generation_config(given.get("generation_config"), **options)
        return config

    def _encode(self, given: Mapping[str, Any]) -> _Shown:
        """What a call shows, encoded at the level of this thread."""
        outputs = dict(given.get("mm_encoder_outputs") or {})
        for source in self.adapter.sources():
            encode = getattr(self.adapter.inner, source.encode)
            if source.kind not in outputs and given.get(source.pixels) is not None:
                wanted = {name: given[name] for name in _parameters(encode) if given.get(name) is not None}
                outputs[source.kind] = encode(**wanted, return_dict=True)
        ids, text = _text(given)
        rows, tokens = {}, {}
        for source in self.adapter.sources():
            if source.kind in outputs:
                marks = self.adapter.placeholders(source, ids, text)
                lengths = [len(one) for one in outputs[source.kind].pooler_output]
                tokens[source.kind] = marks.sum(dim=1).tolist()
                rows[source.kind] = list(_rows_of(lengths, tokens[source.kind]))
        return _Shown(outputs, rows, max(map(sum, zip(*tokens.values(), strict=True)), default=0))

    def _open(self, count: int, *, final: bool) -> list[bool]:
        """Of each row of the attempt under way whether something was left out of what it shows: an image that no
        setting of the method cuts so far is kept whole, and more of it is the same again."""
        images = () if final else self.state.generation.trail.images
        less = {image.row for image in images if not image.whole}
        return [row in less for row in range(count)]

    def _of_rows(self, given: Mapping[str, Any], shown: _Shown, rows: Sequence[int], size: int) -> dict[str, Any]:
        """The arguments of `generate` for some rows of the batch, with what they show encoded already."""
        pixels = {source.pixels for source in self.adapter.sources()}
        found = {name: value for name, value in given.items() if name not in pixels}
        chosen = {kind: [place for place, row in enumerate(own) if row in rows] for kind, own in shown.rows.items()}
        found["mm_encoder_outputs"] = {
            kind: _some(output, chosen[kind]) for kind, output in shown.outputs.items() if chosen[kind]
        }
        if len(rows) == size:
            return found
        for name, dimension in ROWS.items():
            if isinstance(found.get(name), Tensor):
                value = found[name]
                found[name] = value.index_select(dimension, torch.tensor(list(rows), device=value.device))
        for source in self.adapter.sources():
            encode = getattr(self.adapter.inner, source.encode)
            for name in set(_parameters(encode)) - pixels:
                own, places = found.get(name), chosen.get(source.kind)
                if places is None or not isinstance(own, Tensor | list) or len(own) != len(shown.rows[source.kind]):
                    continue
                found[name] = own[places] if isinstance(own, Tensor) else [own[place] for place in places]
                if not places:
                    del found[name]
        return found

    def _check(self, given: Mapping[str, Any]) -> None:
        """Raises VTPruneError for answers that are not greedy; warns of what they were not calibrated with."""
        assistant = given.get("assistant_model")
        config = self._config(given)
        mode = config.get_generation_mode(assistant)
        if mode != GenerationMode.GREEDY_SEARCH:
            raise VTPruneError(
                f"{self.name} compares greedy answers, and this call asks for {mode.value}; generate with "
                "do_sample=False, num_beams=1 and without an assistant, or wrap the model with another method"
            )
        if not self._shared and given.get("mm_encoder_outputs"):
            raise VTPruneError(
                f"{self.name} runs {self.growth.method.name}, which prunes inside the encoder, at several levels: "
                "give pixel_values in place of features that were made at one of them"
            )
        origin = self.growth.origin
        if origin is None:
            return
        cache = cache_in(given)
        if cache is not None and logical_length(cache):
            self._warn("a cache", "it was calibrated with first turns", "an earlier turn")
        for name, idle in IDLE.items():
            asked, known = getattr(config, name, None), origin.generation.get(name)
            if asked not in idle and asked != known:
                self._warn(name, f"it was calibrated {'without it' if known is None else f'with {known!r}'}", asked)

    def _check_length(self, tokens: int) -> None:
        """Warns of an answer that is longer than those that were compared."""
        known = None if self.growth.origin is None else self.growth.origin.generation.get(LONGEST)
        if isinstance(known, int) and tokens > known:
            self._warn("an answer's tokens", f"answers were compared up to {known} of them", tokens)

    def _check_tokens(self, shown: _Shown) -> None:
        """Warns of a prompt that shows more than any that was calibrated with."""
        origin = self.growth.origin
        if origin is not None and shown.tokens > origin.most_tokens:
            self._warn("vision tokens of a prompt", f"the most were {origin.most_tokens}", shown.tokens)

    def _warn(self, name: str, why: str, asked: object) -> None:
        if name not in self._told:
            self._told.add(name)
            text = f"{self.name}: the promise does not cover {name}={asked!r}: {why}; calibrate with it"
            warnings.warn(text, PromiseWarning, stacklevel=6)


def _text(given: Mapping[str, Any]) -> tuple[Tensor | None, Tensor]:
    """The token ids of a call, None where it gives embeddings, and whichever of both it gives."""
    embeds = given.get("inputs_embeds")
    if embeds is not None:
        return None, embeds
    ids: Tensor = given["inputs"] if given.get("input_ids") is None else given["input_ids"]
    return ids, ids


def _parameters(encode: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(encode).parameters if name != "kwargs"]


def _rows_of(lengths: Sequence[int], placeholders: Sequence[int]) -> Iterator[int]:
    """The row of each image: images fill the placeholders of one row after another."""
    row, left = 0, placeholders[0]
    for length in lengths:
        while left < length and row + 1 < len(placeholders):
            row, left = row + 1, placeholders[row + 1]
        left -= length
        yield row


def _some(output: Any, places: Sequence[int]) -> Any:
    """An encoder's output for some of its images, with their records; the output itself stays as it is."""
    found, features = copy.copy(output), output.pooler_output
    chosen: Any
    if isinstance(features, Tensor):
        chosen = features[torch.tensor(list(places), device=features.device)]
        records = getattr(features, RECORD, None)
        if records is not None:
            setattr(chosen, RECORD, [records[place] for place in places])
    else:
        chosen = [features[place] for place in places]
    found.pooler_output = chosen
    planes = getattr(output, "deepstack_features", None)
    if planes is not None:
        found.deepstack_features = [[plane[place] for place in places] for plane in planes]
    return found
