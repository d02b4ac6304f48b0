"""A hundred of each at once."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any, TypeVar

from services.cloud import CloudTestCase

COUNT = 100

T = TypeVar('T')


class Many(CloudTestCase):
    def test_a_hundred_volumes_are_made_attached_detached_and_deleted_at_once(self) -> None:
        for agent in self.fleet.agents.values():
            agent.capacity = 4 * COUNT << 30
        volumes = self.at_once(lambda _: self.create('local'), range(COUNT))
        nodes = ['node-a', 'node-b'] * COUNT
        pairs = list(zip(volumes, nodes, strict=False))
        made = self.at_once(self.attach, pairs)
        for (volume, node), attachment in zip(pairs, made, strict=True):
            self.assertIn(f'/{node}/', attachment['connection_info']['device_path'])
            self.assertEqual('in-use', self.block.show(volume)['status'])
        self.at_once(lambda attachment: self.block.detach(attachment['id']), made)
        self.at_once(self.block.delete, volumes)

    def attach(self, where: tuple[str, str]) -> dict[str, Any]:
        volume, node = where
        return self.block.attach(volume, str(uuid.uuid4()), node)

    @staticmethod
    def at_once(act: Callable[[Any], T], of: Sequence[Any]) -> list[T]:
        with futures.ThreadPoolExecutor(COUNT) as pool:
            return list(pool.map(act, of))
