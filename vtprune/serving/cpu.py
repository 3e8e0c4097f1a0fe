"""vLLM 0.32 on a CPU: its runner forgets to ask whether the model prunes, so that positions are never made anew."""

from __future__ import annotations

import functools
from typing import Any

from vllm.model_executor.models.interfaces import supports_multimodal_pruning
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

MARK = "_vtprune_repaired"


def repair_runner() -> None:
    """Has the runner ask, once; its own `load_model` runs as it is."""
    own = CPUModelRunner.load_model
    if hasattr(own, MARK):
        return

    @functools.wraps(own)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        settings = self.model_config.multimodal_config
        self.is_multimodal_pruning_enabled = (
            settings is not None
            and settings.is_multimodal_pruning_enabled()
            and supports_multimodal_pruning(self.model)
        )

    setattr(load_model, MARK, True)
    CPUModelRunner.load_model = load_model
