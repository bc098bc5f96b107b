"""Callback of the tests: kills ansible-playbook without warning when its N-th task starts, or only counts them."""

from __future__ import annotations

import os
import pathlib
import signal
from typing import Any

from ansible.plugins.callback import CallbackBase

DOCUMENTATION = r"""
name: kill_at
type: aggregate
short_description: SIGKILL to ansible-playbook at the start of a task
description:
  - Writes the name of each task that starts, handlers too, to the file E(KIT_KILL_LOG), one a line.
  - Kills this process (SIGKILL) when the task of the number E(KIT_KILL_AT) would start, from 1; 0 never does.
"""


class CallbackModule(CallbackBase):  # type: ignore[misc]  # Ansible ships no types
    """Counts, and kills when its time has come."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "kill_at"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Read the environment."""
        super().__init__(*args, **kwargs)
        self.at, self.seen = int(os.environ.get("KIT_KILL_AT", "0")), 0
        self.log = pathlib.Path(os.environ["KIT_KILL_LOG"])
        self.log.write_text("")

    def v2_playbook_on_task_start(self, task: Any, is_conditional: bool) -> None:
        """A task would start now."""
        self.seen += 1
        with self.log.open("a") as file:
            file.write(f"{task.get_name()}\n")
        if self.seen == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def v2_playbook_on_handler_task_start(self, task: Any) -> None:
        """A handler is a task, too."""
        self.v2_playbook_on_task_start(task, False)
