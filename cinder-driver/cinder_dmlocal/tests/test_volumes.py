"""Volumes and snapshots: what begins, grows, is copied, and ends."""

from __future__ import annotations

from typing import Any

from cinder import exception

from cinder_dmlocal.tests.base import SERVICE, DriverTestCase, Snapshot, Volume
from cinder_dmlocal.tests.fake import GIB, Refusal


class Volumes(DriverTestCase):
    def test_a_volume_is_created_where_the_scheduler_says(self) -> None:
        volume = self.cinder.create('node-b', 3)
        self.assert_where(volume, b='LOCAL')
        self.assertEqual(3 * GIB, self.agent('b').volumes[volume.id].size)

    def test_creating_again_succeeds(self) -> None:
        volume = self.cinder.create()
        self.driver.create_volume(volume)
        self.assert_where(volume, a='LOCAL')

    def test_no_room_says_what_can_be_done(self) -> None:
        with self.refused('NO_ROOM', 'make room'):
            self.cinder.create('node-a', 1000)

    def test_a_node_that_is_not_of_the_fleet_is_named(self) -> None:
        with self.refused('node-x', 'dmlocal_nodes'):
            self.cinder.create('node-x')

    def test_multiattach_is_refused(self) -> None:
        volume = Volume(1, f'{SERVICE}#node-a', multiattach=True)
        with self.assertRaisesRegex(exception.InvalidVolumeType, 'multiattach'):
            self.driver.create_volume(volume)

    def test_a_volume_is_deleted_wherever_it_is(self) -> None:
        volume = self.cinder.create()
        row = self.cinder.attach(volume, 'node-b')
        self.cinder.delete_attachment(volume, row)
        volume.host = f'{SERVICE}#node-a'
        self.driver.delete_volume(volume)
        self.assert_where(volume)

    def test_deleting_what_is_nowhere_succeeds_although_a_node_is_silent(self) -> None:
        volume = self.cinder.create()
        self.driver.delete_volume(volume)
        self.agent('c').is_down = True
        self.driver.delete_volume(volume)

    def test_a_volume_on_a_silent_node_is_not_forgotten(self) -> None:
        volume = self.cinder.create()
        self.agent('a').is_down = True
        with self.refused('node-a', 'does not answer'):
            self.driver.delete_volume(volume)

    def test_a_volume_on_a_node_that_is_declared_dead_is_deleted(self) -> None:
        volume = self.cinder.create()
        driver = self.make_driver(dmlocal_dead_nodes=['node-a'])
        driver.delete_volume(volume)
        self.assert_where(volume, a='LOCAL')

    def test_an_open_volume_is_not_deleted(self) -> None:
        volume = self.cinder.create()
        self.cinder.attach(volume, 'node-a')
        self.agent('a').open(volume.id)
        with self.refused('in use'):
            self.driver.delete_volume(volume)
        self.assert_where(volume, a='LOCAL')

    def test_a_volume_whose_detach_was_not_heard_is_deleted(self) -> None:
        volume = self.cinder.create()
        self.cinder.attach(volume, 'node-a')
        self.driver.delete_volume(volume)
        self.assert_where(volume)

    def test_a_volume_that_is_held_somewhere_is_deleted_in_both_places(self) -> None:
        volume = self.cinder.create()
        self.cinder.attach(volume, 'node-a', 'vm')
        self.cinder.create_attachment(volume, 'vm', 'node-b')
        self.driver.delete_volume(volume)
        self.assert_where(volume)

    def test_a_volume_that_is_used_remotely_is_deleted_at_its_home(self) -> None:
        volume = self.cinder.create()
        volume.status = 'downloading'
        self.driver.initialize_connection(volume, {'host': 'node-b'})
        self.driver.delete_volume(volume)
        self.assert_where(volume)

    def test_a_volume_grows_where_it_is_written(self) -> None:
        volume = self.cinder.create()
        self.cinder.attach(volume, 'node-a', 'vm')
        self.agent('a').open(volume.id)
        self.cinder.create_attachment(volume, 'vm', 'node-b')
        self.driver.extend_volume(volume, 5)
        self.assertEqual(5 * GIB, self.agent('a').volumes[volume.id].size)

    def test_the_text_of_a_moving_volume_says_to_wait(self) -> None:
        volume = self.cinder.create()
        self.agent('a').says_refused['Volumes.Extend'] = Refusal('VOLUME_MOVING')
        with self.refused('VOLUME_MOVING', 'wait'):
            self.driver.extend_volume(volume, 2)

    def test_a_late_call_does_not_hit_another_generation(self) -> None:
        volume = self.cinder.create()
        extend, agent = self.agent('a').volumes_extend, self.agent('a')

        def handed_over(request: Any) -> Any:
            agent.volumes[volume.id].generation += 2
            return extend(request)

        agent.volumes_extend = handed_over  # type: ignore[method-assign]
        self.addCleanup(agent.__dict__.pop, 'volumes_extend')
        with self.refused('GENERATION_STALE'):
            self.driver.extend_volume(volume, 2)
        self.assertEqual(GIB, agent.volumes[volume.id].size)


