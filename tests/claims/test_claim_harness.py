import json
import subprocess
import sys
from pathlib import Path

import pytest

from claims.__main__ import main
from claims._harness import ROOT, ClaimError, find, load

GOOD = """
PAPER = 7
CLAIM = "The method is higher."
BETTER = "higher"

def run(seed, *, smoke=False):
    return {"method": 2.0 + 0.1 * seed, "baseline": 1.0 + 0.11 * seed, "smoked": float(smoke)}
"""


def write(root: Path, name: str, text: str) -> Path:
    path = root / f"{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return root


def records(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_one_record_per_seed_and_a_summary(tmp_path, capsys):
    write(tmp_path, "optim/good", GOOD)
    assert main(["good", "--seeds", "0", "1", "2"], tmp_path) == 0
    *seeds, summary = records(capsys)
    assert [(entry["seed"], entry["method"], entry["smoked"]) for entry in seeds] == [
        (0, 2.0, 0.0),
        (1, 2.1, 0.0),
        (2, 2.2, 0.0),
    ]
    assert list(summary)[:7] == ["claim", "paper", "mean_method", "mean_baseline", "ratio", "ci95", "holds"]
    assert summary["claim"] == "The method is higher."
    assert summary["paper"] == 7
    assert summary["holds"] is True
    assert summary["mean_method"] == pytest.approx(2.1)
    assert summary["ratio"] == pytest.approx(2.1 / 1.11)
    assert summary["ci95"][0] < 0.99 < summary["ci95"][1]


def test_a_claim_that_fails_is_recorded_with_the_reason(tmp_path, capsys):
    text = GOOD.replace('"higher"', '"lower"') + 'WHY = "The baseline has the better schedule."\n'
    write(tmp_path, "optim/bad", text)
    out = tmp_path / "results.jsonl"
    assert main(["optim/bad", "--record", str(out)], tmp_path) == 1
    printed = records(capsys)
    assert printed[-1]["holds"] is False
    assert printed[-1]["why"] == "The baseline has the better schedule."
    assert [json.loads(line) for line in out.read_text().splitlines()] == printed
    assert main(["optim/bad", "--record", str(out)], tmp_path) == 1
    assert len(out.read_text().splitlines()) == 2 * len(printed)  # appended, nothing lost


def test_a_reason_is_not_given_where_the_claim_holds(tmp_path, capsys):
    write(tmp_path, "optim/good", GOOD + 'WHY = "old"\n')
    assert main(["good"], tmp_path) == 0
    assert "why" not in records(capsys)[-1]


def test_parity_is_read_from_the_module(tmp_path, capsys):
    text = GOOD.replace("2.0 + 0.1", "1.0 + 0.1") + "PARITY = 0.05\n"
    write(tmp_path, "optim/equal", text)
    assert main(["equal"], tmp_path) == 0
    assert records(capsys)[-1]["parity"] == 0.05
    write(tmp_path, "optim/tight", text.replace("0.05", "0.005"))
    assert main(["tight"], tmp_path) == 1


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        (["0", "1"], "needs at least 3 seeds, got 2"),
        (["0", "1", "1"], "seeds 0, 1, 1 repeat"),
        (["0"], "needs at least 3 seeds, got 1"),
    ],
)
def test_too_few_or_repeated_seeds(tmp_path, capsys, seeds, message):
    write(tmp_path, "optim/good", GOOD)
    assert main(["good", "--seeds", *seeds], tmp_path) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_a_claim_may_ask_for_more_seeds(tmp_path, capsys):
    write(tmp_path, "optim/noisy", GOOD + "SEEDS = 5\n")
    assert main(["noisy", "--seeds", "0", "1", "2"], tmp_path) == 2
    assert "needs at least 5 seeds" in capsys.readouterr().err
    assert main(["noisy"], tmp_path) == 0
    assert records(capsys)[-1]["seeds"] == [0, 1, 2, 3, 4]


