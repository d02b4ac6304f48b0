"""What tests of Nova's flows over pretended agents have in common."""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
import unittest
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from cinder_dmlocal.tests.fake import FakeFleet
from services.check_base import keep_certificates, processes_below
from services.flows import Cloud
from services.processes import Processes

NODES = ['node-a', 'node-b']

# Another backend has this node as well, and is therefore another fleet to Cinder.
SPARE = 'node-x'

# Pretended agents need no patience.
SETTINGS = {'dmlocal_close_timeout': 1, 'dmlocal_look_timeout': 2}


def volume_of(device: str) -> str:
    """The agents' id of a device."""
    return device.partition('dmlocal-')[2]


class FakeMachine:
    """Devices of pretended agents."""

    def __init__(self, fleet: FakeFleet) -> None:
        self._fleet = fleet

    def open(self, host: str, device: str) -> None:
        with self._fleet.lock:
            self._fleet.agents[host].open(volume_of(device))

    def shut(self, host: str, device: str) -> None:
        with self._fleet.lock:
            self._fleet.agents[host].shut(volume_of(device))

    def copy(self, host: str, old: str, new: str) -> None:
        with self._fleet.lock:
            volumes = self._fleet.agents[host].volumes
            for word in volumes[volume_of(old)].data:
                self._fleet.agents[host].write(volume_of(new), word)


class NovaCase(unittest.TestCase):
    """Each test has an empty cloud, and leaves one."""

    fleet: ClassVar[FakeFleet]
    cloud: ClassVar[Cloud]

    def setUp(self) -> None:
        self._is_clean = False
        self.addCleanup(self.clear)
        self.maxDiff = None

    def until(self, what: str, condition: Callable[[], Any]) -> None:
        """Waits until a condition is true."""
        self.cloud.processes.wait(what, condition)

    def guest(self, host: str = 'node-a') -> Guest:
        """A guest with two volumes, to which something was written."""
        root = self.cloud.volume(host, bootable=True)
        data = self.cloud.volume(host)
        server = self.cloud.boot(host, [root, data])
        guest = Guest(self, server, [root, data])
        guest.runs_on(host)
        guest.write()
        return guest

    def room(self, host: str, gib: int) -> None:
        """Leaves so much room on a node."""
        with self.fleet.lock:
            agent = self.fleet.agents[host]
            agent.capacity += (gib << 30) - agent._free()

    @contextlib.contextmanager
    def no_room(self, host: str, but: int = 0) -> Iterator[None]:
        """A node with room for so many volumes only."""
        self.room(host, but)
        try:
            yield
        finally:
            self.room(host, 90)

    def assert_clean(self) -> None:
        """Nothing is left, of anybody."""
        self.assertEqual([], self.cloud.servers.call('GET', '/servers')['servers'])
        volumes = self.cloud.volumes.call('GET', '/volumes?all_tenants=1')['volumes']
        self.assertEqual([], volumes)
        attachments = self.cloud.volumes.call('GET', '/attachments?all_tenants=1')
        self.assertEqual([], attachments['attachments'])
        self.assertEqual([], self.cloud.hypervisors.opened())
        for agent in self.fleet.agents.values():
            self.assertEqual({}, agent.volumes, agent.name)
            self.assertEqual({}, agent.snapshots, agent.name)
        self._is_clean = True

    def clear(self) -> None:
        """After a test that failed: the next one is not to suffer."""
        if self._is_clean:
            return
        print(f'\n{self.id()} failed with:\n{self.state()}')
        for node in NODES:
            self.fleet.agents[node].boot()
            self.fleet.agents[node].says_refused = {}
            self.cloud.hypervisors.lose(node)
            if not self.cloud.nova.has_compute(node):
                self.cloud.revive_compute(node)
        for server in self.cloud.servers.call('GET', '/servers')['servers']:
            with contextlib.suppress(AssertionError):
                self.cloud.servers.act(server['id'], 'os-resetState', {'state': 'active'})
                self.cloud.servers.delete(server['id'])
        volumes = self.cloud.volumes
        for attachment in volumes.call('GET', '/attachments?all_tenants=1')['attachments']:
            with contextlib.suppress(AssertionError):
                volumes.detach(attachment['id'])
        for volume in volumes.call('GET', '/volumes?all_tenants=1')['volumes']:
            with contextlib.suppress(AssertionError):
                body = {'status': 'available', 'attach_status': 'detached'}
                self.cloud.volumes.act(volume['id'], os_reset_status=body)
                self.fleet.reset()
                self.cloud.volumes.delete(volume['id'])
        self.fleet.reset()

    def state(self) -> str:
        """What everybody says, of everything."""
        lines = []
        for server in self.cloud.servers.call('GET', '/servers')['servers']:
            lines.append(f'{server["id"]} {self.cloud.servers.show(server["id"])}')
        for volume in self.cloud.volumes.call('GET', '/volumes/detail?all_tenants=1')[
            'volumes'
        ]:
            host = volume['os-vol-host-attr:host']
            lines.append(f'{volume["id"]} {volume["status"]} {host} {self.rows(volume["id"])}')
        for agent in self.fleet.agents.values():
            lines += [f'{agent.name} {vol}' for vol in agent.volumes.values()]
        return '\n'.join([*lines, f'{self.cloud.hypervisors.opened()}'])

    def rows(self, volume: str) -> list[tuple[str, str]]:
        """A volume's attachments: their statuses, and the hosts of those that are attached."""
        shown = self.cloud.volumes.show(volume)
        hosts = {row['attachment_id']: row['host_name'] for row in shown['attachments']}
        rows = self.cloud.volumes.attachments(volume)
        return sorted((row['status'], hosts.get(row['id'], '')) for row in rows)


