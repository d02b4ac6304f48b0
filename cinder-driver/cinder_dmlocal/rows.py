"""What Cinder's rows say, in the words of the rest of this package."""

from __future__ import annotations

from typing import Any

from cinder import exception, objects
from cinder.volume import volume_utils

from cinder_dmlocal.copies import Known
from cinder_dmlocal.snapshots import KnownSnapshot

# Statuses in which whoever attaches a volume is an instance.
_CONSUMED = frozenset({'reserved', 'attaching', 'in-use', 'detaching'})

NOT_SHARED = 'dmlocal has one node write a volume at a time; it does not support multiattach'


def home(volume: Any) -> str:
    """Name of the node that a volume's host names; empty if it names none."""
    return volume_utils.extract_host(volume.host, 'pool') or ''


def section(volume: Any) -> str:
    """The backend's name in cinder.conf, which all services of a cluster share."""
    return str(volume_utils.extract_host(volume.host, 'backend')).partition('@')[2]


def in_pool(host: str, name: str) -> str:
    """A host or cluster, with another node."""
    backend = volume_utils.extract_host(host, 'backend')
    return str(volume_utils.append_host(backend, name))


def named(connector: dict[str, Any]) -> str:
    """The host of a connector. Raises InvalidConnectorException if it has none."""
    host = connector.get('host')
    if not host:
        raise exception.InvalidConnectorException(missing='host')
    return str(host)


def is_visited(volume: Any) -> bool:
    """Whether Cinder itself attaches a volume: for an image, a backup, a migration.

    What it copies for itself it may call in use, although no attachment is there.
    """
    if volume.status == 'in-use':
        return not volume.volume_attachment
    return volume.status not in _CONSUMED


def known(volume: Any) -> Known:
    """What is known of a volume."""
    hosts = (_host_of(attachment) for attachment in volume.volume_attachment)
    return Known(
        volume.name_id,
        home(volume),
        tuple(host for host in hosts if host),
        was_made=volume.launched_at is not None,
        is_uploaded=volume.status == 'uploading',
    )


def _host_of(attachment: Any) -> str:
    """The host of an attachment; empty for one that is only reserved."""
    return attachment.attached_host or (attachment.connector or {}).get('host') or ''


def snapshot_id(snapshot: Any) -> str:
    """The id by which agents know a snapshot."""
    return str(snapshot.provider_id or snapshot.id)


def known_snapshot(snapshot: Any) -> KnownSnapshot:
    """What is known of a snapshot."""
    return KnownSnapshot(
        snapshot_id(snapshot), snapshot.provider_location or '', known(snapshot.volume)
    )


def must_not_be_shared(volume: Any) -> None:
    """Raises InvalidVolumeType for a volume that several instances may attach."""
    if volume.multiattach:
        raise exception.InvalidVolumeType(reason=NOT_SHARED)


def must_be_one_instance(volume: Any) -> None:
    """Raises InvalidVolume if attachments are of several instances.

    Cinder itself sees to that, but for volumes that it calls shared: also after a retype
    to such a type was refused. An attachment that is made with its connector has its row
    already then, but not in the list that comes with the volume.
    """
    attachments = volume.volume_attachment
    if volume.multiattach:
        every = objects.VolumeAttachmentList.get_all_by_volume_id
        attachments = every(volume._context, volume.id)
    instances = {a.instance_uuid for a in attachments if a.instance_uuid}
    if len(instances) > 1:
        raise exception.InvalidVolume(reason=NOT_SHARED)
