"""migrate_volume, retype, update_migrated_volume, and taking over."""

from __future__ import annotations

import uuid
from typing import Any
from unittest import mock

from cinder import exception, objects

from cinder_dmlocal.tests.base import SERVICE, Attachment, DriverTestCase, Snapshot, Volume
from cinder_dmlocal.tests.fake import Vol


class Moves(DriverTestCase):
    def target(self, letter: str) -> dict[str, Any]:
        """A host as the scheduler hands it over."""
        stats = self.driver.get_volume_stats(refresh=True)
        pools = {pool['pool_name']: pool for pool in stats['pools']}
        name = f'node-{letter}'
        return {'host': f'{SERVICE}#{name}', 'capabilities': pools.get(name)}

    def test_a_volume_nobody_uses_moves_at_once(self) -> None:
        volume = self.cinder.create()
        moved, _ = self.driver.migrate_volume(None, volume, self.target('b'))
        self.assertTrue(moved)
        self.assert_where(volume, a='FENCED', b='HYDRATING')
        self.assertFalse(self.agent('b').volumes[volume.id].attached)

    def test_migrating_again_succeeds(self) -> None:
        volume = self.cinder.create()
        for _ in range(2):
            self.assertTrue(self.driver.migrate_volume(None, volume, self.target('b'))[0])
        self.assert_where(volume, a='FENCED', b='HYDRATING')

    def test_a_node_without_room_does_not_get_a_volume_only_in_name(self) -> None:
        volume = self.cinder.create()
        target = self.target('b')
        self.agent('b').takes_remote, self.agent('b').capacity = True, 0
        with self.refused('NO_ROOM', 'node-b'):
            self.driver.migrate_volume(None, volume, target)
        self.assert_where(volume, a='LOCAL')

    def test_what_an_interrupted_migration_left_is_finished(self) -> None:
        volume = self.cinder.create()
        row = self.cinder.attach(volume, 'node-b')
        volume.volume_attachment.remove(row)
        volume.host = f'{SERVICE}#node-a'
        self.driver.migrate_volume(None, volume, self.target('b'))
        self.assertFalse(self.agent('b').volumes[volume.id].attached)

    def swap(self, origin_host: str) -> Volume:
        """What Cinder has Nova copy a volume in use to, for an operator who chose node b."""
        origin = Volume(1, origin_host, 'in-use')
        self.enterContext(mock.patch.object(objects.Volume, 'get_by_id', lambda *_: origin))
        made = self.cinder.create('node-b')
        made.migration_status = f'target:{origin.id}'
        self.cinder.attach(made, 'node-a', 'vm')
        return made

    def test_a_guest_goes_on_with_its_volume_on_the_node_that_was_chosen(self) -> None:
        made = self.swap(f'{SERVICE}#node-a')
        self.assert_where(made, a='REMOTE', b='FENCED')
        self.assert_home(made, 'b')

    def test_what_comes_from_another_backend_is_where_its_guest_is(self) -> None:
        made = self.swap('fleet@lvm#node-a')
        self.assert_where(made, a='HYDRATING', b='FENCED')
        self.assert_home(made, 'a')

    def test_a_volume_in_use_moves_only_with_its_guest(self) -> None:
        volume = self.cinder.create()
        self.cinder.attach(volume, 'node-a')
        with self.refused('in use'):
            self.driver.migrate_volume(None, volume, self.target('b'))
        self.assert_where(volume, a='LOCAL')

    def test_a_volume_in_use_remotely_is_copied_to_its_user(self) -> None:
        volume = self.cinder.create()
        self.agent('b').has_pool = False
        self.cinder.attach(volume, 'node-b')
        self.assert_where(volume, a='FENCED', b='REMOTE')
        self.assert_home(volume, 'a')
        self.agent('b').has_pool = True
        self.assertTrue(self.driver.migrate_volume(None, volume, self.target('b'))[0])
        self.assert_where(volume, a='FENCED', b='HYDRATING')

    def use_remotely(self) -> tuple[Volume, Attachment]:
        """A volume of node-a's whose guest runs on node-b, which had no room then."""
        volume = self.cinder.create()
        self.agent('b').has_pool = False
        row = self.cinder.attach(volume, 'node-b', 'vm')
        self.agent('b').open(volume.id)
        self.agent('b').write(volume.id, 'remotely')
        self.agent('b').has_pool = True
        return volume, row

    def test_a_guest_that_uses_its_volume_remotely_migrates(self) -> None:
        for target in 'ac':
            with self.subTest(target=target):
                volume, row = self.use_remotely()
                self.cinder.create_attachment(volume, 'vm', f'node-{target}')
                self.agent('b').shut(volume.id)
                self.cinder.delete_attachment(volume, row)
                moved = self.agent(target).volumes[volume.id]
                self.assertEqual('HYDRATING', moved.state)
                self.assertEqual(['remotely'], moved.data)
                self.assert_home(volume, target)

    def test_without_room_at_its_user_a_remote_volume_stays_there(self) -> None:
        volume, _row = self.use_remotely()
        self.agent('b').capacity = 0
        with self.refused('NO_ROOM'):
            self.cinder.create_attachment(volume, 'vm', 'node-c')
        self.assert_where(volume, a='FENCED', b='REMOTE')
        self.assertTrue(self.agent('b').write(volume.id, 'still'))

    def test_what_a_remote_volume_cannot_do_has_it_copied_first(self) -> None:
        def extend(volume: Volume) -> None:
            self.driver.extend_volume(volume, 2)

        def snapshot(volume: Volume) -> None:
            self.driver.create_snapshot(Snapshot(volume))

        def clone(volume: Volume) -> None:
            made = Volume(1, f'{SERVICE}#node-b', 'creating')
            self.driver.create_cloned_volume(made, volume)

        for act in (extend, snapshot):
            with self.subTest(act=act.__name__):
                volume, _row = self.use_remotely()
                act(volume)
                self.assert_where(volume, a='FENCED', b='HYDRATING')
                self.assert_home(volume, 'b')
        volume, _row = self.use_remotely()
        with self.refused('VOLUME_MOVING', 'repeat'):
            clone(volume)
        self.agent('b').arrive(volume.id)
        clone(volume)

    def test_retype_of_a_volume_in_use_leaves_it_with_its_guest(self) -> None:
        volume = self.cinder.create()
        self.cinder.attach(volume, 'node-a')
        retyped = self.driver.retype(None, volume, {}, {}, self.target('b'))
        # Cinder would take the scheduler's choice for the place otherwise.
        stays = {'host': f'{SERVICE}#node-a', 'cluster_name': None}
        self.assertEqual((True, stays), retyped)
        self.assert_where(volume, a='LOCAL')

    def test_retype_of_what_agents_know_nothing_of_needs_nothing(self) -> None:
        volume = self.cinder.create()
        target = self.target('a')
        diff = {
            'qos_specs': {'consumer': ('front-end', 'front-end'), 'iops': (None, '9')},
            'extra_specs': {'volume_backend_name': (None, 'dmlocal')},
            'encryption': {},
        }
        self.fleet.order.clear()
        self.assertTrue(self.driver.retype(None, volume, {}, diff, target))
        self.assertEqual([], self.fleet.order)

    def test_another_backend_is_left_to_cinder(self) -> None:
        volume = self.cinder.create()
        host = {'host': 'other@lvm#pool', 'capabilities': {'location_info': 'LVM:other'}}
        self.assertEqual((False, None), self.driver.migrate_volume(None, volume, host))

    def test_another_pool_of_the_same_nodes_is_left_to_cinder(self) -> None:
        volume = self.cinder.create()
        other = self.make_driver(dmlocal_pool='local')
        pools = {p['pool_name']: p for p in other.get_volume_stats(refresh=True)['pools']}
        for name in ('node-a', 'node-b'):
            host = {'host': f'fleet@other#{name}', 'capabilities': pools[name]}
            self.assertEqual((False, None), self.driver.migrate_volume(None, volume, host))
            self.assertFalse(self.driver.retype(None, volume, {}, {}, host))
        self.assert_where(volume, a='LOCAL')

    def test_retype_on_the_same_node_needs_nothing(self) -> None:
        volume = self.cinder.create()
        target = self.target('a')
        self.fleet.order.clear()
        self.assertTrue(self.driver.retype(None, volume, {}, {'encryption': {}}, target))
        self.assertEqual([], self.fleet.order)

    def test_retype_to_another_node_moves(self) -> None:
        volume = self.cinder.create()
        self.assertTrue(self.driver.retype(None, volume, {}, {}, self.target('b')))
        self.assert_where(volume, a='FENCED', b='HYDRATING')

    def test_retype_of_encryption_is_left_to_cinder(self) -> None:
        volume = self.cinder.create()
        diff = {'encryption': {'cipher': (None, 'aes-xts-plain64')}}
        self.assertFalse(self.driver.retype(None, volume, {}, diff, self.target('a')))

    def test_retype_to_multiattach_is_refused(self) -> None:
        volume = self.cinder.create()
        shared = {'extra_specs': {'multiattach': '<is> True'}}
        with self.assertRaises(exception.InvalidVolumeType):
            self.driver.retype(None, volume, shared, {}, self.target('a'))

    def test_agents_know_a_migrated_volume_by_the_id_of_its_copy(self) -> None:
        old, new = self.cinder.create(), self.cinder.create('node-b')
        old.update(self.driver.update_migrated_volume(None, old, new, 'available'))
        old.host = new.host
        self.cinder.attach(old, 'node-b')
        self.assertTrue(self.agent('b').volumes[new.id].attached)
        self.assertNotIn(old.id, self.agent('b').volumes)


