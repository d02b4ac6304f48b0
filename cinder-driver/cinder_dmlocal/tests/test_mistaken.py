"""Copies that are easily taken for what they are not, and what would be lost with that."""

from __future__ import annotations

import uuid
from typing import Any

from cinder_dmlocal.tests.base import (
    SERVICE,
    Attachment,
    DriverTestCase,
    Snapshot,
    Volume,
)
from cinder_dmlocal.tests.fake import GIB, Refusal, Vol


class Onward(DriverTestCase):
    """A guest that migrates on while its volume is still being copied to its node."""

    def setUp(self) -> None:
        super().setUp()
        self.vm = str(uuid.uuid4())
        self.volume = self.cinder.create()
        self.at_b = self.cinder.attach(self.volume, 'node-b', self.vm)
        self.agent('b').open(self.volume.id)
        self.agent('b').write(self.volume.id, 'first')

    def prepare(self, letter: str) -> Attachment:
        row = self.cinder.create_attachment(self.volume, self.vm, f'node-{letter}')
        self.cinder.complete(self.volume, row)
        return row

    def leave_b(self) -> None:
        self.agent('b').shut(self.volume.id)
        self.cinder.delete_attachment(self.volume, self.at_b)

    def test_the_terminate_at_its_source_switches(self) -> None:
        self.prepare('c')
        self.leave_b()
        self.assert_where(self.volume, a='FENCED', b='FENCED', c='HYDRATING')
        self.assert_home(self.volume, 'c')

    def test_a_repeated_initialize_keeps_the_destination(self) -> None:
        self.prepare('c')
        self.driver.initialize_connection(self.volume, {'host': 'node-c'})
        self.assertEqual(1, self.agent('b').calls['Moves.Grant'])

    def test_a_destination_that_has_died_keeps_no_other_away(self) -> None:
        at_c = self.prepare('c')
        self.agent('c').is_down = True
        self.cinder.delete_attachment(self.volume, at_c)
        self.prepare('a')

    def test_a_guest_that_returns_before_it_has_written_is_not_cut(self) -> None:
        self.prepare('c')
        self.leave_b()
        self.prepare('b')
        # The first write at node c comes while that is prepared.
        self.assertTrue(self.agent('c').write(self.volume.id, 'second'))
        self.agent('b').open(self.volume.id)
        self.assertTrue(self.agent('b').write(self.volume.id, 'third'))

    def test_a_volume_in_the_middle_of_a_switch_is_not_forgotten(self) -> None:
        self.leave_b()
        at_c = self.cinder.attach(self.volume, 'node-c', self.vm)
        self.cinder.delete_attachment(self.volume, at_c)
        self.agent('c').volumes[self.volume.id].state = 'HELD'
        self.volume.host = f'{SERVICE}#node-b'
        with self.refused():
            self.driver.delete_volume(self.volume)


class FailedHold(DriverTestCase):
    """The destination's devices fail while it is held."""

    def setUp(self) -> None:
        super().setUp()
        self.volume = self.cinder.create()
        self.at_a = self.cinder.attach(self.volume, 'node-a', 'vm')
        self.agent('a').open(self.volume.id)
        self.at_b = self.cinder.create_attachment(self.volume, 'vm', 'node-b')
        self.cinder.complete(self.volume, self.at_b)
        self.agent('b').volumes[self.volume.id].has_failed = True
        for method in ('Volumes.Detach', 'Moves.Switch'):
            self.agent('b').says_refused[method] = Refusal('VOLUME_FAILED')

    def test_a_roll_back_ends_it(self) -> None:
        self.cinder.delete_attachment(self.volume, self.at_b)
        self.assert_where(self.volume, a='LOCAL')

    def test_the_source_is_still_the_volume(self) -> None:
        self.driver.extend_volume(self.volume, 2)
        self.assertEqual(2 * GIB, self.agent('a').volumes[self.volume.id].size)

    def test_a_terminate_at_the_source_does_not_make_it_the_volume(self) -> None:
        self.agent('a').shut(self.volume.id)
        self.cinder.delete_attachment(self.volume, self.at_a)
        self.assert_home(self.volume, 'a')


class OwnHost(DriverTestCase):
    """cinder-volume runs on a hypervisor, and makes an image of a volume in use there."""

    def setUp(self) -> None:
        super().setUp()
        self.volume = self.cinder.create()
        self.cinder.attach(self.volume, 'node-a', 'vm')
        self.volume.status = 'uploading'

    def upload(self) -> None:
        connector = {'host': 'node-a'}
        self.driver.initialize_connection(self.volume, connector)
        self.driver.terminate_connection(self.volume, connector, force=True)

    def test_under_a_running_guest_it_ends_well(self) -> None:
        self.agent('a').open(self.volume.id)
        self.upload()

    def test_an_instance_that_is_shut_off_keeps_its_device(self) -> None:
        self.upload()
        self.agent('a').open(self.volume.id)


