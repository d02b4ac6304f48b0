"""Volumes change their type, their node and their backend."""

from __future__ import annotations

from typing import Any

from cinder_dmlocal.tests.fake import FakeFleet
from services.cloud import CONTROLLER, FilesTestCase


class Moves(FilesTestCase):
    def test_a_volume_moves_to_another_node_and_is_copied_there(self) -> None:
        volume = self.written('one', 'local')
        away = next(node for node in ('node-a', 'node-b') if node != self.node_of(volume))
        self.migrate(volume, f'fleet@dmlocal#{away}')
        self.assertEqual(away, self.node_of(volume))
        self.assertEqual({away: 'LOCAL'}, self.fleet.where(volume))
        self.assertNotIn(f'{CONTROLLER} Moves.Receive', self.fleet.order)
        self.assert_content(volume, self.file('one'), away)
        self.delete(volume)

    def test_a_volume_moves_to_another_backend_and_keeps_its_id(self) -> None:
        volume = self.written('one', 'any')
        self.migrate(volume, 'fleet@dmlocal#node-a')
        self.migrate(volume, 'fleet@other#node-x')
        self.assert_is_elsewhere(volume, 'one')
        row = self.block.show(volume)
        name = row['os-vol-mig-status-attr:name_id']
        self.assertNotEqual(volume, name)
        self.assertEqual({'node-x': 'LOCAL'}, self.cloud.fleets['other'].where(name))
        # What is known by another id has snapshots, grows, and comes back.
        snapshot = self.block.snapshot(volume)
        self.block.delete_snapshot(snapshot)
        self.block.act(volume, os_extend={'new_size': 2})
        self.block.wait(volume, 'available')
        self.migrate(volume, 'fleet@dmlocal#node-b')
        self.gone_from(self.cloud.fleets['other'])
        self.assert_content(volume, self.file('one'), 'node-b')
        self.delete(volume)

    def test_a_type_that_the_same_node_offers_is_changed_at_once(self) -> None:
        volume = self.written('one', 'local')
        node = self.node_of(volume)
        self.fleet.order.clear()
        self.retype(volume, node)
        self.assertEqual([], [call for call in self.fleet.order if 'Moves.' in call])
        self.assertEqual(node, self.node_of(volume))
        self.assert_content(volume, self.file('one'), node)
        self.delete(volume)

    def test_a_type_of_another_node_moves_the_volume_there(self) -> None:
        volume = self.written('one', 'node-a')
        self.retype(volume, 'node-b', 'on-demand')
        self.assertEqual('node-b', self.node_of(volume))
        self.assertNotIn(f'{CONTROLLER} Moves.Receive', self.fleet.order)
        self.assert_content(volume, self.file('one'), 'node-b')
        self.delete(volume)

    def test_a_type_of_another_backend_has_cinder_copy_the_volume(self) -> None:
        volume = self.written('one', 'node-a')
        self.retype(volume, 'other', 'on-demand')
        self.assert_is_elsewhere(volume, 'one')
        self.delete(volume)

    def test_a_type_of_another_backend_is_refused_if_nothing_may_move(self) -> None:
        volume = self.written('one', 'node-a')
        self.retype(volume, 'other', 'never', becomes='node-a')
        self.assertEqual('node-a', self.node_of(volume))
        self.assert_content(volume, self.file('one'), 'node-a')
        self.delete(volume)

    def assert_is_elsewhere(self, volume: str, name: str) -> None:
        """Nothing of a volume is left where it was."""
        self.assertEqual('node-x', self.node_of(volume))
        self.gone_from(self.fleet)
        self.assert_content(volume, self.file(name), 'node-x')

    def gone_from(self, fleet: FakeFleet) -> None:
        """Cinder deletes what was copied when all else is done."""
        left = fleet.left
        self.cloud.processes.wait(f'there is still {left()}', lambda: not left())

    def migrate(self, volume: str, host: str) -> None:
        if self.block.show(volume)['os-vol-host-attr:host'] == host:
            return
        self.block.act(volume, os_migrate_volume={'host': host})
        self.settle(volume, lambda row: row['os-vol-host-attr:host'] == host)

    def retype(
        self, volume: str, kind: str, policy: str = 'never', becomes: str | None = None
    ) -> None:
        self.block.act(volume, os_retype={'new_type': kind, 'migration_policy': policy})
        self.settle(volume, lambda row: row['volume_type'] == (becomes or kind))

    def settle(self, volume: str, is_so: Any) -> None:
        """Waits until Cinder has done what it does to a volume."""

        def seen() -> bool:
            row = self.block.show(volume)
            migration = row['os-vol-mig-status-attr:migstat']
            self.assertNotEqual('error', migration)
            is_done = row['status'] == 'available' and migration in (None, 'success')
            return is_done and is_so(row)

        self.cloud.processes.wait(f'{volume} does not settle', seen)
