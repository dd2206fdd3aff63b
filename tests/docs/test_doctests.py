"""Every example in a docstring, and every ``>>>`` in the pages, is run."""

import doctest
import importlib
import io
from pathlib import Path

import pytest

import netwright

SOURCE = Path(netwright.__file__).parent
PAGES = sorted((Path(__file__).resolve().parents[2] / "docs").glob("*.md"))
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def modules_with_examples() -> list[str]:
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        if ">>> " in path.read_text(encoding="utf-8"):
            parts = path.relative_to(SOURCE.parent).with_suffix("").parts
            found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


def test_there_are_examples_to_run() -> None:
    assert len(modules_with_examples()) > 20


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        pytest.skip("Ray is an extra and not installed here")
    _run(doctest.DocTestFinder(exclude_empty=True).find(module))


@pytest.mark.parametrize("page", [page for page in PAGES if ">>> " in page.read_text()], ids=lambda page: page.name)
def test_examples_in_the_pages(page: Path) -> None:
    _run([doctest.DocTestParser().get_doctest(page.read_text(), {}, page.name, str(page), 0)])


def _run(examples: list[doctest.DocTest]) -> None:
    said = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    for example in examples:
        runner.run(example, out=said.write)
    assert runner.failures == 0, said.getvalue()
    assert runner.tries > 0
