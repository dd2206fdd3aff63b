"""The written page: complete, self-contained, small, and harmless whatever a run is called."""

import html
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from example_run import write_example

from netwright.core.errors import CorruptRunError, RunDirectoryError
from netwright.report import read_run, write_report
from netwright.report.format import TIMES

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\"&{{7*7}}@kind${x}\u2028"
LIMIT = 2_000_000


class Page(HTMLParser):
    """Tags, what they load, and the text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.handlers: list[str] = []
        self.ids: list[str] = []
        self.scripts: list[str] = []
        self.words = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._inside = tag
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action", "xlink:href"):
                self.loads.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)
            if name == "id":
                self.ids.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside != "style":
            self.words += data + " "


def page_of(run: Path) -> Page:
    report = write_report(run)
    assert report == run / "report.html"
    assert report.stat().st_size < LIMIT
    return Page(report.read_text(encoding="utf-8"))


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    run = write_example(tmp_path_factory.mktemp("runs") / "whole")
    return run, page_of(run)


def test_all_parts_in_order(whole: tuple[Path, Page]) -> None:
    words = whole[1].words
    parts = ["Netwright report", "Target met", "What can be had for what", "Baseline against chosen", "Training"]
    parts += ["What was cut where", "How the search went", "Candidates that failed", "Machine, settings, replay"]
    parts += ["The exact command", "Terms", "Pareto front"]
    places = [words.index(part) for part in parts]
    assert places == sorted(places)
    assert len(whole[1].ids) == len(set(whole[1].ids))


def test_figures_come_from_the_files(whole: tuple[Path, Page]) -> None:
    run, page = whole
    result = json.loads((run / "result.json").read_text())
    base, chosen = result["baseline"], result["chosen"]
    assert f"{100 * base['score']['test']:.1f}%" in page.words
    assert f"{100 * chosen['score']['test']:.1f}%" in page.words
    assert f"{base['size_bytes'] / 1e6:.2f} MB" in page.words
    assert f"{1 / result['latency_ratio']['median']:.0f}{TIMES} faster" in page.words.replace("\u00a0", " ")
    assert result["machine"]["cpu"] in page.words
    assert json.loads((run / "run.json").read_text())["command"] in page.words
    for layer in json.loads((run / "layers.json").read_text()):
        assert layer["layer"] in page.words
        assert f"{layer['baseline_shape'][0]} → {layer['chosen_shape'][0]}" in page.words
    assert "NonFiniteLossError" in page.words


def test_nothing_is_loaded(whole: tuple[Path, Page]) -> None:
    run, page = whole
    assert page.loads == ["data:,"]
    assert page.handlers == []
    assert not {"iframe", "object", "embed", "link rel=stylesheet", "base"} & set(page.tags)
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    styles = "".join(re.findall(r"<style>(.*?)</style>", text, re.S))
    assert "url(" not in styles
    assert "@import" not in styles
    assert not re.findall(
        r"""(?:src|href)\s*=\s*["']?\s*(?:https?:)?//""", re.sub(r"<script.*?</script>", "", text, flags=re.S)
    )
    assert str(run.parent) not in text


def test_hundreds_of_evaluations_stay_small(tmp_path: Path) -> None:
    run = write_example(tmp_path / "run", evaluations=800)
    page = page_of(run)
    data = json.loads(next(text for text in page.scripts if text.startswith("{")))
    assert set(data["plots"]) == {"front", "loss", "score", "progress", "volume"}


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    calm = page_of(write_example(tmp_path / "calm", evaluations=12))
    run = write_example(tmp_path / "run", evaluations=12)
    (run / "result.json").write_text(_poison(json.loads((run / "result.json").read_text())))
    (run / "run.json").write_text(_poison(json.loads((run / "run.json").read_text())))
    rewrite(run / "run.json", score=f"accuracy{HOSTILE}")
    (run / "layers.json").write_text(_poison(json.loads((run / "layers.json").read_text())))
    lines = (run / "evaluations.jsonl").read_text().splitlines()
    (run / "evaluations.jsonl").write_text("".join(_poison(json.loads(line)) + "\n" for line in lines))
    page = page_of(run)
    assert page.tags == calm.tags
    assert page.handlers == []
    assert page.loads == calm.loads
    assert HOSTILE in page.words
    assert "49@kind" not in page.words
    text = (run / "report.html").read_text(encoding="utf-8")
    assert html.escape(HOSTILE, quote=False).split("&#x27;")[0][:20] in text
    assert "<script>alert" not in text


def _poison(content: Any) -> str:
    """JSON in which every free text is hostile."""
    free = {
        "task",
        "description",
        "explanation",
        "cpu",
        "method",
        "error",
        "layer",
        "kind",
        "command",
        "saliency",
    }

    def walk(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: walk(inner, name) for name, inner in value.items()}
        if isinstance(value, list):
            return [walk(inner, key) for inner in value]
        return HOSTILE if isinstance(value, str) and key in free else value

    return json.dumps(walk(content))