class Copies(DriverTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.volume = self.cinder.create()
        self.agent('a').volumes[self.volume.id].data = ['one']
        self.snapshot = Snapshot(self.volume)

    def take(self) -> None:
        answer = self.driver.create_snapshot(self.snapshot)
        self.snapshot.provider_location = answer['provider_location']

    def copy(self, node: str, size: int = 1) -> Volume:
        made = Volume(size, f'{SERVICE}#{node}', 'creating')
        self.driver.create_volume_from_snapshot(made, self.snapshot)
        return made

    def test_a_copy_on_the_same_node_is_whole_at_once(self) -> None:
        self.take()
        made = self.copy('node-a')
        self.assert_where(made, a='LOCAL')
        self.assertEqual(['one'], self.agent('a').volumes[made.id].data)

    def test_a_copy_on_another_node_is_received_there_detached(self) -> None:
        self.take()
        made = self.copy('node-b')
        self.assert_where(made, a='FENCED', b='HYDRATING')
        self.assertFalse(self.agent('b').volumes[made.id].attached)
        self.assertEqual(['one'], self.agent('b').volumes[made.id].data)

    def test_a_copy_may_be_larger(self) -> None:
        self.take()
        for node in ('node-a', 'node-b'):
            made = self.copy(node, 4)
            self.assertEqual(4 * GIB, self.fleet.agents[node].volumes[made.id].size)

    def test_a_copy_that_was_made_already_is_not_made_again(self) -> None:
        self.take()
        made = self.copy('node-b')
        self.driver.create_volume_from_snapshot(made, self.snapshot)
        self.assertEqual(1, self.agent('a').calls['Moves.Grant'])

    def test_a_copy_whose_grant_was_not_heard_of_is_begun_again(self) -> None:
        self.take()
        made = Volume(1, f'{SERVICE}#node-b', 'creating')
        self.agent('a').loses_answer.add('Moves.Grant')
        with self.refused('does not answer'):
            self.driver.create_volume_from_snapshot(made, self.snapshot)
        self.agent('a').loses_answer.clear()
        self.assert_where(made, a='PUBLISHED')
        self.driver.create_volume_from_snapshot(made, self.snapshot)
        self.assert_where(made, a='FENCED', b='HYDRATING')

    def test_a_copy_whose_grant_was_not_heard_of_is_deleted(self) -> None:
        self.take()
        made = Volume(1, f'{SERVICE}#node-b', 'error')
        self.agent('a').loses_answer.add('Moves.Grant')
        with self.refused('does not answer'):
            self.driver.create_volume_from_snapshot(made, self.snapshot)
        self.agent('a').loses_answer.clear()
        self.driver.delete_volume(made)
        self.assert_where(made)

    def test_a_refused_copy_leaves_nothing_at_its_source(self) -> None:
        self.take()
        self.agent('b').capacity = 0
        made = Volume(1, f'{SERVICE}#node-b')
        with self.refused('NO_ROOM'):
            self.driver.create_volume_from_snapshot(made, self.snapshot)
        self.assert_where(made)

    def test_a_snapshot_is_found_where_it_was_taken(self) -> None:
        self.take()
        self.cinder.attach(self.volume, 'node-b')
        self.agent('b').arrive(self.volume.id)
        made = self.copy('node-c')
        self.assert_where(made, a='FENCED', c='HYDRATING')

    def test_a_snapshot_whose_node_cinder_does_not_know_is_found(self) -> None:
        self.take()
        self.snapshot.provider_location = None
        self.cinder.attach(self.volume, 'node-b')
        self.agent('c').is_down = True
        self.driver.delete_snapshot(self.snapshot)
        self.assertEqual({}, self.agent('a').snapshots)

    def test_a_snapshot_of_a_migrating_volume_is_taken_where_it_is_written(self) -> None:
        self.cinder.attach(self.volume, 'node-a', 'vm')
        self.agent('a').open(self.volume.id)
        self.cinder.create_attachment(self.volume, 'vm', 'node-b')
        self.take()
        self.assertEqual('node-a', self.snapshot.provider_location)

    def test_a_snapshot_that_is_gone_is_deleted(self) -> None:
        self.take()
        for _ in range(2):
            self.driver.delete_snapshot(self.snapshot)

    def test_a_snapshot_on_a_silent_node_is_not_forgotten(self) -> None:
        self.take()
        self.agent('a').is_down = True
        with self.refused('node-a'):
            self.driver.delete_snapshot(self.snapshot)
        self.make_driver(dmlocal_dead_nodes=['node-a']).delete_snapshot(self.snapshot)

    def test_a_clone_is_made_of_a_volume_in_use(self) -> None:
        self.cinder.attach(self.volume, 'node-a')
        self.agent('a').open(self.volume.id)
        made = Volume(1, f'{SERVICE}#node-b')
        self.driver.create_cloned_volume(made, self.volume)
        self.assertEqual(['one'], self.agent('b').volumes[made.id].data)

    def test_a_clone_of_what_has_not_arrived_says_to_wait(self) -> None:
        self.cinder.attach(self.volume, 'node-b')
        made = Volume(1, f'{SERVICE}#node-b')
        with self.refused('VOLUME_MOVING', 'wait'):
            self.driver.create_cloned_volume(made, self.volume)

    def test_a_volume_goes_back_to_a_snapshot_of_it(self) -> None:
        self.take()
        self.agent('a').volumes[self.volume.id].data.append('two')
        self.driver.revert_to_snapshot(None, self.volume, self.snapshot)
        self.assertEqual(['one'], self.agent('a').volumes[self.volume.id].data)

    def test_a_volume_that_has_left_its_snapshot_is_reverted_by_cinder(self) -> None:
        self.take()
        row = self.cinder.attach(self.volume, 'node-b')
        self.cinder.delete_attachment(self.volume, row)
        with self.assertRaises(NotImplementedError):
            self.driver.revert_to_snapshot(None, self.volume, self.snapshot)
