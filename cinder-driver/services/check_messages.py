"""What users hear when an agent refuses or does not answer."""

from __future__ import annotations

import uuid
from typing import Any

from cinder_dmlocal.tests.fake import Refusal
from services.clients import Refused
from services.cloud import CONTROLLER, POOLS, FilesTestCase

_NO_ROOM = Refusal('NO_ROOM', 'RESOURCE_EXHAUSTED', pool='local')


class Messages(FilesTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.addCleanup(self.everybody_agrees)

    def everybody_agrees(self) -> None:
        for agent in self.fleet.agents.values():
            agent.says_refused.clear()
            agent.is_down = False
        self.cloud.cinder.wait(*POOLS)

    def refuse(self, node: str, method: str, refusal: Refusal = _NO_ROOM) -> None:
        self.fleet.agents[node].says_refused[method] = refusal

    def heard(self, resource: str) -> set[str]:
        """What Cinder tells the owner of a volume or snapshot."""
        path = f'/messages?resource_uuid={resource}'
        return {message['user_message'] for message in self.block.call('GET', path)['messages']}

    def test_a_creation_goes_on_where_there_is_room(self) -> None:
        self.refuse('node-a', 'Volumes.Create')
        volumes = [self.create('local') for _ in range(2)]
        self.assertEqual({'node-b'}, {self.node_of(volume) for volume in volumes})
        self.delete(*volumes)

    def test_a_creation_for_which_there_is_room_nowhere(self) -> None:
        self.refuse('node-a', 'Volumes.Create')
        what = {'volume': {'size': 1, 'volume_type': 'node-a'}}
        volume = str(self.block.call('POST', '/volumes', what)['volume']['id'])
        self.block.wait(volume, 'error')
        self.assertIn('Could not find any available weighted backend', self.text(volume))
        self.delete(volume)

    def test_a_volume_for_several_instances(self) -> None:
        what = {'volume': {'size': 1, 'volume_type': self.shared_type()}}
        volume = str(self.block.call('POST', '/volumes', what)['volume']['id'])
        self.block.wait(volume, 'error')
        self.assertIn('Could not find any available weighted backend', self.text(volume))
        self.delete(volume)

    def test_a_volume_that_several_instances_are_to_share_from_now_on(self) -> None:
        volume = self.written('one')
        row = self.retype(volume, self.shared_type())
        # Cinder keeps the type, and takes the volume for one of the other all the same.
        self.assertEqual(('node-a', True), (row['volume_type'], row['multiattach']))
        with self.attached(volume, 'node-a'):
            [first] = self.block.attachments(volume)
            for node in ('node-a', 'node-b'):
                with self.subTest(node):
                    with self.assertRaises(Refused) as caught:
                        self.block.attach(volume, str(uuid.uuid4()), node)
                    self.assertIn('does not support multiattach', caught.exception.text)
                for one in self.block.attachments(volume):
                    if one['id'] != first['id']:
                        self.block.detach(one['id'])
            self.assertEqual({'node-a': 'LOCAL'}, self.fleet.where(volume))
        self.assertFalse(self.retype(volume, 'local')['multiattach'])
        self.assert_content(volume, self.file('one'), 'node-b')
        self.delete(volume)

    def retype(self, volume: str, kind: str) -> dict[str, Any]:
        """Has a type changed; gives the volume when Cinder has done what it does."""
        what = {'new_type': kind, 'migration_policy': 'on-demand'}
        self.block.act(volume, os_retype=what)
        return self.block.wait(volume, 'available')

    def shared_type(self) -> str:
        """A volume type for several instances, which goes when the test is over."""
        kind = self.cloud.add_type('shared', {'multiattach': '<is> True'})
        self.addCleanup(self.block.call, 'DELETE', f'/types/{kind}')
        return kind

    def test_growth_for_which_there_is_no_room(self) -> None:
        volume = self.written('one')
        self.refuse('node-a', 'Volumes.Extend')
        self.block.act(volume, os_extend={'new_size': 2})
        self.block.wait(volume, 'error_extending')
        self.assertIn('Volume Driver failed to extend volume', self.text(volume))
        self.assertEqual(1, self.block.show(volume)['size'])
        self.block.act(volume, os_reset_status={'status': 'available'})
        self.assert_content(volume, self.file('one'), 'node-a')
        self.delete(volume)

    def test_an_attachment_to_a_volume_whose_node_is_silent(self) -> None:
        volume = self.create('node-a')
        self.fleet.agents['node-a'].is_down = True
        with self.assertRaises(Refused) as caught:
            self.block.attach(volume, str(uuid.uuid4()), 'node-b')
        self.assertIn('node-a does not answer', caught.exception.text + self.text(volume))
        self.fleet.agents['node-a'].is_down = False
        for attachment in self.block.attachments(volume):
            self.block.detach(attachment['id'])
        self.block.wait(volume, 'available')
        self.delete(volume)

    def test_a_snapshot_of_a_volume_whose_node_is_silent(self) -> None:
        volume = self.create('node-a')
        self.fleet.agents['node-a'].is_down = True
        what = {'snapshot': {'volume_id': volume}}
        snapshot = str(self.block.call('POST', '/snapshots', what)['snapshot']['id'])
        self.block.wait_snapshot(snapshot, 'error')
        self.assertIn('Snapshot failed to create', self.text(snapshot))
        self.fleet.agents['node-a'].is_down = False
        self.block.delete_snapshot(snapshot)
        self.delete(volume)

    def test_an_image_of_a_volume_that_cannot_be_read_where_cinder_runs(self) -> None:
        volume = self.written('one')
        self.fleet.agents[CONTROLLER].is_down = True
        what = {'image_name': 'x', 'disk_format': 'raw', 'container_format': 'bare'}
        self.block.act(volume, os_volume_upload_image=what)
        self.block.wait(volume, 'available')
        self.cloud.processes.wait('nothing is heard', lambda: self.heard(volume))
        self.assertIn('Failed to upload volume to image', self.text(volume))
        self.fleet.agents[CONTROLLER].is_down = False
        self.assert_content(volume, self.file('one'), 'node-a')
        self.delete(volume)

    def test_a_volume_that_is_open_is_kept(self) -> None:
        volume = self.written('one')
        made = self.block.attach(volume, str(uuid.uuid4()), 'node-a')
        self.fleet.agents['node-a'].open(volume)
        with self.assertRaises(Refused):
            self.block.detach(made['id'])
        self.assertEqual('in-use', self.block.show(volume)['status'])
        self.fleet.agents['node-a'].shut(volume)
        self.block.detach(made['id'])
        self.assert_content(volume, self.file('one'), 'node-a')
        self.delete(volume)

    def text(self, resource: str) -> str:
        return ' '.join(self.heard(resource))
