"""vtprune: prune, merge and route the vision tokens of Hugging Face vision-language models."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from vtprune.config import load_config
from vtprune.cost import FlopsBreakdown, flops, kv_bytes
from vtprune.errors import (
    ScoreError,
    UncheckedBaseWarning,
    UnknownPrunerError,
    UnsupportedCacheError,
    UnsupportedModelError,
    UntrainedWarning,
    VTPruneError,
)
from vtprune.pruner import Pruner, PrunerInfo
from vtprune.pruners import (
    D2O,
    CDPruner,
    CoViPAL,
    DivPrune,
    FastV,
    FlowCut,
    FoPru,
    GemFilter,
    Grid,
    HoloV,
    LazyLLM,
    MustDrop,
    NoPruning,
    Pool,
    PyramidDrop,
    Random,
    SparseVLM,
    Turbo,
    VFlowOpt,
    VisionZip,
)
from vtprune.registry import available, register
from vtprune.report import Report
from vtprune.routing import GammaMoD, PMoD
from vtprune.selection import Merge, Selection
from vtprune.stream import DecoderLayer, EncoderLayer, VisionStream
from vtprune.wrap import auxiliary_loss, load_weights, mark_answers, report, save, save_config, unwrap, wrap, wrapped

try:
    __version__ = version("vtprune")
except PackageNotFoundError:
    __version__ = "0+unknown"

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
