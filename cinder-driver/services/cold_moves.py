"""Nova's cold moves: resize, shelving, evacuation. The source is let go of first."""

from __future__ import annotations

from services.case import Guest, NovaCase

A, B = 'node-a', 'node-b'


class ColdMoves(NovaCase):
    def test_a_resize_moves_its_volumes_and_a_revert_takes_them_back(self) -> None:
        guest = self.guest(A)
        self.assertEqual('VERIFY_RESIZE', self.cloud.resize(guest.server, '2'))
        guest.write()
        guest.runs_on(B)
        self.assertEqual('ACTIVE', self.cloud.revert(guest.server))
        guest.write()
        guest.runs_on(A)
        guest.is_home_at(A)
        guest.finish()

    def test_a_cold_migration_is_confirmed(self) -> None:
        guest = self.guest(A)
        self.assertEqual('VERIFY_RESIZE', self.cloud.migrate(guest.server, B))
        guest.write()
        self.assertEqual('ACTIVE', self.cloud.confirm(guest.server))
        guest.runs_on(B)
        guest.is_home_at(B)
        guest.finish()

    def test_a_cold_migration_without_room_goes_back(self) -> None:
        guest = self.guest(A)
        with self.no_room(B):
            self.assertEqual('ERROR', self.cloud.migrate(guest.server, B))
        self.assertEqual([], self.cloud.hypervisors.where(guest.server))
        for volume in guest.volumes:
            self.assertEqual({A: 'LOCAL'}, self.fleet.where(volume))
            self.assertEqual([('reserved', '')], self.rows(volume))
        # As Nova has it on the destination, it migrates back.
        self.cloud.reset(guest.server)
        self.assertEqual('VERIFY_RESIZE', self.cloud.migrate(guest.server, A))
        self.assertEqual('ACTIVE', self.cloud.confirm(guest.server))
        guest.write()
        guest.runs_on(A)
        guest.finish()

    def test_a_shelved_instance_is_unshelved_anywhere(self) -> None:
        guest = self.guest(A)
        self.cloud.shelve(guest.server)
        for volume in guest.volumes:
            self.assertEqual({A: 'LOCAL'}, self.fleet.where(volume))
            self.assertEqual([('reserved', '')], self.rows(volume))
        self.assertEqual('ACTIVE', self.cloud.unshelve(guest.server, B))
        guest.write()
        guest.runs_on(B)
        guest.is_home_at(B)
        guest.finish()

    def test_an_unshelve_that_finds_too_little_room_is_repeated_there(self) -> None:
        guest = self._unshelve_without_room()
        self.assertEqual('ACTIVE', self.cloud.unshelve(guest.server, B))
        guest.write()
        guest.runs_on(B)
        guest.is_home_at(B)
        guest.finish()

    def test_an_unshelve_that_finds_too_little_room_is_repeated_elsewhere(self) -> None:
        guest = self._unshelve_without_room()
        self.assertEqual('ACTIVE', self.cloud.unshelve(guest.server, A))
        guest.write()
        guest.runs_on(A)
        guest.is_home_at(A)
        guest.finish()

    def _unshelve_without_room(self) -> Guest:
        """The first volume has room on the other node, the second has not."""
        guest = self.guest(A)
        self.cloud.shelve(guest.server)
        with self.no_room(B, but=1):
            self.assertEqual('SHELVED_OFFLOADED', self.cloud.unshelve(guest.server, B))
        self.assertEqual([], self.cloud.hypervisors.where(guest.server))
        root, data = guest.volumes
        self.assertEqual([('attached', B)], self.rows(root))
        self.assertEqual([('reserved', '')], self.rows(data))
        return guest


