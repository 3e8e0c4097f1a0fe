"""A CLIP beside the model: how well each patch of a picture fits a text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtprune.errors import VTPruneError
from vtprune.method.beside import image_statistics, tokenizer_of

# What OpenAI's CLIP was trained with, for models that say nothing else.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class Clip(ABC):
    """A CLIP model of one library.

    length: tokens that its text side takes at once; side: pixels (height, width) that its image side takes;
    cells: the patches (rows, columns) of a picture; `owned`: whether it was loaded here, and may be moved.
    """

    length: int
    side: tuple[int, int]
    cells: tuple[int, int]
    statistics: tuple[tuple[float, ...], tuple[float, ...]]
    owned = False

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    @abstractmethod
    def token_ids(self, text: str) -> list[int]:
        """All ids of a text, start and end included, never cut."""

    @abstractmethod
    def embed_text(self, ids: Tensor) -> Tensor:
        """(M, length) ids to (M, E)."""

    @abstractmethod
    def embed_patches(self, pixels: Tensor) -> Tensor:
        """(t, 3, *side) normalised pixels to (t, rows * columns, E): the patches of the layer before the last,
        through the final norm and the visual projection."""

    @abstractmethod
    def layers(self) -> tuple[Iterable[nn.Module], Iterable[nn.Module]]:
        """The layers that run of the image side and of the text side."""

    def on(self, device: torch.device) -> Clip:
        """This CLIP on `device` if it was loaded here; one that the user made stays where it is."""
        if self.owned and self._weight.device != device:
            self.model.to(device)
        return self

    @property
    def _weight(self) -> Tensor:
        weight: Tensor = next(self.model.parameters())
        return weight

    @torch.no_grad()
    def texts(self, text: str) -> Tensor:
        """(M, E) fp32: a text longer than `length` tokens is cut into M segments, the last filled up with zeros."""
        ids = torch.tensor(self.token_ids(text))
        ids = F.pad(ids, (0, -ids.numel() % self.length)).view(-1, self.length)
        return self.embed_text(ids.to(self._weight.device)).float()

    @torch.no_grad()
    def patches(self, picture: Tensor) -> Tensor:
        """(t, rows * columns, E) fp32, from a picture (t, 3, H, W) in [0, 1], squeezed whole into `side`."""
        picture = picture.to(self._weight.device, torch.float32)
        if picture.shape[-2:] != self.side:
            picture = F.interpolate(picture, self.side, mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (picture.new_tensor(values).view(3, 1, 1) for values in self.statistics)
        return self.embed_patches(((picture - mean) / std).to(self._weight.dtype)).float()

    def flops(self, text_tokens: int) -> int:
        """FLOPs of the layers for one picture and a text of `text_tokens` tokens."""
        segments = max(1, -(-text_tokens // self.length))
        image, text = (list(layers) for layers in self.layers())
        return tower_flops(image, 1 + self.cells[0] * self.cells[1]) + segments * tower_flops(text, self.length)


def tower_flops(layers: list[nn.Module], tokens: int) -> int:
    """FLOPs of the matrix products of transformer layers over one sequence."""
    total = 0
    for layer in layers:
        matrices = [weight for weight in layer.parameters() if weight.ndim == 2]
        width = min(min(weight.shape) for weight in matrices)
        total += 2 * tokens * sum(weight.numel() for weight in matrices) + 4 * tokens * tokens * width
    return total


class TransformersClip(Clip):
    """transformers' CLIPModel; its tokenizer and image statistics lie in `source`."""

    def __init__(self, model: Any, source: str) -> None:
        super().__init__(model)
        vision, text = model.config.vision_config, model.config.text_config
        self.length = text.max_position_embeddings
        self.side = (vision.image_size, vision.image_size)
        self.cells = (vision.image_size // vision.patch_size,) * 2
        self.statistics = image_statistics(source) or (MEAN, STD)
        self.tokenizer: Any = tokenizer_of(source)
        # transformers makes up an empty tokenizer where the files are missing.
        if self.tokenizer is None or not text.vocab_size // 2 < len(self.tokenizer) <= text.vocab_size:
            raise VTPruneError(
                f"the CLIP from {source or 'memory'!r} has no tokenizer beside it that fits its {text.vocab_size} "
                "tokens: save model and tokenizer into one folder (save_pretrained) and pass that folder"
            )

    def token_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, truncation=False, verbose=False)["input_ids"])

    def embed_text(self, ids: Tensor) -> Tensor:
        hidden = self.model.text_model(input_ids=ids).last_hidden_state
        # The end of the text; segments without one pool at their highest id, as the first CLIPs did throughout.
        end = (ids == self.tokenizer.eos_token_id).int()
        place = torch.where(end.any(dim=1), end.argmax(dim=1), ids.argmax(dim=1))
        embeds: Tensor = self.model.text_projection(hidden[torch.arange(ids.shape[0], device=ids.device), place])
        return embeds

    def embed_patches(self, pixels: Tensor) -> Tensor:
        tower = self.model.vision_model
        hidden = tower.pre_layrnorm(tower.embeddings(pixels))
        for layer in tower.encoder.layers[:-1]:
            hidden = layer(hidden, attention_mask=None)
        embeds: Tensor = self.model.visual_projection(tower.post_layernorm(hidden[:, 1:]))
        return embeds

    def layers(self) -> tuple[Iterable[nn.Module], Iterable[nn.Module]]:
        return self.model.vision_model.encoder.layers[:-1], self.model.text_model.encoder.layers


class OpenClip(Clip):
    """open_clip's CLIP with a plain vision transformer."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(model)
        visual = model.visual
        if getattr(visual, "attn_pool", None) is not None or getattr(visual, "proj", None) is None:
            raise VTPruneError(
                "relevance needs patches in CLIP's joint space, which only open_clip's plain vision transformers "
                f"(no timm tower, no attention pooling) give; got {type(visual).__name__}"
            )
        self.tokenizer, self.length = tokenizer, model.context_length
        self._text_layers = getattr(model, "text", model).transformer.resblocks
        height, width = visual.image_size if isinstance(visual.image_size, tuple) else (visual.image_size,) * 2
        self.side, self.cells = (height, width), visual.grid_size
        self.statistics = getattr(visual, "image_mean", None) or MEAN, getattr(visual, "image_std", None) or STD

    def token_ids(self, text: str) -> list[int]:
        if hasattr(self.tokenizer, "encode"):
            return [self.tokenizer.sot_token_id, *self.tokenizer.encode(text), self.tokenizer.eot_token_id]
        return list(self.tokenizer.tokenizer(text, truncation=False, verbose=False)["input_ids"])

    def embed_text(self, ids: Tensor) -> Tensor:
        embeds: Tensor = self.model.encode_text(ids)
        return embeds

    def embed_patches(self, pixels: Tensor) -> Tensor:
        visual = self.model.visual
        before_last = max(0, len(visual.transformer.resblocks) - 2)
        found = visual.forward_intermediates(
            pixels, [before_last], stop_early=True, normalize_intermediates=True, intermediates_only=True,
            output_fmt="NLC",
        )  # fmt: skip
        embeds: Tensor = found["image_intermediates"][0] @ visual.proj
        return embeds

    def layers(self) -> tuple[Iterable[nn.Module], Iterable[nn.Module]]:
        return self.model.visual.transformer.resblocks[:-1], self._text_layers
