"""The processes of a test run: each with a log, awaited, and ended whatever happens.

Each is a session of its own, so that a keeper (`keeper`) can kill what it has started with
it if the run itself is killed.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import psutil

DRIVER = pathlib.Path(__file__).parent.parent
LATER = 120.0


class NeverHappened(AssertionError):
    """What was waited for did not come, or cannot come any more."""


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on; all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(('127.0.0.1', 0))
        return [one.getsockname()[1] for one in sockets]


def module(name: str, *arguments: Any) -> list[str]:
    """What runs a module of this environment's Python."""
    return [sys.executable, '-m', name, *map(str, arguments)]


def program(name: str, *arguments: Any) -> list[str]:
    """What runs the main function of a module, as an installed script would."""
    return module('services.program', name, *arguments)


class Process:
    """One process, with what it has started."""

    def __init__(self, name: str, popen: subprocess.Popen[bytes], log: pathlib.Path) -> None:
        self.name = name
        self.popen = popen
        self.log = log

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self.popen.poll() is None

    def tail(self, size: int = 3000) -> str:
        """The end of its log."""
        return self.log.read_text(errors='replace')[-size:]

    def signal(self, number: signal.Signals) -> None:
        """Signals it and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, number)

    def kill(self) -> None:
        """Kills it and all that it has started, as a power cut does."""
        descendants = []
        with contextlib.suppress(psutil.NoSuchProcess):
            descendants = psutil.Process(self.popen.pid).children(recursive=True)
        self.signal(signal.SIGKILL)
        for one in descendants:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        self.popen.wait()
        until = time.monotonic() + LATER
        while any(_lives(one) for one in descendants) and time.monotonic() < until:
            time.sleep(0.01)


class Processes:
    """All processes of a run; a context that ends them."""

    def __init__(self, folder: pathlib.Path, patience: float = LATER) -> None:
        self.folder = folder
        # How long anything is waited for, in seconds.
        self.patience = patience
        self._running: dict[str, Process] = {}
        self._started = 0
        self._keeper = subprocess.Popen(
            [sys.executable, '-I', str(pathlib.Path(__file__).with_name('keeper.py'))],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def start(
        self, name: str, argv: list[str], environment: Mapping[str, str] | None = None
    ) -> Process:
        """Starts a process whose output goes to NAME.log; a name may be used again."""
        assert name not in self._running, f'{name} runs already'
        path = self.folder / f'{name}.log'
        with open(path, 'ab') as log:
            popen = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(environment),
                cwd=DRIVER,
                start_new_session=True,
            )
        self._tell('+', popen)
        process = self._running[name] = Process(name, popen, path)
        return process

    def run(
        self, name: str, argv: list[str], environment: Mapping[str, str] | None = None
    ) -> None:
        """Runs a process to its end, which must be a good one."""
        self.finish(self.start(name, argv, environment))

    def finish(self, process: Process) -> None:
        """Waits until a process has ended, which must be a good end."""
        status = process.popen.wait()
        self.forget(process)
        if status != 0:
            raise NeverHappened(f'{process.name} ended with {status}: {process.tail()}')

    def has(self, name: str) -> bool:
        """Whether a process of that name was started, and not killed."""
        return name in self._running

    def kill(self, name: str) -> None:
        """Kills a process, so that it may be started anew."""
        process = self._running[name]
        process.kill()
        self.forget(process)

    def forget(self, process: Process) -> None:
        """Does not look after a process any more that has ended."""
        self._tell('-', process.popen)
        del self._running[process.name]

    def wait(self, what: str, condition: Callable[[], Any]) -> Any:
        """Waits until the condition is true, and gives what it gave.

        Whoever has ended in the meantime, or all of them if it takes too long, have the
        ends of their logs told.
        """
        until = time.monotonic() + self.patience
        while not (given := condition()):
            ended = [one for one in self._running.values() if not one.is_running]
            if ended or time.monotonic() > until:
                raise NeverHappened(f'{what}:\n' + self.tails(ended or None))
            time.sleep(0.05)
        return given

    def wait_for_port(self, port: int, what: str) -> None:
        """Waits until somebody listens."""
        self.wait(f'{what} does not listen on {port}', lambda: _listens(port))

    def tails(self, of: list[Process] | None = None) -> str:
        """The ends of logs."""
        shown = list(self._running.values()) if of is None else of
        return '\n'.join(f'== {one.name}\n{one.tail()}' for one in shown)

    def end(self) -> None:
        """Kills all; the last started first."""
        for name in reversed(list(self._running)):
            self.kill(name)
        if self._keeper.stdin is not None:
            self._keeper.stdin.close()
        self._keeper.wait()

    def _environment(self, more: Mapping[str, str] | None) -> dict[str, str]:
        path = f'{self.folder / "bin"}:{os.environ.get("PATH", "/usr/bin:/bin")}'
        ours = {'PATH': path, 'PYTHONWARNINGS': 'ignore', 'PYTHONDONTWRITEBYTECODE': '1'}
        return {**os.environ, **ours, **(more or {})}

    def _tell(self, sign: str, popen: subprocess.Popen[bytes]) -> None:
        print(f'{sign}{popen.pid}', file=self._keeper.stdin, flush=True)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(('127.0.0.1', port), timeout=1).close()
    except OSError:
        return False
    return True


def _lives(one: psutil.Process) -> bool:
    """Whether it has not ended; who is to reap it does not matter."""
    try:
        return one.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
