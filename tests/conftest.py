"""Shared settings of the test suite."""

import gc
import importlib

import pytest
import torch

from netwright.core.machine import instruction_sets


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "vnni: compares numbers that saturate where the processor has no VNNI")
    config.addinivalue_line("markers", "cuda: runs on a CUDA device")


_LONGEST = (
    *("test_optimize", "test_scripts_compress", "test_examples", "test_explore", "test_tutorial", "test_local_engine"),
    *("test_layer_merge", "test_evaluation", "test_compare", "test_docs_coverage", "test_rundir", "test_codebooks"),
)  # modules, which begin first: else one process works on them while the others have nothing left


def _rank(item: pytest.Item) -> int:
    name = item.path.stem
    return _LONGEST.index(name) if name in _LONGEST else len(_LONGEST)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest modules first.

    Without VNNI a product of uint8 and int8 pairs saturates at 16 bits, so integers differ from their simulation.
    """
    items.sort(key=_rank)
    missing = {}
    if "vnni" not in instruction_sets():
        missing["vnni"] = "this processor has no VNNI: uint8 by int8 products saturate"
    if not torch.cuda.is_available():
        missing["cuda"] = "there is no CUDA device"
    for item in items:
        for marker, reason in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """Modules and tests live to the end: the collector need not look at their millions of objects again and again.

    Hypothesis looks by the collector for who holds generators, so that it has to come before.
    """
    importlib.import_module("hypothesis")
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
