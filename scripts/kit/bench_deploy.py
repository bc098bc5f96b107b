"""From a bare host to the first logged run: the kit beside a guide that is followed by hand."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

from kit import vm
from kit.bench_lab import CLIENT, GUIDE, KIT, Lab, Measurement, cpu_seconds, ended, medians, pinned, say

PEER = "guide: apt, venv, pip, mlflow server in a plain unit"
UNIT = """[Unit]
Description=MLflow
After=network.target postgresql.service
[Service]
ExecStart=/opt/mlflow/bin/mlflow server --backend-store-uri postgresql+psycopg2://mlflow:mlflow@localhost/mlflow \
--default-artifact-root /srv/mlruns --host 0.0.0.0 --port 5000 --allowed-hosts '*'
Restart=always
[Install]
WantedBy=multi-user.target
"""


def guide() -> str:
    """The commands of the guides in circulation, with the versions that the kit pins."""
    index = vm.python_index()
    lines = [f"export PIP_INDEX_URL='{index}' PIP_CERT=/etc/ssl/certs/ca-certificates.crt"] if index else []
    return "\n".join(
        [
            "set -e",
            "export DEBIAN_FRONTEND=noninteractive",
            *lines,
            'mark() { echo "phase $1 $(date +%s.%N)"; }',
            "mark apt",
            "apt-get update >&2",
            "apt-get install -y postgresql python3-venv >&2",
            "mark database",
            "runuser -u postgres -- createuser mlflow >&2",
            "runuser -u postgres -- createdb -O mlflow mlflow >&2",
            """runuser -u postgres -- psql -c "ALTER ROLE mlflow PASSWORD 'mlflow'" >&2""",
            "mark pip",
            "python3 -m venv /opt/mlflow >&2",
            f"/opt/mlflow/bin/pip install {' '.join(pinned('server.txt', 'mlflow', 'psycopg2-binary', 'boto3'))} >&2",
            "mark start",
            "mkdir -p /srv/mlruns",
            f"cat > /etc/systemd/system/mlflow.service <<'UNIT'\n{UNIT}UNIT",
            "systemctl daemon-reload",
            "systemctl enable --now mlflow >&2",
            "mark end",
            "",
        ]
    )


def follow_guide(lab: Lab) -> tuple[float, dict[str, float]]:
    """Follow the guide on a new machine; returns seconds to the first run, and each phase's."""
    lab.client()
    address = lab.boot(GUIDE)[0]
    vm.write(CLIENT, "/root/guide.env", f"MLFLOW_TRACKING_URI=http://{address}:5000\n".encode())
    waiting = lab.await_run("/root/guide.env")
    began = time.monotonic()
    try:
        out = lab.ssh(GUIDE, guide(), "bench-guide")
        logged = ended(waiting) - began
    finally:
        waiting.kill()
    marks = [(name, float(at)) for name, at in re.findall(r"^phase (\w+) ([\d.]+)$", out, re.MULTILINE)]
    phases = {name: round(after - at, 2) for (name, at), (_, after) in zip(marks, marks[1:], strict=False)}
    phases["until_the_first_run"] = round(logged - sum(phases.values()), 2)
    return logged, phases


def task_seconds(output: str, top: int = 12) -> dict[str, float]:
    """The longest tasks of an ansible-playbook call, from the summary of profile_tasks: name to seconds."""
    found = re.findall(r"^(\S.*?) -{2,} +([\d.]+)s$", output, re.MULTILINE)
    return {name: float(seconds) for name, seconds in found[:top]}


def role_seconds(output: str) -> dict[str, float]:
    """Seconds of an ansible-playbook call by role, the first first; what stands in no role is «playbooks»."""
    pattern = r"^(?:TASK|RUNNING HANDLER) \[(.*)\] \**\n.*?\(\d+:\d\d:[\d.]+\) +(\d+):(\d\d):([\d.]+)"
    starts = [
        (name.split(" : ")[0] if " : " in name else "playbooks", int(h) * 3600 + int(m) * 60 + float(s))
        for name, h, m, s in re.findall(pattern, output, re.MULTILINE)
    ]
    end = re.search(r"^TASKS RECAP \*+\n.*?\(\d+:\d\d:[\d.]+\) +(\d+):(\d\d):([\d.]+)", output, re.MULTILINE)
    if end:
        starts.append(("", int(end[1]) * 3600 + int(end[2]) * 60 + float(end[3])))
    spent: dict[str, float] = {}
    for (name, at), (_, after) in zip(starts, starts[1:], strict=False):
        spent[name] = round(spent.get(name, 0) + after - at, 2)
    return spent


def bench(lab: Lab, rounds: int) -> Iterator[Measurement]:
    """Both sides in turn, each on a machine that was never used; who begins changes from round to round."""
    kit: list[float] = []
    kit_phases: list[dict[str, float]] = []
    peer: list[float] = []
    peer_phases: list[dict[str, float]] = []
    output = ""
    for number in range(rounds):
        for side in ("kit", "guide") if number % 2 else ("guide", "kit"):
            if side == "kit":
                deployed, logged, output = lab.deploy_kit()
                kit.append(logged)
                kit_phases.append({**role_seconds(output), "whole_of_site.yml": round(deployed, 2)})
                kit_phases[-1]["cpu_seconds"] = cpu_seconds(KIT)
            else:
                lab.remove(KIT)
                logged, phases = follow_guide(lab)
                phases["cpu_seconds"] = cpu_seconds(GUIDE)
                lab.remove(GUIDE)
                peer.append(logged)
                peer_phases.append(phases)
            say(f"deploy, round {number + 1} of {rounds}: {side} {logged:.1f} s")
    kit_median, peer_median = medians([{"s": s} for s in kit])["s"], medians([{"s": s} for s in peer])["s"]
    detail = {
        "kit_rounds": [round(s, 1) for s in kit],
        "peer_rounds": [round(s, 1) for s in peer],
        "kit_phases": medians(kit_phases),
        "peer_phases": medians(peer_phases),
        "kit_longest_tasks": task_seconds(output),
    }
    yield Measurement("deploy", "bare host to first logged run", "s", "lower", kit_median, peer_median, PEER, detail)
