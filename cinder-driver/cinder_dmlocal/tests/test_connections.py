"""Attaching and detaching, on one node and between nodes, and the flows of Nova's."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

from cinder import context, exception, objects
from cinder.message import message_field

from cinder_dmlocal import messages
from cinder_dmlocal.tests.base import Attachment, DriverTestCase, Volume
from cinder_dmlocal.tests.fake import Refusal, Vol


class OneNode(DriverTestCase):
    def test_a_local_volume_is_attached_with_two_calls(self) -> None:
        volume = self.cinder.create()
        self.fleet.order.clear()
        row = self.cinder.reserve(volume, 'vm')
        path = self.cinder.connect(volume, row, 'node-a')
        self.assertEqual(f'/dev/mapper/dmlocal-{volume.id}', path)
        self.assertEqual(['node-a Volumes.Get', 'node-a Volumes.Attach'], self.fleet.order)

    def test_initialize_again_gives_the_same_answer(self) -> None:
        volume = self.cinder.create()
        self.cinder.attach(volume, 'node-a')
        self.agent('a').open(volume.id)
        connector = {'host': 'node-a'}
        first = self.driver.initialize_connection(volume, connector)
        self.assertEqual(first, self.driver.initialize_connection(volume, connector))
        self.assert_where(volume, a='LOCAL')

    def test_a_detached_volume_has_no_device(self) -> None:
        volume = self.cinder.create()
        row = self.cinder.attach(volume, 'node-a')
        self.cinder.delete_attachment(volume, row)
        self.assertFalse(self.agent('a').volumes[volume.id].attached)

    def test_terminate_again_succeeds(self) -> None:
        volume = self.cinder.create()
        self.cinder.attach(volume, 'node-a')
        for _ in range(2):
            self.driver.terminate_connection(volume, {'host': 'node-a'})

    def test_terminate_of_a_volume_that_is_nowhere_succeeds(self) -> None:
        volume = self.cinder.create()
        self.agent('a').volumes.clear()
        self.driver.terminate_connection(volume, {'host': 'node-a'}, force=True)

    def test_an_open_device_is_not_removed(self) -> None:
        volume = self.cinder.create()
        row = self.cinder.attach(volume, 'node-a')
        self.agent('a').open(volume.id)
        with self.refused('in use', 'node-a'):
            self.cinder.delete_attachment(volume, row)
        self.assertTrue(self.agent('a').write(volume.id, 'x'))
        self.assertIn(row, volume.volume_attachment)

    def test_a_device_that_is_closed_meanwhile_is_removed(self) -> None:
        self.driver = self.make_driver(dmlocal_close_timeout=5)
        volume = self.cinder.create()
        self.cinder.attach(volume, 'node-a')
        agent, volume_id = self.agent('a'), volume.id
        agent.open(volume_id)
        detach = agent.volumes_detach

        def closing(request: object) -> object:
            if agent.calls['Volumes.Detach'] == 2:
                agent.shut(volume_id)
            return detach(request)

        agent.volumes_detach = closing  # type: ignore[method-assign]
        self.addCleanup(agent.__dict__.pop, 'volumes_detach')
        self.driver.terminate_connection(volume, {'host': 'node-a'})
        self.assertFalse(agent.volumes[volume_id].attached)

    def test_an_agent_that_dies_during_a_terminate_is_no_error(self) -> None:
        volume = self.cinder.create()
        row = self.cinder.attach(volume, 'node-a')
        self.agent('a').loses_answer.add('Volumes.Detach')
        self.cinder.delete_attachment(volume, row)
        self.assertEqual([], volume.volume_attachment)

    def test_without_a_connector_every_host_is_detached(self) -> None:
        volume = self.cinder.create()
        self.cinder.attach(volume, 'node-a')
        self.driver.terminate_connection(volume, None, force=True)
        self.assertFalse(self.agent('a').volumes[volume.id].attached)

    def test_without_a_connector_an_open_device_is_not_removed(self) -> None:
        volume = self.cinder.create()
        self.cinder.attach(volume, 'node-a')
        self.agent('a').open(volume.id)
        with self.refused('in use'):
            self.driver.terminate_connection(volume, None, force=True)

    def test_without_a_connector_a_host_that_two_attachments_name_is_detached(self) -> None:
        volume = self.cinder.create()
        row = self.cinder.attach(volume, 'node-a')
        volume.volume_attachment.append(dataclasses.replace(row, id='another'))
        for connector in (None, {}):
            self.agent('a').volumes[volume.id].attached = True
            self.driver.terminate_connection(volume, connector, force=True)
            self.assertFalse(self.agent('a').volumes[volume.id].attached)

    def test_a_host_that_is_not_of_the_fleet_any_more_is_left(self) -> None:
        volume = self.cinder.create()
        row = self.cinder.attach(volume, 'node-b')
        self.cinder.driver = self.make_driver(
            dmlocal_nodes=['node-a', 'node-c'],
            dmlocal_endpoints={n: self.fleet.endpoints[n] for n in ('node-a', 'node-c')},
        )
        self.cinder.delete_attachment(volume, row)
        self.assertEqual([], volume.volume_attachment)
        self.assert_where(volume, a='FENCED', b='HYDRATING')

    def test_a_destination_that_is_not_of_the_fleet_any_more_keeps_the_volume(self) -> None:
        volume = self.cinder.create()
        self.cinder.attach(volume, 'node-a', 'vm')
        self.cinder.create_attachment(volume, 'vm', 'node-b')
        driver = self.make_driver(
            dmlocal_nodes=['node-a', 'node-c'],
            dmlocal_endpoints={n: self.fleet.endpoints[n] for n in ('node-a', 'node-c')},
        )
        with self.refused('node-b', 'dmlocal_nodes'):
            driver.initialize_connection(volume, {'host': 'node-c'})
        self.assert_where(volume, a='PUBLISHED', b='HELD')

    def test_exports_are_nobodys_affair(self) -> None:
        volume = self.cinder.create()
        self.cinder.attach(volume, 'node-a')
        self.fleet.order.clear()
        self.driver.ensure_export(None, volume)
        self.driver.create_export(None, volume, {'host': 'node-a'})
        self.driver.remove_export(None, volume)
        self.assertEqual([], self.fleet.order)

    def test_a_host_without_an_agent_is_named_before_anything_is_done(self) -> None:
        volume = self.cinder.create()
        row = self.cinder.reserve(volume, 'vm')
        with self.assertRaises(exception.InvalidConnectorException):
            self.cinder.connect(volume, row, 'elsewhere')

    def test_another_instance_is_refused(self) -> None:
        volume = self.cinder.create()
        self.cinder.attach(volume, 'node-a', 'vm-1')
        other = self.cinder.reserve(volume, 'vm-2')
        with self.refused('multiattach'):
            self.cinder.connect(volume, other, 'node-b')
        self.assert_where(volume, a='LOCAL')

    def test_another_instance_is_refused_that_cinder_would_let_share(self) -> None:
        volume = self.cinder.create()
        attached = self.cinder.attach(volume, 'node-a', 'vm-1')
        # What a retype that was refused leaves.
        volume.multiattach = True
        rows = [attached, Attachment('vm-2')]
        known = mock.patch.object(
            objects.VolumeAttachmentList, 'get_all_by_volume_id', lambda *_: rows
        )
        with known, self.refused('multiattach'):
            self.cinder.create_attachment(volume, 'vm-2', 'node-a')
        self.assert_where(volume, a='LOCAL')

    def test_a_dead_agent_is_told_of_at_once(self) -> None:
        volume = self.cinder.create()
        self.agent('a').is_down = True
        row = self.cinder.reserve(volume, 'vm')
        with self.refused('node-a', 'does not answer'):
            self.cinder.connect(volume, row, 'node-a')

    def test_a_reboot_of_a_once_lent_volume_waits_for_its_borrower(self) -> None:
        volume = self.cinder.create()
        vol = self.agent('a').volumes[volume.id]
        vol.lent_to, vol.must_confirm = 'node-b', True
        row = self.cinder.reserve(volume, 'vm')
        with self.refused('dmlocal_dead_nodes'):
            self.cinder.connect(volume, row, 'node-a')
        self.assertTrue(vol.must_confirm)
        self.cinder.driver = self.make_driver(dmlocal_dead_nodes=['node-b'])
        self.cinder.connect(volume, row, 'node-a')
        self.assertTrue(vol.attached)


class Elsewhere(DriverTestCase):
    """A volume that nobody uses is attached on another node."""

    def setUp(self) -> None:
        super().setUp()
        self.volume = self.cinder.create()
        self.agent('a').volumes[self.volume.id].data = ['old']

    def test_it_moves_there_and_its_host_follows(self) -> None:
        self.cinder.attach(self.volume, 'node-b')
        self.assert_where(self.volume, a='FENCED', b='HYDRATING')
        self.assert_home(self.volume, 'b')
        self.agent('b').write(self.volume.id, 'new')
        self.assertEqual(['old', 'new'], self.agent('b').volumes[self.volume.id].data)

    def test_an_attachment_that_lags_behind_does_not_matter(self) -> None:
        row = self.cinder.attach(self.volume, 'node-a')
        self.driver.terminate_connection(self.volume, {'host': 'node-a'})
        self.cinder.attach(self.volume, 'node-b', row.instance_uuid)
        self.assert_where(self.volume, a='FENCED', b='HYDRATING')

    def test_what_a_dead_agent_did_not_hear_is_made_up_for(self) -> None:
        row = self.cinder.attach(self.volume, 'node-a')
        self.agent('a').is_down = True
        self.cinder.delete_attachment(self.volume, row)
        self.agent('a').is_down = False
        self.assertTrue(self.agent('a').volumes[self.volume.id].attached)
        self.cinder.attach(self.volume, 'node-b')
        self.assert_where(self.volume, a='FENCED', b='HYDRATING')

    def test_what_is_open_there_is_not_taken_away(self) -> None:
        row = self.cinder.attach(self.volume, 'node-a')
        self.agent('a').open(self.volume.id)
        self.agent('a').is_down = True
        self.cinder.delete_attachment(self.volume, row)
        self.agent('a').is_down = False
        with self.refused('in use', 'node-a'):
            self.cinder.attach(self.volume, 'node-b')
        self.assertTrue(self.agent('a').write(self.volume.id, 'x'))

    def test_a_refusal_leaves_nothing(self) -> None:
        self.agent('b').capacity = 0
        with self.refused('NO_ROOM', 'another node'):
            self.cinder.attach(self.volume, 'node-b')
        self.assert_where(self.volume, a='LOCAL')
        self.assert_home(self.volume, 'a')

    def test_a_lost_answer_is_looked_for(self) -> None:
        self.agent('b').loses_answer.add('Moves.Receive')
        self.cinder.attach(self.volume, 'node-b')
        self.assert_where(self.volume, a='FENCED', b='HYDRATING')

    def test_what_was_interrupted_after_the_grant_goes_on(self) -> None:
        self.agent('b').says_refused['Moves.Receive'] = Refusal('NO_ROOM')
        self.agent('a').says_refused['Moves.Revoke'] = Refusal('INTERNAL', 'INTERNAL')
        with self.refused('NO_ROOM'):
            self.cinder.attach(self.volume, 'node-b')
        self.assert_where(self.volume, a='PUBLISHED')
        self.agent('b').says_refused.clear()
        self.agent('a').says_refused.clear()
        self.volume.volume_attachment.clear()
        self.cinder.attach(self.volume, 'node-c')
        self.assert_where(self.volume, a='FENCED', c='HYDRATING')

    def test_what_was_interrupted_after_the_grant_may_stay_at_home(self) -> None:
        self.agent('a').loses_answer.add('Moves.Grant')
        with self.refused('does not answer'):
            self.cinder.attach(self.volume, 'node-b')
        self.agent('a').loses_answer.clear()
        self.assert_where(self.volume, a='PUBLISHED')
        self.volume.volume_attachment.clear()
        self.cinder.attach(self.volume, 'node-a')
        self.assert_where(self.volume, a='LOCAL')

    def test_its_cluster_follows_too(self) -> None:
        self.volume.cluster_name = 'cluster@dmlocal#node-a'
        self.cinder.attach(self.volume, 'node-b')
        self.assertEqual('cluster@dmlocal#node-b', self.volume.cluster_name)
        self.assert_home(self.volume, 'b')

    def test_a_host_that_is_behind_is_found_out(self) -> None:
        self.cinder.attach(self.volume, 'node-b')
        self.agent('b').arrive(self.volume.id)
        self.volume.volume_attachment.clear()
        self.volume.host = 'fleet@dmlocal#node-c'
        self.driver.terminate_connection(self.volume, {'host': 'node-b'})
        self.assert_home(self.volume, 'b')

    def test_what_a_lost_creation_left_is_never_taken_for_the_volume(self) -> None:
        self.agent('b').volumes[self.volume.id] = Vol(self.volume.id, 1 << 30)
        with self.refused('VOLUME_EXISTS'):
            self.cinder.attach(self.volume, 'node-b', 'vm')
        self.agent('a').is_down = True
        with self.refused('node-a', 'does not answer'):
            self.cinder.attach(self.volume, 'node-b', 'vm')
        self.agent('a').is_down = False
        self.agent('a').volumes.clear()
        with self.refused('No node has'):
            self.cinder.attach(self.volume, 'node-b', 'vm')
        self.assertFalse(self.agent('b').volumes[self.volume.id].attached)

    def test_a_volume_that_is_nowhere_is_never_made_anew(self) -> None:
        self.agent('a').volumes.clear()
        with self.refused('No node has'):
            self.cinder.attach(self.volume, 'node-b')
        self.assert_where(self.volume)


class Instances(DriverTestCase):
    """The other flows of Nova's."""

    def test_cold_migration_terminates_first(self) -> None:
        volume = self.cinder.create()
        at_a = self.cinder.attach(volume, 'node-a', 'vm')
        self.agent('a').write(volume.id, 'first')
        next_row = self.cinder.reserve(volume, 'vm')
        self.cinder.delete_attachment(volume, at_a)
        self.cinder.connect(volume, next_row, 'node-b')
        self.cinder.complete(volume, next_row)
        self.assert_where(volume, a='FENCED', b='HYDRATING')
        self.agent('b').write(volume.id, 'second')
        # Reverted before everything is there.
        back = self.cinder.reserve(volume, 'vm')
        self.cinder.delete_attachment(volume, next_row)
        self.agent('b').arrive(volume.id)
        self.cinder.connect(volume, back, 'node-a')
        data = self.agent('a').volumes[volume.id].data
        self.assertEqual(['first', 'second'], data)

    def test_unshelve_is_repeated_after_a_failure(self) -> None:
        volume = self.cinder.create()
        row = self.cinder.reserve(volume, 'vm')
        self.agent('b').capacity = 0
        for _ in range(5):
            with self.refused('NO_ROOM'):
                self.cinder.connect(volume, row, 'node-b')
        self.assert_where(volume, a='LOCAL')
        self.agent('b').capacity = 100 << 30
        self.cinder.connect(volume, row, 'node-b')
        self.cinder.connect(volume, row, 'node-b')
        self.assert_where(volume, a='FENCED', b='HYDRATING')

    def test_evacuation_waits_for_the_node_that_has_the_data(self) -> None:
        volume = self.cinder.create()
        at_a = self.cinder.attach(volume, 'node-a', 'vm')
        self.agent('a').open(volume.id)
        self.agent('a').is_down = True
        row = self.cinder.reserve(volume, 'vm')
        self.cinder.delete_attachment(volume, at_a)
        with self.refused('node-a', 'does not answer'):
            self.cinder.connect(volume, row, 'node-b')
        # The node comes back, and its guest does not.
        self.agent('a').boot()
        self.cinder.connect(volume, row, 'node-b')
        self.assert_where(volume, a='FENCED', b='HYDRATING')

    def test_evacuation_does_not_take_a_volume_from_a_guest_that_still_runs(self) -> None:
        volume = self.cinder.create()
        at_a = self.cinder.attach(volume, 'node-a', 'vm')
        self.agent('a').open(volume.id)
        row = self.cinder.reserve(volume, 'vm')
        with self.refused('in use'):
            self.cinder.delete_attachment(volume, at_a)
        self.assertTrue(self.agent('a').write(volume.id, 'x'))
        self.assertIn(row, volume.volume_attachment)

    def test_evacuation_from_a_node_that_is_declared_dead_says_what_is_lost(self) -> None:
        volume = self.cinder.create()
        at_a = self.cinder.attach(volume, 'node-a', 'vm')
        self.agent('a').is_down = True
        self.cinder.driver = self.driver = self.make_driver(dmlocal_dead_nodes=['node-a'])
        row = self.cinder.reserve(volume, 'vm')
        self.cinder.delete_attachment(volume, at_a)
        with self.refused('data is lost'):
            self.cinder.connect(volume, row, 'node-b')
        self.assert_where(volume, a='LOCAL')

    def test_evacuation_to_the_node_that_has_taken_the_volume_over_goes_on(self) -> None:
        volume = self.cinder.create()
        at_a = self.cinder.attach(volume, 'node-a', 'vm')
        self.agent('a').open(volume.id)
        self.cinder.create_attachment(volume, 'vm', 'node-b')
        self.agent('b').open(volume.id)
        self.agent('a').shut(volume.id)
        self.agent('b').write(volume.id, 'first')
        # The source dies before Nova has told of the migration.
        self.agent('a').is_down = True
        self.cinder.delete_attachment(volume, at_a)
        self.assert_home(volume, 'b')
        self.driver.initialize_connection(volume, {'host': 'node-b'})


