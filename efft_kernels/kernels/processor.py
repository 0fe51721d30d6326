"""What /proc/cpuinfo says of the processor; nothing where there is no such file."""

import functools
from pathlib import Path


@functools.cache
def words() -> frozenset[str]:
    """All words of the file, among them the maker ("GenuineIntel") and the flags ("amx_tile")"""
    cpuinfo = Path("/proc/cpuinfo")
    return frozenset(cpuinfo.read_text().split() if cpuinfo.exists() else ())


def amd() -> bool:
    return "AuthenticAMD" in words()


def intel() -> bool:
    return "GenuineIntel" in words()
