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
    from vtprune.loading.pictures import open_picture
    from vtprune.method.answers import EncoderSelection, Eviction, Merge, Routes, Selection
    from vtprune.method.catalogue import PrunerInfo
    from vtprune.method.config import load_config
    from vtprune.method.facts import ModelFacts, Work
    from vtprune.method.pruner import Counted, Pruner, Tunable
    from vtprune.method.registry import available, register
    from vtprune.method.scorer import scorer
    from vtprune.method.stages import (
        BeforeDecoder,
        BetweenLayers,
        Guided,
        InCache,
        InEncoder,
        InLayers,
        Query,
        Read,
        Trained,
    )
    from vtprune.method.views import CachedRow, DecoderLayer, EncoderLayer, RoutedTokens, VisionStream
    from vtprune.provenance import __version__
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
    from vtprune.wrap import (
        auxiliary_loss,
        is_wrapped,
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
    "BeforeDecoder",
    "BetweenLayers",
    "CDPruner",
    "CachedRow",
    "CoViPAL",
    "Counted",
    "DecoderLayer",
    "DivPrune",
    "EncoderLayer",
    "EncoderSelection",
    "Eviction",
    "FastV",
    "FlopsBreakdown",
    "FlowCut",
    "FoPru",
    "GammaMoD",
    "GemFilter",
    "Grid",
    "Guided",
    "HoloV",
    "InCache",
    "InEncoder",
    "InLayers",
    "KeptWholeWarning",
    "LazyLLM",
    "Merge",
    "ModelFacts",
    "MustDrop",
    "NoPruning",
    "PMoD",
    "Pool",
    "Pruner",
    "PrunerInfo",
    "PyramidDrop",
    "Query",
    "Random",
    "Read",
    "Report",
    "RoutedTokens",
    "Routes",
    "ScoreError",
    "Selection",
    "SparseVLM",
    "Trained",
    "Tunable",
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
    "Work",
    "__version__",
    "auxiliary_loss",
    "available",
    "flops",
    "is_wrapped",
    "kv_bytes",
    "load_config",
    "load_weights",
    "mark_answers",
    "open_picture",
    "register",
    "report",
    "save",
    "save_config",
    "scorer",
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
        "vtprune.method.facts": ("ModelFacts", "Work"),
        "vtprune.method.pruner": ("Counted", "Pruner", "Tunable"),
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
        "vtprune.method.scorer": ("scorer",),
        "vtprune.method.stages": (
            "BeforeDecoder",
            "BetweenLayers",
            "Guided",
            "InCache",
            "InEncoder",
            "InLayers",
            "Query",
            "Read",
            "Trained",
        ),
        "vtprune.loading.pictures": ("open_picture",),
        "vtprune.report.report": ("Report",),
        "vtprune.method.answers": ("EncoderSelection", "Eviction", "Merge", "Routes", "Selection"),
        "vtprune.method.views": ("CachedRow", "DecoderLayer", "EncoderLayer", "RoutedTokens", "VisionStream"),
        "vtprune.provenance": ("__version__",),
        "vtprune.wrap": (
            "auxiliary_loss",
            "is_wrapped",
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
