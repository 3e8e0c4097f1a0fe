"""vtprune: prune, merge and route the vision tokens of Hugging Face vision-language models."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from vtprune.lazy import export

if find_spec("vtprune.adapters") is None:
    raise ImportError(
        "vtprune is not installed: run `pip install -e .` in its checkout (`make test` and `make bench` do), as its "
        "adapters, evals and assets are installed from beside this folder"
    )

if TYPE_CHECKING:
    from vtprune.cost.formulas import FlopsBreakdown
    from vtprune.errors import (
        KeptWholeWarning,
        ScoreError,
        UncheckedBaseWarning,
        UnknownPrunerError,
        UnsupportedCacheError,
        UnsupportedModelError,
        UntrainedWarning,
        VTPruneError,
    )
    from vtprune.method.answers import Merge, Selection
    from vtprune.method.catalogue import PrunerInfo
    from vtprune.method.config import load_config
    from vtprune.method.pruner import Pruner
    from vtprune.method.registry import available, register
    from vtprune.method.views import DecoderLayer, EncoderLayer, VisionStream
    from vtprune.pruners import (
        D2O,
        CDPruner,
        CoViPAL,
        DivPrune,
        FastV,
        FlowCut,
        FoPru,
        GammaMoD,
        GemFilter,
        Grid,
        HoloV,
        LazyLLM,
        MustDrop,
        NoPruning,
        PMoD,
        Pool,
        PyramidDrop,
        Random,
        SparseVLM,
        Turbo,
        VFlowOpt,
        VisionZip,
    )
    from vtprune.report.costs import flops, kv_bytes
    from vtprune.report.report import Report
    from vtprune.version import __version__
    from vtprune.wrap import (
        auxiliary_loss,
        load_weights,
        mark_answers,
        report,
        save,
        save_config,
        unwrap,
        wrap,
        wrapped,
    )

__all__ = [
    "D2O",
    "CDPruner",
    "CoViPAL",
    "DecoderLayer",
    "DivPrune",
    "EncoderLayer",
    "FastV",
    "FlopsBreakdown",
    "FlowCut",
    "FoPru",
    "GammaMoD",
    "GemFilter",
    "Grid",
    "HoloV",
    "KeptWholeWarning",
    "LazyLLM",
    "Merge",
    "MustDrop",
    "NoPruning",
    "PMoD",
    "Pool",
    "Pruner",
    "PrunerInfo",
    "PyramidDrop",
    "Random",
    "Report",
    "ScoreError",
    "Selection",
    "SparseVLM",
    "Turbo",
    "UncheckedBaseWarning",
    "UnknownPrunerError",
    "UnsupportedCacheError",
    "UnsupportedModelError",
    "UntrainedWarning",
    "VFlowOpt",
    "VTPruneError",
    "VisionStream",
    "VisionZip",
    "__version__",
    "auxiliary_loss",
    "available",
    "flops",
    "kv_bytes",
    "load_config",
    "load_weights",
    "mark_answers",
    "register",
    "report",
    "save",
    "save_config",
    "unwrap",
    "wrap",
    "wrapped",
]

export(
    __name__,
    {
        "vtprune.method.catalogue": ("PrunerInfo",),
        "vtprune.method.config": ("load_config",),
        "vtprune.cost.formulas": ("FlopsBreakdown",),
        "vtprune.errors": (
            "KeptWholeWarning",
            "ScoreError",
            "UncheckedBaseWarning",
            "UnknownPrunerError",
            "UnsupportedCacheError",
            "UnsupportedModelError",
            "UntrainedWarning",
            "VTPruneError",
        ),
        "vtprune.method.pruner": ("Pruner",),
        "vtprune.pruners": (
            "D2O",
            "CDPruner",
            "CoViPAL",
            "DivPrune",
            "FastV",
            "FlowCut",
            "FoPru",
            "GammaMoD",
            "GemFilter",
            "Grid",
            "HoloV",
            "LazyLLM",
            "MustDrop",
            "NoPruning",
            "PMoD",
            "Pool",
            "PyramidDrop",
            "Random",
            "SparseVLM",
            "Turbo",
            "VFlowOpt",
            "VisionZip",
        ),
        "vtprune.method.registry": ("available", "register"),
        "vtprune.report.costs": ("flops", "kv_bytes"),
        "vtprune.report.report": ("Report",),
        "vtprune.method.answers": ("Merge", "Selection"),
        "vtprune.method.views": ("DecoderLayer", "EncoderLayer", "VisionStream"),
        "vtprune.version": ("__version__",),
        "vtprune.wrap": (
            "auxiliary_loss",
            "load_weights",
            "mark_answers",
            "report",
            "save",
            "save_config",
            "unwrap",
            "wrap",
            "wrapped",
        ),
    },
)
