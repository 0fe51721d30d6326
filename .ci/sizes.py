"""Limits on what is in the repository: exit status 1 and a line for each file, or the sum, that exceeds one."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BYTES = 500_000  # of any file
PACKAGE_LINES = 500  # of a file of efft_kernels/
LINES = 60_000  # of all files together, pictures left out


def problems(root: Path = ROOT) -> list[str]:
    """What exceeds a limit, among the files that git tracks or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        check=True,
    )
    found, total = [], 0
    for name in sorted(set(listed.stdout.decode().split("\0")) - {""}):
        if not (root / name).is_file():  # deleted, but not yet committed
            continue
        content = (root / name).read_bytes()
        if len(content) > BYTES:
            found.append(f"{name} has {len(content):,} bytes, at most {BYTES:,} are allowed")
        if b"\0" in content:
            continue
        lines = content.count(b"\n")
        total += lines
        if name.startswith("efft_kernels/") and name.endswith(".py") and lines > PACKAGE_LINES:
            found.append(f"{name} has {lines} lines, at most {PACKAGE_LINES} are allowed in a file of the package")
    if total > LINES:
        found.append(f"the files have {total:,} lines together, at most {LINES:,} are allowed")
    return found


if __name__ == "__main__":
    found = problems()
    print("\n".join(found), end="\n" if found else "")
    sys.exit(bool(found))
