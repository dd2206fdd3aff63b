"""Small runs of the scripts of one wing: they show that a script still works, not that its claim holds."""

import json

import pytest

from claims.__main__ import main
from claims._harness import find


def scripts(wing: str) -> list[str]:
    """The claims of a wing."""
    return [name for name in find() if name.startswith(f"{wing}/")]


def check(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a script once and small."""
    code = main(["--smoke", name])
    output = capsys.readouterr()
    if "fails: MissingDataError" in output.err:  # Debian has it as a package, which .ci/run installs
        pytest.skip(output.err)
    assert code == 0, output.err
    seed, summary = (json.loads(line) for line in output.out.splitlines())
    assert (seed["seed"], summary["name"], summary["smoke"]) == (0, name, True)
