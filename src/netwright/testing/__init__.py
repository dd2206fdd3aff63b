"""Conformance suites that anyone can run on a method of their own.

Plain functions that raise an ``AssertionError`` naming the property that does not hold. They need no test
runner.
"""

from netwright.testing._optimizer import check_optimizer, optimizer_properties
from netwright.testing._sampler import check_sampler, sampler_properties
from netwright.testing._tasks import small_tasks
from netwright.testing._transform import check_transform, transform_properties

__all__ = [
    "check_optimizer",
    "check_sampler",
    "check_transform",
    "optimizer_properties",
    "sampler_properties",
    "small_tasks",
    "transform_properties",
]
