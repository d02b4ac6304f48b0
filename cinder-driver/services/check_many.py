"""A hundred of each at once."""

from __future__ import annotations

from services.cloud import CloudTestCase
from services.many import come_and_go

COUNT = 100


class Many(CloudTestCase):
    def test_a_hundred_volumes_are_made_attached_detached_and_deleted_at_once(self) -> None:
        for agent in self.fleet.agents.values():
            agent.capacity = 4 * COUNT << 30
        moved = come_and_go(self.block, COUNT, 'local', ['node-a', 'node-b'])
        self.assertGreater(moved, 0)
