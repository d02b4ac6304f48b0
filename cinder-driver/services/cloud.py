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
import threading
import time
import unittest
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import requests

from cinder_dmlocal.tests.certificates import Authority
from cinder_dmlocal.tests.fake import FakeFleet
from services import contents
from services.block import Cinder, Sections, agents, merged
from services.clients import Block
from services.identity import SERVICE_PROJECT, Identity, Scope
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
    'any': {},
    'local': {'volume_backend_name': 'dmlocal'},
    'other': {'volume_backend_name': 'other'},
    'node-a': {'volume_backend_name': 'dmlocal', 'pool_name': 'node-a'},
    'node-b': {'volume_backend_name': 'dmlocal', 'pool_name': 'node-b'},
}

_KEPT = ('volumes', 'snapshots', 'volume_attachment', 'backups', 'groups', 'group_snapshots')

# How long the last of Cinder's records may take to go, in seconds.
SOON = 30.0


class Cloud:
    """All that runs."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self._read: dict[str, int] = {}
        self.processes = Processes(folder)
        self._authority = Authority()
        self._keep_certificates()
        self.fleets: dict[str, FakeFleet] = {}
        for name, nodes in BACKENDS.items():
            self.add_fleet(name, nodes)
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
        self.types = {name: self.add_type(name, specs) for name, specs in TYPES.items()}

    def _keep_certificates(self) -> None:
        pair = self._authority.issue('driver')
        (self.folder / 'ca.pem').write_bytes(self._authority.cert)
        (self.folder / 'driver.pem').write_bytes(pair.cert)
        (self.folder / 'driver.key').write_bytes(pair.key)

    def add_fleet(self, name: str, nodes: list[str]) -> FakeFleet:
        """A fleet that the controller belongs to, without a pool of its own."""
        disks = self.folder / 'disks' / name
        disks.mkdir(parents=True)
        ours = [*nodes, CONTROLLER]
        fleet = FakeFleet(ours, disks, authority=self._authority, copies_at_once=True)
        fleet.agents[CONTROLLER].has_pool = False
        self.fleets[name] = fleet
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
                # Calls to a service that has died are given up after this.
                'rpc_response_timeout': 60,
                'default_volume_type': 'local',
                'glance_api_servers': self.images.url,
                'enable_force_upload': 'true',
                # A node that has refused a volume is not tried again at once.
                'scheduler_default_filters': 'AvailabilityZoneFilter, CapacityFilter, '
                'CapabilitiesFilter, IgnoreAttemptedHostsFilter',
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
        self.service = self.identity.scope('cinder', SERVICE_PROJECT)
        return self._as(self.identity.admin)

    def as_service(self) -> Block:
        """Cinder's interface, called for another project."""
        return self._as(self.service)

    def _as(self, whom: Scope) -> Block:
        tokens = {'X-Auth-Token': whom.token, 'X-Service-Token': self.service.token}
        return Block(self.cinder.url, self.processes, tokens)

    def add_type(self, name: str, specs: dict[str, str]) -> str:
        """A volume type."""
        what = {'name': name, 'extra_specs': specs}
        return str(
            self.block.call('POST', '/types', {'volume_type': what})['volume_type']['id']
        )

    def group_type(self, name: str) -> str:
        """A type of groups of volumes, each of which has a snapshot of its own."""
        what = {'group_type': {'name': name}}
        return str(self.block.call('POST', '/group_types', what)['group_type']['id'])

    def left(self) -> list[str]:
        """What all agents have."""
        return [one for fleet in self.fleets.values() for one in fleet.left()]

    def leaks(self) -> list[str]:
        """What is there that should not be when a test is over."""
        found = self.left()
        disks = self.folder / 'disks'
        found += [str(path) for path in disks.rglob('*') if path.is_symlink() or path.is_file()]
        found += [str(path) for path in (self.folder / 'backups').rglob('*') if path.is_file()]
        conversion = self.cinder.folder / 'conversion'
        found += [str(path) for path in conversion.rglob('*') if path.is_file()]
        ask = self.infra.database.ask
        for table in _KEPT:
            rows = ask(f'select id from cinder.{table} where deleted = 0')
            found += [f'{table} {row[0]}' for row in rows]
        # What is only reserved, for a call that was killed, expires by itself.
        usages = ask('select resource, in_use from cinder.quota_usages where in_use <> 0')
        found += [f'quota {row}' for row in usages]
        return found

    def heard(self) -> list[str]:
        """Errors that Cinder's services have logged since this was last asked."""
        found = []
        for path in sorted(self.folder.glob('cinder-*.log')):
            with open(path, errors='replace') as log:
                log.seek(self._read.get(path.name, 0))
                found += [line.rstrip() for line in log if ' ERROR ' in line[:60]]
                self._read[path.name] = log.tell()
        return found[-200:]

    def end(self) -> None:
        """Ends all processes and servers."""
        self.processes.end()
        for fleet in self.fleets.values():
            fleet.stop()


_ends = contextlib.ExitStack()


@functools.cache
def shared_cloud() -> Cloud:
    """Starts once for all tests of the process; ended by `end_shared`, or with it."""
    name = _ends.enter_context(tempfile.TemporaryDirectory(prefix='dmlocal-services-'))
    cloud = Cloud(pathlib.Path(name))
    _ends.callback(cloud.end)
    return cloud


def end_shared() -> None:
    """Ends what all tests of the process share."""
    _ends.close()


# For whoever starts tests by themselves.
atexit.register(end_shared)


def later(act: Callable[[], Any]) -> threading.Thread:
    """Has something done while the test goes on; nobody hears whether it could be."""

    def quietly() -> None:
        with contextlib.suppress(AssertionError, requests.RequestException):
            act()

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    return thread


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
        # Cinder gives quota back when what it was for has gone already.
        until = time.monotonic() + SOON
        while leaks := [one for one in self.cloud.leaks() if one not in self.there]:
            if time.monotonic() > until:
                break
            time.sleep(0.1)
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

    def cached(self) -> list[str]:
        """Volumes of the image cache."""
        rows = self.cloud.infra.database.ask(
            'select volume_id from cinder.image_volume_cache_entries'
        )
        return [str(volume) for [volume] in rows]

    def delete(self, *volumes: str) -> None:
        """The end of volumes."""
        for volume in volumes:
            self.block.delete(volume)


class FilesTestCase(CloudTestCase):
    """With a folder of contents, each by a name."""

    def setUp(self) -> None:
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def file(self, name: str) -> pathlib.Path:
        """The content of that name; every name has another."""
        path = self.folder / name
        return path if path.exists() else contents.make(path, 24 << 20, name)

    def written(self, name: str, kind: str = 'node-a', **more: Any) -> str:
        """A volume with that content."""
        volume = self.create(kind, **more)
        self.write(volume, self.file(name), self.node_of(volume))
        return volume
