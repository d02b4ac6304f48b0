"""Volumes of Cinder's image cache, for services that run as a cluster.

There Cinder looks only for a volume in the pool that is asked for, whatever the driver
says of copies across pools; without a cluster it finds those of all pools by itself.
"""

from __future__ import annotations

import datetime
from typing import Any

from cinder import context as cinder_context
from cinder import exception, objects
from cinder.volume import volume_utils


def source(database: Any, volume: Any, image_meta: Any) -> Any | None:
    """The cached volume of an image that the volume may be made of; the last used first."""
    if not volume.cluster_name:
        return None
    context = cinder_context.get_internal_tenant_context()
    if context is None:
        return None
    for entry in database.image_volume_cache_get_all(context, image_id=image_meta['id']):
        if not _serves(entry, volume, image_meta):
            continue
        try:
            found = objects.Volume.get_by_id(context, entry['volume_id'])
        except exception.VolumeNotFound:
            continue
        # What is used stays longest in the cache.
        database.image_volume_cache_get_and_update_last_used(
            context, image_meta['id'], cluster_name=entry['cluster_name']
        )
        return found
    return None


def _serves(entry: Any, volume: Any, image_meta: Any) -> bool:
    """Whether an entry is of this backend, of the image as it is now, and not too large."""
    changed = image_meta['updated_at'].astimezone(datetime.timezone.utc)
    cached = entry['image_updated_at'].replace(tzinfo=datetime.timezone.utc)
    return bool(
        _backend(entry['cluster_name']) == _backend(volume.cluster_name)
        and cached == changed
        and entry['size'] <= volume.size
    )


def _backend(name: str | None) -> str:
    return volume_utils.extract_host(name, 'backend') if name else ''
