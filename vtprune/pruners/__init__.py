"""The methods, one file each; importing this package registers them all."""

from vtprune.pruners.auto import Auto
from vtprune.pruners.cdpruner import CDPruner
from vtprune.pruners.covipal import CoViPAL
from vtprune.pruners.d2o import D2O
from vtprune.pruners.dart import DART
from vtprune.pruners.divprune import DivPrune
from vtprune.pruners.dycoke import DyCoke
from vtprune.pruners.evs import EVS
from vtprune.pruners.fastv import FastV
from vtprune.pruners.fastvid import FastVID
from vtprune.pruners.flowcut import FlowCut
from vtprune.pruners.fopru import FoPru
from vtprune.pruners.frame_pool import FramePool
from vtprune.pruners.frame_skip import FrameSkip
from vtprune.pruners.gamma_mod import GammaMoD
from vtprune.pruners.gemfilter import GemFilter
from vtprune.pruners.grid import Grid
from vtprune.pruners.holitom import HoliTom
from vtprune.pruners.holov import HoloV
from vtprune.pruners.iared2 import IARED2
from vtprune.pruners.lazyllm import LazyLLM
from vtprune.pruners.mue import MuE
from vtprune.pruners.mustdrop import MustDrop
from vtprune.pruners.none import NoPruning
from vtprune.pruners.pmod import PMoD
from vtprune.pruners.pool import Pool
from vtprune.pruners.prumerge import PruMerge
from vtprune.pruners.pyramid_drop import PyramidDrop
from vtprune.pruners.random import Random
from vtprune.pruners.random_ltd import RandomLTD
from vtprune.pruners.sparsevlm import SparseVLM
from vtprune.pruners.spatten import SpAtten
from vtprune.pruners.tome import ToMe
from vtprune.pruners.turbo import Turbo
from vtprune.pruners.vflowopt import VFlowOpt
from vtprune.pruners.vidcom2 import VidCom2
from vtprune.pruners.visionzip import VisionZip
from vtprune.pruners.vispruner import VisPruner
from vtprune.pruners.vscan import VScan
from vtprune.pruners.vtw import VTW
from vtprune.pruners.yopo import YOPO

__all__ = [
    "D2O",
    "DART",
    "EVS",
    "IARED2",
    "VTW",
    "YOPO",
    "Auto",
    "CDPruner",
    "CoViPAL",
    "DivPrune",
    "DyCoke",
    "FastV",
    "FastVID",
    "FlowCut",
    "FoPru",
    "FramePool",
    "FrameSkip",
    "GammaMoD",
    "GemFilter",
    "Grid",
    "HoliTom",
    "HoloV",
    "LazyLLM",
    "MuE",
    "MustDrop",
    "NoPruning",
    "PMoD",
    "Pool",
    "PruMerge",
    "PyramidDrop",
    "Random",
    "RandomLTD",
    "SpAtten",
    "SparseVLM",
    "ToMe",
    "Turbo",
    "VFlowOpt",
    "VScan",
    "VidCom2",
    "VisPruner",
    "VisionZip",
]
