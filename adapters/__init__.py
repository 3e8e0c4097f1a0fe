"""One file a model family; `adapter_for` picks the one that knows a model."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import transformers
from packaging.version import Version
from torch import nn

from vtprune.adapters.base import Adapter
from vtprune.adapters.encoder_side import EncoderSide
from vtprune.adapters.llava import LlavaAdapter
from vtprune.adapters.llava_anyres import LlavaNextAdapter, LlavaNextVideoAdapter, LlavaOnevisionAdapter
from vtprune.adapters.open_clip import OpenClipTower
from vtprune.adapters.qwen_vl import Qwen2VLAdapter, Qwen3VLAdapter, Qwen3VLMoeAdapter, Qwen25VLAdapter
from vtprune.adapters.qwen_vl_hybrid import Qwen35Adapter, Qwen35MoeAdapter
from vtprune.adapters.timm import TimmTower
from vtprune.adapters.tower import Tower
from vtprune.cost.sizes import ModelCost
from vtprune.errors import UnsupportedModelError

ADAPTERS: tuple[type[Adapter], ...] = (
    LlavaAdapter,
    LlavaNextAdapter,
    LlavaOnevisionAdapter,
    LlavaNextVideoAdapter,
    Qwen2VLAdapter,
    Qwen25VLAdapter,
    Qwen3VLAdapter,
    Qwen3VLMoeAdapter,
    Qwen35Adapter,
    Qwen35MoeAdapter,
)
# Vision encoders that stand alone; of an open_clip model the one that knows its `visual`.
TOWERS: tuple[type[Tower], ...] = (TimmTower, OpenClipTower)
# Models that are asked for and that no adapter would be right for, by what their configs call themselves without
# punctuation: why not.
REFUSED = {
    "qwen4exp": "its attention picks what each query sees by an index over every place of the prompt, its embeddings "
    "are of runs of token ids, and it carries several hidden states a token: none of this holds once tokens are gone",
    "videollava": "it has a tower for images and another for videos, and each frame's CLS token goes to the decoder, "
    "where it has no place in a grid; LLaVA-NeXT-Video, LLaVA-OneVision and the Qwen-VL families take videos",
    "llavaonevision15": "no release of transformers that vtprune is tested on has a class for it, and the code that "
    "its checkpoints bring along is not run",
}
# Earlier releases expand images wrongly for beams; what wraps no model (`vtprune.select`, a plugin) takes them.
LOWEST_TRANSFORMERS = Version("5.20")
# What a config says beside the architecture: where it came from, how it runs, what generation does.
PASSING = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")


def adapters() -> list[tuple[str, tuple[str, ...], str]]:
    """(name, model classes, notes) of every adapter."""
    found: list[type[EncoderSide]] = [*ADAPTERS, *TOWERS]
    found.sort(key=lambda adapter: adapter.__module__)
    return [(adapter.name, adapter.models, adapter.notes) for adapter in found]


def core_model(model: Any) -> nn.Module:
    """The generation model itself, out of a compiled module or a PEFT wrapper."""
    seen = getattr(model, "_orig_mod", model)
    return seen.get_base_model() if hasattr(seen, "get_base_model") else seen


def tower_for(model: Any) -> Tower | None:
    """The adapter of a vision encoder that stands alone, None for any other model; raises UnsupportedModelError for a
    tower that cannot be pruned rightly."""
    core = core_model(model)
    for tower in TOWERS:
        if tower.takes(core):
            found = tower(core)
            found.check()
            return found
    return None


def adapter_for(model: Any) -> Adapter:
    """The adapter of a model; raises UnsupportedModelError with the classes that have one, and on a release of
    transformers whose models are not pruned rightly."""
    core: Any = core_model(model)
    if Version(transformers.__version__) < LOWEST_TRANSFORMERS:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} expands images wrongly for beams: vtprune wraps models of "
            f"{LOWEST_TRANSFORMERS} and later; vtprune.select and vtprune serve run on this one, too"
        )
    _refuse(getattr(getattr(core, "config", None), "model_type", None))
    for adapter in ADAPTERS:
        if adapter.takes(core):
            found = adapter(core)
            found.check()
            return found
    known = ", ".join(name for adapter in ADAPTERS for name in adapter.models)
    raise UnsupportedModelError(
        f"no adapter for {type(core).__name__}; vtprune wraps {known}, and towers of open_clip (see CONTRIBUTING.md, "
        "'Add a model')"
    )


def _refuse(kind: object) -> None:
    """Raises UnsupportedModelError, with the reason, for a model type that is known not to work."""
    reason = REFUSED.get("".join(filter(str.isalnum, str(kind).lower())))
    if reason is not None:
        raise UnsupportedModelError(f"{kind} cannot be wrapped: {reason}")


def model_cost(config: Any) -> ModelCost:
    """The sizes of a model that its cost depends on; raises UnsupportedModelError for an unknown family."""
    kind = getattr(config, "model_type", None)
    _refuse(kind)
    for adapter in ADAPTERS:
        if kind in adapter.model_types:
            return adapter.sizes(config)
    got = repr(kind) if kind else type(config).__name__
    known = ", ".join(name for adapter in ADAPTERS for name in adapter.model_types)
    raise UnsupportedModelError(f"no cost for config {got}; supported model types: {known}")


def model_type(model: Any) -> str:
    """The family's name, as transformers has it in a config."""
    return str(core_model(model).config.model_type)  # type: ignore[union-attr]


def config_hash(model: Any) -> str:
    """Identifies the architecture of a model: its config without what passes."""
    lasting = _lasting(core_model(model).config.to_dict())  # type: ignore[union-attr,operator]
    return hashlib.sha256(json.dumps(lasting, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _lasting(one) for key, one in value.items() if key not in PASSING}
    return [_lasting(one) for one in value] if isinstance(value, list | tuple) else value
