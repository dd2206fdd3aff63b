"""Every example in a docstring is run."""

import doctest
import importlib
import io
from pathlib import Path

import pytest

import netwright

SOURCE = Path(netwright.__file__).parent
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
    said = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    for example in doctest.DocTestFinder(exclude_empty=True).find(module):
        runner.run(example, out=said.write)
    assert runner.failures == 0, said.getvalue()
    assert runner.tries > 0
