"""Finds a CLIP on this machine, by folder, by hub id or in memory; nothing is ever downloaded."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from torch import nn

from vtprune.errors import VTPruneError
from vtprune.pruners.cdpruner.clip import Clip, OpenClip, TransformersClip

TRANSFORMERS_CONFIG, OPEN_CLIP_CONFIG = "config.json", "open_clip_config.json"
OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"
HUB, FOLDER = "hf-hub:", "local-dir:"
OPENAI_VOCABULARY = 49408


def find_clip(clip: str | nn.Module) -> Clip:
    """The CLIP of a folder or hub id (loaded in fp32, once), or around a model in memory.

    Raises VTPruneError, without asking any network, for what is not on this machine and for other models.
    """
    return load_clip(clip) if isinstance(clip, str) else clip_around(clip)


def clip_around(model: nn.Module) -> Clip:
    """A transformers CLIPModel (its tokenizer is looked up where it was loaded from) or an open_clip CLIP."""
    from transformers import CLIPModel

    if isinstance(model, CLIPModel):
        return TransformersClip(model, str(getattr(model.config, "_name_or_path", "") or ""))
    if hasattr(model, "encode_text") and hasattr(model, "visual"):
        vocabulary = getattr(model, "vocab_size", None)
        if vocabulary != OPENAI_VOCABULARY:
            raise VTPruneError(
                f"the open_clip model in memory has {vocabulary} tokens, not the {OPENAI_VOCABULARY} of open_clip's "
                "own tokenizer: save it to a folder with open_clip_config.json and its tokenizer, and pass that"
            )
        return OpenClip(model, _bundled_tokenizer(int(getattr(model, "context_length", 77))))
    raise VTPruneError(f"clip is a transformers CLIPModel or an open_clip CLIP, got a {type(model).__name__}")


@functools.lru_cache(maxsize=2)
def load_clip(source: str) -> Clip:
    """The CLIP in a folder, or in the hub's local cache, in fp32 on the CPU."""
    folder = local_folder(source)
    try:
        if (folder / TRANSFORMERS_CONFIG).is_file() and not source.startswith(HUB):
            found: Clip = _from_transformers(folder)
        else:
            found = _from_open_clip(folder)
    except VTPruneError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise VTPruneError(f"cannot load the CLIP in {folder}: {reason}") from error
    found.model.requires_grad_(False)
    found.owned = True
    return found


def local_folder(source: str) -> Path:
    """The folder with a CLIP's files; raises VTPruneError, saying how to get them, if this machine has none."""
    from huggingface_hub import try_to_load_from_cache

    name = source.removeprefix(HUB).removeprefix(FOLDER)
    names = (OPEN_CLIP_CONFIG,) if source.startswith(HUB) else (TRANSFORMERS_CONFIG, OPEN_CLIP_CONFIG)
    for file in names:
        if (Path(name) / file).is_file() and not source.startswith(HUB):
            return Path(name)
    if not Path(name).exists():
        for file in names:
            try:
                path = try_to_load_from_cache(name, file)
            except ValueError:  # not a repository's id
                break
            if isinstance(path, str):
                return Path(path).parent
    raise VTPruneError(
        f"no CLIP at {source!r}: it is neither a folder with {' or '.join(names)} nor in the local cache of the hub, "
        f"and nothing is downloaded here. Fetch it first, with `hf download {name}` for one on the hub, or leave "
        "clip out to take the relevance from the decoder's own embeddings"
    )


def _from_transformers(folder: Path) -> Clip:
    from transformers import CLIPModel

    kind = _config(folder / TRANSFORMERS_CONFIG).get("model_type")
    if kind != "clip":
        raise VTPruneError(f"{folder} holds a model of type {kind!r}, a 'clip' with both towers is needed")
    loaded: Any = CLIPModel.from_pretrained(
        str(folder), local_files_only=True, output_loading_info=True, use_safetensors=True
    )
    model, info = loaded
    if info["missing_keys"]:
        raise VTPruneError(
            f"the weights in {folder} are not a whole CLIP: {sorted(info['missing_keys'])[0]} is missing"
        )
    return TransformersClip(model.float().eval(), str(folder))


def _from_open_clip(folder: Path) -> Clip:
    try:
        import open_clip
    except ImportError as error:
        raise VTPruneError(f"{folder} holds an open_clip model: pip install 'vtprune[clip]' to use it") from error
    config = _part(_config(folder / OPEN_CLIP_CONFIG), "model_cfg", folder)
    # These towers would be looked up on the hub.
    text, vision = (_part(config, name, folder) for name in ("text_cfg", "vision_cfg"))
    towers = text.get("hf_model_name") or vision.get("timm_model_name")
    if towers:
        raise VTPruneError(f"the open_clip model in {folder} is built around {towers}; only its plain CLIPs are known")
    if not (folder / OPEN_CLIP_WEIGHTS).is_file():
        raise VTPruneError(
            f"no {OPEN_CLIP_WEIGHTS} in {folder}: only safetensors are loaded, so save the model's weights as these"
        )
    model = open_clip.create_model(f"{FOLDER}{folder}", require_pretrained=True).eval()
    return OpenClip(model, open_clip.get_tokenizer(f"{FOLDER}{folder}"))


def _config(path: Path) -> dict[str, Any]:
    """The JSON object in a model's config; raises FileError."""
    # Here, so that importing the methods does not load what reads files.
    from vtprune.json_files import OBJECT, read_json

    found: dict[str, Any] = read_json(OBJECT, path, "the config of a CLIP")
    return found


def _part(config: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
    part = config.get(name)
    if not isinstance(part, dict):
        raise VTPruneError(f"{folder / OPEN_CLIP_CONFIG} is not the config of a CLIP: it has no object {name}")
    return part


@functools.lru_cache(maxsize=2)
def _bundled_tokenizer(length: int) -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(context_length=length)
