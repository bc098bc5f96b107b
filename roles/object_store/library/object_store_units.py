"""Ansible module: which units run, which do not, and which take a new configuration, in one call.

The packages enable 18 units, of which a node needs five; a task for each would cost more time than their start.
"""

from __future__ import annotations

import fnmatch

from ansible.module_utils.basic import AnsibleModule

READY = (("enabled", "active"), ("enabled", "activating"))


class Units:
    """The service manager's units."""

    def __init__(self, module: AnsibleModule) -> None:
        """Speak to the service manager through `module`."""
        self.module = module
        # update-rc.d for units that have a script of old besides would reload the manager once for each.
        module.run_command_environ_update = {"SYSTEMCTL_SKIP_SYSV": "1", "LC_ALL": "C"}

    def call(self, *argv: str) -> str:
        """Run systemctl and return its output; a failure ends the module."""
        return str(self.module.run_command(["systemctl", *argv], check_rc=True)[1])

    def states(self, units: list[str]) -> dict[str, tuple[str, str]]:
        """Return {unit: (state of its file, active state)}; the former is empty for a unit that does not exist."""
        found = {}
        if units:
            for block in self.call("show", "--property=Id,UnitFileState,ActiveState", *units).strip().split("\n\n"):
                values = dict(line.split("=", 1) for line in block.splitlines())
                found[values["Id"]] = (values["UnitFileState"], values["ActiveState"])
        return found

    def active(self, units: list[str]) -> list[str]:
        """Return those of `units` that run."""
        return [unit for unit, state in self.states(units).items() if state[1] not in ("inactive", "failed")]

    def surplus(self, patterns: list[str], packages: dict[str, list[str]]) -> list[str]:
        """Return enabled services that match `patterns` or belong to `packages` that only a dependency brought."""
        auto = self.module.run_command(["apt-mark", "showauto", *packages])[1].split() if packages else []
        patterns = patterns + [unit for name in auto for unit in packages[name]]
        lines = self.call("list-unit-files", "--no-legend", "--plain", "--type=service", "--state=enabled").splitlines()
        names = [line.split()[0] for line in lines]
        return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def main() -> None:
    """Run the module; it returns the lists `stopped`, `started`, `restarted` and `reloaded`."""
    names = {"type": "list", "elements": "str", "default": []}
    module = AnsibleModule(
        argument_spec={
            "daemon_reload": {"type": "bool", "default": False},
            "restart": names,
            "reload": names,
            "keep": names,
            "surplus": names,
            "surplus_packages": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    p, units = module.params, Units(module)
    if p["daemon_reload"] and not module.check_mode:
        units.call("daemon-reload")
    # What does not run yet is started with the new configuration anyway.
    restarted = units.active(p["restart"])
    reloaded = [unit for unit in units.active(p["reload"]) if unit not in restarted]
    stopped = [unit for unit in units.surplus(p["surplus"], p["surplus_packages"]) if unit not in p["keep"]]
    started = [unit for unit, state in units.states(p["keep"]).items() if state not in READY]
    if not module.check_mode:
        if restarted:
            units.call("restart", *restarted)
        if reloaded:
            units.call("reload", *reloaded)
        if stopped:
            units.call("disable", "--quiet", "--now", *stopped)
        if started:
            units.call("enable", "--quiet", "--now", *started)
            failed = [f"{unit} ({state[1]})" for unit, state in units.states(started).items() if state not in READY]
            if failed:
                module.fail_json(msg=f"these units do not run: {', '.join(failed)}; see `journalctl -u UNIT`")
    done = {"stopped": stopped, "started": started, "restarted": restarted, "reloaded": reloaded}
    module.exit_json(changed=p["daemon_reload"] or any(done.values()), **done)


if __name__ == "__main__":
    main()
