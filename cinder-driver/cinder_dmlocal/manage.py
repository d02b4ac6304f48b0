"""Taking over volumes and snapshots that the agents have and Cinder does not know.

A reference is {'source-id': UUID}. Agents rename nothing: what is taken over keeps its
id there, and Cinder keeps that id beside its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cinder import context, coordination, exception
from oslo_utils import units, uuidutils

from cinder_dmlocal import errors
from cinder_dmlocal.copies import Known
from cinder_dmlocal.fleet import Fleet, Node
from cinder_dmlocal.snapshots import KnownSnapshot, Snapshots, Taken
from cinder_dmlocal.wire import dmlocal_pb2 as pb


@coordination.synchronized('{agents_id}-dmlocal-managed')
def claim(row: Any, kind: Any, rows: Any, key: str, agents_id: str) -> dict[str, Any]:
    """Has a row stand for what agents know by this id; what it says of that now.

    Refuses what Cinder has already, by its own id or by the one that agents know: two
    rows for one volume would each be deleted with what the other holds. Whoever claims
    it next finds the row, because it is saved.
    """
    admin = context.get_admin_context()
    if kind.exists(admin, agents_id) or rows.get_all(admin, filters={key: agents_id}):
        raise exception.ManageExistingAlreadyManaged(volume_ref=agents_id)
    claimed = {key: agents_id}
    row.update(claimed)
    row.save()
    return claimed


def size_gib(size_bytes: int) -> int:
    """A size in GiB, rounded up, as Cinder counts."""
    return -(-size_bytes // units.Gi)


def volume(node: Node, existing_ref: dict[str, Any]) -> pb.Volume:
    """The volume on a node that a reference means.

    Raises ManageExistingInvalidReference if there is none that may be taken over.
    """
    source = _source(existing_ref)
    try:
        found = node.look(node.volumes.Get, pb.GetVolumeRequest(id=source))
    except errors.Refused as refusal:
        raise _invalid(existing_ref, refusal.msg) from refusal
    why = _why_not(found, node.pool)
    if why:
        raise _invalid(existing_ref, why)
    return found


def snapshot(all_of_them: Snapshots, of: Known, existing_ref: dict[str, Any]) -> Taken:
    """The snapshot of a volume that a reference means.

    Raises ManageExistingInvalidReference if there is none that may be taken over.
    """
    try:
        taken = all_of_them.find(KnownSnapshot(_source(existing_ref), '', of))
    except errors.NotFound as missing:
        raise _invalid(existing_ref, str(missing)) from missing
    if taken.snapshot.volume_id != of.id:
        raise _invalid(existing_ref, f'it is of volume {taken.snapshot.volume_id}')
    why = _elsewhere(taken.snapshot, taken.node.pool)
    if why:
        raise _invalid(existing_ref, why)
    return taken


def volumes(fleet: Fleet, known: Iterable[Any]) -> list[dict[str, Any]]:
    """What the nodes that answer have; safe to manage or not, and why."""
    owners = {volume.name_id: volume.id for volume in known}
    answers = fleet.ask(lambda node: node.volumes.List, pb.ListVolumesRequest())
    return [
        _entry(found, owners.get(found.id), _why_not(found, fleet.pool), {'node': node})
        for node, answer in answers.given.items()
        for found in answer.volumes
    ]


def snapshots(fleet: Fleet, known: Iterable[Any]) -> list[dict[str, Any]]:
    """The same of snapshots."""
    owners = {snapshot.provider_id or snapshot.id: snapshot.id for snapshot in known}
    answers = fleet.ask(lambda node: node.snapshots.List, pb.ListSnapshotsRequest())
    entries = []
    for node, answer in answers.given.items():
        for found in answer.snapshots:
            is_whole = found.state == pb.SNAPSHOT_STATE_AVAILABLE
            why = _elsewhere(found, fleet.pool) if is_whole else 'it is not available'
            entry = _entry(found, owners.get(found.id), why, {'node': node})
            entry['source_reference'] = {'source-id': found.volume_id}
            entries.append(entry)
    return entries


def _entry(found: Any, cinder_id: str | None, why: str | None, extra: Any) -> dict[str, Any]:
    if cinder_id is not None:
        why = 'Cinder has it already'
    return {
        'reference': {'source-id': found.id},
        'size': size_gib(found.size_bytes),
        'safe_to_manage': why is None,
        'reason_not_safe': why,
        'cinder_id': cinder_id,
        'extra_info': extra,
    }


def _why_not(found: pb.Volume, pool: str) -> str | None:
    if found.attached:
        return 'it is attached'
    if found.state != pb.VOLUME_STATE_LOCAL:
        return 'it is not all on this node'
    return _elsewhere(found, pool)


def _elsewhere(found: Any, pool: str) -> str | None:
    if pool in ('', found.pool):
        return None
    return f'it is in the pool {found.pool}, and here {pool} is used (dmlocal_pool)'


def _source(existing_ref: dict[str, Any]) -> str:
    source = existing_ref.get('source-id') or existing_ref.get('source-name')
    if not uuidutils.is_uuid_like(source):
        raise _invalid(existing_ref, "it must be {'source-id': UUID}")
    return str(source).lower()


def _invalid(existing_ref: dict[str, Any], why: str) -> Exception:
    return exception.ManageExistingInvalidReference(existing_ref=existing_ref, reason=why)
