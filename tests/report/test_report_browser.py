"""The report in a real Chromium without a network: it renders, hovering works, axes change, nothing leaves the page."""

import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import chromium, figure_state, hover_point, open_report, programs, requested, tooltip_texts
from example_run import write_example
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from netwright.report import write_report
from netwright.report.format import TIMES

HOSTILE = "</script><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">"

if programs() is None and not os.environ.get("CI"):
    pytest.skip("chromium and chromedriver are not on this machine", allow_module_level=True)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(write_example(tmp_path_factory.mktemp("runs") / "run"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    with chromium() as driver:
        yield driver


@pytest.fixture
def page(browser: Chrome, report: Path) -> Chrome:
    browser.get("about:blank")
    browser.get_log("browser")
    requested(browser)
    open_report(browser, report)
    return browser


def complaints(driver: Chrome) -> list[str]:
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def test_it_renders_without_a_word_on_the_console_and_without_a_request(page: Chrome, report: Path) -> None:
    assert "faster" in page.find_element(By.TAG_NAME, "h1").text
    for name in ("front", "loss", "score", "progress", "volume"):
        assert inked(page, name) > 200, f"nothing was drawn in {name}"
    hover_point(page, "front")
    assert complaints(page) == []
    loaded = [url for url in requested(page) if not url.startswith(("data:", "blob:"))]
    assert loaded == [report.as_uri()]


def inked(driver: Chrome, name: str) -> int:
    """Pixels of a plot's canvases that something was painted on."""
    return int(
        driver.execute_script(
            """
            let found = 0;
            const walk = (node) => {
              for (const one of node.querySelectorAll("*")) {
                if (one.shadowRoot) walk(one.shadowRoot);
                if (one.tagName !== "CANVAS" || !one.width) continue;
                const pixels = one.getContext("2d").getImageData(0, 0, one.width, one.height).data;
                for (let i = 3; i < pixels.length; i += 4) found += pixels[i] > 0;
              }
            };
            walk(document.getElementById(arguments[0]));
            return found;
            """,
            f"plot-{name}",
        )
    )


@pytest.mark.parametrize("group", ["baseline", "chosen", "front", "evaluated"])
def test_hovering_shows_the_steps_and_the_figures(page: Chrome, group: str) -> None:
    assert tooltip_texts(page) == []
    row = hover_point(page, group)
    shown = next(text for text in tooltip_texts(page) if row["shown_latency"] in text)
    assert row["kind"] in shown
    assert row["steps"] in shown
    for cost in ("score", "size", "memory", "macs", "parameters"):
        assert row[f"shown_{cost}"] in shown


def test_a_point_of_the_file_is_where_it_should_be(page: Chrome, report: Path) -> None:
    chosen = json.loads((report.parent / "result.json").read_text())["chosen"]
    state = figure_state(page)
    assert state["points"]["chosen"] == [
        [pytest.approx(chosen["latency_ratio"]["median"]), pytest.approx(100 * chosen["score"]["val"])]
    ]


def test_choosing_axes_moves_the_points(page: Chrome, report: Path) -> None:
    baseline = json.loads((report.parent / "result.json").read_text())["baseline"]
    before = figure_state(page)
    assert before["labels"][0].startswith(f"Latency ({TIMES}")
    assert before["limits"] == [pytest.approx(0.2), pytest.approx(100 * (baseline["score"]["val"] - 0.01))]
    Select(page.find_element(By.ID, "axis-x")).select_by_value("size")
    Select(page.find_element(By.ID, "axis-y")).select_by_value("macs")
    after = figure_state(page)
    assert after["labels"] == ["Size on disk (MB)", "MACs (M)"]
    assert after["points"]["baseline"] == [
        [pytest.approx(baseline["size_bytes"] / 1e6), pytest.approx(baseline["macs"] / 1e6)]
    ]
    assert after["limits"] == [None, None]
    assert all(after["start"][i] < min(after["all"][i]) for i in (0, 1))
    assert all(after["end"][i] > max(after["all"][i]) for i in (0, 1))
    row = hover_point(page, "baseline")
    assert any(row["shown_size"] in text for text in tooltip_texts(page))
    assert "Size on disk (MB) across, MACs (M) up." in page.find_element(By.ID, "front-says").text
    assert complaints(page) == []


def test_the_edge_of_the_front_is_not_beaten(page: Chrome) -> None:
    state = figure_state(page)
    edge = list(zip(*state["edge"], strict=True))
    assert len(edge) > 3
    for x, y in edge:
        assert not any(
            a <= x and b >= y and (a, b) != (x, y) for a, b in zip(*state["all"], strict=True) if [a, b] != [x, y]
        )


def test_logarithmic_axes_come_and_go(page: Chrome) -> None:
    box = page.find_element(By.ID, "log-x")
    assert box.is_selected()
    assert figure_state(page)["scales"] == ["LogScale", "LinearScale"]
    box.click()
    assert figure_state(page)["scales"] == ["LinearScale", "LinearScale"]
    page.find_element(By.ID, "log-y").click()
    assert figure_state(page)["scales"] == ["LinearScale", "LogScale"]
    hover_point(page, "chosen")
    assert any("Chosen" in text for text in tooltip_texts(page))
    assert complaints(page) == []


@pytest.mark.parametrize(("width", "dark"), [(390, False), (1280, True)])
def test_narrow_and_dark(report: Path, width: int, dark: bool) -> None:
    with chromium(width, 900, dark=dark) as driver:
        open_report(driver, report)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        ink, paper = driver.execute_script(
            "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
        )
        assert (light(ink) > light(paper)) is dark
        assert contrast(ink, paper) > 7
        drawn = driver.execute_script("return Bokeh.documents[0].roots()[0].below[0].major_label_text_color")
        assert contrast(f"rgb({','.join(str(int(drawn[i : i + 2], 16)) for i in (1, 3, 5))})", paper) > 4.5
        assert complaints(driver) == []


def light(colour: str) -> float:
    """Relative luminance of ``rgb(r, g, b)`` (WCAG 2)."""
    parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


def test_every_control_has_a_name(page: Chrome) -> None:
    tree = page.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = {"combobox", "checkbox", "table", "region", "heading", "figure", "list"}
    nameless = {"table", "list"}
    for node in tree:
        role = node.get("role", {}).get("value")
        if role in roles - nameless and not node.get("ignored"):
            assert node.get("name", {}).get("value"), f"a {role} without a name"


def test_hostile_texts_do_nothing(browser: Chrome, tmp_path: Path) -> None:
    run = write_example(tmp_path / "run", evaluations=12, task=HOSTILE)
    lines = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    result = json.loads((run / "result.json").read_text())
    for point in [result["chosen"], *result["front"], *(line["point"] for line in lines if line["point"])]:
        for step in point["steps"]:
            step["method"] = HOSTILE
    (run / "result.json").write_text(json.dumps(result))
    (run / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    open_report(browser, write_report(run))
    hover_point(browser, "chosen")
    assert any("onerror" in text for text in tooltip_texts(browser))
    assert browser.title != "broken"
    assert browser.title.startswith("</script>")
    assert browser.execute_script("return document.images.length") == 0


def test_it_prints(page: Chrome) -> None:
    printed = base64.b64decode(page.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    assert printed.startswith(b"%PDF")
    assert page.execute_script("return 'print' in document.documentElement.dataset") is False
