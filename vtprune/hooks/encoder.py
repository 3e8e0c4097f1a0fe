"""Hooks of a vision encoder's layers: tokens drop out and merge between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.adapters.encoder_side import EncoderSide
from vtprune.encoder.encoding import Encoding
from vtprune.encoder.merging import check_selection
from vtprune.errors import VTPruneError
from vtprune.hooks.checkpoints import Checkpoints
from vtprune.hooks.state import RUN, ThreadState
from vtprune.hooks.taps import Taps
from vtprune.method.answers import EncoderSelection
from vtprune.method.facts import ModelFacts
from vtprune.method.kinds import VIDEO
from vtprune.method.plan import Plans
from vtprune.method.pruner import forms
from vtprune.method.stages import InEncoder, Read, encoder_layers, reads
from vtprune.tensors.attention import full_precision

# Where methods are asked before the first layer.
BEFORE = -1


class EncoderHooks:
    """What happens in the layers of a vision encoder, whatever comes before and behind them."""

    def __init__(
        self,
        adapter: EncoderSide,
        plans: Plans,
        facts: ModelFacts,
        *,
        state: ThreadState,
        taps: Taps,
        modules: Mapping[int, nn.Module] = MappingProxyType({}),
    ) -> None:
        self.adapter, self.plans, self.facts, self.state, self.taps = adapter, plans, facts, state, taps
        self.modules = modules
        pruners = plans.pruners
        self.token = object()
        depth, last = facts.encoder_depth, len(list(adapter.encoder_layers)) - 1
        # Layers at which each pruner scores, inside (0: before the MLP) or at the end (1).
        self.scored = [
            (index, order, pruner)
            for order, pruner in enumerate(pruners)
            if isinstance(pruner, InEncoder)
            for index in sorted({layer for form in forms(pruner) for layer in encoder_layers(form)})
        ]
        read = frozenset[Read]().union(*(reads(pruner) for pruner in pruners))
        self.reads = bool(read & {Read.ENCODER, Read.ENCODER_FLOWS})
        self.reads_last = bool(read & {Read.LAST_LAYER, Read.LAST_LAYER_FLOWS})
        # Layers whose inputs are cut: all of them or none; layers whose q, k and v are read.
        self.prunes = bool(self.scored)
        self.tapped = {index for index, _, _ in self.scored if index != BEFORE}
        self.before = any(index == BEFORE for index, _, _ in self.scored)
        self.tapped |= ({depth - 1} if self.reads else set()) | ({last} if self.reads_last else set())
        self.opened = {index for index, _, pruner in self.scored if pruner.before_mlp}
        self.sized = any(pruner.weighs_keys for _, _, pruner in self.scored)
        # Layers of which methods read more than a choice: gradients then reach their q, k and v.
        flowing = {Read.ENCODER_FLOWS: depth - 1, Read.LAST_LAYER_FLOWS: last}
        weighed = frozenset(layer for one, layer in flowing.items() if one in read)
        self.weighs = bool(weighed)
        self.checkpoints = Checkpoints(adapter.encoder_layers, state, weighed)

    @contextmanager
    def under_way(self, encoding: Encoding) -> Iterator[None]:
        outer, self.state.encoding = self.state.encoding, encoding
        try:
            yield
        finally:
            self.state.encoding = outer

    def open_encoder(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Sends the encoding under way along to the tower's layers."""
        self.checkpoints.refresh()
        if self.state.encoding is None or not self.prunes:
            return None
        return args, {**kwargs, RUN: self.state.encoding}

    def before_layer(self, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Gives a layer the tokens that are alive."""
        encoding = kwargs.pop(RUN, self.state.encoding)
        if index in self.tapped:
            self.state.enter(encoding)
        if encoding is None:
            return None
        args, kwargs = self.cut(index, encoding, args, kwargs)
        # A checkpoint hands the layer's arguments to its attention again, where nothing else knows of this encoding.
        return args, {**kwargs, RUN: encoding} if index in self.opened else kwargs

    def cut(self, index: int, encoding: Encoding, args: Any, kwargs: dict[str, Any]) -> Any:
        """The inputs of a layer, cut to the tokens alive."""
        if self.before and index == 0 and encoding.is_new(BEFORE, 1):
            self._decide(encoding, BEFORE, args[0], before_mlp=False)
        if self.prunes:
            args, kwargs = encoding.layer_inputs(index, args, kwargs)
            encoding.note_layer(index, kwargs)
        encoding.arguments = kwargs
        return args, kwargs

    def before_attention(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Takes the encoding from the arguments of a layer's attention, for the layer's MLP."""
        self.state.inside = kwargs.get(RUN)
        return args, {name: value for name, value in kwargs.items() if name != RUN}

    def before_mlp(self, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Asks methods that act between attention and MLP, and gives the MLP the tokens that are left."""
        encoding = self.state.inside
        if encoding is None:
            return None
        if encoding.is_new(index, 0):
            encoding.hold_layout()
            self._decide(encoding, index, args[0], before_mlp=True)
            encoding.open_mlp(index, args[0])
        states = encoding.mlp_input(index, args[0])
        if self.adapter.adds_mlp and encoding.averages(index):
            encoding.hold(states)
        return (states, *args[1:]), kwargs

    def after_mlp(self, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Hands what the MLP put out back to every token that the layer's own residual sum is over."""
        encoding, self.state.inside = self.state.inside, None
        if encoding is None or output is None:
            return None
        # Another hook may change what the MLP hands on.
        encoding.hold_output(output if len(module._forward_hooks) == 1 else None)
        return encoding.mlp_output(index, output)

    def after_layer(self, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Keeps what methods read of a layer that ran, and asks those that act after it."""
        encoding = self.state.leave()
        if not isinstance(encoding, Encoding) or output is None:
            return
        if isinstance(output, Tensor):
            encoding.hold_layer_output(output)
        if encoding.is_new(index, 1):
            self._note_signals(encoding, index)
            if index not in self.opened:
                self._decide(encoding, index, output[0] if isinstance(output, tuple) else output, before_mlp=False)
        encoding.taps.clear()

    def _note_signals(self, encoding: Encoding, index: int) -> None:
        scale, arguments = self.adapter.encoder_scale, encoding.arguments
        with torch.set_grad_enabled(self.weighs and torch.is_grad_enabled()):
            encoding.note_signals(index, arguments, scale, features=self.reads, last=self.reads_last)

    def _decide(self, encoding: Encoding, index: int, hidden: Tensor, *, before_mlp: bool) -> None:
        """Asks the methods that act at this place which tokens go on, and carries it out."""
        learning = torch.is_grad_enabled()
        with torch.no_grad():
            chosen = self._chosen(encoding, index, hidden, before_mlp=before_mlp, learning=learning)
        if chosen is not None:
            cls = encoding.hidden(hidden)[:, 0] if chosen.cls is not None and encoding.prefix else None
            encoding.apply(chosen, index, cls)

    def _chosen(
        self, encoding: Encoding, index: int, hidden: Tensor, *, before_mlp: bool, learning: bool
    ) -> EncoderSelection | None:
        chosen: EncoderSelection | None = None
        for layer, order, pruner in self.scored:
            if layer != index or pruner.before_mlp != before_mlp:
                continue
            one = self._ask(encoding, index, order=order, pruner=pruner, hidden=hidden, learning=learning)
            if one is not None:
                # Methods that merge have their layers to themselves (see `check_order`); drops add up.
                chosen = one if chosen is None else EncoderSelection.drop(chosen.keep & one.keep)
        return chosen

    def asks(self, encoding: Encoding, index: int) -> bool:
        """Whether a method is going to look at this layer: whether some image has more tokens than it may keep."""
        plans = [self.plans.of(shown) for shown in encoding.shown]
        orders = [order for layer, order, _ in self.scored if layer == index]
        budgets = [encoding.shared([plan.in_encoder(order) for plan in plans]) for order in orders]
        return any(not all(encoding.spared(own)) for own in budgets)

    def _ask(
        self, encoding: Encoding, index: int, order: int, pruner: InEncoder, *, hidden: Tensor, learning: bool
    ) -> EncoderSelection | None:
        plans = [self.plans.of(shown) for shown in encoding.shown]
        # All of one pass are images, or all videos.
        acting = plans[0].pruners[order]
        assert isinstance(acting, InEncoder)
        if index not in acting.encoder_layers():
            return None
        budgets = encoding.shared([plan.in_encoder(order) for plan in plans])
        whole = encoding.spared(budgets)
        if all(whole):
            return None
        mixed = next((one for one in encoding.arrangements if one.mixed), None)
        if mixed is not None:
            raise VTPruneError(
                f"{pruner.name} prunes inside the vision encoder, and {self.adapter.name} makes each token of "
                f"{'this video' if encoding.kind == VIDEO else 'a picture this large'} ({mixed.tokens} tokens) of "
                "several patches after it, so that no patch can be dropped by itself; use a method that prunes after "
                "the encoder" + ("" if encoding.kind == VIDEO else ", or a smaller picture")
            )
        before = encoding.scored.get(index, [False] * len(whole))
        encoding.scored[index] = [known or not spared for known, spared in zip(before, whole, strict=True)]
        shown = hidden if Read.HIDDEN in pruner.encoder_reads else None
        layer = encoding.layer(
            index, encoding.arguments, scale=self.adapter.encoder_scale, budgets=budgets, hidden=shown
        )
        module = self.modules.get(order)
        learning = learning and module is not None and module.training
        if module is not None:
            layer = replace(layer, module=module, teach=self.state.lessons.append if learning else None)
        with torch.set_grad_enabled(learning), full_precision(hidden.device), encoding.checks.collecting():
            answer = acting.prune_encoder(layer)
        if answer is None:
            return None
        selection = EncoderSelection.drop(answer) if isinstance(answer, Tensor) else answer
        if encoding.visible is not None:
            selection = selection.unseen(~encoding.visible)
        if any(whole) or not encoding.full or encoding.visible is not None:
            # An image within its budget is kept whole, whatever the method says of its neighbours.
            selection = selection.sparing(whole, encoding.valid, encoding.counts)
        if not selection.sound:
            check_selection(selection, encoding.valid, pruner.name)
        return selection
