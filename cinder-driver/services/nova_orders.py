"""Nova and Cinder over agents that are somebody else's, by order.

    python -m services.nova_orders FOLDER NODE=HOST:PORT…

FOLDER has ca.pem, driver.pem and driver.key, and takes what the services write. Each line
of standard input is an order, {"do": …}, and each has one line of standard output as its
answer; the first line says that all is up. What a guest does with its device is left to
whoever gives the orders: a live migration waits for them at the moment at which the guest
moves.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
from typing import Any

from services.flows import Cloud
from services.hypervisors import Move
from services.processes import Processes

# Emulated nodes take their time.
SETTINGS = {'dmlocal_close_timeout': 2, 'dmlocal_look_timeout': 10, 'dmlocal_call_timeout': 100}


class Untouched:
    """Devices that somebody else opens and writes."""

    def open(self, host: str, device: str) -> None:
        pass

    def shut(self, host: str, device: str) -> None:
        pass

    def copy(self, host: str, old: str, new: str) -> None:
        pass


class Orders:
    """What may be ordered beyond the methods of Cloud."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud
        self._moves: dict[str, Move] = {}

    def hold(self, server: str) -> None:
        """Has the next live migration of an instance wait."""
        self._moves[server] = self._cloud.hypervisors.hold(server)

    def meet(self, server: str) -> None:
        """Waits until the guest is about to move."""
        self._moves[server].wait()

    def decide(self, server: str, outcome: str) -> None:
        """Says what came of it."""
        self._moves[server].decide(outcome)

    def delete(self, server: str) -> None:
        """The end of an instance."""
        self._cloud.servers.delete(server)

    def delete_volume(self, volume: str) -> None:
        """The end of a volume, once nothing of an instance's is left."""
        self._cloud.volumes.wait(volume, 'available')
        self._cloud.volumes.delete(volume)

    def attached(self, volume: str) -> list[str]:
        """Hosts that attachments of a volume name, in order."""
        rows = self._cloud.volumes.show(volume)['attachments']
        return sorted(str(row['host_name']) for row in rows)

    def home(self, volume: str) -> str:
        """Where Cinder believes a volume."""
        return str(self._cloud.volumes.show(volume)['os-vol-host-attr:host'])

    def obey(self, order: dict[str, Any]) -> Any:
        """Does what an order says."""
        name = order.pop('do')
        return getattr(self if hasattr(self, name) else self._cloud, name)(**order)


def main() -> None:
    """Begins, and ends with standard input."""
    folder = pathlib.Path(sys.argv[1])
    endpoints = dict(argument.split('=', 1) for argument in sys.argv[2:])
    # What libraries print is not an answer.
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    with Processes(folder) as processes:
        orders = Orders(Cloud(processes, endpoints, Untouched(), SETTINGS))
        print(json.dumps({'is': 'up'}), file=answers, flush=True)
        for line in sys.stdin:
            try:
                answer = {'is': orders.obey(json.loads(line))}
            except Exception as error:  # noqa: BLE001 - whoever ordered it is told
                answer = {'error': repr(error)}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == '__main__':
    main()
