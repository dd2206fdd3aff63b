"""The page about a search: what is drawn, what is told, and that no name of a user's can become markup."""

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.samplers import RandomSampler

from netwright.report import write_search_report
from netwright.report.search_page import render_search
from netwright.search import SearchSpace, importance, predictor_quality, run

EVIL = "<b>&'\"</script>"
SPACE = SearchSpace({f"width {EVIL}": IntDistribution(0, 63), "kind": CategoricalDistribution(("u", EVIL))})


def evaluate(params):
    width = params[f"width {EVIL}"]
    if width == 7:
        raise ValueError(f"seven {EVIL}")
    return {"cost": width * (1.0 + (params["kind"] == "u")), "score": float(width)}


def found(evaluations=40, **changes):
    goals = {"score": "maximize", "cost": "minimize"}
    options = {"sampler": RandomSampler(seed=0), "evaluations": evaluations, "progress": lambda *_: None}
    return run(SPACE, evaluate, goals, **(options | changes))


class Page(HTMLParser):
    """Tags, words outside of scripts, cells of the table by row, places of plots, and the data."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.places, self.words, self.data, self.rows = set(), set(), "", "", []
        self._within = []
        self.feed(text)
        self.plots = json.loads(self.data)["plots"]

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        named = dict(attrs)
        self._within = [*self._within[-3:], "data" if named.get("id") == "report-data" else tag]
        if (named.get("id") or "").startswith("plot-"):
            self.places.add(named["id"].removeprefix("plot-"))
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        self._within = self._within[:-1]

    def handle_data(self, data):
        within = self._within[-1] if self._within else ""
        if within == "data":
            self.data += data
        elif within not in ("script", "style"):
            self.words += data
        if within in ("td", "th"):
            self.rows[-1].append(data)

    def source(self, plot):
        """The columns of each source of a plot."""
        return list(sources(self.plots[plot]))


def sources(item):
    """Everything in a plot that maps names to columns."""
    if isinstance(item, dict):
        if item.get("name") == "ColumnDataSource":
            entries = item["attributes"]["data"]["entries"]
            yield {name: np.array(column).tolist() for name, column in entries}
        item = list(item.values())
    if isinstance(item, list):
        for each in item:
            yield from sources(each)


@pytest.fixture(scope="module")
def searched():
    return found()


@pytest.fixture(scope="module")
def page(searched, tmp_path_factory):
    files = {entry.number: Path(f"{entry.number:05d}.onnx") for entry in searched.front}
    path = write_search_report(
        searched, SPACE, tmp_path_factory.mktemp("out"), task=f"task {EVIL}", files=files, command=f"netwright {EVIL}"
    )
    assert path.name == "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_names_are_words_not_markup(page):
    assert "b" not in page.tags
    for words in (f"task {EVIL}: ", f"width {EVIL} ", f"ValueError: seven {EVIL}", f"netwright {EVIL}"):
        assert words in page.words
    assert page.places == set(page.plots) == {"search-front", "growth", "quality", "importance-0", "importance-1"}


def test_the_front_is_a_table_and_a_plot(searched, page):
    front = {str(entry.number): entry for entry in searched.front}
    table = {row[0]: row[1:] for row in page.rows[1:]}
    assert page.rows[0] == ["Number", "cost", "score", "Decisions", "File"]
    assert table.keys() == front.keys()
    for number, (cost, score, _, file) in table.items():
        assert float(cost) == pytest.approx(front[number].metrics["cost"], rel=0.01)
        assert float(score) == pytest.approx(front[number].metrics["score"], rel=0.01)
        assert file == f"front/{int(number):05d}.onnx"
    others, best = page.source("search-front")
    assert best["x"] == [entry.metrics["cost"] for entry in searched.evaluations if str(entry.number) in front]
    assert len(others["x"]) + len(best["x"]) == sum(entry.metrics is not None for entry in searched.evaluations)


def test_the_front_grows_to_the_whole(searched, page):
    source = page.source("growth")[0]
    assert source["x"] == list(range(1, 41))
    assert source["y"] == sorted(source["y"])
    assert source["y"][-1] == 1.0
    assert source["y"][0] < 0.9


def test_quality_and_importance_are_those_of_insight(searched, page):
    quality = predictor_quality(searched, SPACE)
    drawn = {tuple(source["x"]): source["y"] for source in page.source("quality")}
    assert len(page.source("quality")) == 2
    for place, objective in enumerate(("score", "cost")):
        entries = [entry for entry in quality if entry.objective == objective]
        assert page.source("quality")[place]["y"] == [entry.kendall_tau for entry in entries]
        assert tuple(entry.seen for entry in entries) in drawn
        bars = page.source(f"importance-{place}")[0]
        worth = importance(searched, SPACE)[objective]
        assert bars["kind"] == list(worth)[::-1]
        assert bars["x"] == [max(value, 0.0) for value in worth.values()][::-1]


def test_few_feasible_candidates_are_no_reason_to_be_silent():
    bound = found(constraints=["cost<=3"])
    assert sum(entry.feasible for entry in bound.evaluations) < 8
    page = Page(render_search(bound, SPACE, task="t", files={}, command=""))
    assert {"quality", "importance-0", "importance-1"} <= page.places


def test_a_search_that_measured_next_to_nothing_has_a_page():
    page = Page(render_search(found(1, constraints=["cost<=-1"]), SPACE, task="t", files={}, command=""))
    assert page.places == set()
    assert "t: 0 sub-networks on the front of score and cost" in page.words
    assert "The exact command" not in page.words
