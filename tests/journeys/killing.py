"""kill -9 of ansible-playbook at the boundary of any two tasks, for the tests of what a second run then does.

_, tasks = counted(site, "playbooks/rotate.yml", "-e", "rotate=s3")  # a whole run, and what it consists of
for number in sample(tasks, 15, "Make the new values"):
    at = kill(site, number, "playbooks/rotate.yml", "-e", "rotate=s3")   # the task that did not start any more
    site.playbook("playbooks/rotate.yml")
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import pathlib
import random
import signal
import tempfile

from journey import Site

CALLBACKS = pathlib.Path(__file__).parent / "callbacks"


def _run(site: Site, at: int, playbook: str, more: tuple[str, ...]) -> tuple[int, str, list[str]]:
    with tempfile.TemporaryDirectory(prefix="mlflow-kit-kill-") as work:
        log = pathlib.Path(work) / "tasks"
        log.touch()
        own = {
            **site.environment,
            "ANSIBLE_CALLBACK_PLUGINS": os.pathsep.join(
                [str(CALLBACKS), os.environ.get("ANSIBLE_CALLBACK_PLUGINS", "")]
            ),
            "ANSIBLE_CALLBACKS_ENABLED": "kill_at",
            "KIT_KILL_AT": str(at),
            "KIT_KILL_LOG": str(log),
        }
        # The shell tells of a signal by its exit status, and so by what is printed last.
        line = 'ansible-playbook "$@"; echo "exit $?"'
        argv = ("sh", "-c", line, "sh", "-i", site.inventory, playbook, *more)
        out = dataclasses.replace(site, environment=own).command(*argv)
        return int(out.rsplit("exit ", 1)[1]), out, log.read_text().splitlines()


def counted(site: Site, playbook: str, *more: str) -> tuple[str, list[str]]:
    """Run the playbook to its end; return what it printed and the names of its tasks in their order, handlers too."""
    code, out, tasks = _run(site, 0, playbook, more)
    assert code == 0, f"{playbook} {' '.join(more)}: exit {code}\n{out[-8000:]}"
    return out, tasks


def kill(site: Site, number: int, playbook: str, *more: str) -> str:
    """Kill the playbook's run when its task `number` (from 1) starts; return that task's name, "" if it ended before.

    What a killed run has begun on a host goes on there until it is done, as after any loss of the controller.
    """
    code, out, tasks = _run(site, number, playbook, more)
    if code == 0 and len(tasks) < number:
        return ""
    assert code == 128 + signal.SIGKILL, f"{playbook} {' '.join(more)}: exit {code}\n{out[-8000:]}"
    return tasks[-1]


def sample(tasks: list[str], size: int, since: str, seed: int = 4) -> list[int]:
    """`size` numbers of `tasks`, the same for the same seed.

    The task that begins with `since` is the first that something depends on later: one number lies before it, the
    others are spread over what follows, one at random in each part of equal length.
    """
    chance = random.Random(seed)
    first = 1 + next(number for number, name in enumerate(tasks) if name.startswith(since))
    bounds = [first + (len(tasks) + 1 - first) * part // (size - 1) for part in range(size)]
    return [chance.randrange(1, first), *(chance.randrange(a, b) for a, b in itertools.pairwise(bounds))]
