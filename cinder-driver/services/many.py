"""Many volumes that come and go at once."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent import futures
from typing import Any, TypeVar

from services.clients import Block

T = TypeVar('T')


def come_and_go(block: Block, count: int, kind: str, nodes: Sequence[str]) -> int:
    """Makes so many volumes of a type, attaches them to these nodes, and ends them.

    Each step is taken for all of them at the same time, and the next when all are done.
    The answer is how many were brought to another node for that.
    """
    volumes = _at_once(lambda _: block.create(volume_type=kind), range(count))
    pairs = list(zip(volumes, itertools.cycle(nodes), strict=False))

    def attach(pair: tuple[dict[str, Any], str]) -> dict[str, Any]:
        volume, node = pair
        return block.attach(volume['id'], str(uuid.uuid4()), node)

    attachments = _at_once(attach, pairs)
    moved = 0
    for (volume, node), attachment in zip(pairs, attachments, strict=True):
        assert attachment['connection_info']['device_path'], attachment
        shown = block.show(volume['id'])
        host = shown['os-vol-host-attr:host']
        assert shown['status'] == 'in-use' and host.endswith(f'#{node}'), shown
        moved += volume['os-vol-host-attr:host'] != host
    _at_once(lambda attachment: block.detach(attachment['id']), attachments)
    _at_once(lambda volume: block.delete(volume['id']), volumes)
    return moved


def _at_once(act: Callable[[Any], T], of: Iterable[Any]) -> list[T]:
    each = list(of)
    with futures.ThreadPoolExecutor(len(each)) as pool:
        return list(pool.map(act, each))
