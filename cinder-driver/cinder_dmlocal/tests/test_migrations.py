"""Live migration, its roll-backs, and every trap that Nova sets in them."""

from __future__ import annotations

import uuid

from cinder_dmlocal.tests.base import Attachment, DriverTestCase, Volume
from cinder_dmlocal.tests.fake import Refusal


class LiveMigration(DriverTestCase):
    """A guest on node a, and what becomes of its way to node b."""

    def setUp(self) -> None:
        super().setUp()
        self.volume: Volume = self.cinder.create()
        self.instance = str(uuid.uuid4())
        self.at_a = self.cinder.attach(self.volume, 'node-a', self.instance)
        self.agent('a').open(self.volume.id)
        self.agent('a').write(self.volume.id, 'first')

    def prepare(self, letter: str = 'b') -> Attachment:
        """pre_live_migration at the destination."""
        host = f'node-{letter}'
        row = self.cinder.create_attachment(self.volume, self.instance, host)
        self.agent(letter).open(self.volume.id)
        self.cinder.complete(self.volume, row)
        return row

    def move_guest(self, source: str = 'a') -> None:
        """The guest is stopped at its source, and its QEMU ends there."""
        self.agent(source).shut(self.volume.id)

    def give_up(self, letter: str = 'b') -> None:
        """QEMU ends at the destination."""
        self.agent(letter).shut(self.volume.id)

    def test_the_destination_is_held_while_the_guest_writes(self) -> None:
        self.prepare()
        self.assertTrue(self.agent('a').write(self.volume.id, 'second'))
        self.assert_where(self.volume, a='PUBLISHED', b='HELD')
        self.assert_home(self.volume, 'a')

    def test_the_terminate_at_the_source_switches_a_guest_that_only_reads(self) -> None:
        self.prepare()
        self.agent('a').write(self.volume.id, 'second')
        self.move_guest()
        self.cinder.delete_attachment(self.volume, self.at_a)
        self.assert_where(self.volume, a='FENCED', b='HYDRATING')
        self.assert_home(self.volume, 'b')
        data = self.agent('b').volumes[self.volume.id].data
        self.assertEqual(['first', 'second'], data)

    def test_the_first_write_switches_and_the_terminate_confirms(self) -> None:
        self.prepare()
        self.move_guest()
        self.assertTrue(self.agent('b').write(self.volume.id, 'second'))
        self.cinder.delete_attachment(self.volume, self.at_a)
        self.assert_home(self.volume, 'b')

    def test_a_source_that_is_let_go_before_the_terminate_is_no_error(self) -> None:
        self.prepare()
        self.move_guest()
        self.agent('b').write(self.volume.id, 'second')
        self.agent('b').arrive(self.volume.id)
        self.cinder.delete_attachment(self.volume, self.at_a)
        self.assert_where(self.volume, b='LOCAL')
        self.assert_home(self.volume, 'b')

    def test_a_source_that_is_let_go_during_the_terminate_is_no_error(self) -> None:
        self.prepare()
        self.move_guest()

        def arrive() -> None:
            self.agent('b').write(self.volume.id, 'second')
            self.agent('b').arrive(self.volume.id)

        self.before('a', 'volumes_detach', arrive)
        self.cinder.delete_attachment(self.volume, self.at_a)
        self.assert_where(self.volume, b='LOCAL')
        self.assert_home(self.volume, 'b')

    def test_a_terminate_goes_on_with_the_generation_that_is_there_then(self) -> None:
        def hand_over() -> None:
            self.agent('a').volumes[self.volume.id].generation += 2

        for is_open in (True, False):
            self.before('a', 'volumes_detach', hand_over)
            if is_open:
                with self.refused('in use', 'node-a'):
                    self.cinder.delete_attachment(self.volume, self.at_a)
                self.move_guest()
            else:
                self.cinder.delete_attachment(self.volume, self.at_a)
        self.assertFalse(self.agent('a').volumes[self.volume.id].attached)

    def test_a_terminate_of_a_volume_that_ends_meanwhile_is_no_error(self) -> None:
        at_b = self.prepare()
        self.give_up()
        self.volume.volume_attachment.remove(at_b)
        self.move_guest()

        def end() -> None:
            for letter in 'ab':
                self.agent(letter).volumes.clear()

        self.before('b', 'moves_abort', end)
        self.cinder.delete_attachment(self.volume, self.at_a)
        self.assertEqual([], self.volume.volume_attachment)

    def test_a_second_initialize_at_the_destination_changes_nothing(self) -> None:
        self.prepare()
        self.driver.initialize_connection(self.volume, {'host': 'node-b'})
        self.assertEqual(1, self.agent('a').calls['Moves.Grant'])
        self.assert_where(self.volume, a='PUBLISHED', b='HELD')

    def test_a_switch_that_nobody_hears_is_left_to_the_first_write(self) -> None:
        self.prepare()
        self.move_guest()
        self.agent('b').says_refused['Moves.Switch'] = Refusal('SOURCE_UNREACHABLE')
        self.cinder.delete_attachment(self.volume, self.at_a)
        self.assert_home(self.volume, 'a')
        self.assertTrue(self.agent('b').write(self.volume.id, 'second'))
        self.driver.initialize_connection(self.volume, {'host': 'node-b'})
        self.assert_home(self.volume, 'b')

    # nova.md 3 and 4

    def test_a_refused_destination_leaves_the_guest_alone(self) -> None:
        self.agent('b').capacity = 0
        with self.refused('NO_ROOM'):
            self.cinder.create_attachment(self.volume, self.instance, 'node-b')
        self.assert_where(self.volume, a='LOCAL')
        self.assertTrue(self.agent('a').write(self.volume.id, 'second'))
        leaked = self.volume.volume_attachment[-1]
        self.assertEqual('reserved', leaked.attach_status)
        # It stays in the way of nothing.
        self.agent('b').capacity = 100 << 30
        self.prepare()
        self.move_guest()
        self.cinder.delete_attachment(self.volume, self.at_a)
        self.assert_home(self.volume, 'b')
        self.cinder.delete_attachment(self.volume, leaked)

    def test_remove_export_after_a_failure_changes_nothing(self) -> None:
        self.prepare()
        self.driver.remove_export(None, self.volume)
        self.assert_where(self.volume, a='PUBLISHED', b='HELD')

    # nova.md 5 and 6

    def test_a_roll_back_ends_the_hold(self) -> None:
        at_b = self.prepare()
        self.give_up()
        self.cinder.delete_attachment(self.volume, at_b)
        self.assert_where(self.volume, a='LOCAL')
        self.assert_home(self.volume, 'a')
        self.assertTrue(self.agent('a').write(self.volume.id, 'second'))

    def test_a_roll_back_is_repeated_without_harm(self) -> None:
        at_b = self.prepare()
        self.give_up()
        connector = at_b.connector
        self.cinder.delete_attachment(self.volume, at_b)
        self.driver.terminate_connection(self.volume, connector)
        self.assertTrue(self.agent('a').write(self.volume.id, 'second'))

    def test_a_roll_back_goes_on_where_the_last_was_interrupted(self) -> None:
        at_b = self.prepare()
        self.give_up()
        self.agent('b').says_refused['Moves.Abort'] = Refusal('STEP_FAILED', 'INTERNAL')
        with self.refused('STEP_FAILED'):
            self.cinder.delete_attachment(self.volume, at_b)
        self.agent('b').says_refused.clear()
        self.cinder.delete_attachment(self.volume, at_b)
        self.assert_where(self.volume, a='LOCAL')

    def test_a_write_that_nobody_waits_for_does_not_keep_a_roll_back(self) -> None:
        at_b = self.prepare()
        self.assertFalse(self.agent('b').write(self.volume.id, 'stray'))
        self.give_up()
        self.cinder.delete_attachment(self.volume, at_b)
        self.assert_where(self.volume, a='LOCAL')
        self.assertEqual(['first'], self.agent('a').volumes[self.volume.id].data)

    def test_a_roll_back_whose_agent_is_dead_is_no_error(self) -> None:
        at_b = self.prepare()
        self.agent('b').is_down = True
        self.cinder.delete_attachment(self.volume, at_b)
        self.assertTrue(self.agent('a').write(self.volume.id, 'second'))
        # The next destination finds the trace, and clears it away.
        self.prepare('c')
        self.assert_where(self.volume, a='PUBLISHED', b='HELD', c='HELD')

    def test_what_a_dead_agent_kept_is_cleared_away_when_it_is_needed(self) -> None:
        self.test_a_roll_back_whose_agent_is_dead_is_no_error()
        self.agent('c').shut(self.volume.id)
        self.cinder.delete_attachment(self.volume, self.volume.volume_attachment[-1])
        self.agent('b').boot()
        self.prepare()
        self.assert_where(self.volume, a='PUBLISHED', b='HELD')

    # nova.md 7

    def test_a_terminate_that_names_the_host_of_another_attachment_cuts_nobody(self) -> None:
        stale = self.prepare()
        self.give_up()
        at_b = self.prepare()
        self.move_guest()
        # The guest runs on b, and has not written yet.
        self.cinder.delete_attachment(self.volume, stale)
        self.assertEqual('HELD', self.agent('b').volumes[self.volume.id].state)
        self.assertTrue(self.agent('b').write(self.volume.id, 'second'))
        self.assertIn(at_b, self.volume.volume_attachment)

    def test_a_terminate_at_a_host_of_another_attachment_tells_where_the_volume_is(
        self,
    ) -> None:
        stale = self.prepare()
        self.give_up()
        self.prepare()
        self.move_guest()
        self.assertTrue(self.agent('b').write(self.volume.id, 'second'))
        self.cinder.delete_attachment(self.volume, stale)
        self.assertTrue(self.volume.host.endswith('#node-b'), self.volume.host)

    def test_a_terminate_at_the_source_under_a_running_guest_is_refused(self) -> None:
        at_b = self.prepare()
        self.give_up()
        with self.refused('in use', 'node-a'):
            self.cinder.delete_attachment(self.volume, self.at_a)
        self.assertTrue(self.agent('a').write(self.volume.id, 'second'))
        self.assertEqual('HELD', self.agent('b').volumes[self.volume.id].state)
        self.cinder.delete_attachment(self.volume, at_b)
        self.assert_where(self.volume, a='LOCAL')

    def test_a_terminate_at_the_destination_under_a_running_guest_is_refused(self) -> None:
        at_b = self.prepare()
        self.move_guest()
        with self.refused('in use', 'node-b'):
            self.cinder.delete_attachment(self.volume, at_b)
        self.assertTrue(self.agent('b').write(self.volume.id, 'second'))

    def test_an_initialize_elsewhere_takes_no_device_from_a_running_guest(self) -> None:
        self.prepare()
        self.move_guest()
        with self.refused('in use', 'node-b'):
            self.cinder.create_attachment(self.volume, self.instance, 'node-c')
        self.assertTrue(self.agent('b').write(self.volume.id, 'second'))

    # nova.md 8

    def test_a_stale_destination_is_given_up_when_its_source_ends(self) -> None:
        at_b = self.prepare()
        self.give_up()
        self.volume.volume_attachment.remove(at_b)
        self.agent('a').shut(self.volume.id)
        self.cinder.delete_attachment(self.volume, self.at_a)
        self.assert_where(self.volume, a='LOCAL')

    def test_a_stale_destination_that_is_dead_keeps_the_volume_from_others(self) -> None:
        self.prepare()
        self.agent('b').is_down = True
        with self.refused('node-b', 'does not answer'):
            self.prepare('c')
        self.assertTrue(self.agent('a').write(self.volume.id, 'second'))

    def test_a_volume_migrates_on_and_back(self) -> None:
        at_b = self.prepare()
        self.move_guest()
        self.agent('b').write(self.volume.id, 'second')
        self.cinder.delete_attachment(self.volume, self.at_a)
        self.agent('b').arrive(self.volume.id)
        self.prepare('a')
        self.move_guest('b')
        self.agent('a').write(self.volume.id, 'third')
        self.cinder.delete_attachment(self.volume, at_b)
        self.assert_home(self.volume, 'a')
        data = self.agent('a').volumes[self.volume.id].data
        self.assertEqual(['first', 'second', 'third'], data)

    def test_a_guest_returns_to_a_node_that_was_never_told_that_it_left(self) -> None:
        at_b = self.prepare()
        self.move_guest()
        self.agent('b').write(self.volume.id, 'second')
        # The source's compute service dies before it tells, and the guest goes back.
        self.assertTrue(self.agent('a').volumes[self.volume.id].attached)
        self.prepare('a')
        self.move_guest('b')
        self.agent('a').write(self.volume.id, 'third')
        self.cinder.delete_attachment(self.volume, at_b)
        data = self.agent('a').volumes[self.volume.id].data
        self.assertEqual(['first', 'second', 'third'], data)

    def test_a_node_where_the_old_device_is_still_open_takes_nothing_back(self) -> None:
        self.prepare()
        self.move_guest()
        self.agent('b').write(self.volume.id, 'second')
        self.agent('a').open(self.volume.id)
        with self.refused('in use', 'node-a'):
            self.prepare('a')
        self.assert_where(self.volume, a='FENCED', b='HYDRATING')
