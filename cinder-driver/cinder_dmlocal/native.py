"""What waits in native code, in a process whose threads eventlet has made green.

There, calls go through eventlet's native threads, so that green threads go on meanwhile.
The locks that such threads share must be native ones: whoever waits for a green lock in a
native thread is never woken. So grpc is loaded here, with the module `threading` as it is
without eventlet; the other modules of this package have it from here.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar('T')

# Of grpc, what it would itself load only when a channel is made.
_LATER = ('grpc._channel', 'grpc._plugin_wrapping')


def natively(act: Callable[[], T]) -> T:
    """Does what blocks in native code, so that green threads go on meanwhile."""
    if not _is_green():
        return act()
    from eventlet import tpool  # noqa: PLC0415 - eventlet is Cinder's choice, not ours

    return tpool.execute(act)


def threading() -> Any:
    """The module threading as it is without eventlet."""
    if _is_green():
        return sys.modules['eventlet.patcher'].original('threading')
    return importlib.import_module('threading')


def _is_green() -> bool:
    # Not imported: where nobody has, nothing is patched.
    patcher = sys.modules.get('eventlet.patcher')
    return patcher is not None and bool(patcher.is_monkey_patched('thread'))


def _load_grpc() -> None:
    # What it loads of Python's own keeps the threads that everybody else has.
    for name in ('asyncio', 'concurrent.futures.thread'):
        importlib.import_module(name)
    native = threading()
    green, sys.modules['threading'] = sys.modules['threading'], native
    try:
        for name in ('grpc', *_LATER):
            importlib.import_module(name)
    finally:
        sys.modules['threading'] = green
    if sys.modules['grpc._channel'].threading is not native:
        raise ImportError('grpc was loaded with green threads, before cinder_dmlocal')


_load_grpc()

import grpc  # noqa: E402 - as it was loaded just now

__all__ = ['grpc', 'natively', 'threading']
