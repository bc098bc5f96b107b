"""A site's status: what each host was found to be, as one table for a person and as one object for a machine."""

from __future__ import annotations

import datetime
import ipaddress
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

OK, WARN, BAD = "ok", "warn", "BAD"
BACKUP_HOURS, DRILL_DAYS, CERTIFICATE_DAYS, DISK_PERCENT, POOL_PERCENT = 26, 8, 21, 85, 80
Row = dict[str, str]


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit in ("B", "KB", "MB") else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _age(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _since(moment: str | None, now: datetime.datetime) -> float | None:
    if not moment:
        return None
    return (now - datetime.datetime.fromisoformat(moment.replace("Z", "+00:00"))).total_seconds()


def _instances(host: str, found: Iterable[Mapping[str, Any]], now: datetime.datetime) -> list[Row]:
    rows = []
    for one in found:
        name = f"{one['unit']}@{one['instance']}"
        if not one["active"]:
            rows.append({"state": BAD, "host": host, "what": name, "words": "does not run: journalctl -u " + name})
            continue
        words = f"{one['version']}, up {_age(now.timestamp() - one['since'])}, {_size(one['memory'])}"
        words += f", health {one['health']} in {one['health_ms']:.0f} ms"
        state = OK if one["health"] == 200 else BAD
        if one["pending"]:
            words += f"; restart pending: {one['pending']}"
            state = WARN if state == OK else state
        rows.append({"state": state, "host": host, "what": name, "words": words})
    return rows


def _database(host: str, found: Mapping[str, Any]) -> list[Row]:
    if not found["up"]:
        return [{"state": BAD, "host": host, "what": "postgresql", "words": found["why"]}]
    used = 100 * found["connections"] / found["max"]
    words = f"{found['version']}, {_size(found['bytes'] or 0)}"
    words += f", {found['connections']} of {found['max']} connections, {found['active']} active"
    words += "".join(f", {login}: {count}" for login, count in sorted(found["logins"].items()))
    state = WARN if used > POOL_PERCENT else OK
    if found["waiting"]:
        words += f"; {found['waiting']} wait for a lock"
    if found["pending"]:
        words += f"; restart pending for {', '.join(found['pending'])}"
        state = WARN
    if found["archive_failed"]:
        words += f"; {found['archive_failed']} times the log could not be archived: see docs/backup.md"
        state = BAD
    return [{"state": state, "host": host, "what": "postgresql", "words": words}]


def _object_store(host: str, found: Mapping[str, Any]) -> list[Row]:
    words = f"swift {found['version']}, {found['objects']} objects, {_size(found['bytes'])}"
    if found["down"]:
        words += f"; not running: {', '.join(found['down'])}"
    if not found["up"]:
        words += "; its proxy does not answer"
    return [{"state": BAD if found["down"] or not found["up"] else OK, "host": host, "what": "s3", "words": words}]


def _gateway(host: str, found: Mapping[str, Any]) -> list[Row]:
    if not found["up"]:
        return [{"state": BAD, "host": host, "what": "gateway", "words": found["why"]}]
    words = f"nginx {found['version']}, {len(found['servers'])} servers behind"
    state = OK
    if found["out"]:
        words += f", taken out: {', '.join(found['out'])}"
        state = WARN
    rows = [{"state": state, "host": host, "what": "gateway", "words": words}]
    days = found["certificate_days"]
    if days is None:
        return [*rows, {"state": OK, "host": host, "what": "certificate", "words": "none: plain HTTP"}]
    words = f"{days:.0f} days left, by {found['issuer']}" if days >= 0 else f"expired {-days:.1f} days ago"
    state = BAD if days < 0 else WARN if days < CERTIFICATE_DAYS else OK
    return [*rows, {"state": state, "host": host, "what": "certificate", "words": words}]


def _alerts(host: str, found: Mapping[str, Any], now: datetime.datetime) -> list[Row]:
    if not found["up"]:
        return [{"state": BAD, "host": host, "what": "monitoring", "words": found["why"]}]
    words = (
        f"{found['reached']} of {found['targets']} sources answer, {len(found['alerts'])} of {found['rules']} alerts"
    )
    state = OK if found["reached"] == found["targets"] else WARN
    rows = [{"state": state, "host": host, "what": "monitoring", "words": words}]
    for alert in found["alerts"]:
        # Prometheus writes nanoseconds.
        age = _since(alert["since"][:19] + "Z", now) or 0.0
        state = BAD if alert["severity"] == "critical" else WARN
        words = f"{alert['summary']}, for {_age(age)}"
        rows.append({"state": state, "host": host, "what": f"alert {alert['name']}", "words": words})
    return rows


def _disks(host: str, lines: Iterable[str]) -> list[Row]:
    """From the lines of `df --output=target,size,avail -B1` below its head; each file system once."""
    rows = []
    for target, size, free in sorted({tuple(line.split()) for line in lines}):
        used = 100 * (1 - int(free) / int(size)) if int(size) else 0.0
        state = BAD if used > 95 else WARN if used > DISK_PERCENT else OK
        words = f"{used:.0f} % of {_size(int(size))} used, {_size(int(free))} free"
        rows.append({"state": state, "host": host, "what": f"disk {target}", "words": words})
    return rows


def _backup(host: str, text: str, kind: str, now: datetime.datetime) -> list[Row]:
    longest = {"backup": BACKUP_HOURS * 3600, "drill": DRILL_DAYS * 86400}[kind]
    if not text:
        words = (
            "there was none yet: playbooks/backup.yml"
            if kind == "backup"
            else "there was none yet: playbooks/drill.yml"
        )
        return [{"state": WARN, "host": host, "what": f"last {kind}", "words": words}]
    found = json.loads(text)
    good = found.get("last_good") or {}
    age = _since(good.get("started"), now)
    state = BAD if age is None or age > longest else OK
    words = "none was good" if age is None else f"good {_age(age)} ago"
    if good.get("database"):
        words += f", database {_size(good['database'].get('bytes') or 0)}"
    if good.get("bucket"):
        words += f", bucket {_size(good['bucket'].get('bytes') or 0)}"
    if found.get("local"):
        words += "; on the host's own disk"
        state = WARN if state == OK else state
    if found["result"] != "ok":
        words += f"; the last one failed: {found['error']}"
        state = BAD
    return [{"state": state, "host": host, "what": f"last {kind}", "words": words}]


def site_host(variables: Mapping[str, Any], backups: bool) -> dict[str, Any]:
    """Return what playbooks/status.yml has registered among a host's `variables`, in the form of site_status.

    Where the site takes `backups`, the host that takes them is the one that has their state file, or the first.
    """
    seen = variables.get("status_host", {})
    if seen.get("unreachable") or "stdout" not in seen:
        return {"unreachable": True}
    disks, backup, drill, flags = (part.strip() for part in f"{seen['stdout']}\n".split("---\n"))
    found: dict[str, Any] = {"disks": disks.splitlines()[1:], "flags": flags.split()}
    if backups and (backup or drill or "database" in variables["group_names"]):
        found |= {"backup": backup, "drill": drill}
    for role, key in (
        ("mlflow", "instances"),
        ("postgresql", "status"),
        ("object_store", "status"),
        ("gateway", "status"),
        ("monitoring", "status"),
    ):
        answer = variables.get(f"{role}_status") or {}
        if key in answer:
            found[role] = answer[key]
    return found


def site_status(hosts: Mapping[str, Mapping[str, Any]], now: str, site: Mapping[str, Any]) -> dict[str, Any]:
    """Return a site's status: `state` (the worst), `rows` (state, host, what, words) and what was `found`.

    Args:
        hosts: host name to what its roles' status said: `mlflow`, `postgresql`, `object_store`, `gateway`, `monitoring`
            (each optional), `disks` (lines of df), `backup` and `drill` (text of their state files, empty for none;
            optional), `flags` (`reboot`, `moving`).
        now: the time in ISO 8601 with its zone.
        site: `name`, `url`, `allow` (entries with cidr and description), `rotating` (kinds of secrets).
    """
    moment = datetime.datetime.fromisoformat(now)
    rows: list[Row] = []
    for host, found in hosts.items():
        if found.get("unreachable", False):
            rows.append({"state": BAD, "host": host, "what": "host", "words": "it does not answer"})
            continue
        if "gateway" in found:
            rows += _gateway(host, found["gateway"])
        if "mlflow" in found:
            rows += _instances(host, found["mlflow"], moment)
        if "postgresql" in found:
            rows += _database(host, found["postgresql"])
        if "object_store" in found:
            rows += _object_store(host, found["object_store"])
        if "monitoring" in found:
            rows += _alerts(host, found["monitoring"], moment)
        rows += _disks(host, found.get("disks", []))
        for kind in ("backup", "drill"):
            if kind in found:
                rows += _backup(host, found[kind], kind, moment)
        if "reboot" in found.get("flags", []):
            rows.append({"state": WARN, "host": host, "what": "host", "words": "the distribution asks for a reboot"})
        if "moving" in found.get("flags", []):
            words = "an upgrade or rollback was cut off: run it again"
            rows.append({"state": BAD, "host": host, "what": "unfinished", "words": words})
    if site["rotating"]:
        words = f"rotation of {', '.join(site['rotating'])}: run playbooks/rotate.yml"
        rows.append({"state": WARN, "host": "site", "what": "unfinished", "words": words})
    for entry in site["allow"]:
        network = ipaddress.ip_network(entry["cidr"])
        wide = network.prefixlen == 0
        words = f"{entry['cidr']} {entry.get('description', '')}".strip()
        words += ": everybody" if wide else ""
        rows.append({"state": WARN if wide else OK, "host": "site", "what": "allowed", "words": words})
    if not site["allow"]:
        rows.append({"state": WARN, "host": "site", "what": "allowed", "words": "nobody: set site_allow"})
    worst = max((row["state"] for row in rows), key=[OK, WARN, BAD].index)
    return {"site": site["name"], "url": site["url"], "time": now, "state": worst, "rows": rows, "found": dict(hosts)}


def site_table(status: Mapping[str, Any]) -> list[str]:
    """Return the lines of a status to read: one row each, in columns."""
    rows = status["rows"]
    width = {column: max(len(row[column]) for row in rows) for column in ("state", "host", "what")}
    lines = [f"{status['site']} {status['url']} {status['time']}: {status['state']}"]
    for row in rows:
        head = "  ".join(row[column].ljust(width[column]) for column in ("state", "host", "what"))
        lines.append(f"{head}  {row['words']}")
    return lines


def site_cleanup(report: Mapping[str, Any]) -> list[str]:
    """Return what a cleanup (see cleanup.py of the role mlflow) has found or done, as lines to read."""
    verb = {"show": "Would delete for good", "delete": "Deleted for good"}[report["mode"]]
    counts = ", ".join(f"{len(report[kind])} {kind}" for kind in ("runs", "models", "experiments"))
    head = f"{verb}, of what was deleted {report['days']:g} days ago or earlier: {counts}; "
    head += (
        f"{report['objects']} objects and {report['uploads']['uploads']} unfinished uploads, {_size(report['bytes'])}"
    )
    lines = [head]
    lines += [f"{kind[:-1]} {name}" for kind in ("runs", "models", "experiments") for name in report[kind][:20]]
    lines += [f"kept {name}: {why}" for name, why in sorted(report["kept"].items())[:20]]
    if report["mode"] == "show" and (report["runs"] or report["models"] or report["uploads"]["uploads"]):
        lines.append("To do it: -e gc_delete=true")
    return lines


class FilterModule:
    """The filters."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Name to function."""
        return {
            "site_host": site_host,
            "site_status": site_status,
            "site_table": site_table,
            "site_cleanup": site_cleanup,
        }
