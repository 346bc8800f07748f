"""The command of the attacks: ``python -m tests.attack files --count 10000 --seed 0``."""

from __future__ import annotations

import argparse
import collections
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# Triton reads this when it is imported: kernels run on a CPU.
os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.append(str(Path(__file__).parents[1]))

from tests.attack import figures, files, kills, operators, power, together

ATTACKS = {
    "files": files.attack,
    "kills": kills.attack,
    "power": power.attack,
    "together": together.attack,
    "operators": operators.attack,
    "metrics": figures.attack,
}


def main(words: Sequence[str] | None = None) -> int:
    """Run attacks and print a table of what they found; return 1 if it is anything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("attack", choices=[*ATTACKS, "all"])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="part of the name of an attack")
    parser.add_argument("--keep", type=Path, help="folder for the files that show a fault")
    arguments = parser.parse_args(words)
    chosen = ATTACKS if arguments.attack == "all" else {arguments.attack: ATTACKS[arguments.attack]}
    faults = 0
    print(f"{'attack':40s} {'tries':>7s} {'found':>6s} {'seconds':>8s}", flush=True)
    for attack in chosen.values():
        start = time.perf_counter()
        for name, tries, found in attack(arguments.count, arguments.seed, arguments.only):
            faults += len(found)
            spent, start = time.perf_counter() - start, time.perf_counter()
            print(f"{name:40s} {tries:7d} {len(found):6d} {spent:8.1f}", flush=True)
            for fault, times in collections.Counter(f for f, _ in found).most_common():
                print(f"    {times:4d} x {fault}", flush=True)
            if arguments.keep is not None:
                arguments.keep.mkdir(parents=True, exist_ok=True)
                for i, (fault, data) in enumerate(found):
                    place = arguments.keep / f"{name.replace(' ', '-')}-{i:03d}"
                    place.write_bytes(data)
                    place.with_suffix(".txt").write_text(fault)

    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
