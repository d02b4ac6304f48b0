"""How one node offers a volume to another, and the other receives it.

The trace of a move is the grant at the node that has the volume: it is made first and
taken back last, so that whoever comes next sees that there is something to go on with or
to clear away.
"""

from __future__ import annotations

import uuid
from typing import Any

from oslo_log import log as logging

from cinder_dmlocal import errors
from cinder_dmlocal.copies import Copy
from cinder_dmlocal.fleet import Node
from cinder_dmlocal.wire import dmlocal_pb2 as pb

LOG = logging.getLogger(__name__)


def move(
    volume_id: str,
    source: Node,
    node: Node,
    pool: str,
    *,
    hold: bool,
    mode: Any = pb.RECEIVE_MODE_UNSPECIFIED,
    origin: pb.Origin | None = None,
) -> Copy:
    """Has `source` offer a volume, or with `origin` a copy of it, and `node` receive it.

    `mode` says where its data is to be; the destination decides unless it is told.
    """
    whom = node.look(node.nodes.GetNode, pb.GetNodeRequest())
    grant_id = str(uuid.uuid4())
    grant = source.call(
        source.moves.Grant,
        pb.GrantRequest(
            id=volume_id,
            grant_id=grant_id,
            node=node.name,
            host_nqn=whom.host_nqn,
            endpoint=whom.endpoint,
            hold=hold,
            source=origin,
        ),
    )
    takes_room = mode != pb.RECEIVE_MODE_REMOTE
    request = pb.ReceiveRequest(grant=grant, pool=pool if takes_room else '', mode=mode)
    try:
        return Copy(node, node.call(node.moves.Receive, request))
    except errors.Refused:
        revoke(source, volume_id, grant_id)
        raise
    except errors.Unreachable as error:
        return _in_doubt(grant, source, node, error)


def _in_doubt(grant: pb.Grant, source: Node, node: Node, error: errors.Unreachable) -> Copy:
    """The answer to a receive was lost: it may have been done.

    While the destination says nothing the grant stays, as the trace of it.
    """
    try:
        volume = node.look(node.volumes.Get, pb.GetVolumeRequest(id=grant.volume_id))
    except errors.Refused:
        revoke(source, grant.volume_id, grant.id)
        raise error from None
    except errors.Unreachable:
        raise error from None
    # What begins with its grant is received detached.
    if volume.grant_id == grant.id and (volume.device_path or grant.begins):
        return Copy(node, volume)
    raise error


def revoke(source: Node, volume_id: str, grant_id: str) -> None:
    """Takes a grant back; leaves it where that cannot be done, for the next to find."""
    request = pb.RevokeRequest(volume_id=volume_id, grant_id=grant_id)
    try:
        source.call(source.moves.Revoke, request)
    except errors.AgentError as error:
        LOG.warning('Volume %s: the grant %s stays: %s', volume_id, grant_id, error.msg)


def give_up(held: Copy, source: Copy | None) -> None:
    """Aborts a move at its destination, which nobody has open.

    If writes wait there they were never acknowledged. The source is told first then,
    so that it cannot be fenced any more.
    """
    request = pb.AbortRequest(**held.which())
    try:
        held.node.call(held.node.moves.Abort, request)
    except errors.Refused as refusal:
        if refusal.reason in ('GRANT_FENCED', 'VOLUME_NOT_FOUND', 'VOLUME_NOT_HELD'):
            LOG.info('Volume %s: %s', held.volume.id, refusal.msg)
            return
        if refusal.reason != 'WRITTEN_AT_DESTINATION' or source is None:
            raise
        revoke(source.node, held.volume.id, held.volume.grant_id)
        held.node.call(held.node.moves.Abort, request)
