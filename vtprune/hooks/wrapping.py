"""Everything that `wrap` puts on a model, and `unwrap` takes off again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vtprune.adapters.base import Adapter
from vtprune.errors import UnsupportedModelError, VTPruneError
from vtprune.hooks.decoder import DecoderHooks
from vtprune.hooks.encoder import EncoderHooks
from vtprune.hooks.generate import GenerateHooks
from vtprune.hooks.records import expanding
from vtprune.hooks.state import ThreadState
from vtprune.hooks.taps import Taps
from vtprune.method.facts import ModelFacts
from vtprune.method.plan import Plans
from vtprune.method.pruner import Pruner
from vtprune.method.sharing import Sharing
from vtprune.report.generation import Generation

MISSING = object()


class Wrapping:
    """The hooks and overrides of one wrapped model, all on its instance, none on a class."""

    def __init__(
        self,
        adapter: Adapter,
        pruners: list[Pruner],
        facts: ModelFacts,
        *,
        compact: bool,
        given: list[Pruner],
        modules: dict[int, nn.Module],
        sharing: Sharing | None = None,
        newlines: str = "keep",
    ) -> None:
        self.given, self.pruners, self.modules = given, pruners, modules
        self.sharing, self.newlines = sharing, newlines
        self.name = "+".join(pruner.name for pruner in pruners)
        self._handles: list[RemovableHandle] = []
        self._overridden: list[tuple[Any, str, Any, Override]] = []
        self._state = state = ThreadState()
        self._taps = Taps(state.sink)
        plans = Plans(pruners, given)
        self._encoder = EncoderHooks(adapter, plans, facts, state=state, taps=self._taps)
        self._decoder = DecoderHooks(
            adapter, plans, facts, state,
            sharing=sharing, compact=compact, newlines=newlines, maker=self._encoder.token, modules=modules,
        )  # fmt: skip
        try:
            self._refuse_copies(adapter.model)
            self._install_taps(adapter)
            self._install_encoder(adapter)
            self._install_decoder(adapter)
        except AttributeError as error:
            self.remove()
            raise UnsupportedModelError(f"the {adapter.name} adapter does not fit this model: {error}") from error

    @property
    def loss(self) -> Tensor | None:
        """What methods add to the loss of this thread's last forward."""
        return self._state.loss

    def mark_answers(self, labels: Tensor) -> None:
        """Hands labels to this thread's next forward."""
        self._state.labels = labels

    @property
    def last(self) -> Generation | None:
        """The last generation of this model, whichever thread ran it."""
        return self._decoder.recorder.last

    def _install_encoder(self, adapter: Adapter) -> None:
        hooks = self._encoder
        for source in adapter.sources():
            original = getattr(adapter.inner, source.encode)
            self.override(adapter.inner, source.encode, hooks.features(source, original))
        self._before(adapter.vision_tower, hooks.open_encoder)
        for owner, name, replacement in hooks.checkpoints.forwards():
            self.override(owner, name, replacement)
        for index, layer in enumerate(adapter.encoder_layers):
            if hooks.prunes or index in hooks.tapped:
                self._before(layer, functools.partial(hooks.before_layer, index))
            if index in hooks.opened:
                norm, mlp = adapter.encoder_mlp(layer)
                self._before(adapter.encoder_projections(layer).owner, hooks.before_attention)
                self._before(norm, functools.partial(hooks.before_mlp, index))
                self._after(mlp, functools.partial(hooks.after_mlp, index))
            if index in hooks.tapped:
                self._after(layer, functools.partial(hooks.after_layer, index))
        if hooks.sized:
            for owner, name, replacement in adapter.sized_attentions():
                self.override(owner, name, replacement)
        for projector in adapter.projectors:
            self._before(projector, hooks.before_projector)
            self._after(projector, hooks.after_projector)
        for merger in adapter.plane_mergers:
            self._before(merger, hooks.before_projector)
            self._after(merger, hooks.after_plane)

    def _install_decoder(self, adapter: Adapter) -> None:
        hooks, routing, teacher = self._decoder, self._decoder.routing, self._decoder.teacher
        for owner, name, replacement in adapter.overrides():
            self.override(owner, name, replacement)
        for owner, name, replacement in hooks.checkpoints.forwards():
            self.override(owner, name, replacement)
        self._before(adapter.inner, hooks.open_frame)
        self._before(adapter.language_model, hooks.open_decoder)
        self._after(adapter.language_model, hooks.close_decoder)
        asked = GenerateHooks(self._state, None if hooks.reads_all is None else hooks.reads_all.name)
        self.override(adapter.model, "generate", asked.generate(adapter.model.generate))
        self.override(adapter.model, "_expand_multimodal_outputs", expanding(adapter.model._expand_multimodal_outputs))
        guesses = asked.candidate_generator(adapter.model._get_candidate_generator)
        self.override(adapter.model, "_get_candidate_generator", guesses)
        for index, layer in enumerate(adapter.decoder_layers):
            self._before(layer, functools.partial(hooks.before_layer, index))
            if index in hooks.entered:
                self._after(layer, functools.partial(hooks.after_layer, index))
            if index in routing.layers:
                self.override(layer, "forward", functools.partial(routing.routed_forward, layer.forward))
                self._before(adapter.decoder_attention(layer), routing.before_attention)
                self._after(adapter.decoder_mlp(layer), routing.after_mlp)
            if index in hooks.adding:
                self.override(layer, "forward", functools.partial(hooks.adding_forward, index, layer.forward))
        self._before(adapter.model, teacher.open_loss)
        self._after(adapter.model, teacher.add_loss)

    def _install_taps(self, adapter: Adapter) -> None:
        encoder_layers, decoder_layers = list(adapter.encoder_layers), list(adapter.decoder_layers)
        projections = [adapter.encoder_projections(encoder_layers[index]) for index in sorted(self._encoder.tapped)]
        projections += [adapter.decoder_taps(decoder_layers[index]) for index in sorted(self._decoder.tapped)]
        self._taps.follow([one.modules for one in projections])

    def override(self, owner: Any, name: str, replacement: Callable[..., Any]) -> None:
        """Replaces a method of one object until `remove`."""
        override = Override(getattr(owner, name), torch.compiler.disable(replacement))
        self._overridden.append((owner, name, owner.__dict__.get(name, MISSING), override))
        owner.__dict__[name] = override

    def _before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        # Shapes depend on the data, so a compiler must not trace the hooks; it breaks its graph around them.
        self._refuse_copies(module)
        self._handles.append(module.register_forward_pre_hook(torch.compiler.disable(hook), with_kwargs=True))

    def _after(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        # always_call: what a layer opened is closed again when something raises half-way.
        hook = torch.compiler.disable(hook)
        self._refuse_copies(module)
        self._handles.append(module.register_forward_hook(hook, with_kwargs=True, always_call=True))

    def remove(self) -> None:
        """Takes every hook and override off."""
        self._taps.remove()
        self._encoder.checkpoints.remove()
        self._decoder.checkpoints.remove()
        for handle in self._handles:
            handle.remove()
        for owner, name, before, override in reversed(self._overridden):
            override.active = False
            if owner.__dict__.get(name) is not override:
                # Somebody, as accelerate does, has put a method of their own around it, which stays.
                continue
            if before is MISSING:
                owner.__dict__.pop(name, None)
            else:
                owner.__dict__[name] = before

    def _refuse_copies(self, module: nn.Module) -> None:
        """Pickling and copying look here first, and would stumble over a hook, or share it, later."""
        if not isinstance(module.__dict__.get("__reduce_ex__"), Override):
            self.override(module, "__reduce_ex__", refuse_copy)


def refuse_copy(*args: Any) -> Any:
    """Raises VTPruneError, for whatever would copy or pickle a model with its hooks."""
    raise VTPruneError("a wrapped model cannot be copied or pickled; call vtprune.unwrap(model) first")


class Override:
    """A method that stands for another one of the same object while it is active."""

    def __init__(self, original: Callable[..., Any], replacement: Callable[..., Any]) -> None:
        functools.update_wrapper(self, replacement)
        self.original, self.replacement, self.active = original, replacement, True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.replacement if self.active else self.original)(*args, **kwargs)
