"""Volumes and snapshots: what begins, grows, is copied, and ends."""

from __future__ import annotations

from typing import Any

from cinder import exception

from cinder_dmlocal.tests.base import (
    SERVICE,
    DriverTestCase,
    Snapshot,
    Volume,
    stays_here,
)
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
        with self.refused('NO_ROOM', 'make room') as caught:
            self.cinder.create('node-a', 1000)
        self.assertFalse(stays_here(caught.exception))

    def test_a_node_that_has_not_heard_of_a_creation_leaves_it_to_others(self) -> None:
        self.agent('a').is_down = True
        with self.refused('does not answer') as caught:
            self.cinder.create()
        self.assertFalse(stays_here(caught.exception))

    def test_what_cinder_deletes_after_it_has_tried_elsewhere_stays(self) -> None:
        volume = self.cinder.create()
        # Cinder has taken the host away, and another call has created the volume since.
        stale = Volume(1, None, 'creating', id=volume.id)  # type: ignore[arg-type]
        with self.refused():
            self.driver.delete_volume(stale)
        self.assert_where(volume, a='LOCAL')

    def test_a_creation_that_may_have_been_done_is_tried_on_no_other_node(self) -> None:
        self.agent('a').loses_answer.add('Volumes.Create')
        volume = Volume(1, f'{SERVICE}#node-a', 'creating')
        with self.refused('does not answer', 'may have') as caught:
            self.driver.create_volume(volume)
        self.assertTrue(stays_here(caught.exception))
        self.driver.delete_volume(volume)
        self.assert_where(volume)

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

    def test_deleting_what_was_never_made_succeeds_although_a_node_is_silent(self) -> None:
        self.agent('c').is_down = True
        self.driver.delete_volume(Volume(1, f'{SERVICE}#node-a', 'error'))

    def test_deleting_again_succeeds_once_every_node_says_that_it_is_gone(self) -> None:
        volume = self.cinder.create()
        self.driver.delete_volume(volume)
        self.agent('c').is_down = True
        with self.refused('node-c', 'does not answer', volume.id):
            self.driver.delete_volume(volume)
        self.make_driver(dmlocal_dead_nodes=['node-c']).delete_volume(volume)
        self.agent('c').is_down = False
        self.driver.delete_volume(volume)

    def test_a_volume_that_a_silent_node_has_unknown_to_cinder_is_not_forgotten(self) -> None:
        volume = self.cinder.create('node-c')
        volume.host = f'{SERVICE}#node-a'
        self.agent('c').volumes[volume.id].data = ['data']
        for letter in 'bc':
            self.agent(letter).is_down = True
        with self.refused('node-b, node-c'):
            self.driver.delete_volume(volume)
        for letter in 'bc':
            self.agent(letter).is_down = False
        self.driver.delete_volume(volume)
        self.assert_where(volume)

    def test_a_volume_on_a_silent_node_is_not_forgotten(self) -> None:
        volume = self.cinder.create()
        self.agent('a').is_down = True
        with self.refused('node-a', 'does not answer'):
            self.driver.delete_volume(volume)

    def test_a_volume_of_which_its_node_says_nothing_is_not_forgotten(self) -> None:
        volume = self.cinder.create()
        self.agent('a').says_refused['Volumes.Get'] = Refusal('INTERNAL', 'INTERNAL')
        with self.refused('node-a', 'INTERNAL'):
            self.driver.delete_volume(volume)

    def test_a_volume_on_a_node_that_is_declared_dead_is_deleted(self) -> None:
        volume = self.cinder.create()
        driver = self.make_driver(dmlocal_dead_nodes=['node-a'])
        driver.delete_volume(volume)
        self.assert_where(volume, a='LOCAL')

    def test_an_open_volume_is_not_deleted_and_stays_as_it_was(self) -> None:
        volume = self.cinder.create()
        self.cinder.attach(volume, 'node-a')
        self.agent('a').open(volume.id)
        with self.assertRaisesRegex(exception.VolumeIsBusy, 'in use on node-a'):
            self.driver.delete_volume(volume)
        self.assert_where(volume, a='LOCAL')

    def test_a_volume_that_cannot_be_deleted_yet_stays_as_it_was(self) -> None:
        volume = self.cinder.create()
        self.agent('a').says_refused['Volumes.Delete'] = Refusal('VOLUME_MOVING')
        with self.assertRaisesRegex(exception.VolumeIsBusy, 'VOLUME_MOVING.*wait'):
            self.driver.delete_volume(volume)
        self.agent('a').says_refused['Volumes.Delete'] = Refusal('STEP_FAILED', 'INTERNAL')
        with self.assertRaisesRegex(exception.VolumeBackendAPIException, 'STEP_FAILED'):
            self.driver.delete_volume(volume)

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

    def test_a_volume_that_is_handed_over_meanwhile_grows_where_it_is_then(self) -> None:
        volume = self.cinder.create()
        self.cinder.attach(volume, 'node-a', 'vm')
        self.cinder.create_attachment(volume, 'vm', 'node-b')
        extend, agent = self.agent('a').volumes_extend, self.agent('a')

        def switched(request: Any) -> Any:
            self.agent('b').write(volume.id, 'first')
            return extend(request)

        agent.volumes_extend = switched  # type: ignore[method-assign]
        self.addCleanup(agent.__dict__.pop, 'volumes_extend')
        self.driver.extend_volume(volume, 2)
        self.assertEqual(2 * GIB, self.agent('b').volumes[volume.id].size)
        self.assert_home(volume, 'b')

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
        """A volume of the snapshot, for which the scheduler has chosen that node."""
        made = Volume(size, f'{SERVICE}#{node}', 'creating')
        self.driver.create_volume_from_snapshot(made, self.snapshot)
        made.status = 'available'
        return made

    def has_room_for_one(self) -> None:
        """Node a takes a copy, but not one that is larger."""
        self.agent('a').capacity = 2 * GIB

    def test_a_copy_on_the_same_node_is_whole_at_once(self) -> None:
        self.take()
        made = self.copy('node-a')
        self.assert_where(made, a='LOCAL')
        self.assertEqual(['one'], self.agent('a').volumes[made.id].data)

    def test_a_copy_begins_where_its_origin_is_whatever_the_scheduler_says(self) -> None:
        self.take()
        made = self.copy('node-b')
        self.assert_where(made, a='LOCAL')
        self.assert_home(made, 'a')
        self.assertEqual(0, self.agent('a').calls['Moves.Grant'])

    def test_a_copy_is_copied_once_where_it_is_attached(self) -> None:
        self.take()
        made = self.copy('node-b')
        self.cinder.attach(made, 'node-c')
        self.assert_where(made, a='FENCED', c='HYDRATING')
        self.assertEqual(['one'], self.agent('c').volumes[made.id].data)

    def test_a_copy_may_be_larger(self) -> None:
        self.take()
        made = self.copy('node-b', 4)
        self.assertEqual(4 * GIB, self.agent('a').volumes[made.id].size)

    def test_where_its_origin_has_no_room_it_is_received_as_the_scheduler_says(self) -> None:
        self.take()
        self.has_room_for_one()
        made = self.copy('node-b', 4)
        self.assert_where(made, a='FENCED', b='HYDRATING')
        self.assert_home(made, 'b')
        vol = self.agent('b').volumes[made.id]
        self.assertFalse(vol.attached)
        self.assertEqual((4 * GIB, ['one']), (vol.size, vol.data))

    def test_a_copy_without_room_anywhere_leaves_nothing(self) -> None:
        self.take()
        self.has_room_for_one()
        self.agent('b').capacity = GIB
        made = Volume(4, f'{SERVICE}#node-b', 'creating')
        with self.refused('NO_ROOM', 'node-b'):
            self.driver.create_volume_from_snapshot(made, self.snapshot)
        self.assert_where(made)

    def test_a_copy_that_cannot_be_taken_away_is_made_nowhere_else(self) -> None:
        self.take()
        self.has_room_for_one()
        self.agent('a').says_refused['Volumes.Delete'] = Refusal('STEP_FAILED', 'INTERNAL')
        made = Volume(4, f'{SERVICE}#node-b', 'creating')
        with self.refused('STEP_FAILED', 'node-a'):
            self.driver.create_volume_from_snapshot(made, self.snapshot)
        self.assert_where(made, a='LOCAL')
        self.agent('a').says_refused.clear()
        self.driver.delete_volume(made)
        self.assert_where(made)

    def test_a_copy_that_may_have_been_made_is_made_nowhere_else(self) -> None:
        self.take()
        self.agent('a').loses_answer.add('Volumes.Create')
        made = Volume(1, f'{SERVICE}#node-b', 'creating')
        with self.refused('may have') as caught:
            self.driver.create_volume_from_snapshot(made, self.snapshot)
        self.assertTrue(stays_here(caught.exception))
        self.driver.delete_volume(made)
        self.assert_where(made)

    def received(self, loses: str = '') -> Volume:
        """A larger copy that node a has no room for; some answer is lost."""
        self.take()
        self.has_room_for_one()
        made = Volume(4, f'{SERVICE}#node-b', 'creating')
        if loses:
            node, _, method = loses.partition(' ')
            self.agent(node).loses_answer.add(method)
            with self.refused('does not answer', 'may have') as caught:
                self.driver.create_volume_from_snapshot(made, self.snapshot)
            self.assertTrue(stays_here(caught.exception))
            self.agent(node).loses_answer.clear()
        return made

    def test_a_receive_that_was_done_already_is_not_done_again(self) -> None:
        made = self.received()
        for _ in range(2):
            self.driver.create_volume_from_snapshot(made, self.snapshot)
        self.assertEqual(1, self.agent('a').calls['Moves.Grant'])

    def test_a_receive_whose_answer_was_lost_is_looked_for(self) -> None:
        made = self.received()
        self.agent('b').loses_answer.add('Moves.Receive')
        self.driver.create_volume_from_snapshot(made, self.snapshot)
        self.assert_where(made, a='FENCED', b='HYDRATING')

    def test_a_receive_whose_grant_was_not_heard_of_is_begun_again(self) -> None:
        made = self.received('a Moves.Grant')
        self.assert_where(made, a='PUBLISHED')
        self.driver.create_volume_from_snapshot(made, self.snapshot)
        self.assert_where(made, a='FENCED', b='HYDRATING')

    def test_a_receive_whose_grant_was_not_heard_of_is_deleted(self) -> None:
        made = self.received('a Moves.Grant')
        self.driver.delete_volume(made)
        self.assert_where(made)

    def test_a_receive_that_waits_for_its_source_is_deleted(self) -> None:
        made = self.received()
        agent = self.agent('b')
        agent.ask_for_fence = lambda vol: False  # type: ignore[method-assign]
        self.addCleanup(agent.__dict__.pop, 'ask_for_fence')
        agent.says_refused['Volumes.Extend'] = Refusal('VOLUME_MOVING')
        agent.says_refused['Volumes.Delete'] = Refusal('VOLUME_MOVING')
        with self.refused('VOLUME_MOVING'):
            self.driver.create_volume_from_snapshot(made, self.snapshot)
        agent.says_refused.clear()
        self.assert_where(made, a='PUBLISHED', b='HELD')
        self.driver.delete_volume(made)
        self.assert_where(made)

    def test_a_snapshot_is_found_where_it_was_taken(self) -> None:
        self.take()
        self.cinder.attach(self.volume, 'node-b')
        self.agent('b').arrive(self.volume.id)
        made = self.copy('node-c')
        self.assert_where(made, a='LOCAL')

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

    def test_a_snapshot_of_a_volume_that_is_just_switched_is_taken_after_it(self) -> None:
        self.cinder.attach(self.volume, 'node-a', 'vm')
        self.cinder.create_attachment(self.volume, 'vm', 'node-b')
        create, agent = self.agent('a').snapshots_create, self.agent('a')

        def switched(request: Any) -> Any:
            self.agent('b').write(self.volume.id, 'two')
            return create(request)

        agent.snapshots_create = switched  # type: ignore[method-assign]
        self.addCleanup(agent.__dict__.pop, 'snapshots_create')
        self.take()
        self.assertEqual('node-b', self.snapshot.provider_location)
        self.assertEqual(['one', 'two'], self.agent('b').snapshots[self.snapshot.id].data)

    def test_a_snapshot_that_may_be_on_a_silent_node_is_not_forgotten(self) -> None:
        self.cinder.attach(self.volume, 'node-b')
        self.agent('b').loses_answer.add('Snapshots.Create')
        with self.refused('does not answer'):
            self.take()
        self.assertEqual('node-b', self.snapshot.provider_location)
        # Cinder believes the volume where it was when the snapshot was asked for.
        self.volume.host = f'{SERVICE}#node-a'
        self.agent('b').is_down = True
        with self.refused('node-b', 'does not answer'):
            self.driver.delete_snapshot(self.snapshot)
        self.make_driver(dmlocal_dead_nodes=['node-b']).delete_snapshot(self.snapshot)
        self.agent('b').is_down = False
        self.agent('b').loses_answer.clear()
        self.driver.delete_snapshot(self.snapshot)
        self.assertEqual({}, self.agent('b').snapshots)

    def test_a_snapshot_that_is_gone_is_deleted_although_another_node_is_silent(self) -> None:
        self.take()
        self.agent('c').is_down = True
        for _ in range(2):
            self.driver.delete_snapshot(self.snapshot)

    def test_a_snapshot_that_was_refused_is_deleted_although_a_node_is_silent(self) -> None:
        self.agent('a').says_refused['Snapshots.Create'] = Refusal('NO_ROOM')
        with self.refused('NO_ROOM'):
            self.take()
        self.agent('c').is_down = True
        self.driver.delete_snapshot(self.snapshot)

    def test_a_snapshot_that_cannot_be_deleted_yet_stays_as_it_was(self) -> None:
        self.take()
        self.agent('a').says_refused['Snapshots.Delete'] = Refusal('SNAPSHOT_IN_USE')
        with self.assertRaisesRegex(exception.SnapshotIsBusy, 'SNAPSHOT_IN_USE'):
            self.driver.delete_snapshot(self.snapshot)

    def test_a_snapshot_that_nobody_has_says_nothing_of_the_fleet(self) -> None:
        self.take()
        self.snapshot.provider_location = None
        self.agent('a').snapshots.clear()
        self.driver.delete_snapshot(self.snapshot)
        self.assertTrue(self.driver.initialized)

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
        self.assert_where(made, a='LOCAL')
        self.assert_home(made, 'a')
        self.assertEqual(['one'], self.agent('a').volumes[made.id].data)

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

    def test_what_a_dead_agent_did_not_hear_is_no_obstacle_to_going_back(self) -> None:
        self.take()
        row = self.cinder.attach(self.volume, 'node-a')
        self.agent('a').loses_answer.add('Volumes.Get')
        self.cinder.delete_attachment(self.volume, row)
        self.agent('a').loses_answer.clear()
        self.assertTrue(self.agent('a').volumes[self.volume.id].attached)
        self.driver.revert_to_snapshot(None, self.volume, self.snapshot)

    def test_a_volume_that_somebody_has_open_does_not_go_back(self) -> None:
        self.take()
        self.cinder.attach(self.volume, 'node-a')
        self.agent('a').open(self.volume.id)
        with self.refused('in use'):
            self.driver.revert_to_snapshot(None, self.volume, self.snapshot)

    def test_a_volume_that_has_left_its_snapshot_is_reverted_by_cinder(self) -> None:
        self.take()
        row = self.cinder.attach(self.volume, 'node-b')
        self.cinder.delete_attachment(self.volume, row)
        with self.assertRaises(NotImplementedError):
            self.driver.revert_to_snapshot(None, self.volume, self.snapshot)
