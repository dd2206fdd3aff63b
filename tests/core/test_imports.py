"""What importing Netwright costs: users of one optimizer, and every worker, should not load reports and searches."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["netwright", "netwright.optim", "netwright.param", "netwright.compress"])
def test_no_reports_and_no_compilers_of_onnx_are_loaded(module: str) -> None:
    code = f"import sys, {module}; print(*{{'bokeh', 'onnxscript', 'optuna', 'ray', 'sympy'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.split() == []


def test_optimize_comes_when_it_is_asked_for() -> None:
    code = "import netwright; print('optimize' in dir(netwright), netwright.optimize.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.split() == ["True", "netwright.face"]
