"""A whole cloud but for its computes: Keystone, Glance, and Cinder with two fleets.

The fleets' agents are pretended to, and their devices are files. One cloud serves all
tests of a process, and each leaves it as it found it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import pathlib
import socket
import sys
import tempfile
import unittest
import uuid
from collections.abc import Iterator
from typing import Any

from cinder_dmlocal.tests.certificates import Authority
from cinder_dmlocal.tests.fake import FakeFleet
from services import contents
from services.block import Cinder, Sections, agents, merged
from services.clients import Block
from services.identity import SERVICE_PROJECT, Identity
from services.images import Images
from services.infra import Infra
from services.processes import Processes

_ETC = pathlib.Path(sys.prefix) / 'etc' / 'cinder'

# Where cinder-volume and cinder-backup attach volumes themselves.
CONTROLLER = socket.gethostname()
BACKENDS = {'dmlocal': ['node-a', 'node-b'], 'other': ['node-x']}
POOLS = [f'fleet@{name}#{node}' for name, nodes in BACKENDS.items() for node in nodes]

# Volume types by the capabilities that they ask for.
TYPES = {
    'local': {'volume_backend_name': 'dmlocal'},
    'other': {'volume_backend_name': 'other'},
    'node-a': {'volume_backend_name': 'dmlocal', 'pool_name': 'node-a'},
    'node-b': {'volume_backend_name': 'dmlocal', 'pool_name': 'node-b'},
}

_KEPT = ('volumes', 'snapshots', 'volume_attachment', 'backups', 'groups', 'group_snapshots')


class Cloud:
    """All that runs."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self._read: dict[str, int] = {}
        self.processes = Processes(folder)
        self.fleets = self._fleets()
        self.infra = Infra(self.processes)
        self.identity = Identity(self.processes, self.infra)
        self.images = Images(self.processes, self.infra, self.identity)
        self.identity.sync()
        self.images.sync()
        self.identity.start()
        self.identity.add_service('glance', 'image', self.images.url)
        self.images.start()
        self.cinder = self._cinder()
        self.block = self._client()
        self.cinder.client = self.block
        self.images.wait(self.identity.admin.token)
        self.cinder.wait(*POOLS)
        for name, specs in TYPES.items():
            self.add_type(name, specs)

    def _fleets(self) -> dict[str, FakeFleet]:
        authority = Authority()
        pair = authority.issue('driver')
        (self.folder / 'ca.pem').write_bytes(authority.cert)
        (self.folder / 'driver.pem').write_bytes(pair.cert)
        (self.folder / 'driver.key').write_bytes(pair.key)
        return {
            name: self.add_fleet(name, nodes, authority) for name, nodes in BACKENDS.items()
        }

    def add_fleet(self, name: str, nodes: list[str], authority: Authority) -> FakeFleet:
        """A fleet that the controller belongs to, without a pool of its own."""
        disks = self.folder / 'disks' / name
        disks.mkdir(parents=True)
        fleet = FakeFleet([*nodes, CONTROLLER], disks, authority=authority, copies_at_once=True)
        fleet.agents[CONTROLLER].has_pool = False
        return fleet

    def _cinder(self) -> Cinder:
        backends = {
            name: agents(self.folder, fleet.endpoints) for name, fleet in self.fleets.items()
        }
        cinder = Cinder(
            self.processes,
            self.infra,
            backends,
            more=self._more(),
            paste=(_ETC / 'api-paste.ini').read_text(),
        )
        self.identity.add_service('cinder', 'block-storage', cinder.url)
        cinder.sync()
        cinder.start('api', 'scheduler', 'volume', 'backup')
        return cinder

    def _more(self) -> Sections:
        service = self.identity.scope('glance', SERVICE_PROJECT)
        backups = self.folder / 'backups'
        backups.mkdir()
        ours = {
            'DEFAULT': {
                'auth_strategy': 'keystone',
                'default_volume_type': 'local',
                'glance_api_servers': self.images.url,
                'enable_force_upload': 'true',
                # Whose the volumes of the image cache are.
                'cinder_internal_tenant_project_id': service.project,
                'cinder_internal_tenant_user_id': service.user,
                'backup_driver': 'cinder.backup.drivers.posix.PosixBackupDriver',
                'backup_posix_path': backups,
                'backup_workers': 1,
                'backup_enable_progress_timer': 'false',
            },
            'dmlocal': {
                'image_volume_cache_enabled': 'true',
                'image_volume_cache_max_count': 2,
                'dmlocal_close_timeout': 1,
            },
        }
        return merged(ours, self.identity.sections('cinder'))

    def _client(self) -> Block:
        service = self.identity.scope('cinder', SERVICE_PROJECT)
        tokens = {'X-Auth-Token': self.identity.admin.token, 'X-Service-Token': service.token}
        return Block(self.cinder.url, self.processes, tokens)

    def add_type(self, name: str, specs: dict[str, str]) -> str:
        """A volume type."""
        what = {'name': name, 'extra_specs': specs}
        return str(
            self.block.call('POST', '/types', {'volume_type': what})['volume_type']['id']
        )

    def fleet_of(self, volume: str) -> FakeFleet:
        """The fleet that has a volume."""
        host = self.block.show(volume)['os-vol-host-attr:host']
        return self.fleets[host.partition('@')[2].partition('#')[0]]

    def leaks(self) -> list[str]:
        """What is there that should not be when a test is over."""
        found = [one for fleet in self.fleets.values() for one in fleet.left()]
        disks = self.folder / 'disks'
        found += [str(path) for path in disks.rglob('*') if path.is_symlink() or path.is_file()]
        found += [str(path) for path in (self.folder / 'backups').rglob('*') if path.is_file()]
        conversion = self.cinder.folder / 'conversion'
        found += [str(path) for path in conversion.rglob('*') if path.is_file()]
        ask = self.infra.database.ask
        for table in _KEPT:
            rows = ask(f'select id from cinder.{table} where deleted = 0')
            found += [f'{table} {row[0]}' for row in rows]
        usages = 'select resource, in_use, reserved from cinder.quota_usages'
        found += [f'quota {row}' for row in ask(f'{usages} where in_use + reserved <> 0')]
        return found

    def heard(self) -> list[str]:
        """Errors that Cinder's services have logged since this was last asked."""
        found = []
        for path in sorted(self.folder.glob('cinder-*.log')):
            with open(path, errors='replace') as log:
                log.seek(self._read.get(path.name, 0))
                found += [line.rstrip() for line in log if ' ERROR ' in line]
                self._read[path.name] = log.tell()
        return found[-200:]

    def end(self) -> None:
        """Ends all processes and servers."""
        self.processes.end()
        for fleet in self.fleets.values():
            fleet.stop()


