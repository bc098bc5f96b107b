"""Measure the kit beside what people do by hand: one JSON object a line for each measurement."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Iterator

from kit import (
    bench_api,
    bench_artifacts,
    bench_deploy,
    bench_gateway,
    bench_idle,
    bench_noop,
    bench_rollout,
    bench_settings,
    bench_table,
    quickstart,
    vm,
)
from kit.bench_lab import BenchError, Lab, Measurement

# In the order of `all`: what needs a deployed machine takes the one that `deploy` left.
BENCHES: dict[str, Callable[[Lab, int], Iterator[Measurement]]] = {
    "deploy": bench_deploy.bench,
    "noop": bench_noop.bench,
    "idle": bench_idle.bench,
    "gateway": bench_gateway.bench,
    "api": bench_api.bench,
    "artifacts": bench_artifacts.bench,
    "rollout": bench_rollout.bench,
    "settings": bench_settings.bench,
}

# Rounds, unless one asks for another number: so many that a bench takes a few minutes after the deployment.
ROUNDS = {"artifacts": 2, "rollout": 1, "settings": 1}


def main() -> None:
    """Command line: `bench NAME... | all | table [--check]`."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("names", nargs="+", choices=[*BENCHES, "all", "table"], metavar="NAME")
    words = ", ".join(f"{number} for {name}" for name, number in ROUNDS.items())
    parser.add_argument("--rounds", type=int, help=f"how often each side is measured (3; {words}); medians are printed")
    parser.add_argument("--suite", choices=vm.SUITES, default="trixie", help="Debian 13 (trixie) or 12 (bookworm)")
    parser.add_argument("--record", action="store_true", help="keep the figures in docs/, and render the table anew")
    parser.add_argument("--check", action="store_true", help="with table: fail when docs/performance.md is behind")
    a = parser.parse_args()
    if "table" in a.names:
        sys.exit(bench_table.render(check=a.check))
    names = list(BENCHES) if "all" in a.names else [name for name in BENCHES if name in a.names]
    if a.rounds is not None and a.rounds < 1:
        parser.error(f"--rounds: found {a.rounds}, expected 1 or more")
    # An end from outside is an end like any other: the machines go.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with Lab(a.suite).opened() as lab:
            for name in names:
                for measurement in BENCHES[name](lab, a.rounds or ROUNDS.get(name, 3)):
                    line = measurement.line()
                    print(json.dumps(line), flush=True)
                    if a.record:
                        bench_table.record(line, a.suite)
    except (BenchError, quickstart.Failed, vm.VmError) as error:
        sys.exit(f"scripts/bench: {error}")
    if a.record:
        bench_table.render()


if __name__ == "__main__":
    main()
