"""When a site's maintenance window opens."""

from __future__ import annotations

import datetime
import re
import zoneinfo
from collections.abc import Callable, Mapping
from typing import Any

from ansible.errors import AnsibleFilterError

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
EXPECTED = "{days: [sat, sun], from: '02:00', to: '04:00', timezone: Europe/Berlin}"


def _refuse(found: Any) -> AnsibleFilterError:
    return AnsibleFilterError(f"found {found!r}; expected such as {EXPECTED}; change site_maintenance_window")


def _clock(text: Any) -> datetime.time:
    if not isinstance(text, str) or not re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", text):
        raise _refuse(text)
    return datetime.time.fromisoformat(text)


def site_window(window: Mapping[str, Any], now: str) -> dict[str, Any]:
    """Return when the window is open next: `seconds` from `now` (0: it is open, or there is none) and `words`.

    Args:
        window: `days` (three letters each; all when absent), `from` and `to` (HH:MM; `to` before `from` is on the
            next day), `timezone` (UTC when absent); empty for no window.
        now: the time in ISO 8601 with its zone.

    Raises AnsibleFilterError for a window that cannot be read, naming what was found.
    """
    if not window:
        return {"seconds": 0, "words": "no maintenance window is set: now"}
    unknown = set(window) - {"days", "from", "to", "timezone"}
    days = [str(day).lower() for day in window.get("days", DAYS)]
    if unknown or not days or set(days) - set(DAYS):
        raise _refuse(sorted(unknown) or window.get("days"))
    begin, end = _clock(window.get("from")), _clock(window.get("to"))
    if begin == end:
        raise _refuse(f"{window['from']} to {window['to']}")
    try:
        zone = zoneinfo.ZoneInfo(str(window.get("timezone", "UTC")))
    except (zoneinfo.ZoneInfoNotFoundError, ValueError) as error:
        raise _refuse(window.get("timezone")) from error
    moment = datetime.datetime.fromisoformat(now).astimezone(zone)
    # From yesterday, whose window may reach into today, to the same day of next week.
    for offset in range(-1, 8):
        day = moment.date() + datetime.timedelta(days=offset)
        if DAYS[day.weekday()] not in days:
            continue
        opens = datetime.datetime.combine(day, begin, zone)
        closes = datetime.datetime.combine(day + datetime.timedelta(days=int(end < begin)), end, zone)
        if moment < closes:
            # By the clock of the world, not of the wall: summer time may begin in between.
            seconds = max(0, round(opens.timestamp() - moment.timestamp()))
            until = closes.strftime("%A %H:%M")
            words = f"the maintenance window is open until {until} ({zone.key})"
            if seconds:
                words = (
                    f"the maintenance window opens {opens:%A %Y-%m-%d %H:%M} ({zone.key}), in {seconds // 60} minutes"
                )
            return {"seconds": seconds, "words": words}
    raise _refuse(window)


class FilterModule:
    """The filter."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Name to function."""
        return {"site_window": site_window}
