"""The documentation builds without warnings, names everything public, and is true about commands and files."""

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
import yaml
from coverage_check import complaints, public_exports
from offline_math import mathml
from public_names import PACKAGES, Export, described, exports, imports, public_modules
from results_page import MARK, NOTHING, claims_table, with_results

import netwright
from netwright.cli import main
from netwright.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [*DOCS.glob("*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("html")
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "-d", str(out / "doctrees")]
    done = subprocess.run([*command, str(DOCS), str(out / "html")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out / "html"


def test_every_public_name_stands_in_the_pages(built: Path) -> None:
    pages = {path.stem: path.read_text() for path in (built / "api" / "generated").glob("*.html")}
    ids = {name for text in pages.values() for name in re.findall(r'id="(netwright[\w.]*)"', text)}
    assert not [export.target for export in public_exports() if export.target not in ids]


def test_no_page_of_sphinx_takes_the_place_of_ours(built: Path) -> None:
    for source in DOCS.glob("*.md"):
        heading = source.read_text().splitlines()[0].removeprefix("# ")
        assert f"<h1>{heading}<a" in (built / f"{source.stem}.html").read_text(), source.name


def test_no_page_loads_anything_from_elsewhere(built: Path) -> None:
    for page in built.rglob("*.html"):
        loaded = re.findall(r'<(?:script|link|img|iframe)[^>]*?(?:src|href)="(?:https?:)?//[^"]*"', page.read_text())
        assert not loaded, page


def test_every_package_of_the_library_has_a_page() -> None:
    found = {"netwright", *(_dotted(path.parent) for path in Path(netwright.__file__).parent.rglob("__init__.py"))}
    assert found - {"netwright.cli"} == set(PACKAGES)
    listed = re.findall(r"^generated/(\S+)$", (DOCS / "api" / "index.md").read_text(), re.MULTILINE)
    assert listed == list(PACKAGES)


def test_public_modules_are_those_without_an_underscore() -> None:
    modules = public_modules("netwright.core")
    assert "netwright.core.task" in modules
    assert "netwright.core.graph" not in modules, "a package has a page of its own"
    assert not [name for name in public_modules("netwright.compress") if "._" in name]


def test_a_name_is_at_home_where_it_is_defined() -> None:
    homes = {export.name: export.home for export in exports("netwright")}
    assert homes["Task"] == "netwright.core.task"
    assert homes["optimize"] == "netwright.face"
    suites = {export.name: export.home for export in exports("netwright.testing")}
    assert suites["check_transform"] == "netwright.testing", "defined in a private module"
    assert {export.name: export.home for export in exports("netwright.core.cost")}["Ratio"] == "netwright.core.timing"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('def f():\n    """Doc."""\n', True),
        ("def f():\n    pass\n", False),
        ("class f:\n    x = 1\n", False),
        ("import dataclasses\n@dataclasses.dataclass\nclass f:\n    x: int = 1\n", False),
        ('f = 1\n"""Doc."""\n', True),
        ("f = 1\n", False),
        ('f: int = 1\n"""Doc."""\n', True),
        ('f = 1\ng = 2\n"""Of g."""\n', False),
    ],
)
def test_what_counts_as_described(source: str, expected: bool, tmp_path: Path, monkeypatch) -> None:
    name = f"described_{abs(hash(source))}"
    (tmp_path / f"{name}.py").write_text(f'__all__ = ["f"]\n{source}')
    monkeypatch.syspath_prepend(str(tmp_path))
    assert described(Export(name, "f", name)) is expected


def test_a_name_without_docstring_or_page_is_a_complaint() -> None:
    good = Export("netwright", "Task", "netwright.core.task")
    assert complaints([good], {"netwright.core.task.Task"}) == []
    assert complaints([good], set()) == ["netwright.Task is public and stands on no page as netwright.core.task.Task."]


def test_imports_see_through_renaming() -> None:
    assert imports(ast.parse("from a.b import c as d, e\nimport f\n")) == {"d": "a.b", "e": "a.b"}
    assert imports(ast.parse("if TYPE_CHECKING:\n    from a import b\nelse:\n    from c import d\n")) == {"b": "a"}


def test_formulas_become_mathml() -> None:
    assert "<mfrac>" in mathml(r"\frac{a}{b}", block=True)
    assert mathml(r"\Big| x \Big|", block=False) == mathml("| x |", block=False)


def test_results_are_shown_where_they_are_there() -> None:
    assert with_results(f"# A\n\n{MARK}\n", None) == f"# A\n\n{NOTHING}\n"
    shown = with_results(MARK, "# Results\n\n```sh\n# not a heading\n```\n\n## Machine\n")
    assert shown == "## Results\n\n```sh\n# not a heading\n```\n\n### Machine\n"
    assert MARK in (DOCS / "benchmarks.md").read_text()


def test_the_page_of_the_command_line_has_every_command_and_option() -> None:
    text = (DOCS / "cli.md").read_text()
    sections = {part.split()[1]: part for part in text.split("\n## ") if part.startswith("netwright ")}
    assert callable(main), "importing it registered the commands"
    group = typer.main.get_command(app)
    assert set(sections) == set(group.commands)
    for name, command in group.commands.items():
        options = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
        assert set(re.findall(r"`(--[a-z-]+)`", sections[name])) - {"--resume"} == options - {"--resume"}, name
    every = {
        option for command in group.commands.values() for p in command.params for option in (*p.opts, *p.secondary_opts)
    }
    for page in PAGES:
        lines = re.findall(r"netwright (?:optimize|measure|report|methods|doctor)\b[^`\n]*", page.read_text())
        for line in lines:
            assert not set(re.findall(r"(--[a-z-]+)", line)) - every, line


def test_links_between_the_pages_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?://|#)([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            generated = link.startswith("api/generated/") and Path(link).stem in PACKAGES
            if not generated and not (page.parent / link).exists():
                broken.append(f"{page.name}: {link}")
    assert not broken


def test_python_names_in_the_pages_exist() -> None:
    missing = []
    for page in PAGES:
        for path in re.findall(r"`(netwright(?:\.\w+)+)", page.read_text()):
            if not _exists(path):
                missing.append(f"{page.name}: {path}")
    assert not missing


def test_the_changelog_has_this_version() -> None:
    assert f"## [{netwright.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_hooks_are_local() -> None:
    settings = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in settings["repos"] for hook in repo["hooks"]]
    assert {repo["repo"] for repo in settings["repos"]} == {"local"}
    assert {hook["language"] for hook in hooks} == {"system"}
    assert {hook["entry"].split()[0] for hook in hooks} == {".venv/bin/ruff", ".venv/bin/mypy"}


