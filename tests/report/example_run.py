"""Writes a run directory as a real run would leave it, from a small simulated search over a ResNet.

Every figure is computed: layers from the widths, costs from the layers, scores from what was removed plus
seeded noise, the front from the evaluated points. Nothing is trained and nothing is timed.

    python tests/report/example_run.py OUT_DIR [--status met] [--evaluations 60] [--seed 0]
"""

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any, Literal

Status = Literal["met", "not_met", "interrupted"]
Json = dict[str, Any]

STAGES = ((32, 2, 28), (64, 2, 14), (160, 2, 7))  # channels, blocks, side of the feature map
COST_KEYS = ("latency", "size", "memory", "macs", "parameters")
TEST_IMAGES = 360


def write_example(
    out: Path,
    *,
    status: Status = "met",
    evaluations: int = 60,
    seed: int = 0,
    task: str = "digits",
    chosen: bool = True,
) -> Path:
    """A run directory with every file that the report reads."""
    draw = random.Random(seed)
    out.mkdir(parents=True, exist_ok=True)
    target = {"latency": "<=0.2x" if status != "not_met" else "<=0.02x"}
    baseline = _point(draw, _widths([1.0, 1.0, 1.0]), int8=False, steps=[])
    records = [_evaluation(draw, trial, baseline, evaluations) for trial in range(evaluations)]
    front = pareto([baseline, *(record["point"] for record in records if record["point"])])
    better = [p for p in front if p["steps"]]
    good = [p for p in better if p["score"]["val"] >= baseline["score"]["val"] - 0.012]
    best = min(good or better, key=share, default=None)
    pick = None if best is None or not chosen else json.loads(json.dumps(best))
    _test_scores(draw, baseline, drop=0.0)
    if pick is not None:
        pick["score"]["val"] = round(pick["score"]["val"] + 0.006, 4)  # what the full recovery brings
        front = pareto([*front, pick])
        _test_scores(draw, pick, drop=baseline["score"]["val"] - pick["score"]["val"])
    result = {
        "schema": 1,
        "netwright": "0.1.0",
        "task": task,
        "seed": seed,
        "status": status,
        "explanation": {
            "met": "The chosen network meets latency<=0.2x and keeps the score within 0.01 of the baseline.",
            "not_met": "No candidate within 0.01 of the baseline's score reached latency<=0.02x.",
            "interrupted": "Stopped by Ctrl-C; what had been measured by then is kept.",
        }[status],
        "target": target,
        "keep": {"score": ">=-0.01"},
        "machine": {
            "cpu": "Example CPU @ 2.50GHz",
            "cores": 2,
            "threads": 1,
            "torch": "2.13.0",
            "onnxruntime": "1.32.0",
        },
        "baseline": baseline,
        "chosen": pick,
        "ratios": {key: cost(pick, key) / cost(baseline, key) if pick else 1.0 for key in COST_KEYS},
        "latency_ratio": pick["latency_ratio"] if pick else None,
        "score_drop": _score_drop(baseline, pick) if pick else None,
        "front": front,
        "hypervolume": 0.81,
        "evaluations": len(records),
        "failed": sum(record["state"] == "failed" for record in records),
        "wall_s": 118.4 if status != "interrupted" else 31.0,
    }
    _dump(out / "result.json", result)
    _dump(out / "run.json", _settings(result))
    (out / "evaluations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    _dump(out / "history.json", {"baseline": _history(draw, 30, 2.3, 0.975), "chosen": _history(draw, 20, 0.9, 0.97)})
    if pick is not None:
        _dump(out / "layers.json", _layers(pick))
    return out


def pareto(points: list[Json]) -> list[Json]:
    """Points that no other point beats in both latency and score, by comparing all pairs."""
    rows = [(share(p), -p["score"]["val"]) for p in points]
    return [
        p
        for p, mine in zip(points, rows, strict=True)
        if not any(all(a <= b for a, b in zip(other, mine, strict=True)) and other != mine for other in rows)
    ]


def cost(point: Json, key: str) -> float:
    """A cost of a point in its own unit."""
    return float(_ms(point) if key == "latency" else point.get(f"{key}_bytes", point.get(key)))


def share(point: Json) -> float:
    """Latency of a point over the baseline's."""
    return float(point["latency_ratio"]["median"]) if point["latency_ratio"] else 1.0


def _ms(point: Json) -> float:
    return float(point["latency_ms"]["median"])


def _widths(keep: list[float]) -> list[tuple[str, str, int, int, int, int]]:
    """(name, kind, in, out, kernel, side) of each layer, with each stage's channels cut to a kept share."""
    first = max(4, round(STAGES[0][0] * keep[0]))
    rows = [("stem.0", "Conv2d", 1, first, 3, STAGES[0][2])]
    before = first
    for index, (channels, blocks, side) in enumerate(STAGES):
        out = max(4, round(channels * keep[index]))
        for block in range(blocks):
            inner = max(4, round(channels * keep[index] * (0.8 if keep[index] < 1 else 1.0)))
            name = f"layer{index + 1}.{block}"
            rows.append((f"{name}.conv1", "Conv2d", before, inner, 3, side))
            rows.append((f"{name}.conv2", "Conv2d", inner, out, 3, side))
            if before != out:
                rows.append((f"{name}.shortcut.0", "Conv2d", before, out, 1, side))
            before = out
    rows.append(("head", "Linear", before, 10, 1, 1))
    return rows


def _weights(row: tuple[str, str, int, int, int, int]) -> int:
    return row[2] * row[3] * row[4] ** 2


def _point(draw: random.Random, rows: list[Any], *, int8: bool, steps: list[Json]) -> Json:
    parameters = sum(_weights(row) + row[3] for row in rows)
    macs = sum(_weights(row) * row[5] ** 2 for row in rows)
    full = _widths([1.0, 1.0, 1.0])
    lost = 1 - parameters / sum(_weights(row) + row[3] for row in full)
    median = (0.02 + macs * 3.4e-8 / (3.0 if int8 else 1.0)) * draw.uniform(0.97, 1.05)
    val = 0.978 - 0.055 * lost**14 - (0.003 if int8 else 0) + (draw.gauss(-0.004, 0.003) if steps else 0)
    return {
        "steps": steps,
        "score": {"val": round(min(1.0, val), 4), "test": None, "test_ci95": None},
        "latency_ms": {
            "median": round(median, 5),
            "p10": round(median * 0.96, 5),
            "p90": round(median * 1.09, 5),
            "batch": 1,
            "threads": 1,
            "runtime": "onnxruntime",
        },
        "memory_bytes": int(4 * parameters / (3.5 if int8 else 1) + 4 * max(r[3] * r[5] ** 2 for r in rows) + 1.5e6),
        "size_bytes": int(parameters * (1.06 if int8 else 4.0) + 9000),
        "macs": macs,
        "parameters": parameters,
        "latency_ratio": None,
    }


def _evaluation(draw: random.Random, trial: int, baseline: Json, count: int) -> Json:
    seconds = round(draw.uniform(1.0, 2.4), 2)
    finished = round(14 + 90 * (trial + 1) / count, 2)
    if draw.random() < 0.05:
        causes = ("the loss became non-finite at step 40", "worker killed by signal 9 while fitting")
        error = f"NonFiniteLossError: {causes[0]}" if draw.random() < 0.6 else f"WorkerError: {causes[1]}"
        return _record(trial, "failed", None, error, seconds, finished)
    aim = 1 - 0.85 * min(1.0, (trial + 3) / (0.7 * count + 3))
    keep = [min(1.0, max(0.08, draw.gauss(aim, 0.18))) for _ in STAGES]
    int8 = draw.random() < 0.25 + 0.6 * trial / count
    groups = {f"layer{i + 1}.out": round(1 - k, 3) for i, k in enumerate(keep)}
    groups |= {f"layer{i + 1}.{b}.conv1": round(1 - 0.8 * k, 3) for i, k in enumerate(keep) for b in range(2)}
    saliency = draw.choice(["taylor", "magnitude"])
    steps: list[Json] = [{"method": "netwright.compress:Prune", "settings": {"ratios": groups, "saliency": saliency}}]
    if int8:
        settings = {"activations": "uint8", "weights": "int8"}
        steps.append({"method": "netwright.compress:QuantizeInt8", "settings": settings})
    point = _point(draw, _widths(keep), int8=int8, steps=steps)
    ratio = _ms(point) / _ms(baseline)
    point["latency_ratio"] = {"median": ratio, "low": 0.97 * ratio, "high": 1.03 * ratio, "noisy": False}
    return _record(trial, "ok", point, None, seconds, finished)


def _record(trial: int, state: str, point: Json | None, error: str | None, seconds: float, finished: float) -> Json:
    return {
        "trial": trial,
        "state": state,
        "point": point,
        "error": error,
        "seconds": seconds,
        "finished_s": finished,
    }


def _test_scores(draw: random.Random, point: Json, drop: float) -> None:
    test = round((0.9778 - drop) * TEST_IMAGES) / TEST_IMAGES
    half = 1.96 * math.sqrt(test * (1 - test) / TEST_IMAGES)
    point["score"]["test"] = test
    point["score"]["test_ci95"] = [max(0.0, test - half), min(1.0, test + half)]


def _score_drop(baseline: Json, pick: Json) -> Json:
    change = pick["score"]["test"] - baseline["score"]["test"]
    return {"test": change, "ci95": [change - 0.009, change + 0.009]}


def _history(draw: random.Random, epochs: int, loss: float, score: float) -> list[Json]:
    return [
        {
            "step": 20 * (epoch + 1),
            "epoch": epoch + 1,
            "train_loss": loss * math.exp(-epoch / (epochs / 5)) + abs(draw.gauss(0.02, 0.01)),
            "val_score": score - (score - 0.3) * math.exp(-epoch / (epochs / 9)) + draw.gauss(0, 0.003),
            "lr": 1e-3 * (1 - epoch / epochs),
            "seconds": 0.8 * (epoch + 1),
        }
        for epoch in range(epochs)
    ]


def _layers(pick: Json) -> list[Json]:
    ratios = pick["steps"][0]["settings"]["ratios"]
    after = {row[0]: row for row in _widths([1 - ratios[f"layer{i + 1}.out"] for i in range(len(STAGES))])}
    int8 = len(pick["steps"]) > 1
    table = []
    for row in _widths([1.0, 1.0, 1.0]):
        new = after.get(row[0])
        table.append(
            {
                "layer": row[0],
                "kind": row[1],
                "baseline_shape": _shape(row),
                "chosen_shape": _shape(new) if new else None,
                "baseline_macs": _weights(row) * row[5] ** 2,
                "chosen_macs": _weights(new) * new[5] ** 2 if new else 0,
                "baseline_parameters": _weights(row) + row[3],
                "chosen_parameters": _weights(new) + new[3] if new else 0,
                "precision": "int8" if int8 and row[0] != "head" else "float32",
            }
        )
    return table


def _shape(row: tuple[str, str, int, int, int, int]) -> list[int]:
    return [row[3], row[2]] if row[1] == "Linear" else [row[3], row[2], row[4], row[4]]


def _settings(result: Json) -> Json:
    target = " ".join(f"--target '{key}{value}'" for key, value in result["target"].items())
    return {
        "schema": 1,
        "netwright": result["netwright"],
        "task": result["task"],
        "description": "Handwritten digits, 8x8 grey images in 10 classes, shown to a ResNet at 28x28.",
        "score": "accuracy",
        "target": result["target"],
        "keep": result["keep"],
        "budget_s": 120.0,
        "seed": result["seed"],
        "engine": "local",
        "workers": 1,
        "command": f"netwright optimize {result['task']} {target} --keep 'score>=-0.01' --out runs/demo --seed 0",
        "created": "2025-01-15T10:30:00+00:00",
    }


def _dump(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--status", choices=("met", "not_met", "interrupted"), default="met")
    parser.add_argument("--evaluations", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    write_example(given.out, status=given.status, evaluations=given.evaluations, seed=given.seed)


if __name__ == "__main__":
    main()
