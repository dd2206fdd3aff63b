"""The main job: a task and a target in, a Pareto front and a better model out."""

from netwright.workshop.asking import make_job, usual_place
from netwright.workshop.dry import dry_run
from netwright.workshop.engine import Engine
from netwright.workshop.evaluation import Measuring
from netwright.workshop.job import Job, Sampler
from netwright.workshop.point import Point, Step
from netwright.workshop.replay import replay
from netwright.workshop.run import run_job
from netwright.workshop.space import STEPS, parse_steps
from netwright.workshop.target import Keep, Limit, parse_budget, parse_keep, parse_targets
from netwright.workshop.training import train
from netwright.workshop.training_settings import Entry, change_recipe, check_own_fit, training_entries

__all__ = [
    "STEPS",
    "Engine",
    "Entry",
    "Job",
    "Keep",
    "Limit",
    "Measuring",
    "Point",
    "Sampler",
    "Step",
    "change_recipe",
    "check_own_fit",
    "dry_run",
    "make_job",
    "parse_budget",
    "parse_keep",
    "parse_steps",
    "parse_targets",
    "replay",
    "run_job",
    "train",
    "training_entries",
    "usual_place",
]
