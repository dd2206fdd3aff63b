"""How parameters move: optimizers, schedules, clipping and averaging."""

from netwright.optim._registry import Capability, available, create, find, schedules
from netwright.optim.agvm import AGVM, module_groups
from netwright.optim.autoclip import AutoClip
from netwright.optim.diffgrad import DiffGrad
from netwright.optim.dog import DoG
from netwright.optim.exact_gauss_newton import ExactGaussNewton
from netwright.optim.finetune_recipe import BertAdam, WarmupLinear, finetune_recipe, reinitialize_top
from netwright.optim.kfac import KFAC
from netwright.optim.lion import Lion
from netwright.optim.mfac import MFAC
from netwright.optim.optex import OptEx, Replicas
from netwright.optim.optimal_input_gain import BypassPerceptron, OptimalInputGain
from netwright.optim.optimistic_amsgrad import OptimisticAMSGrad
from netwright.optim.saddle_free_newton import SaddleFreeNewton
from netwright.optim.sania import SANIA
from netwright.optim.shampoo import Shampoo
from netwright.optim.switch_ema import SwitchEMA
from netwright.optim.udog import UDoG
from netwright.optim.unified_budget import UnifiedBudget

__all__ = [
    "AGVM",
    "KFAC",
    "MFAC",
    "SANIA",
    "AutoClip",
    "BertAdam",
    "BypassPerceptron",
    "Capability",
    "DiffGrad",
    "DoG",
    "ExactGaussNewton",
    "Lion",
    "OptEx",
    "OptimalInputGain",
    "OptimisticAMSGrad",
    "Replicas",
    "SaddleFreeNewton",
    "Shampoo",
    "SwitchEMA",
    "UDoG",
    "UnifiedBudget",
    "WarmupLinear",
    "available",
    "create",
    "find",
    "finetune_recipe",
    "module_groups",
    "reinitialize_top",
    "schedules",
]
