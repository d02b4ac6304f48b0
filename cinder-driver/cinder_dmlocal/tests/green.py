"""Many calls to one agent at the same time, in a process as eventlet makes it.

    python -m cinder_dmlocal.tests.green FOLDER HOST:PORT

FOLDER has ca.pem, cert.pem and key.pem. Ends with success once all are answered.
"""

from __future__ import annotations

# Before anything else is imported, as in Cinder's services.
import eventlet

eventlet.monkey_patch()

# ruff: noqa: E402
import os
import sys

from cinder_dmlocal import fleet, options
from cinder_dmlocal.tests import base
from cinder_dmlocal.wire import dmlocal_pb2 as pb

CALLERS = 16
CALLS = 300


def main() -> None:
    """Calls from many green threads."""
    folder, endpoint = sys.argv[1:]
    values = {f'dmlocal_{name}': f'{folder}/{name}.pem' for name in ('ca', 'cert', 'key')}
    nodes = {'dmlocal_nodes': ['node-a'], 'dmlocal_endpoints': {'node-a': endpoint}}
    settings = options.Settings.read(base.section(**values, **nodes))
    node = fleet.Fleet(settings)['node-a']

    def call() -> None:
        for _ in range(CALLS):
            node.look(node.nodes.GetNode, pb.GetNodeRequest())

    # Threads meet in every place in which they can.
    sys.setswitchinterval(1e-7)
    # Each is alive meanwhile, and none waits for ever.
    callers = [eventlet.spawn(call) for _ in range(CALLERS)]
    for caller in callers:
        caller.wait()
    print(CALLERS * CALLS, flush=True)
    # What eventlet has begun does not end by itself.
    os._exit(0)


if __name__ == '__main__':
    main()