class TakingOver(DriverTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.found = Vol(str(uuid.uuid4()), 3 * (1 << 29))
        self.agent('a').volumes[self.found.id] = self.found
        self.ref = {'source-id': self.found.id}
        self.volume = Volume(0, f'{SERVICE}#node-a')
        # What Cinder has, by its own ids and by those that agents know it by.
        self.rows: set[str] = set()
        self.named: set[str] = set()
        for cls, key in ((objects.Volume, '_name_id'), (objects.Snapshot, 'provider_id')):
            self.patch(cls, 'exists', lambda _, id_: id_ in self.rows)
            of_all = getattr(objects, f'{cls.__name__}List')
            self.patch(
                of_all, 'get_all', lambda _, filters, key=key: self.named & {filters[key]}
            )

    def patch(self, where: Any, name: str, by: Any) -> None:
        patcher = mock.patch.object(where, name, by)
        patcher.start()
        self.addCleanup(patcher.stop)

    def test_what_cinder_has_already_is_refused(self) -> None:
        volume = self.cinder.create()
        other = Snapshot(volume)
        self.driver.create_snapshot(other)
        ref = {'source-id': other.id}
        for has in (self.rows, self.named):
            has.update({self.found.id, other.id})
            with self.assertRaises(exception.ManageExistingAlreadyManaged):
                self.driver.manage_existing(self.volume, self.ref)
            with self.assertRaises(exception.ManageExistingAlreadyManaged):
                self.driver.manage_existing_snapshot(Snapshot(volume), ref)
            has.clear()

    def test_a_volume_is_taken_over_and_keeps_its_id_at_the_agents(self) -> None:
        self.assertEqual(2, self.driver.manage_existing_get_size(self.volume, self.ref))
        self.volume.update(self.driver.manage_existing(self.volume, self.ref))
        self.cinder.attach(self.volume, 'node-b')
        self.assertEqual(
            {'node-a': 'FENCED', 'node-b': 'HYDRATING'}, self.fleet.where(self.found.id)
        )

    def test_nothing_is_taken_over_twice(self) -> None:
        volume = self.cinder.create()
        other = Snapshot(volume)
        self.driver.create_snapshot(other)
        self.patch(Volume, 'save', lambda row: self.named.add(row.name_id))
        self.patch(Snapshot, 'save', lambda row: self.named.add(row.provider_id))
        # Before Cinder has saved what it is told.
        self.driver.manage_existing(self.volume, self.ref)
        with self.assertRaises(exception.ManageExistingAlreadyManaged):
            self.driver.manage_existing(Volume(0, f'{SERVICE}#node-a'), self.ref)
        ref = {'source-id': other.id}
        self.driver.manage_existing_snapshot(Snapshot(volume), ref)
        with self.assertRaises(exception.ManageExistingAlreadyManaged):
            self.driver.manage_existing_snapshot(Snapshot(volume), ref)

    def test_what_cannot_be_taken_over_is_refused(self) -> None:
        for ref in ({}, {'source-id': 'x'}, {'source-id': str(uuid.uuid4())}):
            with self.assertRaises(exception.ManageExistingInvalidReference):
                self.driver.manage_existing(self.volume, ref)
        self.found.attached = True
        with self.assertRaisesRegex(exception.ManageExistingInvalidReference, 'attached'):
            self.driver.manage_existing(self.volume, self.ref)

    def test_what_is_in_another_pool_is_refused(self) -> None:
        volume = self.cinder.create()
        other = Snapshot(volume)
        self.driver.create_snapshot(other)
        self.found.pool = self.agent('a').snapshots[other.id].pool = 'slow'
        driver = self.make_driver(dmlocal_pool='local')
        why = 'pool slow.*dmlocal_pool'
        with self.assertRaisesRegex(exception.ManageExistingInvalidReference, why):
            driver.manage_existing(self.volume, self.ref)
        with self.assertRaisesRegex(exception.ManageExistingInvalidReference, why):
            driver.manage_existing_snapshot(Snapshot(volume), {'source-id': other.id})
        for entries in (
            driver.get_manageable_volumes([volume], None, 10, 0, ['size'], ['desc']),
            driver.get_manageable_snapshots([], None, 10, 0, ['size'], ['desc']),
        ):
            reasons = [e['reason_not_safe'] for e in entries if not e['cinder_id']]
            self.assertEqual(1, len(reasons))
            self.assertRegex(reasons[0], why)
        # Where no pool is named, all of them are used.
        self.driver.manage_existing(self.volume, self.ref)

    def test_the_list_says_what_is_safe(self) -> None:
        known = self.cinder.create('node-b')
        in_use = Vol(str(uuid.uuid4()), 1 << 30, attached=True)
        self.agent('b').volumes[in_use.id] = in_use
        self.agent('c').is_down = True
        entries = self.driver.get_manageable_volumes([known], None, 10, 0, ['size'], ['desc'])
        safe = {e['reference']['source-id']: e['safe_to_manage'] for e in entries}
        expected = {self.found.id: True, known.id: False, in_use.id: False}
        self.assertEqual(expected, safe)

    def test_unmanaging_leaves_everything(self) -> None:
        volume = self.cinder.create()
        self.driver.unmanage(volume)
        self.driver.unmanage_snapshot(Snapshot(volume))
        self.assert_where(volume, a='LOCAL')

    def test_a_snapshot_is_taken_over(self) -> None:
        volume = self.cinder.create()
        other = Snapshot(volume)
        self.driver.create_snapshot(other)
        snapshot, ref = Snapshot(volume), {'source-id': other.id}
        self.assertEqual(1, self.driver.manage_existing_snapshot_get_size(snapshot, ref))
        for key, value in self.driver.manage_existing_snapshot(snapshot, ref).items():
            setattr(snapshot, key, value)
        self.driver.delete_snapshot(snapshot)
        self.assertEqual({}, self.agent('a').snapshots)

    def test_a_snapshot_of_another_volume_is_refused(self) -> None:
        mine, others = self.cinder.create(), self.cinder.create()
        taken = Snapshot(others)
        self.driver.create_snapshot(taken)
        with self.assertRaises(exception.ManageExistingInvalidReference):
            self.driver.manage_existing_snapshot(Snapshot(mine), {'source-id': taken.id})

    def test_the_list_of_snapshots_says_what_is_safe(self) -> None:
        volume = self.cinder.create()
        mine, free = Snapshot(volume), Snapshot(volume)
        for snapshot in (mine, free):
            self.driver.create_snapshot(snapshot)
        entries = self.driver.get_manageable_snapshots([mine], None, 10, 0, ['size'], ['desc'])
        safe = {e['reference']['source-id']: e['safe_to_manage'] for e in entries}
        self.assertEqual({mine.id: False, free.id: True}, safe)