class Evacuations(NovaCase):
    def test_a_host_that_died_with_its_node_has_the_data(self) -> None:
        guest = self.guest(A)
        self._lose_node(A)
        self.cloud.kill_compute(A)
        self.assertEqual('ERROR', self.cloud.evacuate(guest.server, B))
        self.assertEqual([], self.cloud.hypervisors.where(guest.server))
        # Nothing has been made anew, or empty, anywhere.
        for volume in guest.volumes:
            self.assertEqual({A: 'LOCAL'}, self.fleet.where(volume))
        # Its node is back, its compute is not.
        self.fleet.agents[A].boot()
        self.cloud.wait_for_pools()
        self.assertEqual('ACTIVE', self.cloud.evacuate(guest.server, B))
        guest.write()
        guest.runs_on(B)
        self.cloud.revive_compute(A)
        guest.is_home_at(B)
        guest.finish()

    def test_a_node_that_is_declared_dead_has_lost_what_it_had(self) -> None:
        guest = self.guest(A)
        self._lose_node(A)
        self.cloud.kill_compute(A)
        self.cloud.declare_dead([A])
        self.cloud.wait_for_pools([B])
        self.assertEqual('ERROR', self.cloud.evacuate(guest.server, B))
        self.assertEqual({A: 'LOCAL'}, self.fleet.where(guest.volumes[0]))
        # The word is taken back.
        self.fleet.agents[A].boot()
        self.cloud.declare_dead([])
        self.cloud.wait_for_pools()
        self.assertEqual('ACTIVE', self.cloud.evacuate(guest.server, B))
        guest.write()
        guest.runs_on(B)
        self.cloud.revive_compute(A)
        guest.is_home_at(B)
        guest.finish()

    def test_what_was_only_offered_to_a_dead_node_goes_on(self) -> None:
        guest = self.guest(A)
        # A live migration to B is given up; then both lose power, and B for ever.
        move = self.cloud.hypervisors.hold(guest.server)
        self.cloud.begin_live_migration(guest.server, B)
        move.wait()
        move.decide('failed')
        self.cloud.end_of_migration(guest.server)
        self.cloud.stop(guest.server)
        self.cloud.shelve(guest.server)
        self._lose_node(B)
        self.fleet.agents[A].boot()
        # Whether B writes there, only B could say.
        self.assertEqual('SHELVED_OFFLOADED', self.cloud.unshelve(guest.server, A))
        self.cloud.declare_dead([B])
        self.cloud.wait_for_pools([A])
        self.assertEqual('ACTIVE', self.cloud.unshelve(guest.server, A))
        guest.write()
        guest.runs_on(A)
        self.fleet.agents[B].boot()
        self.cloud.declare_dead([])
        self.cloud.wait_for_pools()
        guest.finish()

    def test_a_guest_that_still_runs_is_not_evacuated(self) -> None:
        guest = self.guest(A)
        # Only nova-compute has died.
        self.cloud.kill_compute(A)
        self.assertEqual('ERROR', self.cloud.evacuate(guest.server, B))
        self.assertEqual([A], self.cloud.hypervisors.where(guest.server))
        guest.write()
        guest.reads()
        # Somebody ends the guest; then it can go.
        self.cloud.hypervisors.power_off(A, guest.server)
        self.assertEqual('ACTIVE', self.cloud.evacuate(guest.server, B))
        guest.write()
        self.cloud.revive_compute(A)
        # Clears away what Nova has reserved in vain.
        self.assertEqual('ACTIVE', self.cloud.reboot(guest.server))
        guest.runs_on(B)
        guest.is_home_at(B)
        guest.finish()

    def test_an_evacuation_without_room_is_repeated(self) -> None:
        guest = self.guest(A)
        self.cloud.kill_compute(A)
        self.cloud.hypervisors.power_off(A, guest.server)
        with self.no_room(B, but=1):
            self.assertEqual('ERROR', self.cloud.evacuate(guest.server, B))
        self.assertEqual('ACTIVE', self.cloud.evacuate(guest.server, B))
        guest.write()
        guest.runs_on(B)
        self.cloud.revive_compute(A)
        guest.is_home_at(B)
        guest.finish()

    def _lose_node(self, node: str) -> None:
        """It has no power any more; neither has any guest on it."""
        self.cloud.hypervisors.lose(node)
        self.fleet.agents[node].is_down = True
