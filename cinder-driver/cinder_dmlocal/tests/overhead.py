"""How long the driver takes for each call, its agents' own time left out.

    python -m cinder_dmlocal.tests.overhead

Prints {"overhead_ms": {CALL: MEDIAN, …}, "local_attach_calls": NUMBER}. The agents are
pretended ones in the same process: what is left out is only what they do once a request
has reached them, so their half of gRPC and TLS counts as the driver's.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from cinder_dmlocal.tests.base import DriverTestCase, Snapshot, Volume
from cinder_dmlocal.tests.fake import GIB

ROUNDS = 30


class Overhead(DriverTestCase):
    """What the driver is asked for in one round, each call timed."""

    def setUp(self) -> None:
        super().setUp()
        self.took: dict[str, list[float]] = defaultdict(list)
        self.attach_calls: set[int] = set()
        for agent in self.fleet.agents.values():
            agent.capacity = 1000 * GIB

    @contextlib.contextmanager
    def timed(self, call: str) -> Iterator[None]:
        served, began = self.fleet.served, time.perf_counter()
        yield
        took = time.perf_counter() - began
        self.took[call].append(took - (self.fleet.served - served))

    def round(self) -> None:
        """A volume's life: on its node, and once on another."""
        volume = Volume(1, 'fleet@dmlocal#node-a', 'creating')
        with self.timed('create'):
            self.driver.create_volume(volume)
        volume.status = 'available'
        row = self.cinder.reserve(volume, 'vm')
        self.fleet.order.clear()
        with self.timed('attach'):
            self.driver.initialize_connection(volume, {'host': 'node-a'})
        self.attach_calls.add(len(self.fleet.order))
        row.attach_status, row.attached_host = 'attached', 'node-a'
        snapshot, clone = Snapshot(volume), Volume(1, volume.host, 'creating')
        with self.timed('snapshot'):
            snapshot.provider_location = self.driver.create_snapshot(snapshot)[
                'provider_location'
            ]
        with self.timed('volume from snapshot'):
            self.driver.create_volume_from_snapshot(clone, snapshot)
        with self.timed('extend'):
            self.driver.extend_volume(volume, 2)
        with self.timed('detach'):
            self.driver.terminate_connection(volume, {'host': 'node-a'})
        volume.volume_attachment.clear()
        self.cinder.reserve(volume, 'vm')
        with self.timed('attach elsewhere'):
            self.driver.initialize_connection(volume, {'host': 'node-b'})
        self.driver.terminate_connection(volume, {'host': 'node-b'})
        volume.volume_attachment.clear()
        self.fleet.agents['node-b'].arrive(volume.id)
        with self.timed('delete'):
            self.driver.delete_volume(volume)
        with self.timed('delete snapshot'):
            self.driver.delete_snapshot(snapshot)
        self.driver.delete_volume(clone)

    def report(self) -> dict[str, Any]:
        """Medians of all rounds but the first, in which connections are made."""
        for _ in range(ROUNDS + 1):
            self.round()
        medians = {call: statistics.median(took[1:]) for call, took in self.took.items()}
        return {
            'overhead_ms': {call: round(1000 * took, 2) for call, took in medians.items()},
            'local_attach_calls': max(self.attach_calls),
        }


def main() -> None:
    """Measures and prints."""
    rounds = Overhead()
    rounds.setUp()
    try:
        print(json.dumps(rounds.report()))
    finally:
        rounds.doCleanups()


if __name__ == '__main__':
    main()
