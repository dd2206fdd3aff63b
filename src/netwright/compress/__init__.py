"""Smaller and faster networks: transforms that prune, merge, quantize, factorize and distil."""

from netwright.compress._comparison import Comparison, Row
from netwright.compress.activating_pruner import ActivatingPruner
from netwright.compress.chita import CHITA
from netwright.compress.codebooks import Codebooks
from netwright.compress.compare import compare, described
from netwright.compress.deep_reduce import DeepReDuce, relu_front
from netwright.compress.easy_quant import EasyQuant
from netwright.compress.geta import GETA
from netwright.compress.global_sparse_momentum import GlobalSparseMomentum
from netwright.compress.group_envelope import GroupEnvelope
from netwright.compress.hesso import HESSO
from netwright.compress.int8_types import fastest_int8
from netwright.compress.layer_merge import LayerMerge
from netwright.compress.low_rank import LowRank
from netwright.compress.meta_aug import MetaAug
from netwright.compress.ompq import OMPQ
from netwright.compress.oto import OTO
from netwright.compress.prune import Prune
from netwright.compress.prune_branches import PruneBranches
from netwright.compress.quantize import Int8
from netwright.compress.sparse_recipe import SparseRecipe
from netwright.compress.stable_cp import StableCP
from netwright.compress.stable_kd import StableKD
from netwright.compress.swap import SWAP
from netwright.compress.trainable_gate import TrainableGate
from netwright.compress.trilateral_kd import TrilateralKD

__all__ = [
    "CHITA",
    "GETA",
    "HESSO",
    "OMPQ",
    "OTO",
    "SWAP",
    "ActivatingPruner",
    "Codebooks",
    "Comparison",
    "DeepReDuce",
    "EasyQuant",
    "GlobalSparseMomentum",
    "GroupEnvelope",
    "Int8",
    "LayerMerge",
    "LowRank",
    "MetaAug",
    "Prune",
    "PruneBranches",
    "Row",
    "SparseRecipe",
    "StableCP",
    "StableKD",
    "TrainableGate",
    "TrilateralKD",
    "compare",
    "described",
    "fastest_int8",
    "relu_front",
]
