"""Which weights of a wrapped model a run trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vtprune.adapters import adapter_for, core_model
from vtprune.errors import VTPruneError
from vtprune.hooks.weights import SUBMODULE
from vtprune.training.config import TrainConfig

MISSING_PEFT = "LoRA needs peft, which is not installed: pip install 'vtprune[train]'"


def brought(model: Any) -> nn.Module | None:
    """The weights that the methods brought to a wrapped model."""
    module: nn.Module | None = getattr(core_model(model), SUBMODULE, None)
    return module


def choose(model: Any, config: TrainConfig) -> Any:
    """Marks what is trained, and returns the model: for LoRA the PEFT model around it.

    Raises VTPruneError where a method brings nothing that could be trained, and where PEFT is missing.
    """
    routers, adapter = brought(model), adapter_for(model)
    if config.train == "routers" and routers is None:
        raise VTPruneError(
            "train='routers' trains what a method brings to the model, and this one brings no weights; "
            "train='decoder' fine-tunes the base under it"
        )
    model.requires_grad_(config.train in ("all", "decoder"))
    if config.train == "decoder":
        adapter.vision_tower.requires_grad_(False)
    if config.train == "lora":
        model = _with_lora(model, config.lora_rank, list(adapter.decoder_layers))
    if routers is not None:
        routers.requires_grad_(True)
    return model


def _with_lora(model: Any, rank: int, layers: list[nn.Module]) -> Any:
    """The model with adapters on every linear layer of its decoder layers."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise VTPruneError(MISSING_PEFT) from error
    if hasattr(model, "get_base_model"):
        raise VTPruneError("this model has PEFT adapters already; give the base model, or train='routers'")
    # Layers may differ: those of linear attention have projections of their own.
    linear = (name for layer in layers for name, part in layer.named_modules() if isinstance(part, nn.Linear))
    leaves = sorted({name.split(".")[-1] for name in linear})
    where = rf".*language_model\..*\.({'|'.join(leaves)})"
    options = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=where, task_type=None)
    return get_peft_model(model, options)


def halve_frozen(model: Any, config: TrainConfig, dtype: torch.dtype) -> None:
    """Holds frozen weights in the dtype that is computed in, where none of the base's own weights are trained."""
    if config.train in ("routers", "lora"):
        for weight in model.parameters():
            if not weight.requires_grad and weight.is_floating_point():
                weight.data = weight.data.to(dtype)


def groups(model: Any, config: TrainConfig) -> list[dict[str, Any]]:
    """Groups for AdamW: matrices of the base decay, vectors and the method's weights do not; `peak`: their rate."""
    routers = brought(model)
    own = [] if routers is None else list(routers.parameters())
    known = set(own)
    base = [weight for weight in model.parameters() if weight.requires_grad and weight not in known]
    found = [
        {"params": [w for w in base if w.dim() > 1], "peak": config.rate, "weight_decay": config.weight_decay},
        {"params": [w for w in base if w.dim() <= 1], "peak": config.rate, "weight_decay": 0.0},
        {"params": own, "peak": config.router_lr or config.rate, "weight_decay": 0.0},
    ]
    return [group for group in found if group["params"]]


def trained(model: Any) -> dict[str, nn.Parameter]:
    """Every weight that is trained, by its name, tied ones once."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
