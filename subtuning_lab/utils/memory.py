"""Main memory that is free, within what a container allows. No torch."""

from __future__ import annotations

import math
from pathlib import Path

import psutil

_GROUP_FILES = {  # where groups are; limit, use, and the cached files in it, which the system gives back when asked
    "v1": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    "v2": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
}


def free_main_memory(root: Path = Path("/")) -> int:
    """Free bytes of the machine, or what this process's control groups (version 1 and 2) leave of them."""
    free = psutil.virtual_memory().available
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not on Linux
        return free
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base, *names = _GROUP_FILES["v1" if controllers else "v2"]
        base, group = root / base, root / base / path.lstrip("/")
        # A parent's limit binds as well; in a container the path may be the host's, of which only the base is there.
        for place in [group, *group.parents][: len(group.parts) - len(base.parts) + 1]:
            free = min(free, _left_in(place, *names))
    return max(0, free)


def _left_in(group: Path, limit: str, usage: str, cache: str) -> float:
    """Bytes that a control group leaves to its processes; infinite without a limit, or without such a group."""
    try:
        most, used = (group / limit).read_text().strip(), int((group / usage).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return math.inf
    return math.inf if most == "max" else int(most) - used + int(stat.get(cache, 0))
