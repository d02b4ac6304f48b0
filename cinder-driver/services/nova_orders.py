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
import queue
import sys
from typing import Any

from services import many
from services.clients import Refused
from services.flows import Cloud
from services.hypervisors import Move
from services.processes import Processes

# Emulated nodes take their time, and more of it if much is asked of them at once.
PATIENCE = 900
SETTINGS = {'dmlocal_close_timeout': 2, 'dmlocal_look_timeout': 10, 'dmlocal_call_timeout': 600}


class Untouched:
    """Devices that somebody else opens and writes."""

    def __init__(self) -> None:
        self._begun: queue.Queue[tuple[str, str, str]] = queue.Queue()
        self._ended: queue.Queue[bool] = queue.Queue()

    def open(self, host: str, device: str) -> None:
        pass

    def shut(self, host: str, device: str) -> None:
        pass

    def copy(self, host: str, old: str, new: str) -> None:
        """Waits until somebody else has copied what is on one device to another."""
        self._begun.put((host, old, new))
        self._ended.get(timeout=PATIENCE)

    def meet(self) -> tuple[str, str, str]:
        """Waits until something is to be copied: on which host, from where, to where."""
        return self._begun.get(timeout=PATIENCE)

    def done(self) -> None:
        """Says that it is."""
        self._ended.put(True)


class Orders:
    """What may be ordered beyond the methods of Cloud."""

    def __init__(self, cloud: Cloud, devices: Untouched) -> None:
        self._cloud = cloud
        self._devices = devices
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

    def fail(self, event: str, host: str) -> None:
        """Has the next such event on a host fail."""
        self._cloud.hypervisors.fail(event, host)

    def connect_again(self, volume: str) -> None:
        """Has Cinder connect a volume where it is connected."""
        [row] = self._cloud.volumes.show(volume)['attachments']
        self._cloud.volumes.connect_again(row['attachment_id'], row['host_name'])

    def force_detach(self, volume: str) -> int:
        """An operator detaches a volume from wherever it is; the status of the answer."""
        [row] = self._cloud.volumes.attachments(volume)
        body = {'attachment_id': row['id']}
        try:
            self._cloud.volumes.act(volume, os_force_detach=body)
        except Refused as refused:
            return refused.status
        return 202

    def delete(self, server: str) -> None:
        """The end of an instance."""
        self._cloud.servers.delete(server)

    def delete_volume(self, volume: str) -> None:
        """The end of a volume, once nothing of an instance's is left."""
        self._cloud.volumes.wait(volume, 'available')
        self._cloud.volumes.delete(volume)

    def attached(self, volume: str) -> list[str]:
        """Hosts that attachments of a volume name, in order; the status if one names none."""
        shown = self._cloud.volumes.show(volume)['attachments']
        hosts = {row['attachment_id']: str(row['host_name']) for row in shown}
        rows = self._cloud.volumes.attachments(volume)
        return sorted(hosts.get(row['id'], row['status']) for row in rows)

    def grow(self, volume: str, size: int) -> None:
        """Gives a volume in use so many GiB."""
        self._cloud.volumes.act(volume, os_extend={'new_size': size})
        self._cloud.processes.wait(
            f'{volume} does not grow',
            lambda: self._cloud.volumes.wait(volume, 'in-use')['size'] == size,
        )

    def snapshot(self, volume: str) -> str:
        """A snapshot of a volume in use."""
        return self._cloud.volumes.snapshot(volume)

    def delete_snapshot(self, snapshot: str) -> None:
        """Its end."""
        self._cloud.volumes.delete_snapshot(snapshot)

    def begin_to_send(self, volume: str, node: str) -> list[str]:
        """Begins to migrate a volume in use; tells what is to be copied, and on which host."""
        host = f'fleet@dmlocal#{node}'
        body = {'host': host, 'force_host_copy': False, 'lock_volume': False}
        self._cloud.volumes.act(volume, os_migrate_volume=body)
        return list(self._devices.meet())

    def sent(self, volume: str) -> str:
        """Says that they are; waits for the end, and tells by which id agents know it now."""
        self._devices.done()

        def is_done() -> bool:
            row = self._cloud.volumes.show(volume)
            status = row['os-vol-mig-status-attr:migstat']
            assert status != 'error', row
            return status == 'success' and row['status'] == 'in-use'

        self._cloud.processes.wait(f'{volume} does not migrate', is_done)
        return str(self._cloud.volumes.show(volume)['os-vol-mig-status-attr:name_id'])

    def many(self, count: int) -> int:
        """So many volumes that come and go; tells how many were brought to other nodes."""
        # An emulated node that connects to dozens of others' disks at once is slow to say so.
        self._cloud.cinder.restart_volume({'dmlocal': {'dmlocal_look_timeout': 120}})
        self._cloud.wait_for_pools()
        return many.come_and_go(self._cloud.volumes, count, 'dmlocal', self._cloud.nodes)

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
    with Processes(folder, PATIENCE) as processes:
        devices = Untouched()
        slow = {'rpc_response_timeout': PATIENCE}
        cloud = Cloud(processes, endpoints, devices, SETTINGS, defaults=slow)
        orders = Orders(cloud, devices)
        print(json.dumps({'is': 'up'}), file=answers, flush=True)
        for line in sys.stdin:
            try:
                answer = {'is': orders.obey(json.loads(line))}
            except Exception as error:  # noqa: BLE001 - whoever ordered it is told
                answer = {'error': repr(error)}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == '__main__':
    main()
