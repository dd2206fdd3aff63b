"""A headless Chromium that may not reach a network, for tests and screenshots of the report."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)


def programs() -> tuple[str, str] | None:
    """Chromium and its driver, or None where one of them is not on the machine."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


@contextmanager
def chromium(width: int = 1280, height: int = 1000, *, dark: bool = False, scale: float = 1.0) -> Iterator[Chrome]:
    """A browser with an empty profile, gone when the block ends.

    Args:
        width: of the window's content, in CSS pixels.
        height: of the window's content, in CSS pixels.
        dark: whether the system prefers dark.
        scale: device pixels per CSS pixel.
    """
    found = programs()
    if found is None:
        raise FileNotFoundError("Neither chromium nor chromedriver is on the PATH.")
    options = ChromeOptions()
    options.binary_location = found[0]
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with TemporaryDirectory(prefix="nw-chromium-", ignore_cleanup_errors=True) as profile:
        options.add_argument(f"--user-data-dir={profile}")
        driver = Chrome(options=options, service=Service(found[1]))
        try:
            driver.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride",
                {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False},
            )
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
            yield driver
        finally:
            driver.quit()


def open_report(driver: Chrome, report: Path) -> None:
    """Load a report from disk and wait until its plots are drawn."""
    driver.get(report.resolve().as_uri())
    WebDriverWait(driver, 30).until(
        lambda page: page.execute_script("return 'ready' in document.documentElement.dataset")
    )
    driver.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 250))")


def hover_point(driver: Chrome, group: str, nth: int = 0) -> dict[str, Any]:
    """Move the mouse onto the nth point of a group in the front's plot; the point's row of figures."""
    driver.execute_script(
        "document.getElementById('plot-front').scrollIntoView({block: 'center', behavior: 'instant'})"
    )
    row: dict[str, Any] = driver.execute_script(_PLACE, group, nth)
    pointer = {"x": row["at"][0], "y": row["at"][1], "button": "none"}
    for shift in (-30, -8, 0):  # an approach, as a hand makes it
        moved = pointer | {"x": pointer["x"] + shift}
        driver.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", **moved})
    driver.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 200))")
    return row


def tooltip_texts(driver: Chrome) -> list[str]:
    """What the visible tooltips say, looked up through every shadow root of the page."""
    texts: list[str] = driver.execute_script(_TIPS)
    return texts


def figure_state(driver: Chrome) -> dict[str, Any]:
    """The front's plot as it stands: points by group, axis labels, ranges, scales, limits, the edge."""
    state: dict[str, Any] = driver.execute_script(_STATE)
    return state


_FRONT = """
const figure = Bokeh.documents.map((d) => d.roots()[0]).find((f) => f.name === "front");
const find = (views) => {
  for (const view of views) {
    if (view.model === figure) return view;
    const inner = find(view.children_views ? [...view.children_views()] : []);
    if (inner) return inner;
  }
};
const view = find([...Bokeh.index.roots]);
const points = figure.renderers.find((r) => r.name === "points").data_source.data;
"""
"""The front's model, its view and its points, for scripts that run in the page."""

_PLACE = (
    _FRONT
    + """
const row = points.group.flatMap((g, i) => (g === arguments[0] ? [i] : []))[arguments[1]];
const box = view.canvas_view.el.getBoundingClientRect();
const at = [box.x + view.frame.x_scale.compute(points.x[row]), box.y + view.frame.y_scale.compute(points.y[row])];
return {at, ...Object.fromEntries(Object.entries(points).map(([key, values]) => [key, values[row]]))};
"""
)

_STATE = (
    _FRONT
    + """
const groups = {};
points.group.forEach((group, i) => (groups[group] ??= []).push([points.x[i], points.y[i]]));
const part = (name) => figure.center.find((one) => one.name === name);
const edge = figure.renderers.find((r) => r.name === "edge").data_source.data;
return {
  points: groups,
  all: [[...points.x], [...points.y]],
  labels: [figure.below[0].axis_label, figure.left[0].axis_label],
  scales: [figure.x_scale.type, figure.y_scale.type],
  start: [figure.x_range.start, figure.y_range.start],
  end: [figure.x_range.end, figure.y_range.end],
  limits: ["x", "y"].map((side) => (part(`limit-${side}`).visible ? part(`limit-${side}`).location : null)),
  edge: [[...edge.x], [...edge.y]],
};
"""
)

_TIPS = """
const found = [];
const walk = (node) => {
  for (const one of node.querySelectorAll("*")) {
    if (one.classList.contains("nw-tip") && one.checkVisibility()) found.push(one.innerText);
    if (one.shadowRoot) walk(one.shadowRoot);
  }
};
walk(document);
return found;
"""


def requested(driver: Chrome) -> list[str]:
    """Every address that the browser asked for since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
