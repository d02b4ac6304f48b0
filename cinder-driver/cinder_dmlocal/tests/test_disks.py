"""Devices that are files show what real ones would."""

from __future__ import annotations

import pathlib
import tempfile
import uuid
from typing import ClassVar

from cinder_dmlocal.tests.base import NODES, Cinder, DriverTestCase, Snapshot, Volume
from cinder_dmlocal.tests.disks import Disks
from cinder_dmlocal.tests.fake import GIB, FakeFleet


class Devices(DriverTestCase):
    files: ClassVar[FakeFleet]

    @classmethod
    def setUpClass(cls) -> None:
        cls.files = FakeFleet(NODES)
        cls.addClassCleanup(cls.files.stop)

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.files.disks = Disks(self.folder)
        self.fleet = self.files
        self.fleet.reset()
        self.driver = self.make_driver()
        self.cinder = Cinder(self.driver)

    def device(self, volume: Volume, host: str, status: str = 'reserved') -> pathlib.Path:
        volume.status = status
        info = self.driver.initialize_connection(volume, {'host': host})
        return pathlib.Path(info['data']['device_path'])

    def written(self, host: str, text: str) -> Volume:
        """A volume whose content that is, attached there."""
        volume = self.cinder.create(host)
        self.cinder.attach(volume, host, 'vm')
        self.write(self.device(volume, host, 'in-use'), text)
        return volume

    @staticmethod
    def write(device: pathlib.Path, text: str) -> None:
        with open(device, 'r+b') as file:
            file.write(text.encode())

    def assert_reads(self, device: pathlib.Path, text: str, size: int = GIB) -> None:
        with open(device, 'rb') as file:
            self.assertEqual(text, file.read(len(text)).decode())
        self.assertEqual(size, device.stat().st_size)

    def test_a_held_destination_shows_its_source_until_the_switch(self) -> None:
        volume = self.written('node-a', 'one')
        at_source = self.device(volume, 'node-a', 'in-use')
        row = self.cinder.create_attachment(volume, 'vm', 'node-b')
        here = self.device(volume, 'node-b', 'in-use')
        self.write(at_source, 'two')
        self.assert_reads(here, 'two')
        self.cinder.delete_attachment(volume, volume.volume_attachment[0])
        self.assert_where(volume, a='FENCED', b='HYDRATING')
        with self.assertRaises(FileNotFoundError):
            self.assert_reads(at_source, 'two')
        self.write(here, 'three')
        self.agent('b').arrive(volume.id)
        self.assert_reads(here, 'three')
        self.assertIsNotNone(row)

    def test_a_visit_reads_and_writes_where_the_volume_is(self) -> None:
        volume = self.written('node-a', 'one')
        self.cinder.delete_attachment(volume, volume.volume_attachment[0])
        visited = self.device(volume, 'node-c', 'uploading')
        self.assert_reads(visited, 'one')
        # As qemu-img does with what it takes for a file.
        visited.write_bytes(b'two')
        self.driver.terminate_connection(volume, {'host': 'node-c'})
        self.assert_reads(self.device(volume, 'node-a'), 'two')

    def test_snapshots_and_clones_keep_what_was_there(self) -> None:
        volume = self.written('node-a', 'one')
        snapshot = Snapshot(volume, str(uuid.uuid4()))
        self.driver.create_snapshot(snapshot)
        self.write(self.device(volume, 'node-a', 'in-use'), 'two')
        near, far = (Volume(2, f'fleet@dmlocal#{node}') for node in ('node-a', 'node-b'))
        self.driver.create_volume_from_snapshot(near, snapshot)
        self.driver.create_volume_from_snapshot(far, snapshot)
        self.assert_reads(self.device(near, 'node-a'), 'one', 2 * GIB)
        self.assert_reads(self.device(far, 'node-b'), 'one', 2 * GIB)
        self.cinder.delete_attachment(volume, volume.volume_attachment[0])
        self.driver.revert_to_snapshot(None, volume, snapshot)
        self.assert_reads(self.device(volume, 'node-a'), 'one')

    def test_nothing_is_left_of_what_is_deleted(self) -> None:
        volume = self.written('node-a', 'one')
        self.cinder.delete_attachment(volume, volume.volume_attachment[0])
        self.driver.migrate_volume(None, volume, self.target('node-b'))
        self.agent('b').arrive(volume.id)
        self.driver.delete_volume(volume)
        links = self.folder.glob(f'*/dmlocal-{volume.id}')
        self.assertEqual([], list(links))
        self.assertEqual([], list(self.folder.glob('data-*')))

    def target(self, node: str) -> dict[str, object]:
        self.driver.get_volume_stats(refresh=True)
        pool = next(p for p in self.driver._stats['pools'] if p['pool_name'] == node)
        return {'host': f'fleet@dmlocal#{node}', 'capabilities': pool}
