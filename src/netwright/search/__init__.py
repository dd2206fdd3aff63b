"""Architectures and policies: spaces, predictors, samplers, and a search that measures nothing twice."""

from netwright.search.graphs import Graph
from netwright.search.linas import LINASSampler
from netwright.search.measured import Measured
from netwright.search.nasbench201 import NASBench201, evaluations_to, nasbench201
from netwright.search.predictors import BayesianRidge, Predictor, SupportVectors, TreeEnsemble, choose
from netwright.search.result import Evaluation, Limit, SearchResult
from netwright.search.run import run
from netwright.search.space import Rule, SearchSpace, SpaceError
from netwright.search.super_net import Elastic, SuperNet
from netwright.search.wl import Motif, WLSampler

__all__ = [
    "BayesianRidge",
    "Elastic",
    "Evaluation",
    "Graph",
    "LINASSampler",
    "Limit",
    "Measured",
    "Motif",
    "NASBench201",
    "Predictor",
    "Rule",
    "SearchResult",
    "SearchSpace",
    "SpaceError",
    "SuperNet",
    "SupportVectors",
    "TreeEnsemble",
    "WLSampler",
    "choose",
    "evaluations_to",
    "nasbench201",
    "run",
]
