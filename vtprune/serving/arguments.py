"""What an engine of vLLM is started with, so that it prunes."""

from __future__ import annotations

from typing import Any

from vtprune.errors import VTPruneError
from vtprune.method.config import WEIGHTS_NAME
from vtprune.method.resolving import folder_of, resolve
from vtprune.serving.release import check_release
from vtprune.serving.settings import KEY, Settings

FAMILIES = ("llava", "qwen2_5_vl")
# Of those that look alike, why not.
REFUSED = {
    "qwen3_vl": "adds planes of vision vectors to its first decoder layers, for which vLLM's seam has no room",
    "qwen3_vl_moe": "adds planes of vision vectors to its first decoder layers, for which vLLM's seam has no room",
    "llava_next": "cuts pictures into crops, between whose rows stand tokens that are no vision tokens",
    "llava_onevision": "cuts pictures into crops, between whose rows stand tokens that are no vision tokens",
}
# By this vLLM is told to ask a model for positions anew. No video is ever pruned by it: none is taken.
SWITCH = 0.5


def engine_args(
    model: str,
    pruner: Any,
    *,
    positions: str = "original",
    most: int | float | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The arguments for `vllm.LLM(**engine_args(...))`, or for the engine of a server; others go beside them.

    model: a folder with a checkpoint, or a hub's id. pruner, options: as for `vtprune.wrap`, one method that can be
    served (`vtprune list`), or a folder that `vtprune.save_config` wrote. positions: "original" (of the whole prompt),
    or, on LLaVA, "compact". most: the most of an image's tokens that a request may keep that asks for another method
    or keep (`mm_processor_kwargs={"vtprune": {"method": "fopru", "keep": 0.5}}`), None for what the method keeps.
    Raises VTPruneError for a method, a model or a release of vLLM that it does not work with.
    """
    check_release()
    given = resolve(pruner, **options)
    if len(given) != 1:
        raise VTPruneError(f"a server runs one method, got {len(given)}")
    settings = Settings(given[0], positions, most, weights_of(pruner))
    return arguments_for(config_of(model), settings) | {"model": model}


def weights_of(pruner: Any) -> str:
    """The folder with weights that a text or a path names, "" for none."""
    folder = folder_of(pruner)
    return str(folder.resolve()) if folder is not None and (folder / WEIGHTS_NAME).is_file() else ""


def config_of(model: str) -> Any:
    """The config of a checkpoint."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise VTPruneError(f"{model}: no config of a model is found there ({str(error).splitlines()[0]})") from error


def arguments_for(config: Any, settings: Settings) -> dict[str, Any]:
    """The same for a model's config, without the model itself."""
    kind = config.model_type
    if kind not in FAMILIES:
        why = REFUSED.get(kind, "has no class in the plugin")
        raise VTPruneError(f"{kind} cannot be served: it {why}; LLaVA-1.5 and Qwen2.5-VL can")
    overrides: dict[str, Any] = {KEY: settings.to_dict()}
    found: dict[str, Any] = {"hf_overrides": overrides}
    if settings.positions == "original":
        found["video_pruning_rate"] = SWITCH
    if kind == "qwen2_5_vl":
        if settings.positions != "original":
            raise VTPruneError("Qwen2.5-VL is served with positions='original' alone")
        overrides["architectures"] = ["VTPruneQwen2_5_VL"]
        return found
    overrides["architectures"] = ["VTPruneLlava"]
    if settings.positions == "original":
        overrides["architectures"] = ["VTPruneLlavaOriginal"]
        overrides["text_config"] = {"rope_parameters": _two_rows(config.text_config)}
    return found


def _two_rows(text: Any) -> dict[str, Any]:
    """A decoder's rotary parameters with three rows of positions, the first of which turns nothing."""
    own = dict(text.rope_parameters)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if own.get("rope_type", "default") != "default" or own.get("partial_rotary_factor", 1.0) != 1.0 or width % 4:
        raise VTPruneError(
            f"positions='original' needs a decoder whose rotary embedding is plain, not {own}: take 'compact'"
        )
    return {**own, "mrope_section": [0, width // 4, width // 4]}