class OtherHost(DriverTestCase):
    """cinder-volume runs elsewhere, and makes an image while the guest ends."""

    def setUp(self) -> None:
        super().setUp()
        self.volume = self.cinder.create()
        self.row = self.cinder.attach(self.volume, 'node-a', 'vm')
        self.agent('a').open(self.volume.id)
        self.agent('a').write(self.volume.id, 'first')

    def visit(self) -> None:
        self.volume.status = 'uploading'
        self.driver.initialize_connection(self.volume, {'host': 'node-c'})
        self.agent('c').open(self.volume.id)

    def end_guest(self) -> None:
        self.agent('a').shut(self.volume.id)
        self.cinder.delete_attachment(self.volume, self.row)

    def test_the_visit_goes_on_and_the_volume_stays_at_home(self) -> None:
        self.visit()
        self.end_guest()
        self.volume.status = 'uploading'
        self.assertFalse(self.agent('a').volumes[self.volume.id].attached)
        self.assert_where(self.volume, a='PUBLISHED', c='HELD')
        self.assert_home(self.volume, 'a')
        self.agent('c').shut(self.volume.id)
        self.driver.terminate_connection(self.volume, {'host': 'node-c'}, force=True)
        self.assert_where(self.volume, a='LOCAL')
        self.assert_home(self.volume, 'a')

    def test_a_guest_that_still_runs_keeps_its_device(self) -> None:
        self.visit()
        with self.refused('in use', 'node-a'):
            self.cinder.delete_attachment(self.volume, self.row)

    def test_a_guest_elsewhere_that_nova_has_forgotten_is_no_visit(self) -> None:
        row = self.cinder.create_attachment(self.volume, 'vm', 'node-c')
        self.agent('c').open(self.volume.id)
        self.cinder.complete(self.volume, row)
        self.volume.volume_attachment.remove(row)
        with self.refused('in use', 'node-c'):
            self.end_guest()
        self.assertTrue(self.agent('c').write(self.volume.id, 'second'))


class Elsewhere(DriverTestCase):
    """What is where this service does not look for it."""

    def without_node_c(self) -> Any:
        nodes = ['node-a', 'node-b']
        endpoints = {node: self.fleet.endpoints[node] for node in nodes}
        return self.make_driver(dmlocal_nodes=nodes, dmlocal_endpoints=endpoints)

    def test_a_volume_on_a_node_that_is_not_listed_is_not_forgotten(self) -> None:
        volume = self.cinder.create('node-c')
        with self.refused('node-c', 'dmlocal_nodes'):
            self.without_node_c().delete_volume(volume)

    def test_a_snapshot_on_a_node_that_is_not_listed_is_not_forgotten(self) -> None:
        snapshot = Snapshot(self.cinder.create('node-c'))
        taken = self.driver.create_snapshot(snapshot)
        snapshot.provider_location = taken['provider_location']
        with self.refused('node-c', 'dmlocal_nodes'):
            self.without_node_c().delete_snapshot(snapshot)

    def test_a_snapshot_whose_answer_was_lost_is_not_forgotten(self) -> None:
        snapshot = Snapshot(self.cinder.create())
        self.agent('a').loses_answer.add('Snapshots.Create')
        with self.refused('does not answer'):
            self.driver.create_snapshot(snapshot)
        self.agent('a').is_down = True
        with self.refused('node-a', 'does not answer'):
            self.driver.delete_snapshot(snapshot)

    def test_a_host_that_cinder_wrote_by_itself_does_not_lose_a_volume(self) -> None:
        for act in ('attach', 'delete'):
            with self.subTest(act):
                volume = self.cinder.create()
                self.agent('a').volumes[volume.id].data = ['data']
                volume.host = f'{SERVICE}#node-b'
                if act == 'attach':
                    self.cinder.attach(volume, 'node-a')
                    self.assert_home(volume, 'a')
                else:
                    self.driver.delete_volume(volume)
                    self.assert_where(volume)

    def test_what_was_brought_back_is_not_taken_for_a_volume_that_has_left(self) -> None:
        volume = self.cinder.create()
        self.cinder.delete_attachment(volume, self.cinder.attach(volume, 'node-b'))
        self.agent('b').arrive(volume.id)
        self.agent('b').is_down = True
        old = Vol(volume.id, GIB, data=['old'])
        self.agent('a').volumes[volume.id] = old
        with self.refused('node-b', 'does not answer'):
            self.cinder.attach(volume, 'node-a', 'vm')
        self.assertFalse(old.attached)
        with self.refused('node-b', 'does not answer'):
            self.driver.delete_volume(volume)
        # An attachment there that has to go is no obstacle.
        self.driver.terminate_connection(volume, {'host': 'node-a'})
        self.cinder.driver = self.make_driver(dmlocal_dead_nodes=['node-b'])
        self.cinder.attach(volume, 'node-a', 'vm')
        self.assertTrue(old.attached)

    def test_what_a_copy_of_a_cached_image_left_is_in_nobodys_way(self) -> None:
        origin = self.cinder.create()
        volume = Volume(1, f'{SERVICE}#node-b', 'creating')
        self.agent('a').loses_answer.add('Volumes.Create')
        with self.refused('does not answer'):
            self.driver.create_cloned_volume(volume, origin)
        self.agent('a').loses_answer.clear()
        # Cinder downloads the image instead.
        self.driver.create_volume(volume)
        self.assert_where(volume, a='LOCAL')
        self.assertIsNone(self.agent('a').volumes[volume.id].made_of)

    def test_a_volume_that_waits_for_the_word_of_the_dead_is_attached_elsewhere(self) -> None:
        volume = self.cinder.create()
        vol = self.agent('a').volumes[volume.id]
        vol.lent_to, vol.must_confirm = 'node-b', True
        with self.refused('CONFIRMATION_REQUIRED'):
            self.cinder.attach(volume, 'node-c', 'vm')
        self.cinder.driver = self.make_driver(dmlocal_dead_nodes=['node-b'])
        self.cinder.attach(volume, 'node-c', 'vm')
        self.assert_where(volume, a='FENCED', c='HYDRATING')
