"""Loading a vision-language model and its processor, with messages that say what is missing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as transformers_logging

from vtprune.assets import folder_of
from vtprune.console.output import log_level
from vtprune.errors import InputError, first_line
from vtprune.loading.devices import check_device, device_of, read_device_map

DTYPES = ("auto", "float32", "bfloat16", "float16")
CPU_BATCH = 16


def is_local(pretrained: str | os.PathLike[str]) -> bool:
    """Whether `pretrained` names a folder on this machine."""
    return Path(pretrained).is_dir()


def pick_device(device: str | None) -> str:
    """The device asked for, else this process's GPU, else the CPU."""
    if device is None:
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    if device == "auto":
        return device
    return check_device(device)


def load_model(
    pretrained: str | os.PathLike[str] | None = None,
    *,
    device: str | None = None,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
) -> tuple[Any, Any]:
    """The model in eval mode and its processor (left padding); `pretrained` None is the bundled LLaVA.

    device_map: as `read_device_map` takes it, for a model that is too large for one device, in the place of `device`.
    Raises InputError for what cannot be loaded, or not as asked.
    """
    name = folder_of(None if pretrained is None else os.fspath(pretrained))
    if dtype not in DTYPES:
        raise InputError(f"dtype: unknown dtype {dtype!r}; one of {', '.join(DTYPES)}")
    if device_map is not None and device is not None:
        raise InputError(f"device_map: it says where everything goes; leave out device={device}")
    spread = None if device_map is None else read_device_map(device_map)
    device = pick_device(device)
    check_model(name)
    transformers_logging.set_verbosity(log_level())
    transformers_logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": dtype}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if spread is None and device == "auto":
        spread = "auto"
    if spread is not None:
        options["device_map"] = spread
    try:
        processor = AutoProcessor.from_pretrained(name)
        model: Any = AutoModelForImageTextToText.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"model: cannot load {name}: {first_line(error)}") from error
    if spread is None:
        model = model.to(device)
    if getattr(processor, "chat_template", None) is None:
        raise InputError(f"model: the processor of {name} has no chat template, so no prompt can be built")
    processor.tokenizer.padding_side = "left"
    return model.eval(), processor


def check_model(pretrained: str | None) -> None:
    """Raises InputError where there is no checkpoint of this name, without loading its weights."""
    name = folder_of(pretrained)
    looks_local = name.startswith((".", "/", "~")) or Path(name).exists()
    if looks_local and not (Path(name) / "config.json").is_file():
        raise InputError(f"model: {name} is not a folder with a checkpoint (no config.json in it)")
    try:
        AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"model: cannot load {name}: {first_line(error)}") from error


def default_batch(model: Any) -> int:
    """Rows together where answers do not depend on what else is in the batch (float32 on a CPU), else one."""
    return CPU_BATCH if device_of(model).type == "cpu" and str(model.dtype) == "torch.float32" else 1