class Guest:
    """An instance and what was written to its volumes."""

    def __init__(self, case: NovaCase, server: str, volumes: list[str]) -> None:
        self._case = case
        self._fleet = case.fleet
        self.cloud = case.cloud
        self.server = server
        self.volumes = volumes
        self.written: dict[str, list[str]] = {volume: [] for volume in volumes}
        # Agents go on knowing a volume that Cinder has copied by the copy's id.
        self._ids: dict[str, str] = {}
        self._words = 0

    def add(self, volume: str) -> None:
        """It has one more."""
        self.volumes.append(volume)
        self.written[volume] = []

    def drop(self, volume: str) -> None:
        """It has one less."""
        self.volumes.remove(volume)
        del self.written[volume]

    def is_copied(self, volume: str) -> None:
        """Another copy has become this volume."""
        self._ids[volume] = self.cloud.volumes.show(volume)['os-vol-mig-status-attr:name_id']

    def id(self, volume: str) -> str:
        """What agents call a volume."""
        return self._ids.get(volume) or volume

    @property
    def host(self) -> str:
        """Where it runs; it runs once."""
        hosts = self.cloud.hypervisors.where(self.server)
        self._case.assertEqual(1, len(hosts), f'the guest runs on {hosts}')
        return hosts[0]

    def write(self) -> None:
        """Writes something else to each volume. It must be acknowledged."""
        self._words += 1
        word = f'{self._words}'
        for volume in self.volumes:
            with self._fleet.lock:
                is_done = self._fleet.agents[self.host].write(self.id(volume), word)
            self._case.assertTrue(is_done, f'a write to {volume} waits')
            self.written[volume].append(word)

    def reads(self) -> None:
        """Finds what it has written."""
        for volume in self.volumes:
            with self._fleet.lock:
                data = self._fleet.agents[self.host].volumes[self.id(volume)].data
                self._case.assertEqual(self.written[volume], data)

    def runs_on(self, host: str) -> None:
        """It runs there, finds what it has written, and Cinder knows where that is."""
        case = self._case
        case.assertEqual(host, self.host)
        case.assertEqual(host, self.cloud.servers.show(self.server)['host'])
        self.reads()
        for volume in self.volumes:
            case.assertEqual([('attached', host)], case.rows(volume))
            shown = self.cloud.volumes.show(volume)
            case.assertEqual('in-use', shown['status'])
            # It is used there, and belongs there unless it is still offered from elsewhere.
            where = self._fleet.where(self.id(volume))
            case.assertIn(where.get(host), ('LOCAL', 'HYDRATING', 'PUBLISHED'), where)

    def is_home_at(self, host: str) -> None:
        """Everything has arrived there, and nothing is left elsewhere."""
        self.arrive()
        for volume in self.volumes:
            self._case.assertEqual({host: 'LOCAL'}, self._fleet.where(self.id(volume)))

    def arrive(self) -> None:
        """Copies to an end what is copied in the background."""
        with self._fleet.lock:
            for agent in self._fleet.agents.values():
                for volume in map(self.id, self.volumes):
                    vol = agent.volumes.get(volume)
                    if vol is not None and vol.state == 'HYDRATING':
                        agent.arrive(volume)

    def finish(self) -> None:
        """Its end, which leaves nothing."""
        self.arrive()
        self.cloud.servers.delete(self.server)
        self.is_deleted()

    def is_deleted(self) -> None:
        """Its volumes are left, with all that it has written, and are deleted too."""
        for volume in self.volumes:
            self.cloud.volumes.wait(volume, 'available')
            known = self.id(volume)
            agents = self._fleet.agents.values()
            copies = [agent.volumes[known] for agent in agents if known in agent.volumes]
            self._case.assertEqual([self.written[volume]], [copy.data for copy in copies])
            self.cloud.volumes.delete(volume)
        self._case.assert_clean()


class Suite(unittest.TestSuite):
    """Tests with one cloud for all of them."""

    def run(self, result: unittest.TestResult, debug: bool = False) -> unittest.TestResult:
        if self.countTestCases() == 0:
            return result
        with tempfile.TemporaryDirectory(prefix='dmlocal-services-') as name:
            folder = pathlib.Path(name)
            with Processes(folder) as processes:
                fleet = FakeFleet([*NODES, SPARE])
                keep_certificates(fleet, folder)
                nodes = {node: fleet.endpoints[node] for node in NODES}
                others = {'other': fleet.endpoints}
                cloud = Cloud(processes, nodes, FakeMachine(fleet), SETTINGS, others)
                NovaCase.fleet, NovaCase.cloud = fleet, cloud
                try:
                    super().run(result, debug)
                finally:
                    cloud.end()
            left = processes_below(folder)
            assert left == [], left
        return result
