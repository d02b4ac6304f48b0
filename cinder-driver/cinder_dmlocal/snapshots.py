"""What the driver has the agents do with snapshots.

A snapshot stays on the node where it was taken, wherever its volume goes. Cinder keeps
that node's name (`provider_location`); like the host of a volume it says where to look
first, and no more.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from oslo_log import log as logging

from cinder_dmlocal import errors
from cinder_dmlocal.copies import Copy, Known
from cinder_dmlocal.fleet import Fleet, Node
from cinder_dmlocal.volumes import Volumes
from cinder_dmlocal.wire import dmlocal_pb2 as pb

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class KnownSnapshot:
    """What Cinder knows of a snapshot: `at` is the node where it was taken."""

    id: str
    at: str
    volume: Known


@dataclasses.dataclass(frozen=True)
class Taken:
    """A snapshot and the node that has it."""

    node: Node
    snapshot: Any


class Snapshots:
    """The snapshots of the fleet."""

    def __init__(self, fleet: Fleet, volumes: Volumes) -> None:
        self._fleet = fleet
        self._volumes = volumes

    def find(self, known: KnownSnapshot) -> Taken:
        """Finds a snapshot.

        Raises errors.Lost, errors.Unreachable or errors.NotFound if it is not found.
        """
        silent: dict[str, errors.AgentError] = {}
        for name in dict.fromkeys((known.at, known.volume.home)):
            if name not in self._fleet:
                continue
            node = self._fleet[name]
            try:
                request = pb.GetSnapshotRequest(id=known.id)
                return Taken(node, node.look(node.snapshots.Get, request))
            except errors.Unreachable as error:
                silent[name] = error
            except errors.Refused as refusal:
                if refusal.reason != 'SNAPSHOT_NOT_FOUND':
                    raise
        # Nobody is known to have been asked for one that was refused.
        at = known.at or known.volume.home
        if at and at not in self._fleet:
            raise errors.Unreachable(at, errors.STRANGER)
        unheard = silent.get(at)
        if unheard is not None and self._fleet[at].is_dead:
            raise errors.Lost(what=f'Snapshot {known.id}', node=at)
        if unheard is not None:
            raise unheard
        return self._find_anywhere(known)

    def _find_anywhere(self, known: KnownSnapshot) -> Taken:
        request = pb.GetSnapshotRequest(id=known.id)
        answers = self._fleet.ask(lambda node: node.snapshots.Get, request)
        for name, snapshot in answers.given.items():
            return Taken(self._fleet[name], snapshot)
        raise errors.NotFound(f'snapshot {known.id}', answers.failed)

    def create(self, known: KnownSnapshot) -> Node:
        """Takes a snapshot where its volume is written; that node is the answer."""
        request = pb.CreateSnapshotRequest(id=known.id, volume_id=known.volume.id)

        def take(owner: Copy) -> None:
            owner.node.call(owner.node.snapshots.Create, request)

        return self._volumes.where_written(known.volume, take).node

    def delete(self, known: KnownSnapshot) -> None:
        """Deletes a snapshot, as soon as nothing reads it; one that is nowhere is deleted."""
        try:
            taken = self.find(known)
        except (errors.NotFound, errors.Lost) as error:
            LOG.warning('Snapshot %s is deleted from Cinder only: %s', known.id, error)
            return
        incarnation = taken.snapshot.incarnation
        request = pb.DeleteSnapshotRequest(id=known.id, defer=True, incarnation=incarnation)
        taken.node.call(taken.node.snapshots.Delete, request)
