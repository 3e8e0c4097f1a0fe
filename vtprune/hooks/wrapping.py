"""Everything that `wrap` puts on a model, and `unwrap` takes off again."""

from __future__ import annotations

import functools

from torch import Tensor, nn

from vtprune.adapters.base import Adapter
from vtprune.errors import UnsupportedModelError
from vtprune.hooks.decoder import DecoderHooks
from vtprune.hooks.features import FeatureHooks
from vtprune.hooks.generate import GenerateHooks
from vtprune.hooks.growing import GrowingHooks
from vtprune.hooks.installing import Installed
from vtprune.hooks.records import expanding
from vtprune.hooks.state import ThreadState
from vtprune.hooks.taps import Taps
from vtprune.method.facts import ModelFacts
from vtprune.method.growth import Growth
from vtprune.method.plan import Plans
from vtprune.method.pruner import Pruner
from vtprune.method.sharing import Sharing
from vtprune.report.generation import Generation
from vtprune.report.report import Report


class Wrapping(Installed):
    """The hooks and overrides of one wrapped vision-language model."""

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
        growth: Growth | None = None,
    ) -> None:
        super().__init__(pruners, given, modules)
        self.sharing, self.newlines = sharing, newlines
        self._state = state = ThreadState()
        self._taps = Taps(state.sink)
        plans = Plans(pruners, given if growth is None else [growth.method], lambda: state.level)
        self._encoder = FeatureHooks(adapter, plans, facts, state=state, taps=self._taps, modules=modules)
        self._decoder = DecoderHooks(
            adapter, plans, facts, state, taps=self._taps, maker=self._encoder.token, modules=modules,
            sharing=sharing, compact=compact, newlines=newlines,
        )  # fmt: skip
        self._growing: GrowingHooks | None = None
        if growth is not None:
            self.name = "+".join(one.name for one in given)
            self._growing = GrowingHooks(adapter, growth, plans, state=state, name=self.name)
        try:
            self.refuse_copies(adapter.model)
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
    def generation(self) -> Generation | None:
        """The last generation of this model, whichever thread ran it."""
        return self._decoder.recorder.last

    def report(self) -> Report | None:
        last = self.generation
        if last is None:
            return None
        grown = None if self._growing is None else self._growing.last
        return grown.build() if grown is not None and grown.last is last else last.build()

    def remove(self) -> None:
        self._taps.remove()
        self._encoder.checkpoints.remove()
        self._decoder.checkpoints.remove()
        super().remove()

    def _install_encoder(self, adapter: Adapter) -> None:
        hooks = self._encoder
        for source in adapter.sources():
            original = getattr(adapter.inner, source.encode)
            self.override(adapter.inner, source.encode, hooks.features(source, original))
        self.before(adapter.vision_tower, hooks.open_encoder)
        for owner, name, replacement in hooks.checkpoints.forwards():
            self.override(owner, name, replacement)
        for index, layer in enumerate(adapter.encoder_layers):
            if hooks.prunes or index in hooks.tapped:
                self.before(layer, functools.partial(hooks.before_layer, index))
            if index in hooks.opened:
                norm, mlp = adapter.encoder_mlp(layer)
                self.before(adapter.encoder_projections(layer).owner, hooks.before_attention)
                self.before(norm, functools.partial(hooks.before_mlp, index))
                self.after(mlp, functools.partial(hooks.after_mlp, index))
            if index in hooks.tapped:
                self.after(layer, functools.partial(hooks.after_layer, index))
        if hooks.sized:
            for owner, name, replacement in adapter.sized_attentions():
                self.override(owner, name, replacement)
        for projector in adapter.projectors:
            self.before(projector, hooks.before_projector)
            self.after(projector, hooks.after_projector)
        for merger in adapter.plane_mergers:
            self.before(merger, hooks.before_projector)
            self.after(merger, hooks.after_plane)

    def _install_decoder(self, adapter: Adapter) -> None:
        hooks, routing, teacher = self._decoder, self._decoder.routing, self._decoder.teacher
        for owner, name, replacement in adapter.overrides():
            self.override(owner, name, replacement)
        for owner, name, replacement in hooks.checkpoints.forwards():
            self.override(owner, name, replacement)
        self.before(adapter.inner, hooks.open_frame)
        self.before(adapter.language_model, hooks.open_decoder)
        self.after(adapter.language_model, hooks.close_decoder)
        asked = GenerateHooks(self._state, None if hooks.reads_all is None else hooks.reads_all.name)
        generate = asked.generate(adapter.model.generate)
        self.override(
            adapter.model, "generate", generate if self._growing is None else self._growing.generate(generate)
        )
        self.override(adapter.model, "_expand_multimodal_outputs", expanding(adapter.model._expand_multimodal_outputs))
        guesses = asked.candidate_generator(adapter.model._get_candidate_generator)
        self.override(adapter.model, "_get_candidate_generator", guesses)
        for index, layer in enumerate(adapter.decoder_layers):
            self.before(layer, functools.partial(hooks.before_layer, index))
            if index in hooks.entered:
                self.after(layer, functools.partial(hooks.after_layer, index))
            if index in routing.layers:
                self.override(layer, "forward", functools.partial(routing.routed_forward, index, layer.forward))
                norm = adapter.decoder_norm(layer)
                self.override(norm, "forward", functools.partial(routing.norm_forward, norm.forward))
                self.before(adapter.decoder_attention(layer), routing.before_attention)
                self.after(adapter.decoder_mlp(layer), routing.after_mlp)
            if index in hooks.planned.layers:
                attention, mlp = adapter.decoder_attention(layer), adapter.decoder_mlp(layer)
                attending = functools.partial(hooks.planned.attention_forward, index, attention.forward)
                # What calls it asks its signature under which name it takes a cache.
                self.override(attention, "forward", functools.update_wrapper(attending, attention.forward))
                self.override(mlp, "forward", functools.partial(hooks.planned.mlp_forward, mlp, mlp.forward))
            if index in hooks.planned.watched:
                self.before(adapter.decoder_output(layer), hooks.planned.before_output)
            if index in hooks.adding:
                self.override(layer, "forward", functools.partial(hooks.adding_forward, index, layer.forward))
        self.before(adapter.model, teacher.open_loss)
        self.after(adapter.model, teacher.add_loss)

    def _install_taps(self, adapter: Adapter) -> None:
        layers, tapped = list(adapter.encoder_layers), sorted(self._encoder.tapped)
        self._taps.follow("encoder", lambda: [adapter.encoder_projections(layers[index]).modules for index in tapped])
        self._decoder.tap()
