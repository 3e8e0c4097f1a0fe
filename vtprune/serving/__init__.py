"""vtprune inside vLLM: the plugin that vLLM loads, and what starts an engine with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vtprune.lazy import export

if TYPE_CHECKING:
    from vtprune.serving.arguments import engine_args as engine_args
    from vtprune.serving.settings import Settings as Settings

export(__name__)