def _dotted(folder: Path) -> str:
    return ".".join(("netwright", *folder.relative_to(Path(netwright.__file__).parent).parts))


def _exists(path: str) -> bool:
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def _summary(name, seeds, holds, claim="It works.", **more):
    record = {"claim": claim, "paper": 1, "mean_method": 1.0, "mean_baseline": 2.0, "ci95": [-2.0, -1.0]}
    return json.dumps({**record, "holds": holds, "name": name, "seeds": seeds, "smoke": False, **more})


def test_the_table_of_claims_names_earlier_runs_that_ended_otherwise(tmp_path):
    lines = [
        _summary("optim/a", [0, 1, 2], holds=False),
        _summary("optim/a", [5, 7], holds=False),
        _summary("optim/a", [3, 4], holds=False, claim="Another sentence."),
        _summary("optim/a", [8, 9], holds=True),
    ]
    *_, row = claims_table("\n".join(lines), tmp_path).splitlines()
    assert row.endswith("| yes (earlier, with seeds 0 to 2; 5, 7: no) |")


def test_the_reason_comes_from_the_record_or_from_the_script(tmp_path):
    (tmp_path / "optim").mkdir()
    (tmp_path / "optim" / "a.py").write_text('WHY = (\n    "Too "\n    "noisy."\n)\n')
    lines = [_summary("optim/a", [0], holds=False, why=""), _summary("optim/b", [0], holds=False, why="Too slow.")]
    table = claims_table("\n".join(lines), tmp_path)
    assert "It works. *Too noisy.*" in table
    assert "It works. *Too slow.*" in table
    assert "*" not in claims_table(_summary("optim/a", [0], holds=True), tmp_path)
