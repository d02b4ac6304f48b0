"""Kills what a test run has started once the run is gone, however it ended.

Standard input says what there is: `+PID` for a process group, `-PID` for one that has
ended. It ends with the run, and then whatever is left is killed. Started by its path, so
that it has nothing of its starter's to read, and lives in a session of its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys


def main() -> None:
    """Keeps the list until standard input ends."""
    groups: set[int] = set()
    for line in sys.stdin:
        group = int(line[1:])
        if line.startswith('+'):
            groups.add(group)
        else:
            groups.discard(group)
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


if __name__ == '__main__':
    main()
