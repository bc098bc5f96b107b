"""A restart under work: the kit's instances one by one, beside `systemctl restart` of the plain server."""

from __future__ import annotations

import json
import pathlib
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kit import vm
from kit.bench_lab import KIT, BenchError, Lab, Measurement, medians, say
from kit.bench_sides import PLAIN_UNIT, Sides

LOAD = pathlib.Path(__file__).with_name("load.py")
LOAD_UNIT = "kit-bench-load.service"
# Seconds of calm before, and those that both sides get from the order to restart on, so that a share of slow requests
# is a share of the same time.
CALM, STRETCH = 8.0, 30.0
PEER = "systemctl restart of mlflow server with its defaults"
CASES = {
    "failed requests": ("requests", "failed"),
    "p50 until answered": ("ms", "wait_median_ms"),
    "p99 until answered": ("ms", "wait_p99_ms"),
    "worst until answered": ("ms", "wait_worst_ms"),
}


def _report(path: str) -> dict[str, Any]:
    text = vm.execute(KIT, "cat", path, check=False)
    found: dict[str, Any] = json.loads(text) if text else {}
    return found


def _start_load(environment: Mapping[str, str]) -> None:
    text = "".join(f"{name}={value}\n" for name, value in environment.items())
    vm.write(KIT, "/root/bench-load.env", text.encode())
    vm.write(KIT, "/root/load.py", LOAD.read_bytes())
    vm.execute(KIT, "sh", "-c", "rm -f /root/bench-load.*n /root/bench-load.before")
    argv = ["systemd-run", f"--unit={LOAD_UNIT}", "--collect", "--quiet", "-p", "EnvironmentFile=/root/bench-load.env"]
    argv += ["-p", "TimeoutStopSec=170", "-p", "KillMode=mixed", "/opt/mlflow/current/bin/python", "-W", "ignore"]
    vm.execute(KIT, *argv, "/root/load.py", "run", "--out", "/root/bench-load.json")
    until = time.monotonic() + 120
    while _report("/root/bench-load.json").get("requests", 0) < 30:
        if time.monotonic() > until:
            raise BenchError(vm.execute(KIT, "journalctl", "-u", LOAD_UNIT, "-n", "30", "-o", "cat", "--no-pager"))
        time.sleep(0.5)


def _stretch() -> dict[str, Any]:
    """End the load's present stretch and return its report."""
    vm.execute(KIT, "rm", "-f", "/root/bench-load.before")
    vm.execute(KIT, "systemctl", "kill", "--signal=SIGUSR1", "--kill-whom=main", LOAD_UNIT)
    until = time.monotonic() + 30
    while not (found := _report("/root/bench-load.before")):
        if time.monotonic() > until:
            raise BenchError("the load does not report")
        time.sleep(0.1)
    return found


def _restart(lab: Lab, sides: Sides) -> float:
    """Restart what serves as its operator would; returns seconds until all of it serves again."""
    began = time.monotonic()
    if sides.serving == "plain":
        vm.execute(KIT, "systemctl", "restart", PLAIN_UNIT)
    else:
        stamp = "systemctl show -p ActiveEnterTimestampMonotonic " + shlex.join(sides.units)
        before = vm.execute(KIT, "sh", "-c", stamp).split()
        # Settings newer than a process are the reason for which it is restarted.
        vm.execute(KIT, "touch", "/etc/mlflow/mlflow.env")
        lab.playbook("playbooks/mlflow.yml", "--tags", "mlflow", log="bench-rollout")
        if set(before) & set(vm.execute(KIT, "sh", "-c", stamp).split()):
            raise BenchError("not every instance was restarted")
    sides.wait()
    return time.monotonic() - began


def _round(lab: Lab, sides: Sides) -> dict[str, dict[str, Any]]:
    _start_load(sides.client(sides.serving))
    try:
        _stretch()
        time.sleep(CALM)
        calm = _stretch()
        began = time.monotonic()
        seconds = _restart(lab, sides)
        time.sleep(max(STRETCH - (time.monotonic() - began), 3))
        # Its end waits for every call that is under way, so that the longest waits are among them.
        vm.execute(KIT, "systemctl", "stop", LOAD_UNIT)
        through = _report("/root/bench-load.json")
        if not through.get("ended"):
            raise BenchError("the load did not end by itself")
    finally:
        vm.execute(KIT, "systemctl", "stop", LOAD_UNIT, check=False)
    if calm["failed"] or calm["refused"] or through["refused"]:
        words = calm["failures"] + calm["refusals"] + through["refusals"]
        raise BenchError(f"requests failed for another reason: {words}")
    return {"calm": calm, "through": {**through, "restart_s": round(seconds, 1)}}


def measurements(seen: Mapping[str, Sequence[Mapping[str, Mapping[str, Any]]]], rounds: int) -> Iterator[Measurement]:
    """The measurements of the rounds of both sides, each with a `calm` and a `through` stretch."""
    numbers = ("requests", "failed", "failing_s", "wait_median_ms", "wait_p99_ms", "wait_worst_ms", "seconds")
    middle = {
        side: {
            "calm": medians([{n: one["calm"][n] for n in numbers} for one in done]),
            "through": medians([{n: one["through"][n] for n in (*numbers, "restart_s")} for one in done]),
        }
        for side, done in seen.items()
    }
    for case, (unit, name) in CASES.items():
        detail: dict[str, Any] = {"rounds": rounds}
        for side, word in (("kit", "kit"), ("plain", "peer")):
            detail[word] = middle[side]
            detail[f"{word}_added"] = round(middle[side]["through"][name] - middle[side]["calm"][name], 2)
            detail[f"{word}_rounds"] = [one["through"][name] for one in seen[side]]
            detail[f"{word}_gave_up"] = sum(len(one["through"]["gave_up"]) for one in seen[side])
        kit, peer = middle["kit"]["through"][name], middle["plain"]["through"][name]
        yield Measurement("rollout", case, unit, "lower", kit, peer, PEER, detail)


def bench(lab: Lab, rounds: int) -> Iterator[Measurement]:
    """Yield failed requests and the waits of the clients, through a restart of each side in turn."""
    sides = Sides(lab)
    seen: dict[str, list[dict[str, dict[str, Any]]]] = {"kit": [], "plain": []}
    try:
        for number in range(rounds):
            for side in ("plain", "kit") if number % 2 else ("kit", "plain"):
                sides.serve(side)
                seen[side].append(_round(lab, sides))
                last = seen[side][-1]["through"]
                words = f"{last['failed']} of {last['requests']} failed, worst wait {last['wait_worst_ms']:.0f} ms"
                say(f"rollout, round {number + 1} of {rounds}: {side} {words}, restarted in {last['restart_s']} s")
    finally:
        sides.serve("kit")
    yield from measurements(seen, rounds)
