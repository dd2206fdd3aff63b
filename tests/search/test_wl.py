"""WL: histograms by hand, the process against dense Gaussian algebra, gradients by differences, motifs, conformance."""

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, IntDistribution

from netwright.core.errors import SettingError
from netwright.search import Graph, SearchSpace, WLSampler
from netwright.search._encoding import Encoding
from netwright.search.wl_process import WLProcess, subtrees
from netwright.testing._sampler import check_sampler

optuna.logging.set_verbosity(optuna.logging.ERROR)
KINDS = CategoricalDistribution(("conv", "pool", "skip"))


def chain(params):
    names = [params[f"layer{place}"] for place in range(5)]
    return Graph(("in", *names), tuple((place, place + 1) for place in range(5))).without("skip")


SPACE = SearchSpace({f"layer{place}": KINDS for place in range(5)}, graph=chain)


def test_histograms_of_a_diamond():
    graph = Graph(("in", "a", "b", "out"), ((0, 1), (0, 2), (1, 3), (2, 3)))
    found = subtrees(graph, 2)
    assert found[0] == {"in": 1, "a": 1, "b": 1, "out": 1}
    assert found[1] == {"in": 1, "a(in)": 1, "b(in)": 1, "out(a,b)": 1}
    assert found[2] == {"in": 1, "a(in)": 1, "b(in)": 1, "out(a(in),b(in))": 1}
    turned = Graph(("out", "b", "in", "a"), ((2, 1), (2, 3), (1, 0), (3, 0)))
    assert subtrees(turned, 2) == found


def fitted(count=30, seed=0):
    sampler, encoding = WLSampler(SPACE, depth=1, seed=seed), Encoding(SPACE)
    rng = np.random.default_rng(seed)
    genes = encoding.random(rng, count)
    vocabulary, rows = sampler.histograms(encoding, genes)
    targets = rows @ rng.normal(size=rows.shape[1]) + 0.1 * rng.normal(size=count)
    return sampler, encoding, vocabulary, rows, targets, WLProcess(vocabulary).fit(rows, targets)


def test_process_is_dense_gaussian_algebra():
    sampler, encoding, vocabulary, rows, targets, process = fitted()
    new = sampler.histograms(encoding, encoding.random(np.random.default_rng(9), 12), vocabulary)[1]
    cut = [sum(len(words) + 1 for words in vocabulary[: depth + 1]) for depth in (0, 1)][process.depth]

    def kernel(a, b):
        lengths = [np.sqrt((x[:, :cut] ** 2).sum(1)) for x in (a, b)]
        return a[:, :cut] @ b[:, :cut].T / np.outer(*lengths)

    assert not new[:, [len(vocabulary[0]), -1]].any()  # no subtree is new, so that plain counts say it all
    level, width = targets.mean(), targets.std()
    inverse = np.linalg.inv(kernel(rows, rows) + process.noise * np.eye(30))
    wanted = (targets - level) / width
    cross = kernel(new, rows)
    scale = wanted @ inverse @ wanted / 30
    variance = scale * (1 + process.noise - np.einsum("ij,jk,ik->i", cross, inverse, cross))
    mean, deviation = process.predict(new)
    np.testing.assert_allclose(mean, level + width * cross @ inverse @ wanted, rtol=1e-6)
    np.testing.assert_allclose(deviation, width * np.sqrt(variance), rtol=1e-5)


def test_unknown_subtrees_lengthen_a_graph():
    _, _, vocabulary, rows, _, process = fitted()
    stretched = rows.copy()
    stretched[:, len(vocabulary[0])] = 1e6
    mean, _ = process.predict(stretched)
    level = process.predict(stretched * 0 + 1e-300)[0]
    np.testing.assert_allclose(mean, level, atol=1e-1)


def test_gradient_by_differences():
    *_, rows, _, process = fitted()
    mean, deviation = process.gradient(rows)
    for column in range(0, process._cut(process.depth) - 1, 2):
        if column + 1 in np.cumsum(process._widths):
            continue
        step = np.zeros(rows.shape[1])
        step[column] = 1e-5
        slope = (process.predict(rows + step)[0] - process.predict(rows - step)[0]) / 2e-5
        np.testing.assert_allclose(mean[:, column], slope, atol=1e-6)
    assert (deviation >= 0).all()


def test_it_finds_the_best_chain_and_says_why():
    sampler = WLSampler(SPACE, start=10, batch=5, pool=60, draws=8, seed=0)
    study = optuna.create_study(sampler=sampler, direction="maximize")
    for _ in range(35):
        trial = study.ask(dict(SPACE.decisions))
        names = list(trial.params.values())
        study.tell(trial, names.count("conv") - 2.0 * names.count("pool"))
    assert study.best_value == 5
    effects = {motif.subtree: motif.effect for motif in sampler.motifs(study)}
    assert effects["conv"] > 0 > effects["pool"]
    study = optuna.create_study(sampler=sampler, direction="minimize")
    for _ in range(15):
        trial = study.ask(dict(SPACE.decisions))
        study.tell(trial, list(trial.params.values()).count("conv"))
    effects = {motif.subtree: motif.effect for motif in sampler.motifs(study)}
    assert effects["conv"] > 0  # more of it, more of what is minimized


def test_it_is_a_sampler():
    def graph(params):
        return Graph((params["kind"], *["layer"] * params["depth"]), tuple((n, n + 1) for n in range(params["depth"])))

    space = SearchSpace({"depth": IntDistribution(1, 8), "kind": CategoricalDistribution(("a", "b", "c"))}, graph=graph)
    check_sampler(lambda seed: WLSampler(space, start=8, batch=8, pool=20, draws=4, seed=seed), trials=20)


def test_graphs_are_told_what_counts():
    def graph(params):
        return Graph(("in", *(params[name] for name in params if name != "long")), ())

    space = SearchSpace(
        {"long": CategoricalDistribution((False, True)), "first": KINDS, "second": KINDS},
        active={"second": lambda p: p["long"]},
        graph=graph,
    )
    encoding = Encoding(space)
    rows = [encoding.genes({"long": long, "first": "conv", "second": "pool"}) for long in (False, True)]
    vocabulary, found = WLSampler(space, depth=0).histograms(encoding, np.array(rows))
    assert vocabulary == [["conv", "in", "pool"]]
    assert found[:, :3].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_bad_settings():
    with pytest.raises(SettingError, match=r"Give SearchSpace\(..., graph=...\)"):
        WLSampler(SearchSpace(SPACE.decisions))
    with pytest.raises(SettingError, match="depth must be at least 0"):
        WLSampler(SPACE, depth=-1)
    sampler = WLSampler(SPACE)
    with pytest.raises(SettingError, match="at least two complete trials, got 0"):
        sampler.motifs(optuna.create_study(sampler=sampler))
