"""Many calls at the same time, in a process as eventlet makes it.

    python -m cinder_dmlocal.tests.green FOLDER HOST:PORT meet|silence

FOLDER has ca.pem, cert.pem and key.pem; the agent of node-a listens at HOST:PORT. Says what
has happened once every call that is to be answered is.
"""

from __future__ import annotations

# Before anything else is imported, as in Cinder's services.
import eventlet

eventlet.monkey_patch()

# ruff: noqa: E402
import os
import socket
import sys

from cinder_dmlocal import errors, fleet, options
from cinder_dmlocal.tests import base
from cinder_dmlocal.wire import dmlocal_pb2 as pb

CALLERS = 16
CALLS = 300

# More than eventlet has native threads.
WAITING = 50


def nodes(folder: str, **endpoints: str) -> fleet.Fleet:
    """A fleet of agents that listen there: a='127.0.0.1:7450'."""
    values = {f'dmlocal_{name}': f'{folder}/{name}.pem' for name in ('ca', 'cert', 'key')}
    named = {f'node-{letter}': endpoint for letter, endpoint in endpoints.items()}
    section = base.section(
        **values,
        dmlocal_nodes=list(named),
        dmlocal_endpoints=named,
        dmlocal_look_timeout=20,
    )
    return fleet.Fleet(options.Settings.read(section))


def look(node: fleet.Node) -> None:
    """A call that an agent answers at once."""
    node.look(node.nodes.GetNode, pb.GetNodeRequest())


def meet(folder: str, endpoint: str) -> str:
    """Calls from many green threads to one agent; how many."""
    node = nodes(folder, a=endpoint)['node-a']

    def call() -> None:
        for _ in range(CALLS):
            look(node)

    # Threads meet in every place in which they can.
    sys.setswitchinterval(1e-7)
    # Each is alive meanwhile, and none waits for ever.
    callers = [eventlet.spawn(call) for _ in range(CALLERS)]
    for caller in callers:
        caller.wait()
    return str(CALLERS * CALLS)


def silence(folder: str, endpoint: str) -> str:
    """Many calls to a node that says nothing, and one to another; which have ended then."""
    ended = []
    with socket.create_server(('127.0.0.1', 0), backlog=WAITING) as silent:
        fleet_of_two = nodes(folder, a=endpoint, b=f'127.0.0.1:{silent.getsockname()[1]}')

        def wait() -> None:
            try:
                look(fleet_of_two['node-b'])
            except errors.Unreachable:
                ended.append('silent')

        for _ in range(WAITING):
            eventlet.spawn(wait)
        # All of them have begun.
        eventlet.sleep(0)
        look(fleet_of_two['node-a'])
        ended.append('answered')
    return ' '.join(ended)


def main() -> None:
    """Does what the arguments say."""
    folder, endpoint, what = sys.argv[1:]
    print({'meet': meet, 'silence': silence}[what](folder, endpoint), flush=True)
    # What eventlet has begun does not end by itself.
    os._exit(0)


if __name__ == '__main__':
    main()
