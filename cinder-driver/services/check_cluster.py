"""Two cinder-volume services of one cluster, of which one dies."""

from __future__ import annotations

import re
import uuid
from concurrent import futures
from typing import ClassVar

from cinder_dmlocal.tests.fake import FakeFleet, Gate
from services.block import agents
from services.cloud import CONTROLLER, FilesTestCase, shared_cloud

BACKEND = 'shared'
NODES = ['node-s', 'node-t']
SERVICES = ('one', 'two')


class Cluster(FilesTestCase):
    fleet_of_both: ClassVar[FakeFleet]

    @classmethod
    def setUpClass(cls) -> None:
        cloud = shared_cloud()
        cls.fleet_of_both = cloud.add_fleet(BACKEND, NODES)
        cloud.add_type(BACKEND, {'volume_backend_name': BACKEND})
        for node in NODES:
            cloud.add_type(node, {'volume_backend_name': BACKEND, 'pool_name': node})
        for name in SERVICES:
            cls.start(name)
        cloud.cinder.wait(*(f'fleet@{BACKEND}#{node}' for node in NODES))

    @classmethod
    def start(cls, name: str) -> None:
        """A service of the cluster, with a host name of its own."""
        cloud = shared_cloud()
        backend = {
            **agents(cloud.folder, cls.fleet_of_both.endpoints),
            'volume_backend_name': BACKEND,
            'image_volume_cache_enabled': 'true',
        }
        ours = {'host': name, 'cluster': 'fleet', 'enabled_backends': BACKEND}
        cloud.cinder.start_volume(name, {'DEFAULT': ours, BACKEND: backend})
        (cloud.folder / f'cinder-volume-{name}.log').touch()

    def test_calls_about_one_volume_exclude_each_other_over_both(self) -> None:
        volume = self.create(BACKEND)
        node = self.node_of(volume)
        gate = Gate()
        self.fleet_of_both.agents[node].gates['Volumes.Attach'] = gate
        with futures.ThreadPoolExecutor() as pool:
            attached = pool.submit(self.block.attach, volume, str(uuid.uuid4()), node)
            self.cloud.processes.wait('no attach', gate.reached.is_set)
            # As if it were attached already: Cinder lets nobody else near what is not.
            self.block.act(volume, os_reset_status={'status': 'in-use'})
            # The broker gives calls to the services in turn: each has one of these.
            snapshots = [self.begin_snapshot(volume) for _ in SERVICES]
            wait = self.cloud.processes.wait
            wait('no service waits', lambda: self.waiting(volume) == set(SERVICES))
            self.assertEqual([], self.taken())
            gate.opened.set()
            for snapshot in snapshots:
                self.block.wait_snapshot(snapshot, 'available')
            self.block.detach(attached.result()['id'])
        for snapshot in snapshots:
            self.block.delete_snapshot(snapshot)
        self.delete(volume)

    def begin_snapshot(self, volume: str) -> str:
        what = {'snapshot': {'volume_id': volume, 'force': True}}
        return str(self.block.call('POST', '/snapshots', what)['snapshot']['id'])

    def taken(self) -> list[str]:
        return [call for call in self.fleet_of_both.order if 'Snapshots.Create' in call]

    def waiting(self, volume: str) -> set[str]:
        """Services that want to take a snapshot and have to wait; all, if one need not."""
        if self.taken():
            return set(SERVICES)
        line = re.compile(f'Acquiring lock "[^"]*{volume}-dmlocal" by "create_snapshot"')
        logs = {name: self.cloud.folder / f'cinder-volume-{name}.log' for name in SERVICES}
        return {name for name, log in logs.items() if line.search(log.read_text())}

    def test_when_one_dies_the_other_serves_its_volumes_and_ends_what_it_began(self) -> None:
        volumes = [self.create(BACKEND) for _ in range(4)]
        hosts = {self.service_of(volume) for volume in volumes}
        self.assertEqual(set(SERVICES), hosts)
        doomed = volumes.pop()
        gate = Gate()
        self.fleet_of_both.agents[self.node_of(doomed)].gates['Volumes.Delete'] = gate
        self.block.call('DELETE', f'/volumes/{doomed}')
        self.cloud.processes.wait('no deletion', gate.reached.is_set)
        [[dead]] = self.cloud.infra.database.ask(
            'select host from cinder.services, cinder.workers where services.id = service_id'
            f" and resource_id = '{doomed}'"
        )
        name = str(dead).partition('@')[0]
        self.cloud.processes.kill(f'cinder-volume-{name}')
        gate.opened.set()
        for volume in volumes:
            with self.attached(volume, 'node-t'):
                self.assertIn('node-t', self.fleet_of_both.where(volume))
            self.delete(volume)
        self.delete(self.create(BACKEND))
        self.cloud.processes.wait('it does not count as dead', lambda: self.clean_up(name))
        self.block.wait(doomed, 'gone')
        self.start(name)

    def test_an_image_is_fetched_once_for_all_nodes(self) -> None:
        image = self.cloud.images.upload(self.file('one'), 'raw')
        first = self.create('node-s', imageRef=image)
        [cached] = self.cached()
        self.fleet_of_both.order.clear()
        second = self.create('node-t', imageRef=image)
        self.assertEqual([cached], self.cached())
        self.assertNotIn(f'{CONTROLLER} Moves.Receive', self.fleet_of_both.order)
        self.assert_content(second, self.file('one'), 'node-t')
        self.delete(first, second, cached)
        self.cloud.images.delete(image)

    def service_of(self, volume: str) -> str:
        return str(self.block.show(volume)['os-vol-host-attr:host']).partition('@')[0]

    def clean_up(self, name: str) -> bool:
        """Has Cinder end what a dead service has begun; whether it knows that it is dead."""
        which = {'cluster_name': f'fleet@{BACKEND}', 'host': f'{name}@{BACKEND}'}
        answer = self.block.call('POST', '/workers/cleanup', which)
        return bool(answer['cleaning'])
