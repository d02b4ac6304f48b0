"""Nova's live migrations, and what becomes of a volume when they fail."""

from __future__ import annotations

from services.case import Guest, NovaCase

A, B = 'node-a', 'node-b'

# Which of them Nova says depends on when it failed.
FAILED = ('failed', 'error')


class LiveMigrations(NovaCase):
    def test_a_guest_migrates_and_comes_back(self) -> None:
        guest = self.guest(A)
        move = self.cloud.hypervisors.hold(guest.server)
        self.cloud.begin_live_migration(guest.server, B)
        move.wait()
        guest.write()
        for volume in guest.volumes:
            self.assertEqual({A: 'PUBLISHED', B: 'HELD'}, self.fleet.where(volume))
            self.assertEqual([('attached', A), ('attached', B)], self.rows(volume))
        move.decide('done')
        self.assertEqual('completed', self.cloud.end_of_migration(guest.server))
        guest.write()
        guest.runs_on(B)
        guest.is_home_at(B)
        self.assertEqual('completed', self.cloud.live_migrate(guest.server, A))
        guest.write()
        guest.runs_on(A)
        guest.is_home_at(A)
        guest.finish()

    def test_a_destination_without_room_leaves_the_guest_alone(self) -> None:
        guest = self.guest(A)
        with self.no_room(B):
            self.assertIn(self.cloud.live_migrate(guest.server, B), FAILED)
        guest.write()
        root, data = guest.volumes
        for volume in guest.volumes:
            self.assertEqual({A: 'LOCAL'}, self.fleet.where(volume))
        # Nova leaves this behind. It is in nobody's way.
        self.assertEqual([('attached', A), ('reserved', '')], self.rows(root))
        self.assertEqual([('attached', A)], self.rows(data))
        self.assertEqual('completed', self.cloud.live_migrate(guest.server, B))
        guest.write()
        self.assertEqual([('attached', B), ('reserved', '')], self.rows(root))
        # A hard reboot clears it away.
        self.assertEqual('ACTIVE', self.cloud.reboot(guest.server))
        guest.runs_on(B)
        guest.is_home_at(B)
        guest.finish()

    def test_no_room_for_the_second_volume_gives_the_first_up_as_well(self) -> None:
        guest = self.guest(A)
        with self.no_room(B, but=1):
            self.assertIn(self.cloud.live_migrate(guest.server, B), FAILED)
        guest.write()
        for volume in guest.volumes:
            self.assertEqual({A: 'LOCAL'}, self.fleet.where(volume))
        self.assertEqual([('attached', A)], self.rows(guest.volumes[0]))
        self.assertEqual([('attached', A), ('reserved', '')], self.rows(guest.volumes[1]))
        self.assertEqual('ACTIVE', self.cloud.reboot(guest.server))
        guest.runs_on(A)
        guest.finish()

    def test_a_destination_that_cannot_take_a_guest_lets_its_volumes_go(self) -> None:
        guest = self.guest(A)
        self.cloud.hypervisors.fail('await', B)
        self.assertIn(self.cloud.live_migrate(guest.server, B), FAILED)
        self._stays_on_a(guest)
        guest.finish()

    def test_a_migration_that_fails_is_rolled_back(self) -> None:
        guest = self.guest(A)
        self._fail(guest, 'failed')
        self._stays_on_a(guest)
        self.assertEqual('completed', self.cloud.live_migrate(guest.server, B))
        guest.write()
        guest.runs_on(B)
        guest.finish()

    def test_a_migration_that_is_aborted_is_rolled_back(self) -> None:
        guest = self.guest(A)
        move = self.cloud.hypervisors.hold(guest.server)
        self.cloud.begin_live_migration(guest.server, B)
        move.wait()
        self.cloud.abort_live_migration(guest.server)
        self.assertEqual('cancelled', self.cloud.end_of_migration(guest.server))
        self._stays_on_a(guest)
        guest.finish()

    def test_an_agent_that_is_dead_at_the_roll_back_is_passed_over(self) -> None:
        guest = self.guest(A)
        move = self.cloud.hypervisors.hold(guest.server)
        self.cloud.begin_live_migration(guest.server, B)
        move.wait()
        self.fleet.agents[B].is_down = True
        self.cloud.hypervisors.lose(B)
        move.decide('failed')
        self.assertIn(self.cloud.end_of_migration(guest.server), FAILED)
        guest.write()
        for volume in guest.volumes:
            self.assertEqual([('attached', A)], self.rows(volume))
        self.fleet.agents[B].boot()
        self.cloud.wait_for_pools()
        # What it still had is cleared away before the volume goes there again.
        self.assertEqual('completed', self.cloud.live_migrate(guest.server, B))
        guest.write()
        guest.runs_on(B)
        guest.finish()

    # A roll-back that fails: Nova goes on with the wrong attachment.

    def test_the_next_migration_ends_with_the_wrong_attachment(self) -> None:
        guest = self.guest(A)
        self._fail_to_roll_back(guest)
        self._migrate_and_clear_up(guest)
        guest.finish()

    def test_a_hard_reboot_does_not_cut_the_live_guest_off(self) -> None:
        guest = self.guest(A)
        self._fail_to_roll_back(guest)
        # Nova deletes the attachment of the host on which the guest runs; in vain.
        self.assertEqual('ACTIVE', self.cloud.reboot(guest.server))
        guest.write()
        self.assertEqual(A, guest.host)
        guest.reads()
        for volume in guest.volumes:
            self.assertEqual([('attached', A), ('attached', B)], self.rows(volume))
        self._migrate_and_clear_up(guest)
        guest.finish()

    def test_an_instance_is_deleted_after_a_roll_back_that_failed(self) -> None:
        guest = self.guest(A)
        self._fail_to_roll_back(guest)
        self.cloud.servers.delete(guest.server)
        for volume in guest.volumes:
            self.assertEqual([('attached', A)], self.rows(volume))
            self.cloud.delete_attachment(volume, A)
        guest.is_deleted()

    def test_a_source_whose_compute_is_killed_keeps_the_guest(self) -> None:
        guest = self.guest(A)
        move = self.cloud.hypervisors.hold(guest.server)
        self.cloud.begin_live_migration(guest.server, B)
        move.wait()
        self.cloud.nova.kill_compute(A)
        guest.write()
        move.decide('failed')
        self.cloud.nova.start_compute(A)
        self.cloud.nova.wait_for_compute(A)
        self.cloud.servers.wait(guest.server, 'ACTIVE')
        guest.write()
        self.assertEqual(A, guest.host)
        guest.reads()
        self.cloud.servers.delete(guest.server)
        for volume in guest.volumes:
            self.assertEqual([('attached', A)], self.rows(volume))
            self.cloud.delete_attachment(volume, A)
        guest.is_deleted()

    # Helpers

    def _fail(self, guest: Guest, outcome: str) -> None:
        move = self.cloud.hypervisors.hold(guest.server)
        self.cloud.begin_live_migration(guest.server, B)
        move.wait()
        guest.write()
        move.decide(outcome)
        self.assertIn(self.cloud.end_of_migration(guest.server), FAILED)

    def _fail_to_roll_back(self, guest: Guest) -> None:
        """What is left of the guest at the destination keeps its devices open."""
        self.cloud.hypervisors.cling(B, guest.server)
        self._fail(guest, 'failed')
        guest.write()
        for volume in guest.volumes:
            self.assertEqual([('attached', A), ('attached', B)], self.rows(volume))
            self.assertEqual({A: 'PUBLISHED', B: 'HELD'}, self.fleet.where(volume))
        self.cloud.hypervisors.cling(B, guest.server, still=False)

    def _migrate_and_clear_up(self, guest: Guest) -> None:
        """The way out: to the same destination once more."""
        self.assertEqual('completed', self.cloud.live_migrate(guest.server, B))
        # Nova has now deleted an attachment of the host on which the guest runs.
        guest.write()
        self.assertEqual(B, guest.host)
        guest.reads()
        for volume in guest.volumes:
            self.assertEqual([('attached', A), ('attached', B)], self.rows(volume))
            self.assertEqual({A: 'FENCED', B: 'HYDRATING'}, self.fleet.where(volume))
            self.cloud.delete_attachment(volume, A)
        guest.runs_on(B)
        guest.is_home_at(B)

    def _stays_on_a(self, guest: Guest) -> None:
        guest.write()
        guest.runs_on(A)
        for volume in guest.volumes:
            self.assertEqual({A: 'LOCAL'}, self.fleet.where(volume))
