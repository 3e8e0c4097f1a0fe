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

# The public names. Each is imported when it is first used; whoever adds one adds it here alone.
if TYPE_CHECKING:
    from vtprune.cost.formulas import FlopsBreakdown as FlopsBreakdown
    from vtprune.cost.sizes import PlannedTokens as PlannedTokens
    from vtprune.downscaling import downscale as downscale
    from vtprune.encoder.selecting import select_encoded as select_encoded
    from vtprune.errors import KeptWholeWarning as KeptWholeWarning
    from vtprune.errors import PromiseWarning as PromiseWarning
    from vtprune.errors import ScoreError as ScoreError
    from vtprune.errors import UncheckedBaseWarning as UncheckedBaseWarning
    from vtprune.errors import UnknownPrunerError as UnknownPrunerError
    from vtprune.errors import UnsupportedCacheError as UnsupportedCacheError
    from vtprune.errors import UnsupportedModelError as UnsupportedModelError
    from vtprune.errors import UntrainedWarning as UntrainedWarning
    from vtprune.errors import VTPruneError as VTPruneError
    from vtprune.hooks.tower import encoder_tokens as encoder_tokens
    from vtprune.loading.pictures import open_picture as open_picture
    from vtprune.loading.videos import Video as Video
    from vtprune.loading.videos import open_video as open_video
    from vtprune.method.answers import EncoderSelection as EncoderSelection
    from vtprune.method.answers import Eviction as Eviction
    from vtprune.method.answers import Merge as Merge
    from vtprune.method.answers import Routes as Routes
    from vtprune.method.answers import Selection as Selection
    from vtprune.method.catalogue import PrunerInfo as PrunerInfo
    from vtprune.method.config import load_config as load_config
    from vtprune.method.facts import ModelFacts as ModelFacts
    from vtprune.method.facts import Work as Work
    from vtprune.method.pruner import Counted as Counted
    from vtprune.method.pruner import Pruner as Pruner
    from vtprune.method.pruner import Tunable as Tunable
    from vtprune.method.registry import available as available
    from vtprune.method.registry import register as register
    from vtprune.method.scorer import scorer as scorer
    from vtprune.method.selecting import Chosen as Chosen
    from vtprune.method.selecting import select as select
    from vtprune.method.stages import BeforeDecoder as BeforeDecoder
    from vtprune.method.stages import BetweenLayers as BetweenLayers
    from vtprune.method.stages import Growing as Growing
    from vtprune.method.stages import Guided as Guided
    from vtprune.method.stages import InCache as InCache
    from vtprune.method.stages import InEncoder as InEncoder
    from vtprune.method.stages import InLayers as InLayers
    from vtprune.method.stages import Query as Query
    from vtprune.method.stages import Read as Read
    from vtprune.method.stages import Trained as Trained
    from vtprune.method.views import CachedRow as CachedRow
    from vtprune.method.views import DecoderLayer as DecoderLayer
    from vtprune.method.views import EncoderLayer as EncoderLayer
    from vtprune.method.views import RoutedTokens as RoutedTokens
    from vtprune.method.views import VisionStream as VisionStream
    from vtprune.provenance import __version__ as __version__
    from vtprune.pruners import D2O as D2O
    from vtprune.pruners import DART as DART
    from vtprune.pruners import EVS as EVS
    from vtprune.pruners import IARED2 as IARED2
    from vtprune.pruners import VTW as VTW
    from vtprune.pruners import YOPO as YOPO
    from vtprune.pruners import Auto as Auto
    from vtprune.pruners import CDPruner as CDPruner
    from vtprune.pruners import CoViPAL as CoViPAL
    from vtprune.pruners import DivPrune as DivPrune
    from vtprune.pruners import DyCoke as DyCoke
    from vtprune.pruners import FastV as FastV
    from vtprune.pruners import FastVID as FastVID
    from vtprune.pruners import FlowCut as FlowCut
    from vtprune.pruners import FoPru as FoPru
    from vtprune.pruners import FramePool as FramePool
    from vtprune.pruners import FrameSkip as FrameSkip
    from vtprune.pruners import GammaMoD as GammaMoD
    from vtprune.pruners import GemFilter as GemFilter
    from vtprune.pruners import Grid as Grid
    from vtprune.pruners import HoliTom as HoliTom
    from vtprune.pruners import HoloV as HoloV
    from vtprune.pruners import LazyLLM as LazyLLM
    from vtprune.pruners import MuE as MuE
    from vtprune.pruners import MustDrop as MustDrop
    from vtprune.pruners import NoPruning as NoPruning
    from vtprune.pruners import PMoD as PMoD
    from vtprune.pruners import Pool as Pool
    from vtprune.pruners import PruMerge as PruMerge
    from vtprune.pruners import PyramidDrop as PyramidDrop
    from vtprune.pruners import Random as Random
    from vtprune.pruners import RandomLTD as RandomLTD
    from vtprune.pruners import SparseVLM as SparseVLM
    from vtprune.pruners import SpAtten as SpAtten
    from vtprune.pruners import ToMe as ToMe
    from vtprune.pruners import Turbo as Turbo
    from vtprune.pruners import VFlowOpt as VFlowOpt
    from vtprune.pruners import VidCom2 as VidCom2
    from vtprune.pruners import VisionZip as VisionZip
    from vtprune.pruners import VisPruner as VisPruner
    from vtprune.pruners import VScan as VScan
    from vtprune.report.costs import flops as flops
    from vtprune.report.costs import kv_bytes as kv_bytes
    from vtprune.report.report import Report as Report
    from vtprune.wrap import auxiliary_loss as auxiliary_loss
    from vtprune.wrap import is_wrapped as is_wrapped
    from vtprune.wrap import load_weights as load_weights
    from vtprune.wrap import mark_answers as mark_answers
    from vtprune.wrap import report as report
    from vtprune.wrap import save as save
    from vtprune.wrap import save_config as save_config
    from vtprune.wrap import unwrap as unwrap
    from vtprune.wrap import wrap as wrap
    from vtprune.wrap import wrapped as wrapped

export(__name__)
