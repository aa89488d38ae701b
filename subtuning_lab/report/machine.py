"""Which machine computes, and which commit of the project."""

import os
import platform
import subprocess


def machine_line() -> str:
    """Names the machine that computes, for example "2 CPU cores (x86_64), Python 3.11, torch 2.14.1"."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cores} CPU cores ({platform.machine()})"
    python = ".".join(platform.python_version_tuple()[:2])
    return f"{device}, Python {python}, torch {torch.__version__.split('+')[0]}"


def commit() -> str:
    """The commit that runs, where git knows it; else what the environment variable COMMIT says, or "unknown"."""
    told = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return told.stdout.strip() or os.environ.get("COMMIT", "unknown")
