"""cinder-volume is killed in the middle of a call, and begins anew.

What the call was about is afterwards as users expect it from Cinder, can be ended or
repeated, and the agents have nothing that nobody knows of.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator

from cinder_dmlocal.tests.fake import Gate
from services.cloud import CONTROLLER, FilesTestCase, later


class Restarts(FilesTestCase):
    @contextlib.contextmanager
    def killed(
        self, node: str, method: str, *, is_done: bool = False, fleet: str = 'dmlocal'
    ) -> Iterator[None]:
        """What is inside is under way at an agent when cinder-volume is killed.

        It has been done there by then, or is done after that.
        """
        gate = Gate(is_done)
        self.cloud.fleets[fleet].agents[node].gates[method] = gate
        yield
        processes = self.cloud.processes
        processes.wait(f'{node} is not asked for {method}', gate.reached.is_set)
        processes.kill('cinder-volume')
        gate.opened.set()
        processes.wait(f'{node} has not done {method}', gate.left.is_set)
        self.cloud.cinder.start('volume')

    def test_a_creation_is_an_error_and_can_be_deleted(self) -> None:
        for is_done in (False, True):
            with self.subTest(is_done=is_done):
                with self.killed('node-a', 'Volumes.Create', is_done=is_done):
                    volume = self.begin('node-a')
                self.block.wait(volume, 'error')
                self.delete(volume)

    def test_a_deletion_goes_on(self) -> None:
        for is_done in (False, True):
            with self.subTest(is_done=is_done):
                volume = self.create()
                with self.killed('node-a', 'Volumes.Delete', is_done=is_done):
                    self.block.call('DELETE', f'/volumes/{volume}')
                self.block.wait(volume, 'gone')

    def test_an_attachment_elsewhere_is_made_again(self) -> None:
        volume = self.written('one')
        reserved = self.reserve(volume)
        with self.killed('node-b', 'Moves.Receive', is_done=True):
            later(lambda: self.connect(reserved, 'node-b'))
        # Cinder's interface goes on with it once it has given the first call up.
        self.assertIn('/node-b/', self.connect(reserved, 'node-b'))
        self.block.detach(reserved)
        self.block.wait(volume, 'available')
        self.assert_content(volume, self.file('one'), 'node-a')
        self.delete(volume)

    def test_a_snapshot_is_an_error_and_can_be_deleted(self) -> None:
        volume = self.create()
        with self.killed('node-a', 'Snapshots.Create', is_done=True):
            what = {'snapshot': {'volume_id': volume}}
            snapshot = str(self.block.call('POST', '/snapshots', what)['snapshot']['id'])
        self.block.wait_snapshot(snapshot, 'error')
        self.block.delete_snapshot(snapshot)
        self.delete(volume)

    def test_a_volume_that_grows_is_reset_and_grown_again(self) -> None:
        volume = self.written('one')
        with self.killed('node-a', 'Volumes.Extend', is_done=True):
            self.block.act(volume, os_extend={'new_size': 2})
        self.reset(volume)
        self.block.act(volume, os_extend={'new_size': 2})
        self.block.wait(volume, 'available')
        self.assert_content(volume, self.file('one'), 'node-a')
        self.delete(volume)

    def test_a_volume_that_moves_is_reset_and_moved_again(self) -> None:
        volume = self.written('one', 'local')
        home = self.node_of(volume)
        away = next(node for node in ('node-a', 'node-b') if node != home)
        host = {'host': f'fleet@dmlocal#{away}'}
        for is_done in (False, True):
            with self.subTest(is_done=is_done):
                with self.killed(away, 'Moves.Receive', is_done=is_done):
                    self.block.act(volume, os_migrate_volume=host)
                self.reset(volume)
                self.assert_content(volume, self.file('one'), home)
        self.block.act(volume, os_migrate_volume=host)
        self.cloud.processes.wait(f'{volume} does not move', lambda: self.is_at(volume, away))
        self.assert_content(volume, self.file('one'), away)
        self.delete(volume)

    def test_a_copy_to_another_backend_is_reset_and_begun_again(self) -> None:
        volume = self.create('any')
        home = self.node_of(volume)
        self.write(volume, self.file('one'), home)
        fleet, away = ('dmlocal', 'node-a') if home == 'node-x' else ('other', 'node-x')
        host = {'host': f'fleet@{fleet}#{away}'}
        with self.killed(away, 'Volumes.Create', is_done=True, fleet=fleet):
            self.block.act(volume, os_migrate_volume=host)
        rows = self.block.call('GET', '/volumes/detail?all_tenants=1')['volumes']
        [copy] = [row['id'] for row in rows if row['id'] != volume]
        self.block.wait(copy, 'error')
        for one in (volume, copy):
            self.reset(one)
        self.delete(copy)
        self.assert_content(volume, self.file('one'), home)
        self.block.act(volume, os_migrate_volume=host)
        self.cloud.processes.wait(f'{volume} does not move', lambda: self.is_at(volume, away))
        self.assert_content(volume, self.file('one'), away)
        self.delete(volume)
        self.cloud.processes.wait('there is more', lambda: not self.cloud.left())

    def is_at(self, volume: str, node: str) -> bool:
        is_idle = self.block.show(volume)['status'] == 'available'
        return is_idle and self.node_of(volume) == node

    def reset(self, volume: str) -> None:
        """What an operator says about a volume whose service has died."""
        now = {'status': 'available', 'attach_status': 'detached'}
        self.block.act(volume, os_reset_status={**now, 'migration_status': 'none'})

    def test_a_volume_of_which_an_image_is_made_is_reset(self) -> None:
        volume = self.written('one')
        with self.killed(CONTROLLER, 'Moves.Receive', is_done=True):
            what = {'image_name': 'x', 'disk_format': 'raw', 'container_format': 'bare'}
            answer = self.block.act(volume, os_volume_upload_image=what)
            image = answer['os-volume_upload_image']['image_id']
        self.reset(volume)
        self.cloud.images.delete(image)
        self.assert_content(volume, self.file('one'), 'node-a')
        self.delete(volume)

    def test_a_volume_that_was_being_made_of_an_image_is_an_error(self) -> None:
        image = self.cloud.images.upload(self.file('one'), 'raw')
        with self.killed(CONTROLLER, 'Moves.Receive'):
            volume = self.begin('node-a', imageRef=image)
        self.block.wait(volume, 'error')
        self.delete(volume)
        self.cloud.images.delete(image)

    def begin(self, kind: str, **more: str) -> str:
        what = {'volume': {'size': 1, 'volume_type': kind, **more}}
        return str(self.block.call('POST', '/volumes', what)['volume']['id'])

    def reserve(self, volume: str) -> str:
        what = {'volume_uuid': volume, 'instance_uuid': str(uuid.uuid4())}
        answer = self.block.call('POST', '/attachments', {'attachment': what})
        return str(answer['attachment']['id'])

    def connect(self, attachment: str, host: str) -> str:
        connector = {'host': host, 'ip': '127.0.0.1', 'initiator': 'iqn'}
        what = {'attachment': {'connector': connector}}
        answer = self.block.call('PUT', f'/attachments/{attachment}', what)
        return str(answer['attachment']['connection_info']['device_path'])
