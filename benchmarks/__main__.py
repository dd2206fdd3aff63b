"""``python -m benchmarks``: measure every figure of the README and write benchmarks/RESULTS.md.

Each part runs in processes of its own, one after the other; figures are ratios to a baseline measured in the same
process. ``--only digits`` runs one part, ``--seeds`` chooses the seeds, and what earlier calls measured is kept. The
parts take minutes to an hour each, spaces nearly seven hours with three seeds; those on Fashion-MNIST are left out
where it is not on the machine.
"""

import argparse
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from netwright.core.errors import MissingDataError
from netwright.core.machine import machine
from netwright.core.task import load_task

HERE = Path(__file__).parent
RUNS = Path("runs/bench")
PARTS = ["digits", "peer", "fashion", "spaces", "steps", "search", "proposer", "pretrained", "chita"]
DIGITS = ["digits", "--target", "latency<=0.2x", "--keep", "score>=-0.01"]
FASHION = ["fashion-mnist", "--target", "latency<=0.1x", "--keep", "score>=-0.01", "--budget", "10m"]

# Targets out of reach, so that every run goes as low as it can within the score that is kept.
SPACES = {
    "digits": ("latency<=0.001x", "score>=-0.01", "120s"),
    "python-source": ("latency<=0.001x", "score>=-0.01", "240s"),
    "fashion-mnist": ("latency<=0.001x", "score>=-0.01", "600s"),
    "digits, size": ("size<=0.0001x", "score>=-0.01", "120s"),
    "python-source, size": ("size<=0.0001x", "score>=-0.01", "240s"),
    "fashion-mnist, size": ("size<=0.0001x", "score>=-0.01", "600s"),
}
WAYS = {
    "prune,int8": ["--steps", "prune,int8"],
    "prune,branches,int8": ["--steps", "prune,branches,int8"],
    "all steps": [],
    "all steps, nsga2": ["--sampler", "nsga2"],
}


def optimize(name: str, words: list[str], seed: int) -> dict[str, Any]:
    """One run of ``netwright optimize`` and what it says of itself."""
    out = RUNS / f"{name}-{seed}"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "netwright", "optimize", *words, "--seed", str(seed), "--out", str(out)]
    start = time.perf_counter()
    done = subprocess.run(command, check=False)
    wall = time.perf_counter() - start
    if done.returncode not in (0, 3):
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    result = json.loads((out / "result.json").read_text())
    phases = json.loads((out / "phases.json").read_text())
    seconds = phases["seconds"]
    useful = seconds["baseline"] + seconds["plan"] + seconds["closing"] + phases["busy_s"] / phases["workers"]
    return {
        "seed": seed,
        "status": result["status"],
        "latency": result["ratios"]["latency"],
        "size": result["ratios"]["size"],
        "hypervolume": result["hypervolume"],
        "test_baseline": result["baseline"]["score"]["test"],
        "test_drop": None if result["score_drop"] is None else result["score_drop"]["test"],
        "evaluations": result["evaluations"],
        "failed": result["failed"],
        "wall_s": wall,
        "overhead": 1 - useful / wall,
        "parent_memory_gb": phases["peak_memory_bytes"] / 1e9,
        "search_s": seconds["search"] + seconds["finals"],
    }


def spaces(seed: int, only: list[str], ways: list[str]) -> list[dict[str, Any]]:
    """The same task, target and time with the first steps alone, with all of them, and by another sampler."""
    rows = []
    for name in only:
        target, keep, budget = SPACES[name]
        for way in ways:
            words = WAYS[way]
            command = [name.partition(",")[0], "--target", target, "--keep", keep, "--budget", budget, *words]
            found = optimize(
                f"space-{name}-{way}".replace(", ", "-").replace(",", "-").replace(" ", "-"), command, seed
            )
            kept = ("latency", "size", "hypervolume", "test_drop", "evaluations", "failed", "wall_s")
            sets = " ".join(machine()["isa"])
            rows.append({"task": name, "way": way, "seed": seed, **{key: found[key] for key in kept}, "isa": sets})
    return rows


