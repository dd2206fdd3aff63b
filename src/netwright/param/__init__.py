"""Where parameters start and how they are written: initialization, parameterization and scaling."""

from netwright.param.architecture_scaling import ArchitectureScaling, architecture_scaling
from netwright.param.backward_modulation import BackwardModulation
from netwright.param.fold import fold
from netwright.param.geometric_parameterization import (
    GeometricParameterization,
    InputMeanNorm,
    geometric_parameterization,
)
from netwright.param.mup import CoordinateCheck, coordinate_check, mup, shapes_of
from netwright.param.orthonormal import OrthonormalPenalty, orthonormal, orthonormal_
from netwright.param.weight_conditioning import WeightConditioning, weight_conditioning

__all__ = [
    "ArchitectureScaling",
    "BackwardModulation",
    "CoordinateCheck",
    "GeometricParameterization",
    "InputMeanNorm",
    "OrthonormalPenalty",
    "WeightConditioning",
    "architecture_scaling",
    "coordinate_check",
    "fold",
    "geometric_parameterization",
    "mup",
    "orthonormal",
    "orthonormal_",
    "shapes_of",
    "weight_conditioning",
]
