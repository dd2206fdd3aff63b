"""Architectures and policies: spaces, predictors, samplers, and a search that measures nothing twice."""

from netwright.search._relaxed_loop import RelaxedResult
from netwright.search.amended_darts import AmendedDARTS, amended
from netwright.search.apq import APQSampler
from netwright.search.darts import DARTS, first_order, hessian_product, mixed_product, second_order
from netwright.search.explore import METRICS, Explored, explore
from netwright.search.gaussian_process import GaussianProcess
from netwright.search.graph_hypernetwork import GraphHyperNetwork
from netwright.search.graphs import Graph
from netwright.search.growing_network import GrowingNetwork, Grown
from netwright.search.hao import (
    ZU3EG,
    Convolution,
    Device,
    Engine,
    HAOMapper,
    HardwareMapping,
    MappingError,
    UnprovenError,
    convolutions,
)
from netwright.search.insight import PredictorQuality, importance, predictor_quality
from netwright.search.linas import LINASSampler
from netwright.search.manas import MANAS, Agents
from netwright.search.measured import Measured
from netwright.search.nasbench201 import NASBench201, evaluations_to, nasbench201
from netwright.search.predictors import BayesianRidge, Predictor, Stack, TreeEnsemble, stack
from netwright.search.rarts import RARTS, alpha_gradient, weight_gradient
from netwright.search.regnet import AnyNetSpace, DesignSpaceEDF, RegNetSpace, Stage, design_space_edf
from netwright.search.relaxed import Mixed, alphas, choices, derive, mixed, on_path, skip_share, weights
from netwright.search.relaxed_cells import DartsCell, cell_network
from netwright.search.result import Evaluation, Limit, SearchResult
from netwright.search.run import run
from netwright.search.space import Rule, SearchSpace, SpaceError
from netwright.search.super_net import Elastic, SuperNet
from netwright.search.wl import Motif, WLSampler

__all__ = [
    "DARTS",
    "MANAS",
    "METRICS",
    "RARTS",
    "ZU3EG",
    "APQSampler",
    "Agents",
    "AmendedDARTS",
    "AnyNetSpace",
    "BayesianRidge",
    "Convolution",
    "DartsCell",
    "DesignSpaceEDF",
    "Device",
    "Elastic",
    "Engine",
    "Evaluation",
    "Explored",
    "GaussianProcess",
    "Graph",
    "GraphHyperNetwork",
    "GrowingNetwork",
    "Grown",
    "HAOMapper",
    "HardwareMapping",
    "LINASSampler",
    "Limit",
    "MappingError",
    "Measured",
    "Mixed",
    "Motif",
    "NASBench201",
    "Predictor",
    "PredictorQuality",
    "RegNetSpace",
    "RelaxedResult",
    "Rule",
    "SearchResult",
    "SearchSpace",
    "SpaceError",
    "Stack",
    "Stage",
    "SuperNet",
    "TreeEnsemble",
    "UnprovenError",
    "WLSampler",
    "alpha_gradient",
    "alphas",
    "amended",
    "cell_network",
    "choices",
    "convolutions",
    "derive",
    "design_space_edf",
    "evaluations_to",
    "explore",
    "first_order",
    "hessian_product",
    "importance",
    "mixed",
    "mixed_product",
    "nasbench201",
    "on_path",
    "predictor_quality",
    "run",
    "second_order",
    "skip_share",
    "stack",
    "weight_gradient",
    "weights",
]
