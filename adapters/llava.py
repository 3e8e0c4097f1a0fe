"""LLaVA-1.5: a CLIP tower (with CLS) or a SigLIP tower (without), a two-layer projector, a Llama-like decoder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from vtprune.adapters.base import Adapter
from vtprune.adapters.seams import Projections, Source, uses_flash
from vtprune.adapters.sizes import model_sizes, pair, tower_sizes
from vtprune.cost.sizes import FixedVisionCost, ModelCost
from vtprune.encoder.encoding import EncodedImage, Encoding
from vtprune.encoder.padded import PaddedEncoding
from vtprune.errors import UnsupportedModelError, VTPruneError
from vtprune.method.facts import ModelFacts

# The towers that are known, and the CLS tokens of each.
TOWERS = {"clip_vision_model": 1, "siglip_vision_model": 0}


class LlavaAdapter(Adapter):
    """`LlavaForConditionalGeneration` with a CLIP or a SigLIP vision tower."""

    name = "llava"
    models = ("LlavaForConditionalGeneration",)
    notes = "CLIP tower (CLS attention) or SigLIP tower (no CLS: received attention instead); fixed-size images"
    adds_mlp = True
    model_types = ("llava",)

    @classmethod
    def sizes(cls, config: Any) -> ModelCost:
        vision, width = _tower(config), config.text_config.hidden_size
        layers = config.vision_feature_layer
        features = vision.blocks.width * (len(layers) if isinstance(layers, Sequence) else 1)
        return model_sizes(config, vision, features * width + width * width)

    def check(self) -> None:
        config = self.model.config
        tower = config.vision_config.model_type
        if tower not in TOWERS:
            raise UnsupportedModelError(
                f"the LLaVA adapter takes {' and '.join(TOWERS)} towers, this model has {tower!r}"
            )
        strategy = config.vision_feature_select_strategy
        if self._prefix and strategy != "default":
            raise UnsupportedModelError(
                f"vision_feature_select_strategy={strategy!r} hands the CLS token to the decoder, where it has no "
                "place in the image's grid; only 'default' is supported with a CLIP tower"
            )
        if not self._prefix and strategy != "full":
            raise UnsupportedModelError(
                f"vision_feature_select_strategy={strategy!r} cuts the first patch of a tower without a CLS token; "
                "only 'full' is supported with a SigLIP tower"
            )

        if self.depth < 1:
            raise UnsupportedModelError(
                f"vision_feature_layer={config.vision_feature_layer!r} reads the patch embeddings; the features must "
                "come from one of the tower's layers"
            )

    def check_stages(self, *, encoder: bool) -> None:
        layers = self.model.config.vision_feature_layer
        if encoder and not isinstance(layers, int):
            raise UnsupportedModelError(
                f"the features are read at several layers ({layers!r}), where different tokens would be left; use a "
                "method that prunes after the encoder"
            )

    @property
    def _prefix(self) -> int:
        return TOWERS[self.model.config.vision_config.model_type]

    @property
    def vision_tower(self) -> nn.Module:
        return self.inner.vision_tower

    @property
    def _encoder(self) -> Any:
        return self.inner.vision_tower.encoder

    @property
    def encoder_layers(self) -> Iterable[nn.Module]:
        return self._encoder.layers

    @property
    def projectors(self) -> tuple[nn.Module, ...]:
        return (self.inner.multi_modal_projector,)

    @property
    def encoder_scale(self) -> float:
        return float(self._encoder.layers[0].self_attn.scale)

    @property
    def depth(self) -> int:
        """Encoder layers that feed the features: the deepest of the feature layers."""
        layers = self.model.config.vision_feature_layer
        total = self.model.config.vision_config.num_hidden_layers
        chosen = [layers] if isinstance(layers, int) else list(layers)
        return max(layer if layer >= 0 else total + 1 + layer for layer in chosen)

    def facts(self) -> ModelFacts:
        text = self.model.config.get_text_config()
        return ModelFacts(
            has_cls=bool(self._prefix),
            encoder_depth=self.depth,
            decoder_depth=text.num_hidden_layers,
            group=1,
            source=self.source,
            decoder_width=text.hidden_size,
            encoder_width=self.model.config.vision_config.hidden_size,
            decoder_kv_heads=self.cost.decoder.kv_heads,
            decoder_mlp_width=self.cost.decoder.mlp_width,
        )

    def encoder_projections(self, layer: Any) -> Projections:
        return Projections(layer.self_attn, {"q": "q_proj", "k": "k_proj", "v": "v_proj"})

    def encoder_mlp(self, layer: Any) -> tuple[nn.Module, nn.Module]:
        return layer.layer_norm2, layer.mlp

    def start_encoding(self, source: Source, arguments: dict[str, Any]) -> Encoding:
        self._check_layers(arguments)
        pixel_values, patch = arguments[source.pixels], self.model.config.vision_config.patch_size
        height, width = pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch
        return self._encoding([(1, height, width)] * pixel_values.shape[0], device=pixel_values.device)

    def _check_layers(self, arguments: dict[str, Any]) -> None:
        """Raises VTPruneError where a call asks for features of other layers than the config does."""
        config = self.model.config
        for name in ("vision_feature_layer", "vision_feature_select_strategy"):
            given = arguments.get(name)
            if given is not None and given != getattr(config, name):
                raise VTPruneError(
                    f"{name}={given!r} differs from the model's config ({getattr(config, name)!r}); set it on the "
                    "config before wrapping"
                )

    def _encoding(self, grids: list[tuple[int, int, int]], **given: Any) -> Encoding:
        """The state of a pass of images, crops or frames of these grids; given: what `Encoding` takes beside what
        follows from the config."""
        config = self.model.config
        return PaddedEncoding(
            grids,
            group=1,
            prefix=self._prefix,
            heads=config.vision_config.num_attention_heads,
            depth=self.depth,
            last=config.vision_config.num_hidden_layers - 1,
            flash=uses_flash(config.vision_config),
            **given,
        )

    def pixels(self, source: Source, arguments: dict[str, Any], encoding: Encoding) -> list[Tensor]:
        return list(arguments[source.pixels])

    def picture(self, image: EncodedImage) -> Tensor:
        assert image.pixels is not None
        return self.real_colours(image.pixels[None])

    @property
    def published_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return super().published_statistics if self._prefix else ((0.5,) * 3, (0.5,) * 3)


def _tower(config: Any) -> FixedVisionCost:
    """A CLIP or SigLIP tower. All its layers run, also those past the features'."""
    tower = config.vision_config
    if tower.model_type not in TOWERS:
        raise UnsupportedModelError(f"no cost for vision tower {tower.model_type!r}; supported: {', '.join(TOWERS)}")
    width = tower.hidden_size
    (image_h, image_w), (patch_h, patch_w) = pair(tower.image_size), pair(tower.patch_size)
    return FixedVisionCost(
        blocks=tower_sizes(
            width, tower.num_attention_heads, tower.intermediate_size, gated=False, layers=tower.num_hidden_layers
        ),
        patch_macs=tower.num_channels * patch_h * patch_w * width,
        side=(image_h // patch_h, image_w // patch_w),
        extra=TOWERS[tower.model_type],
        dropped=1 if config.vision_feature_select_strategy == "default" else 0,
        # Before transformers 5.23 a config without the switch still means a head.
        pooling=tower.model_type == "siglip_vision_model" and getattr(tower, "vision_use_head", True),
    )
