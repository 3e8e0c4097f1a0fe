"""The entry point of lmms-eval: `--model vtprune`. Light, as every start of it imports this."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

# The bundled tasks.
TASK_FOLDER = Path(__file__).parent / "tasks"


def manifests() -> list[ModelManifest]:
    """The model that lmms-eval finds under the name `vtprune`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(
            model_id="vtprune",
            chat_class_path="vtprune.evals.lmms.model.VTPrune",
            simple_class_path="vtprune.evals.lmms.simple_model.VTPruneSimple",
        )
    ]
