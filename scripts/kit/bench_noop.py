"""A run of site.yml that has nothing to do, beside the run that did it all."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

from kit import vm
from kit.bench_deploy import role_seconds, task_seconds
from kit.bench_lab import KIT, BenchError, Lab, Measurement, cpu_seconds, medians, say

PEER = "the first run, of site.yml and client.yml, on the same machine"


def changed(output: str) -> list[str]:
    """The names of the tasks that changed something, from the output of ansible-playbook."""
    tasks = re.split(r"^(?:TASK|RUNNING HANDLER) \[", output.partition("PLAY RECAP")[0], flags=re.MULTILINE)[1:]
    return [task.partition("]")[0] for task in tasks if re.search(r"^changed: ", task, re.MULTILINE)]


def bench(lab: Lab, rounds: int) -> Iterator[Measurement]:
    """Yield the seconds of a run that changes nothing; raises BenchError when one changes something."""
    if not lab.deployed:
        lab.deploy_kit()
    elif vm.execute(KIT, "sh", "-c", "test -e /opt/bench-plain && echo yes", check=False) == "yes":
        # Another bench had a database added: that goes first.
        lab.playbook("site.yml", log="bench-noop")
    seconds: list[float] = []
    phases: list[dict[str, float]] = []
    output = ""
    for number in range(rounds):
        used, began = cpu_seconds(KIT), time.monotonic()
        output = lab.playbook("site.yml", log="bench-noop")
        seconds.append(time.monotonic() - began)
        phases.append({**role_seconds(output), "host_cpu_seconds": round(cpu_seconds(KIT) - used, 1)})
        if tasks := changed(output):
            raise BenchError(f"a run that should have nothing to do changed something: {', '.join(tasks)}")
        say(f"noop, round {number + 1} of {rounds}: {seconds[-1]:.1f} s")
    detail = {
        "kit_rounds": [round(s, 1) for s in seconds],
        "tasks": len(re.findall(r"^TASK \[", output, re.M)),
        "kit_phases": medians(phases),
        "kit_longest_tasks": task_seconds(output),
    }
    middle = medians([{"s": s} for s in seconds])["s"]
    yield Measurement("noop", "site.yml with nothing to do", "s", "lower", middle, lab.first_seconds, PEER, detail)
