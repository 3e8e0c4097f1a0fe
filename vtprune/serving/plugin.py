"""What vLLM loads in each of its processes, by the entry point `vllm.general_plugins`."""

from __future__ import annotations

import logging

from vtprune.errors import VTPruneError
from vtprune.serving.release import check_release

logger = logging.getLogger("vllm.vtprune")
# The classes that stand in for vLLM's own, by the names under which a config asks for them.
ARCHITECTURES = {
    "VTPruneLlava": "vtprune.serving.llava:PrunedLlava",
    "VTPruneLlavaOriginal": "vtprune.serving.llava:PrunedLlavaOriginal",
    "VTPruneQwen2_5_VL": "vtprune.serving.qwen2_5_vl:PrunedQwen25VL",
}


def register() -> None:
    """Makes vtprune's classes known; may be called again. Another release of vLLM is told so and left alone."""
    try:
        check_release()
    except VTPruneError as error:
        logger.warning("%s; its pruners are not registered", error)
        return
    from vllm import ModelRegistry
    from vllm.platforms import current_platform

    known = ModelRegistry.get_supported_archs()
    for name, home in ARCHITECTURES.items():
        if name not in known:
            ModelRegistry.register_model(name, home)
    if current_platform.is_cpu():
        from vtprune.serving.cpu import repair_runner

        repair_runner()