class Controller(DriverTestCase):
    """Cinder attaches a volume to copy an image or a backup."""

    def setUp(self) -> None:
        super().setUp()
        self.volume = self.cinder.create()
        self.volume.status = 'downloading'

    def test_a_visit_leaves_the_data_where_it_is(self) -> None:
        self.agent('b').has_pool = False
        connector = {'host': 'node-b'}
        self.driver.initialize_connection(self.volume, connector)
        self.assert_where(self.volume, a='FENCED', b='REMOTE')
        self.assert_home(self.volume, 'a')
        self.agent('b').write(self.volume.id, 'image')
        self.driver.terminate_connection(self.volume, connector, force=True)
        self.assert_where(self.volume, a='LOCAL')
        self.assertEqual(['image'], self.agent('a').volumes[self.volume.id].data)
        self.assert_home(self.volume, 'a')

    def test_a_volume_that_cinder_itself_calls_used_is_visited(self) -> None:
        # The temporary volume of a revert is 'in-use', and no instance has it.
        self.volume.status = 'in-use'
        self.driver.initialize_connection(self.volume, {'host': 'node-b'})
        self.assert_where(self.volume, a='FENCED', b='REMOTE')

    def test_an_instance_without_a_row_is_no_visitor(self) -> None:
        # Attached as it was done before attachments had rows of their own.
        self.volume.status = 'attaching'
        self.driver.initialize_connection(self.volume, {'host': 'node-b'})
        self.assert_where(self.volume, a='FENCED', b='HYDRATING')

    def test_a_visit_at_home_needs_no_network(self) -> None:
        self.driver.initialize_connection(self.volume, {'host': 'node-a'})
        self.assert_where(self.volume, a='LOCAL')

    def test_a_visit_that_failed_is_cleared_away_by_the_next_attachment(self) -> None:
        self.driver.initialize_connection(self.volume, {'host': 'node-b'})
        self.volume.status = 'available'
        self.cinder.attach(self.volume, 'node-c')
        self.assert_where(self.volume, a='FENCED', c='HYDRATING')