def test_interrupted_with_nothing_chosen(tmp_path: Path) -> None:
    run = write_example(tmp_path / "run", status="interrupted", chosen=False, evaluations=10)
    (run / "evaluations.jsonl").write_text("")
    page = page_of(run)
    assert "not finished; nothing better than the baseline was found" in page.words
    assert "nothing was chosen and the test set was not read" in page.words
    assert "The table of layers is left out: there is no layers.json" in page.words
    assert "faster" not in page.words.split("Terms")[0]


def test_not_met(tmp_path: Path) -> None:
    words = page_of(write_example(tmp_path / "run", status="not_met")).words
    assert "Target not met" in words
    assert "target not met; the best found is" in words
    assert "Target met" not in words


def test_a_front_of_one_point(tmp_path: Path) -> None:
    run = write_example(tmp_path / "run", evaluations=1)
    result = json.loads((run / "result.json").read_text())
    rewrite(run / "result.json", front=[result["baseline"]], chosen=None, latency_ratio=None, score_drop=None)
    assert "The front as a table (1 network)" in page_of(run).words


def test_no_evaluation_at_all(tmp_path: Path) -> None:
    run = write_example(tmp_path / "run", evaluations=0, status="interrupted")
    words = page_of(run).words
    assert "nothing better than the baseline was found" in words
    assert "How the search went" not in words


@pytest.mark.parametrize(
    ("empty", "sentence", "legend"),
    [
        ((), "The baseline's training and the chosen network's full recovery.", "Chosen Baseline"),
        (("baseline",), "The chosen network's full recovery.", "Chosen"),
        (("chosen",), "The baseline's training.", "Baseline"),
    ],
)
def test_curves_are_named_where_there_are_any(
    empty: tuple[str, ...], sentence: str, legend: str, tmp_path: Path
) -> None:
    run = write_example(tmp_path / "run", evaluations=5)
    rewrite(run / "history.json", **{key: [] for key in empty})
    text = write_report(run).read_text(encoding="utf-8")
    section = text.partition('id="h-curves"')[2].partition("</section>")[0]
    assert f"<p>{sentence}</p>" in section
    shown = re.sub("<[^>]*>", " ", section.partition('<ul class="legend"')[2].partition(">")[2])
    assert " ".join(shown.split()) == legend


def test_an_unfinished_run(tmp_path: Path) -> None:
    run = write_example(tmp_path / "run", evaluations=9)
    for name in ("result.json", "history.json", "layers.json"):
        (run / name).unlink()
    words = page_of(run).words
    assert "digits: not finished, 9 candidates evaluated so far" in words
    assert "There is no result.json" in words
    (run / "evaluations.jsonl").unlink()
    assert "not finished, 0 candidates" in page_of(run).words


def test_zero_costs_do_not_break_it(tmp_path: Path) -> None:
    run = write_example(tmp_path / "run", evaluations=5)
    result = json.loads((run / "result.json").read_text())
    for point in (result["baseline"], result["chosen"]):
        point.update(macs=0, memory_bytes=0)
    rewrite(run / "result.json", **result)
    assert "MACs" in page_of(run).words


def test_a_damaged_run_leaves_an_old_report_alone(tmp_path: Path) -> None:
    run = write_example(tmp_path / "run", evaluations=5)
    report = write_report(run)
    before = report.read_bytes()
    (run / "result.json").write_text("{")
    with pytest.raises(CorruptRunError, match=r"result\.json"):
        write_report(run)
    assert report.read_bytes() == before
    assert sorted(path.name for path in run.iterdir() if path.name.startswith(".")) == []


def test_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    run = write_example(tmp_path / "run", evaluations=5)
    (run / "report.html").mkdir()
    with pytest.raises(RunDirectoryError, match=r"report\.html"):
        write_report(run)


def test_removed_layers_are_called_removed(tmp_path: Path) -> None:
    run = write_example(tmp_path / "run", evaluations=12)
    layers = json.loads((run / "layers.json").read_text())
    layers[2].update(chosen_shape=None, chosen_macs=0, chosen_parameters=0)
    (run / "layers.json").write_text(json.dumps(layers))
    assert "removed" in page_of(run).words


def test_the_same_run_gives_the_same_words(whole: tuple[Path, Page]) -> None:
    assert page_of(whole[0]).words == whole[1].words
    assert replace(read_run(whole[0]), path=Path()) == replace(read_run(whole[0]), path=Path())


def test_a_text_that_is_no_unicode_is_shown_by_its_code(tmp_path: Path) -> None:
    run = write_example(tmp_path / "run", evaluations=12)
    rewrite(run / "run.json", description="of caf\udce9.py", command="netwright optimize caf\udce9.py:task")
    words = page_of(run).words
    assert "of caf\\udce9.py" in words
    assert "netwright optimize caf\\udce9.py:task" in words
