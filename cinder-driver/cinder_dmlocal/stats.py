"""What the scheduler hears of the fleet: a pool for each node that answers."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from oslo_log import log as logging
from oslo_utils import units

from cinder_dmlocal.fleet import Fleet

if TYPE_CHECKING:
    from cinder_dmlocal.driver import DmLocalDriver

LOG = logging.getLogger(__name__)


def location_info(fleet: Fleet) -> str:
    """The same for every service of one fleet and agents' pool, and for no other."""
    names = ' '.join(sorted(fleet.names))
    return f'dmlocal:{hashlib.sha256(names.encode()).hexdigest()[:16]}:{fleet.pool}'


def of(driver: DmLocalDriver) -> dict[str, Any]:
    """Statistics of a backend, gathered from all nodes at once.

    A node that does not answer, or whose pool is away, has no pool here: nothing new is
    placed on it, and the others go on.
    """
    pools = driver.fleet.pools()
    for name, error in pools.failed.items():
        LOG.warning('Nothing is placed on %s: %s', name, error.msg)
    configuration = driver.configuration
    return {
        'volume_backend_name': configuration.safe_get('volume_backend_name') or 'dmlocal',
        'vendor_name': 'dmlocal',
        'driver_version': driver.VERSION,
        'storage_protocol': 'local',
        # Without this, Cinder would keep its image-volume cache for each pool apart.
        'clone_across_pools': True,
        'pools': [_pool(driver, name, pool) for name, pool in sorted(pools.given.items())],
    }


def _pool(driver: DmLocalDriver, name: str, pool: Any) -> dict[str, Any]:
    reserved = driver.configuration.safe_get('reserved_percentage')
    return {
        'pool_name': name,
        'location_info': location_info(driver.fleet),
        'total_capacity_gb': _gib(pool.size_bytes),
        # What the agent would still take, its overprovisioning included.
        'free_capacity_gb': _gib(pool.free_bytes),
        'provisioned_capacity_gb': _gib(pool.provisioned_bytes),
        'reserved_percentage': reserved or 0,
        'thick_provisioning_support': True,
        'thin_provisioning_support': False,
        'multiattach': False,
        'online_extend_support': True,
        'consistent_group_snapshot_enabled': False,
        'QoS_support': False,
        'filter_function': driver.get_filter_function(),
        'goodness_function': driver.get_goodness_function(),
    }


def _gib(size_bytes: int) -> float:
    return round(size_bytes / units.Gi, 2)