@functools.cache
def shared_cloud() -> Cloud:
    """Starts once for all tests of the process."""
    folder = tempfile.TemporaryDirectory(prefix='dmlocal-services-')
    atexit.register(folder.cleanup)
    cloud = Cloud(pathlib.Path(folder.name))
    atexit.register(cloud.end)
    return cloud


class CloudTestCase(unittest.TestCase):
    """A test that leaves nothing behind."""

    def run(self, result: Any = None) -> Any:
        """Shows what the services have logged as errors, if the test fails."""
        before = len(result.failures) + len(result.errors)
        shared_cloud().heard()
        ran = super().run(result)
        if len(result.failures) + len(result.errors) > before:
            print('\n'.join(shared_cloud().heard()), file=sys.stderr)
        return ran

    def setUp(self) -> None:
        self.cloud = shared_cloud()
        self.block = self.cloud.block
        self.fleet = self.cloud.fleets['dmlocal']
        for fleet in self.cloud.fleets.values():
            fleet.order.clear()
        self.there = set(self.cloud.leaks())

    def tearDown(self) -> None:
        leaks = [one for one in self.cloud.leaks() if one not in self.there]
        self.assertEqual('', '\n'.join(leaks))

    def node_of(self, volume: str) -> str:
        """The pool that Cinder's host of a volume names."""
        return str(self.block.show(volume)['os-vol-host-attr:host']).partition('#')[2]

    def create(self, kind: str = 'node-a', **more: Any) -> str:
        """A volume that is there."""
        return str(self.block.create(volume_type=kind, **more)['id'])

    @contextlib.contextmanager
    def attached(self, volume: str, node: str) -> Iterator[pathlib.Path]:
        """A volume's device on a node, for an instance."""
        made = self.block.attach(volume, str(uuid.uuid4()), node)
        yield pathlib.Path(made['connection_info']['device_path'])
        self.block.detach(made['id'])

    def write(self, volume: str, content: pathlib.Path, node: str = 'node-a') -> None:
        """Has an instance write a file's content to the beginning of a volume."""
        with self.attached(volume, node) as device:
            contents.write(device, content)

    def assert_content(self, volume: str, content: pathlib.Path, node: str) -> None:
        """A volume begins with a file's content, and has nothing after it."""
        with self.attached(volume, node) as device:
            size = self.block.show(volume)['size'] << 30
            contents.assert_reads(device, content, size)

    def delete(self, *volumes: str) -> None:
        """The end of volumes."""
        for volume in volumes:
            self.block.delete(volume)