class Messages(DriverTestCase):
    """What users are told who see no logs."""

    def setUp(self) -> None:
        super().setUp()
        patcher = mock.patch.object(messages, '_messages')
        self.create = patcher.start().return_value.create
        self.addCleanup(patcher.stop)

    def told(self) -> list[tuple[Any, Any, Any]]:
        calls = self.create.call_args_list
        return [(c.args[1], c.kwargs['resource_uuid'], c.kwargs['detail']) for c in calls]

    def volume(self) -> Volume:
        volume = self.cinder.create()
        volume._context = context.RequestContext(user_id='user', project_id='project')
        return volume

    def test_of_an_attachment_that_failed(self) -> None:
        volume = self.volume()
        self.agent('b').capacity = 0
        with self.refused('NO_ROOM'):
            self.cinder.attach(volume, 'node-b')
        action, detail = message_field.Action.ATTACH_VOLUME, message_field.Detail.ATTACH_ERROR
        self.assertEqual([(action, volume.id, detail)], self.told())

    def test_of_a_device_that_is_open(self) -> None:
        volume = self.volume()
        row = self.cinder.attach(volume, 'node-a')
        self.agent('a').open(volume.id)
        with self.refused('in use'):
            self.cinder.delete_attachment(volume, row)
        action = message_field.Action.UPDATE_ATTACHMENT
        self.assertEqual([(action, volume.id, message_field.Detail.DETACH_ERROR)], self.told())

    def test_of_a_copy_that_somebody_has_asked_for(self) -> None:
        origin = self.volume()
        made = Volume(1, origin.host, 'creating', _context=origin._context)
        self.agent('a').capacity = 1 << 30
        # The first is a temporary copy of Cinder's own, or one of a cached image.
        for source, told in ((None, 0), (origin.id, 1)):
            made.source_volid = source
            with self.refused('NO_ROOM'):
                self.driver.create_cloned_volume(made, origin)
            self.assertEqual(told, len(self.told()))
        action = message_field.Action.CREATE_VOLUME_FROM_BACKEND
        detail = message_field.Detail.DRIVER_FAILED_CREATE
        self.assertEqual([(action, made.id, detail)], self.told())

    def test_of_nothing_where_all_is_well(self) -> None:
        volume = self.volume()
        self.cinder.delete_attachment(volume, self.cinder.attach(volume, 'node-b'))
        self.assertEqual([], self.told())