def test_smoke_runs_every_claim_once_and_small(tmp_path, capsys):
    write(tmp_path, "optim/good", GOOD)
    write(tmp_path, "tune/other", GOOD)
    assert main(["--smoke"], tmp_path) == 0
    found = records(capsys)
    assert [entry["smoked"] for entry in found if "seed" in entry] == [1.0, 1.0]
    summaries = [entry for entry in found if "claim" in entry]
    assert [(entry["name"], entry["holds"], entry["ci95"], entry["smoke"]) for entry in summaries] == [
        ("optim/good", None, None, True),
        ("tune/other", None, None, True),
    ]


def test_smoke_reports_a_rotten_script_and_goes_on(tmp_path, capsys):
    write(tmp_path, "optim/broken", GOOD.replace("return", "raise ValueError('gone')\n    return"))
    write(tmp_path, "tune/fine", GOOD)
    assert main(["--smoke"], tmp_path) == 1
    captured = capsys.readouterr()
    assert "Claim optim/broken fails: ValueError: gone" in captured.err
    assert "tune/fine" in captured.out


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("PAPER = 7", "", "does not define PAPER"),
        ("def run", "def go", "does not define run"),
        ('"higher"\n', '"up"\n', "BETTER must be 'higher' or 'lower', got 'up'"),
        ("PAPER = 7", "PAPER = 'seven'", "PAPER must be a number or None"),
        ('"The method is higher."', "''", "CLAIM must be a sentence"),
        ("*, smoke=False", "", "run must be callable as run(seed, smoke=True)"),
        ("PAPER = 7", "PAPER = 7\nPARITY = 0.0", "PARITY must be a positive margin"),
        ("PAPER = 7", "PAPER = 7\nSEEDS = 2", "SEEDS must be at least 3"),
    ],
)
def test_modules_that_do_not_state_their_claim(tmp_path, old, new, message):
    write(tmp_path, "optim/bad", GOOD.replace(old, new))
    with pytest.raises(ClaimError) as caught:
        load("bad", tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("{'method': 1.0}", "must return"),
        ("3.0", "must return"),
        ("{'method': float('nan'), 'baseline': 1.0}", "returned method=nan"),
        ("{'method': 1.0, 'baseline': float('inf')}", "returned baseline=inf"),
        ("{'method': 'good', 'baseline': 1.0}", "returned method='good'"),
        ("{'method': True, 'baseline': 1.0}", "returned method=True"),
    ],
)
def test_results_that_are_no_evidence(tmp_path, capsys, result, message):
    write(
        tmp_path,
        "optim/bad",
        f"PAPER = None\nCLAIM = 'x'\nBETTER = 'higher'\ndef run(seed, *, smoke=False):\n    return {result}\n",
    )
    assert main(["bad"], tmp_path) == 2
    assert message in capsys.readouterr().err


def test_names(tmp_path, capsys):
    write(tmp_path, "optim/twin", GOOD)
    write(tmp_path, "tune/twin", GOOD)
    write(tmp_path, "optim/_private", GOOD)
    assert sorted(find(tmp_path)) == ["optim/twin", "tune/twin"]
    assert load("tune/twin", tmp_path).name == "tune/twin"
    assert load("claims/tune/twin.py", tmp_path).name == "tune/twin"
    with pytest.raises(ClaimError, match="More than one claim 'twin'"):
        load("twin", tmp_path)
    with pytest.raises(ClaimError, match=r"No claim 'nothing'\. Known are optim/twin, tune/twin"):
        load("nothing", tmp_path)
    assert main(["--list"], tmp_path) == 0
    assert capsys.readouterr().out.splitlines() == [
        "optim/twin: The method is higher.",
        "tune/twin: The method is higher.",
    ]


def test_a_request_for_nothing(tmp_path, capsys):
    assert main([], tmp_path) == 2
    assert "Name a claim" in capsys.readouterr().err
    assert main(["--smoke"], tmp_path) == 0
    assert "No claims yet" in capsys.readouterr().err


def test_every_claim_of_the_repository_states_itself():
    for name in find():
        assert load(name).name == name


def test_it_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "claims", "--list"], cwd=ROOT.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == list(find())


def test_the_scripts_of_every_wing_are_run():
    wings = {name.partition("/")[0] for name in find()}
    files = {path.stem.removeprefix("test_scripts_") for path in Path(__file__).parent.glob("test_scripts_*.py")}
    assert files == wings
