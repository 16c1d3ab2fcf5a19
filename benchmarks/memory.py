"""Peak memory of a call, in a process of its own."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Makes glibc give freed blocks of a MiB and more back at once, so that the peak is memory in use and not in its store.
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}


def peak_of(call: Callable[[], object]) -> dict[str, float]:
    """
    Call, and measure.

    :param call: the call
    :return: MiB that the process held before, and by how much its peak was above that
    """
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak to what is held now
    before = _status("VmRSS")
    call()
    return {"before_mib": before, "peak_over_before_mib": _status("VmHWM") - before}


def _status(field: str) -> float:
    """A field of this process's status, in MiB."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"{field} is not in /proc/self/status")


def in_own_process(script: str, *arguments: str) -> dict[str, Any]:
    """
    Run a script that prints figures as JSON.

    :param script: path
    :param arguments: arguments of the command line
    :return: the figures; ``failed`` with the exit status if there are none, as when it is killed for want of memory
    """
    command = [sys.executable, script, *arguments]
    process = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **RETURN_MEMORY})
    return json.loads(process.stdout) if process.returncode == 0 else {"failed": process.returncode}