def peer(seed: int) -> dict[str, Any]:
    """The scripted peer on the baseline of the digits run, with the time that its search and recovery had."""
    run = RUNS / f"digits-{seed}"
    phases = json.loads((run / "phases.json").read_text())["seconds"]
    command = [sys.executable, str(HERE / "peer.py"), str(run), f"{phases['search'] + phases['finals']:.1f}"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    ours = json.loads((run / "result.json").read_text())["ratios"]["latency"]
    return {"seed": seed, **found, "ours_over_peer": ours / found["latency"]}


def steps() -> list[dict[str, Any]]:
    """Step times of optimizers (benchmarks/step_time.py), beside the peers' where they are installed."""
    peers = ["--peers"] if importlib.util.find_spec("pytorch_optimizer") else []
    command = [sys.executable, "-m", "benchmarks.step_time", *peers]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return [{"step": row["step"], "ratio": row["ratio"], "over": row.get("over", "torch AdamW fused")} for row in rows]


def search() -> list[dict[str, Any]]:
    """Evaluations until samplers have the front of NAS-Bench-201 (benchmarks/search_table.py), twenty seeds.

    Runs that search_table.jsonl holds are not repeated: the table has no noise, so they are the same on any machine.
    """
    command = [sys.executable, "-m", "benchmarks.search_table", "--data", "cifar10", "cifar100", "imagenet"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return [
        {
            "sampler": row["sampler"],
            "data": row["data"],
            "seeds": row["seeds"],
            "limit": row["limit"],
            **{f"to {float(share):.0%}": count for share, count in row["median_evaluations_to"].items()},
            **{f"arrived {float(share):.0%}": count for share, count in row["arrived"].items()},
        }
        for row in rows
    ]


def proposer() -> list[dict[str, Any]]:
    """What a suggestion costs as the history grows (benchmarks/proposer.py)."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.proposer"], check=True, stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def pretrained() -> list[dict[str, Any]]:
    """Networks that ship trained in packages, rounded to 8 bits (benchmarks/pretrained.py)."""
    parts = ["image", "text", *(["speech"] if shutil.which("espeak-ng") else [])]
    if "speech" not in parts:
        print("espeak-ng is not on this machine: the voice-activity detector is left out.", file=sys.stderr)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.pretrained", *parts], check=True, stdout=subprocess.PIPE, text=True
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def chita() -> list[dict[str, Any]]:
    """Time and memory of CHITA as a network grows (benchmarks/chita_scale.py)."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.chita_scale"], check=True, stdout=subprocess.PIPE, text=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown table, with a last row of medians."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    numbers = [name for name in names if name != "seed" and isinstance(rows[0].get(name), int | float)]
    if names[0] != "seed":
        return [
            "| " + " | ".join(row) + " |"
            for row in [names, ["---"] * len(names), *([_text(row.get(name)) for name in names] for row in rows)]
        ]
    medians = {name: statistics.median(row[name] for row in rows if row.get(name) is not None) for name in numbers}
    body = [[_text(row.get(name)) for name in names] for row in rows]
    body.append(["median", *(_text(medians.get(name, "")) for name in names[1:])])
    return ["| " + " | ".join(row) + " |" for row in [names, ["---"] * len(names), *body]]


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def write(results: dict[str, list[dict[str, Any]]]) -> None:
    """RESULTS.md from everything measured so far."""
    titles = {
        "digits": "The demo: " + " ".join(DIGITS),
        "peer": "The scripted peer (benchmarks/peer.py) with the same baseline, time and score floor",
        "fashion": "Fashion-MNIST: " + " ".join(FASHION),
        "spaces": "Which steps and which sampler: the same baseline recipe, target and time",
        "steps": "Optimizer steps over 25M parameters in 160 tensors, and whole steps of a 78k-parameter network",
        "search": "NAS-Bench-201: median evaluations to shares of the front's hypervolume, and seeds that got there",
        "proposer": "Processor seconds of one suggestion after so many observations (NAS-Bench-201), one thread",
        "pretrained": "Trained networks from packages, rounded to 8 bits: agreement with float on held-out inputs",
        "chita": "CHITA on perceptrons of growing size, two threads: seconds, and peak memory beyond the network's own",
    }
    lines = ["# Results", "", "Written by `make bench`. Ratios are to the baseline, measured in one process.", ""]
    lines += [
        "This machine ran the latest part. Other rows may come from another one; some name its instruction sets (isa).",
        "",
    ]
    lines += [f"- {name}: {value}" for name, value in machine().items()] + [""]
    for name, title in titles.items():
        if results.get(name):
            lines += [f"## {title}", "", *table(results[name]), ""]
    (HERE / "RESULTS.md").write_text("\n".join(lines))


def _has(task: str) -> bool:
    try:
        load_task(task)
    except MissingDataError:
        return False
    return True


WHOLE: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "steps": steps,
    "search": search,
    "proposer": proposer,
    "pretrained": pretrained,
    "chita": chita,
}


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", choices=PARTS, nargs="*", default=PARTS)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--spaces", choices=list(SPACES), nargs="*", default=list(SPACES))
    parser.add_argument("--ways", choices=list(WAYS), nargs="*", default=list(WAYS))
    options = parser.parse_args()
    if not _has("fashion-mnist"):
        print("Fashion-MNIST is not on this machine: its parts are left out.", file=sys.stderr)
        options.only = [name for name in options.only if name not in ("fashion", "chita")]
        options.spaces = [name for name in options.spaces if not name.startswith("fashion-mnist")]
    stored = HERE / "results.json"
    results: dict[str, list[dict[str, Any]]] = json.loads(stored.read_text()) if stored.exists() else {}
    parts: dict[str, Callable[[int], dict[str, Any]]] = {
        "digits": lambda seed: optimize("digits", DIGITS, seed),
        "peer": peer,
        "fashion": lambda seed: optimize("fashion", FASHION, seed),
    }
    for name in options.only:
        if name in WHOLE:
            results[name] = WHOLE[name]()
            stored.write_text(json.dumps(results, indent=1) + "\n")
            write(results)
            continue
        if name == "spaces":
            for seed in options.seeds:
                made = spaces(seed, options.spaces, options.ways)
                known = {(row["task"], row["way"], row["seed"]) for row in made}
                old = [row for row in results.get(name, []) if (row["task"], row["way"], row["seed"]) not in known]
                results[name] = sorted([*old, *made], key=lambda row: (row["task"], row["way"], row["seed"]))
                stored.write_text(json.dumps(results, indent=1) + "\n")
                write(results)
            continue
        rows = [row for row in results.get(name, []) if row["seed"] not in options.seeds]
        for seed in options.seeds:
            rows.append(parts[name](seed))
            results[name] = sorted(rows, key=lambda row: row["seed"])
            stored.write_text(json.dumps(results, indent=1) + "\n")
            write(results)


if __name__ == "__main__":
    main()
