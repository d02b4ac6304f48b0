"""Volumes that are encrypted where they are used: all else sees what is written as it is.

Where Cinder encrypts or decrypts something itself, it has dm-crypt do that. There is none
here, because agents' devices are files; whatever needs it fails.
"""

from __future__ import annotations

import uuid
from typing import Any

from services.cloud import CONTROLLER, FilesTestCase

ENCRYPTION = {
    'provider': 'luks',
    'control_location': 'front-end',
    'cipher': 'aes-xts-plain64',
    'key_size': 256,
}


class Encryption(FilesTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.kind = self.encrypted_type('secret')

    def encrypted_type(self, name: str, backend: str = 'dmlocal') -> str:
        """A volume type, which goes when the test is over."""
        kind = self.cloud.add_type(name, {'volume_backend_name': backend})
        self.addCleanup(self.block.call, 'DELETE', f'/types/{kind}')
        self.block.call('POST', f'/types/{kind}/encryption', {'encryption': ENCRYPTION})
        return kind

    def test_an_encrypted_volume_follows_its_instance_like_any_other(self) -> None:
        volume = self.create('secret')
        self.assert_encrypted(volume)
        node = self.node_of(volume)
        away = next(node for node in ('node-a', 'node-b') if node != self.node_of(volume))
        for there in (node, away):
            with self.subTest(there):
                made = self.block.attach(volume, str(uuid.uuid4()), there)
                self.assertTrue(made['connection_info']['encrypted'])
                self.block.detach(made['id'])
        self.write(volume, self.file('one'), node)
        self.assert_content(volume, self.file('one'), away)
        self.assertEqual(away, self.node_of(volume))
        self.assertEqual({away: 'LOCAL'}, self.fleet.where(volume))
        self.delete(volume)

    def test_copies_are_written_as_their_origins_and_have_keys(self) -> None:
        volume = self.written('one', 'secret')
        snapshot = self.block.snapshot(volume)
        made = [
            self.create('secret', snapshot_id=snapshot),
            self.create('secret', source_volid=volume),
        ]
        self.write(volume, self.file('two'), 'node-b')
        for copy in made:
            self.assert_encrypted(copy)
            self.assert_content(copy, self.file('one'), 'node-a')
        self.delete(*made)
        self.block.delete_snapshot(snapshot)
        self.delete(volume)

    def test_a_copy_to_another_backend_has_what_was_written_and_its_key(self) -> None:
        self.encrypted_type('elsewhere', 'other')
        volume = self.written('one', 'secret')
        self.retype(volume, 'elsewhere')
        self.cloud.processes.wait(f'{volume} is left', lambda: not self.fleet.left())
        self.assertEqual('node-x', self.node_of(volume))
        self.assert_encrypted(volume)
        self.assert_content(volume, self.file('one'), 'node-x')
        self.delete(volume)

    def test_a_volume_that_cinder_cannot_encrypt_stays_as_it_was(self) -> None:
        volume = self.written('one')
        for policy, migration in (('never', None), ('on-demand', 'error')):
            with self.subTest(policy):
                row = self.retype(volume, 'secret', policy)
                self.assertEqual(migration, row['os-vol-mig-status-attr:migstat'])
                self.assertEqual(('node-a', False), (row['volume_type'], row['encrypted']))
                self.assert_content(volume, self.file('one'), 'node-a')
        self.assertIn(f'{CONTROLLER} Moves.Receive', self.fleet.order)
        self.delete(volume)

    def test_an_image_of_an_encrypted_volume_becomes_one_again(self) -> None:
        volume = self.written('one', 'secret')
        what = {'image_name': 'made', 'disk_format': 'raw', 'container_format': 'bare'}
        answer = self.block.act(volume, os_volume_upload_image=what)
        image = answer['os-volume_upload_image']['image_id']
        self.addCleanup(self.cloud.images.delete, image)
        self.cloud.images.wait_for(image)
        self.block.wait(volume, 'available')
        made = self.create('secret', imageRef=image)
        self.assert_encrypted(made)
        self.assert_content(made, self.file('one'), self.node_of(made))
        self.assertEqual([], self.cached())
        self.delete(made, volume)

    def test_an_image_that_cinder_cannot_encrypt_becomes_no_volume(self) -> None:
        image = self.cloud.images.upload(self.file('one'), 'raw')
        self.addCleanup(self.cloud.images.delete, image)
        what = {'size': 1, 'volume_type': 'secret', 'imageRef': image}
        volume = self.block.call('POST', '/volumes', {'volume': what})['volume']['id']
        self.block.wait(volume, 'error')
        self.assertIn(f'{CONTROLLER} Moves.Receive', self.fleet.order)
        self.delete(volume)

    def retype(self, volume: str, kind: str, policy: str = 'on-demand') -> dict[str, Any]:
        """Has a type changed; gives the volume when Cinder has done what it does."""
        self.block.act(volume, os_retype={'new_type': kind, 'migration_policy': policy})
        return self.block.wait(volume, 'available')

    def assert_encrypted(self, volume: str) -> None:
        """What Nova asks for, to open a volume, is there."""
        self.assertTrue(self.block.show(volume)['encrypted'])
        told = self.block.call('GET', f'/volumes/{volume}/encryption')
        self.assertEqual(ENCRYPTION, {name: told[name] for name in ENCRYPTION})
        self.assertTrue(told['encryption_key_id'])
