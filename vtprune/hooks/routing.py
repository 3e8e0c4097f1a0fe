"""Routed decoder layers: asking a method which tokens a layer computes, and having it compute these alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vtprune.adapters.base import Adapter
from vtprune.cache.adopting import cache_in, with_cache
from vtprune.cache.joining import Joining
from vtprune.decoder.packing import Packed
from vtprune.decoder.prompt import numbers_in_rows
from vtprune.decoder.run import DecoderRun, Entering, Layout, Shaper
from vtprune.errors import VTPruneError
from vtprune.hooks.learning import Lessons
from vtprune.hooks.recording import Recording
from vtprune.hooks.state import GATE, READ, ThreadState
from vtprune.method.answers import Computed, Routes
from vtprune.method.plan import Plans
from vtprune.method.pruner import Pruner
from vtprune.method.stages import InLayers
from vtprune.method.views import RoutedTokens
from vtprune.report.trail import Routed, RoutedText
from vtprune.tensors.attention import full_precision
from vtprune.tensors.compaction import gather_tokens, pick


class RoutedLayers:
    """The hooks' work for the one method of a list that routes, if there is one."""

    def __init__(
        self,
        adapter: Adapter,
        pruners: list[Pruner],
        plans: Plans,
        *,
        modules: dict[int, nn.Module],
        state: ThreadState,
    ) -> None:
        found = [
            (order, pruner)
            for order, pruner in enumerate(pruners)
            if isinstance(pruner, InLayers) and pruner.routed_layers()
        ]
        self.pruner: InLayers | None = found[0][1] if found else None
        self.layers = frozenset(self.pruner.routed_layers()) if self.pruner else frozenset()
        if self.pruner is not None and self.pruner.keep_video is not None:
            raise VTPruneError(f"{self.pruner.name} routes its layers by one keep; give keep alone")
        self.order = found[0][0] if found else -1
        self.module, self.plans = modules.get(self.order), plans
        self.adapter = adapter
        self._modules: list[Any] = list(adapter.decoder_layers)
        self._state = state

    @property
    def routes_text(self) -> bool:
        """Whether forwards without an image are routed, too."""
        return self.pruner is not None and self.pruner.routes_text

    @property
    def skips_text(self) -> bool:
        """Whether text may be left out."""
        return self.pruner is not None and self.pruner.skips_text

    def open(self, run: DecoderRun, recording: Recording, lessons: Lessons) -> Routing | None:
        """The shaper of a forward that is routed."""
        if self.pruner is None or not (run.spans or self.routes_text):
            return None
        return Routing(self, self.pruner, recording, lessons)

    def norm(self, index: int) -> Callable[[Tensor], Tensor]:
        """The norm before the attention of a layer."""
        return self.adapter.decoder_normed(self._modules[index])

    def keys_and_values(self, index: int, states: Tensor, embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What a layer's own projections make of the states (B, s, D) of tokens that skip it."""
        return self.adapter.keys_and_values(self._modules[index], states, embeddings)

    def keys(self, index: int, states: Tensor, embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """The keys alone of these."""
        return self.adapter.keys(self._modules[index], states, embeddings)

    def routed_forward(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The forward of a layer for the tokens that it computes; the others come back as they were."""
        routing = self._under_way()
        packed = None if routing is None else routing.packed
        if routing is None or packed is None:
            return forward(*args, **kwargs)
        read = routing.still_read(index)
        if packed.empty:
            output: Any = packed.states
            if read is not None:
                joining = Joining(cache_in(kwargs), **read)
                joining.update(joining.key[:, :, :0], joining.value[:, :, :0], index)
        else:
            read = {READ[name]: value for name, value in (read or {}).items()}
            output = forward(*args, **{**kwargs, GATE: packed.gate, **read})
        if isinstance(output, tuple):
            return (packed.unpack(output[0]), *output[1:])
        return packed.unpack(output)

    def norm_forward(self, forward: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
        """The forward of the norm before a routed layer's attention, which a method that reads normed tokens may have
        run already."""
        routing = self._under_way()
        known = None if routing is None else routing.known(states)
        return forward(states) if known is None else known

    def _under_way(self) -> Routing | None:
        run = self._state.running
        shaper = run.shaper if isinstance(run, DecoderRun) else None
        return shaper if isinstance(shaper, Routing) else None

    def before_attention(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Takes the gate from the arguments, which gradient checkpointing hands to the layer again, for its MLP, and
        what the layer still reads of tokens that skip it, for its keys and values."""
        self._state.gate = kwargs.get(GATE)
        read = {name: kwargs[argument] for name, argument in READ.items() if argument in kwargs}
        kwargs = {name: value for name, value in kwargs.items() if name not in (GATE, *READ.values())}
        if read:
            kwargs = with_cache(module.forward, kwargs, Joining(cache_in(kwargs), **read))
        return args, kwargs

    def after_mlp(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        """Multiplies what the MLP of a routed layer adds to each token by its gate."""
        gate, self._state.gate = self._state.gate, None
        return None if gate is None or output is None else output * gate[..., None].to(output)


class Routing(Shaper):
    """The routed layers of one forward: they are given the tokens that they compute, which their forward puts back
    among the others (`RoutedLayers.routed_forward`).

    packed: what the layer under way computes, None where it is not routed; normed: what goes into its norm and what
    comes out, where the method asked for that.
    """

    def __init__(self, of: RoutedLayers, pruner: InLayers, recording: Recording, lessons: Lessons) -> None:
        self._of, self._pruner, self._recording, self._lessons = of, pruner, recording, lessons
        self.packed: Packed | None = None
        self.normed: tuple[Tensor, Tensor] | None = None
        # What entered the layer before, all tokens of it, and what the method noted in this forward.
        self._before: Tensor | None = None
        self._memory: dict[str, Any] = {}
        self._version = 0
        # Rotary embeddings of the tokens that skip the layer under way, where it reads them.
        self._turned: tuple[Tensor, Tensor] | None = None
        # Kept while the run lives: slots and masks are known by the identity of these places.
        self._layouts: dict[int, Layout] = {}
        self._marked: tuple[Tensor | None, Tensor, Tensor, Tensor] | None = None
        self._text: Tensor | None = None

    def enter(self, run: DecoderRun, index: int, states: Tensor) -> Entering:
        """Of the tokens alive those that a routed layer computes."""
        entering = run.alive_at(index, states)
        self.packed = self.normed = self._turned = None
        found = self._packed(run, index, entering) if index in self._of.layers else entering
        self._before = entering.states
        return found

    def _packed(self, run: DecoderRun, index: int, entering: Entering) -> Entering:
        """Of the tokens that enter a routed layer those that it computes."""
        places = entering.layout.places
        self.packed = Packed.of(entering.states, self._routes(run, index, entering))
        columns = self.packed.columns
        if columns is None:
            return entering
        if self.packed.read is not None and self._of.adapter.flash:
            raise VTPruneError(
                f"{self._pruner.name}: what a layer computes attends to tokens that skip it, wherever they stand, and "
                "flash attention has no mask for that; load the model with attn_implementation='sdpa' or 'eager'"
            )
        own = columns
        if places is not None:
            own = pick(places, columns)
        self._layouts[index] = Layout(own, ragged=len(own) > 1)
        inside, normed = self.packed.inside, self.known(entering.states)
        self._remember(None if normed is None else (inside, gather_tokens(normed, columns)))
        entering = replace(entering, held=None if self.packed.read is None else entering.layout)
        return replace(entering, layout=self._layouts[index], states=inside)

    def own_embeddings(self, held: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Of the tokens that the layer computes; those of the others wait for their keys."""
        packed = self.packed
        if packed is None or packed.columns is None or packed.read is None:
            return held
        cos, sin = held
        self._turned = gather_tokens(cos, packed.read.columns), gather_tokens(sin, packed.read.columns)
        return gather_tokens(cos, packed.columns), gather_tokens(sin, packed.columns)

    def still_read(self, index: int) -> dict[str, Any] | None:
        """Keys and values (B, Hkv, s, d) of the tokens that skip layer `index`, which is under way, made of their
        states before it, and where these stand, as `Joining` takes them; None where it reads none of them."""
        packed = self.packed
        if packed is None or packed.read is None or self._turned is None:
            return None
        states = gather_tokens(packed.states, packed.read.columns)
        if self._pruner.keys_alone:
            key = self._of.keys(index, states, self._turned)
            value = torch.zeros_like(key)
        else:
            key, value = self._of.keys_and_values(index, states, self._turned)
        found: dict[str, Any] = {"key": key, "value": value, "order": packed.read.order}
        if packed.read.order is None:
            assert packed.columns is not None
            found["columns"] = packed.columns[0], packed.read.columns[0]
        return found

    def known(self, states: Tensor) -> Tensor | None:
        """What the norm of the layer under way made of these very states, None where it did not run on them, or its
        output was changed since."""
        if self.normed is None or self.normed[0] is not states or self._version != _version(self.normed[1]):
            return None
        return self.normed[1]

    def _remember(self, normed: tuple[Tensor, Tensor] | None) -> None:
        self.normed, self._version = normed, 0 if normed is None else _version(normed[1])

    def _norm(self, index: int, entering: Tensor) -> Callable[[Tensor], Tensor]:
        """The norm of a layer, which takes what it made of the states that enter it. Not where gradients are recorded:
        a checkpoint may run the layer again, and then has to find it as it was."""
        norm, records = self._of.norm(index), torch.is_grad_enabled()

        def normed(states: Tensor) -> Tensor:
            found = norm(states)
            if states is entering and not records:
                self._remember((states, found))
            return found

        return normed

    def _routes(self, run: DecoderRun, index: int, entering: Entering) -> Routes:
        """Which of the tokens alive a layer computes."""
        tokens = self._tokens(run, index, entering)
        with full_precision(tokens.hidden.device), run.checks.collecting():
            routes = self._pruner.route(tokens)
        if routes.loss is not None:
            self._lessons.routing[index] = routes.loss
        if not run.prompt.offset or run.spans:
            computed = routes.computed(entering.states)
            self._note(run, index, computed, places=entering.layout.places, read=routes.read)
        return routes

    def _tokens(self, run: DecoderRun, index: int, entering: Entering) -> RoutedTokens:
        """What the method sees of them."""
        device, numbers = entering.states.device, numbers_in_rows(run.spans)
        real, image, text = self._marks(run, entering)
        width = max([0, *numbers]) + 1
        totals, budgets = ([[0] * width for _ in range(run.prompt.batch)] for _ in range(2))
        spared, known = [0] * run.prompt.batch, True
        for span, number in zip(run.spans, numbers, strict=True):
            shown, entered = span.shown, span.entered.numel()
            budget = self._of.plans.of(shown).routed(self._of.order, index, entered)
            known = known and budget is not None
            own = entered if budget is None else budget
            totals[span.row][number], budgets[span.row][number] = shown.tokens, own
            spared[span.row] += max(0, span.kept.numel() - own)
        return RoutedTokens(
            hidden=entering.states,
            norm=self._norm(index, entering.states),
            real=real,
            image=image,
            text=text,
            totals=torch.tensor(totals, device=device),
            budgets=torch.tensor(budgets, device=device),
            index=index,
            depth=self._pruner.model.decoder_depth,
            module=self._of.module,
            training=bool(self._of.adapter.language_model.training),
            continues=run.prompt.offset > 0 and not run.spans,
            spared=tuple(spared) if known else (),
            before=self._before,
            memory=self._memory,
            whole=bool(run.spans) and self._whole(run, entering.layout.places),
        )

    @staticmethod
    def _whole(run: DecoderRun, places: Tensor | None) -> bool:
        """Whether a prompt has no padding, as the host knows."""
        return bool((run.prompt.outline.number >= 0).all()) and (places is None or run.prompt.batch == 1)

    def _marks(self, run: DecoderRun, entering: Entering) -> tuple[Tensor, Tensor, Tensor]:
        """(B, n) of the tokens alive which ones hold a token, the number of the image in its row that each one belongs
        to, -1 for text, and which are text: the same for all layers whose tokens are."""
        places, device = entering.layout.places, entering.states.device
        if self._marked is None or self._marked[0] is not places or self._marked[1].device != device:
            image = np.full((run.prompt.batch, run.prompt.length), -1)
            for span, number in zip(run.spans, numbers_in_rows(run.spans), strict=True):
                image[span.row, span.stands] = number
            real, images = run.prompt.real().to(device), torch.from_numpy(image).to(device)
            if places is not None:
                real = real.gather(1, places.clamp(min=0)) & (places >= 0)
                images = pick(images, places)
            self._marked = places, real, images, images < 0
        return self._marked[1:]

    def _note(self, run: DecoderRun, index: int, computed: Computed, *, places: Tensor | None, read: bool) -> None:
        """Leaves with the record what the layer computes of a prompt; places: (B, n) of the tokens alive, None for
        all; read: whether it reads the others."""
        for span in run.spans:
            self._recording.of(span).routed[index] = Routed(
                alive=span.kept,
                row=span.row,
                places=span.places,
                length=run.prompt.length,
                layout=places,
                columns=computed,
                read=read,
            )
        self._recording.trail.routed_text[index] = RoutedText(self._words(run), computed, places, read)

    def _words(self, run: DecoderRun) -> Tensor:
        """(B, length) which conversation each text token of the input belongs to, -1 for all else."""
        if self._text is None:
            number = run.prompt.outline.number.copy()
            for span in run.spans:
                number[span.row, span.stands] = -1
            self._text = torch.from_numpy(number)
        return self._text


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; those of inference mode do not count that."""
    return -1 if tensor.is_inference() else tensor._version
