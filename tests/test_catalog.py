import re
from pathlib import Path

import pytest

from netwright.catalog import CatalogError, load, steps
from netwright.core.recipe import resolve
from netwright.core.transform import Transform

REPOSITORY = Path(__file__).resolve().parents[1]

METHOD = """
[[method]]
paper = 3
title = "A Title"
wing = "optim"
object = "torch.optim:AdamW"
claim = "claims/optim/adamw.py"
"""
STEP = """
[[step]]
wing = "compress"
object = "torch.nn:Linear"
summary = "Does it."
"""


def catalog(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "catalog.toml"
    path.write_text(text)
    return path


def test_rows_and_steps_are_read_in_order(tmp_path):
    second = METHOD.replace("paper = 3", "paper = 1")
    path = catalog(tmp_path, METHOD + STEP + second)
    assert [row.paper for row in load(path)] == [3, 1]
    row = load(path)[0]
    assert (row.title, row.wing, row.object, row.claim) == (
        "A Title",
        "optim",
        "torch.optim:AdamW",
        "claims/optim/adamw.py",
    )
    assert [(step.wing, step.object, step.summary) for step in steps(path)] == [
        ("compress", "torch.nn:Linear", "Does it.")
    ]


def test_an_empty_list_is_a_list(tmp_path):
    path = catalog(tmp_path, "")
    assert load(path) == ()
    assert steps(path) == ()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("torch.optim:AdamW", "torch.optim:AdamX", "torch.optim:AdamX.*cannot be imported"),
        ("torch.optim:AdamW", "nowhere.at.all:X", "cannot be imported"),
        ("torch.optim:AdamW", "torch.optim.AdamW", "is not an import path"),
        ("claims/optim/adamw.py", "claims/tune/adamw.py", r"paper 3: claim must be named claims/optim/<method>\.py"),
        ("claims/optim/adamw.py", "adamw.py", "claim must be named"),
        ("claims/optim/adamw.py", "claims/optim/adam w.py", "claim must be named"),
        ('wing = "optim"', 'wing = "optimizers"', "no wing 'optimizers'. Known are optim"),
        ("paper = 3", "paper = 0", "paper must be a positive number"),
        ("paper = 3", 'paper = "3"', "paper must be a non-empty int, got '3'"),
        ("paper = 3", "paper = true", "paper must be a non-empty int, got True"),
        ('title = "A Title"\n', "", "needs exactly paper, title, wing, object, claim"),
        ('title = "A Title"', 'title = ""', "title must be a non-empty str"),
        ("paper = 3", "paper = 3\nyear = 2020", "needs exactly paper"),
        ("[[method]]", "[method]", "write every row under"),
        ("[[method]]", "[[methods]]", "unknown tables methods"),
        ("paper = 3", "paper = ", "cannot be read"),
    ],
)
def test_bad_rows_are_named(tmp_path, old, new, message):
    path = catalog(tmp_path, METHOD.replace(old, new))
    with pytest.raises(CatalogError, match=message):
        load(path)


def test_no_paper_and_no_step_twice(tmp_path):
    with pytest.raises(CatalogError, match="lists paper 3 more than once"):
        load(catalog(tmp_path, METHOD + METHOD))
    with pytest.raises(CatalogError, match=r"lists object torch\.nn:Linear more than once"):
        steps(catalog(tmp_path, STEP + STEP))


def test_bad_steps_are_named(tmp_path):
    with pytest.raises(CatalogError, match=r"torch\.nn:Linea'"):
        steps(catalog(tmp_path, STEP.replace("Linear", "Linea")))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CatalogError, match=re.escape(str(tmp_path / "none.toml"))):
        load(tmp_path / "none.toml")


def test_the_catalogue_itself_holds_together():
    for row in load():
        assert (REPOSITORY / row.claim).is_file(), f"{row.claim} is not there"
    assert [step.object for step in steps()][:1] == ["netwright.compress:Prune"]
    for step in steps():
        assert isinstance(resolve(step.object)(), Transform)
