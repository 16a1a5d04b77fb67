"""How much memory this process holds."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import torch

MEBI, GIBI = 2**20, 2**30


class Meter:
    """Memory that this process holds on a device, in bytes: now, and at the most since the last restart.

    On a CPU it is the kernel's own record of resident memory (VmRSS and VmHWM), good to a few MiB.

    Args:
        device: `"cpu"` or `"cuda"`.
    """

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"

    def restart(self) -> None:
        """Give freed memory back to the system, and let the peak start from what is held now."""
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew from VmRSS

    def now(self) -> int:
        """Return what is held now."""
        return torch.cuda.memory_allocated() if self._cuda else status_bytes("VmRSS")

    def peak(self) -> int:
        """Return what was held at the most."""
        if self._cuda:
            torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() if self._cuda else status_bytes("VmHWM")


def status_bytes(entry: str) -> int:
    """Return the bytes that `/proc/self/status` states.

    Args:
        entry: VmRSS for resident memory now, VmHWM for the most there was, RssAnon for what no file backs.

    Raises:
        OSError: Where there is no such entry.
    """
    found = re.search(rf"^{entry}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"expected {entry} in /proc/self/status, got none: this needs Linux")
    return int(found[1]) * 1024
