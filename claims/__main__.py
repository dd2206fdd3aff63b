"""``python -m claims``: see ``--help``."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from claims._harness import ROOT, Claim, ClaimError, find, load, run_claim, to_line
from netwright.core.errors import NetwrightError

_LIMIT_S = 300.0


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Run what the command line asks for.

    Returns:
        0 when every claim that was run holds (with ``--smoke``: runs), 1 when one does not, 2 for a request that
        cannot be met.
    """
    options = _parser().parse_args(arguments)
    try:
        if options.list:
            for name in find(root):
                print(f"{name}: {load(name, root).sentence}")
            return 0
        with _Writer(options.record) as write:
            if options.smoke:
                return _smoke(options.names or list(find(root)), root, write)
            if not options.names:
                raise ClaimError("Name a claim, or give --smoke or --list.")
            return max([_full(load(name, root), options.seeds, write) for name in options.names])
    except (NetwrightError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m claims", description="Run claims and print JSON lines.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="wing/method, or method where it is unique")
    parser.add_argument(
        "--seeds", nargs="+", type=int, metavar="SEED", help="default: 0 1 2, or as many as the claim asks"
    )
    parser.add_argument("--smoke", action="store_true", help="one seed, a tenth of the size: see that the scripts work")
    parser.add_argument("--list", action="store_true", help="name all claims")
    parser.add_argument("--record", type=Path, metavar="FILE", help="append the lines to FILE too")
    return parser


def _full(claim: Claim, seeds: Sequence[int] | None, write: Callable[[dict[str, Any]], None]) -> int:
    records: list[dict[str, Any]] = []

    def keep(record: dict[str, Any]) -> None:
        records.append(record)
        write(record)

    verdict = run_claim(claim, list(range(claim.seeds)) if seeds is None else seeds, keep)
    if records[-1]["seconds"] > _LIMIT_S:
        print(f"Claim {claim.name} took {records[-1]['seconds']:.0f} s; it may take {_LIMIT_S:.0f} s.", file=sys.stderr)
    return 0 if verdict.holds else 1


def _smoke(names: Sequence[str], root: Path, write: Callable[[dict[str, Any]], None]) -> int:
    if not names:
        print("No claims yet.", file=sys.stderr)
    failed = 0
    for name in names:
        try:
            run_claim(load(name, root), [0], write, smoke=True)
        except Exception as error:  # one rotten script must not hide the others
            failed += 1
            print(f"Claim {name} fails: {type(error).__name__}: {error}", file=sys.stderr)
    return 1 if failed else 0


class _Writer:
    """Prints records and appends them to a file where one is given."""

    def __init__(self, path: Path | None) -> None:
        self.file = None if path is None else path.open("a", encoding="utf-8")

    def __enter__(self) -> Callable[[dict[str, Any]], None]:
        return self.write

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()

    def write(self, record: dict[str, Any]) -> None:
        line = to_line(record)
        print(line, flush=True)
        if self.file is not None:
            self.file.write(line + "\n")
            self.file.flush()


if __name__ == "__main__":
    torch.set_num_threads(1)  # so that a claim gives the same numbers whatever the number of cores
    raise SystemExit(main())
