"""The driver: Cinder's calls, and which of the agents' answer them.

One cinder-volume serves the fleet; each node is a pool of it, and a volume's `host`
follows the volume. Nothing is kept here: what Cinder's records do not say, the agents
are asked (`copies`). Calls about one volume exclude each other, over all services of a
cluster, by Cinder's own locks.

create_export, ensure_export and remove_export do nothing, because Cinder calls them
while another host uses the volume: what is exported is the agents' affair.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import decorator
from cinder import coordination, exception, interface, objects
from cinder.volume import configuration as volume_configuration
from cinder.volume import driver, volume_utils
from oslo_config import cfg
from oslo_log import log as logging

from cinder_dmlocal import cached, errors, manage, messages, options, rows, stats
from cinder_dmlocal.copies import Known
from cinder_dmlocal.fleet import Fleet, Node
from cinder_dmlocal.snapshots import Snapshots
from cinder_dmlocal.volumes import Placed, Volumes
from cinder_dmlocal.wire import dmlocal_pb2 as pb

LOG = logging.getLogger(__name__)

cfg.CONF.register_opts(options.OPTIONS, group=volume_configuration.SHARED_CONF_GROUP)

# Cinder removes locks that begin with a volume's id together with the volume.
_of_volume = coordination.synchronized('{volume.id}-dmlocal')
_of_snapshot = coordination.synchronized('{snapshot.volume_id}-dmlocal')


@decorator.decorator
def _told(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Has what an agent refused say what can be done about it."""
    try:
        return method(*args, **kwargs)
    except errors.AgentError as error:
        raise exception.VolumeBackendAPIException(data=errors.for_cinder(error)) from error


@interface.volumedriver
class DmLocalDriver(driver.VolumeDriver):
    """Node-local disks, as volumes that follow their instances."""

    VERSION = '0.1.0'
    CI_WIKI_NAME = 'dmlocal'
    SUPPORTS_ACTIVE_ACTIVE = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.configuration.append_config_values(options.OPTIONS)
        self._fleet: Fleet | None = None

    @staticmethod
    def get_driver_options() -> list[cfg.Opt]:
        """The options of the backend's section."""
        return options.OPTIONS

    def do_setup(self, context: Any) -> None:
        """Reads the configuration and gets ready to call the agents."""
        try:
            settings = options.Settings.read(self.configuration)
        except (ValueError, OSError) as error:
            raise exception.InvalidConfigurationValue(
                option='dmlocal_*', value=str(error)
            ) from error
        if self._fleet is not None:
            # Cinder begins again where no node has answered.
            self._fleet.close()
        self._fleet = Fleet(settings)
        self._volumes = Volumes(self._fleet, settings)
        self._snapshots = Snapshots(self._fleet, self._volumes)

    def check_for_setup_error(self) -> None:
        """Nothing more: nodes that do not answer now may do so later."""

    @property
    def initialized(self) -> bool:
        """Whether calls are taken: not while no node of the fleet answers."""
        is_set_up = bool(super().initialized) and self._fleet is not None
        return is_set_up and self.fleet.answers()

    @property
    def fleet(self) -> Fleet:
        """The nodes. Raises DriverNotInitialized before do_setup."""
        if self._fleet is None:
            raise exception.DriverNotInitialized()
        return self._fleet

    def _update_volume_stats(self) -> None:
        self._stats = stats.of(self)

    # Volumes

    @_told
    @_of_volume
    def create_volume(self, volume: Any) -> None:
        """Creates a blank volume on the node that the scheduler has chosen."""
        rows.must_not_be_shared(volume)
        self._volumes.create(volume.name_id, volume.size, self._node(rows.home(volume)))

    @_told
    @_of_volume
    def create_volume_from_snapshot(self, volume: Any, snapshot: Any) -> None:
        """Makes a volume of a snapshot, where that is."""
        rows.must_not_be_shared(volume)
        with messages.of_failure(volume, messages.CREATE, asked=bool(volume.snapshot_id)):
            at = self._snapshots.find(rows.known_snapshot(snapshot)).node
            self._make_of(volume, pb.Origin(snapshot_id=rows.snapshot_id(snapshot)), at)

    @_told
    @_of_volume
    def create_cloned_volume(self, volume: Any, src_vref: Any) -> None:
        """Makes a volume of another as it is now, used or not, where that is."""
        rows.must_not_be_shared(volume)
        with messages.of_failure(volume, messages.CREATE, asked=bool(volume.source_volid)):
            at = self._volumes.find_local(rows.known(src_vref)).node
            self._make_of(volume, pb.Origin(volume_id=src_vref.name_id), at)

    def clone_image(
        self,
        context: Any,
        volume: Any,
        image_location: Any,
        image_meta: dict[str, Any],
        image_service: Any,
    ) -> tuple[dict[str, Any] | None, bool]:
        """Makes a volume of one in the image cache that Cinder itself would not find."""
        is_wanted = self.configuration.safe_get('image_volume_cache_enabled')
        source = cached.source(self.db, volume, image_meta) if is_wanted else None
        if source is None:
            return None, False
        try:
            self.create_cloned_volume(volume, source)
        except exception.CinderException as error:
            LOG.warning('Volume %s is not made of a cached one: %s', volume.id, error)
            return None, False
        return {}, True

    def _make_of(self, volume: Any, origin: pb.Origin, at: Node) -> None:
        """Makes a volume on the node that has its origin, and copies nothing.

        If that has no room, or has begun to hand it over, it is received where the
        scheduler wants it. Its record says where it is before it is there, so that it is
        found whatever happens.
        """
        chosen = self._node(rows.home(volume))
        self._follow(volume, Placed(at.name))
        try:
            return self._volumes.create_of(volume.name_id, volume.size, origin, at)
        except errors.Refused as refusal:
            if refusal.reason not in {'NO_ROOM', 'VOLUME_EXISTS'} or at is chosen:
                raise
            LOG.info('Volume %s: %s', volume.id, refusal.msg)
        self._follow(volume, Placed(chosen.name))
        self._volumes.receive_of(volume.name_id, volume.size, origin, at, chosen)
        return None

    @_told
    @_of_volume
    def delete_volume(self, volume: Any) -> None:
        """Deletes a volume, wherever it is; one in use stays available."""
        if volume.status == 'error_managing_deleting':
            LOG.warning('Volume %s was not taken over: agents keep it.', volume.name_id)
            return
        with errors.busy(exception.VolumeIsBusy):
            self._volumes.delete(rows.known(volume))

    @_told
    @_of_volume
    def extend_volume(self, volume: Any, new_size: int) -> None:
        """Grows a volume to that many GiB, used or not."""
        self._follow(volume, self._volumes.extend(rows.known(volume), new_size))

    # Connections

    def ensure_export(self, context: Any, volume: Any) -> None:
        """Nothing: agents bring their exports back by themselves."""

    def create_export(self, context: Any, volume: Any, connector: Any) -> None:
        """Nothing: initialize_connection does it all."""

    def remove_export(self, context: Any, volume: Any) -> None:
        """Nothing: another host may be using the volume."""

    def validate_connector(self, connector: dict[str, Any]) -> None:
        """Refuses a host on which no agent is known."""
        self._host(connector)

    @_told
    @_of_volume
    def initialize_connection(
        self, volume: Any, connector: dict[str, Any], initiator_data: Any = None
    ) -> dict[str, Any]:
        """Makes the device exist on the connector's host; repeating gives the same."""
        node = self._node(self._host(connector))
        visits = rows.is_visited(volume)
        with messages.of_failure(volume, messages.ATTACH, asked=not visits):
            rows.must_be_one_instance(volume)
            stays = visits or self._is_sent(volume)
            placed = self._volumes.attach(rows.known(volume), node, visits=stays)
        self._follow(volume, placed)
        data = {'device_path': placed.device_path}
        return {'driver_volume_type': 'local', 'data': data}

    @_told
    @_of_volume
    def terminate_connection(
        self, volume: Any, connector: dict[str, Any] | None, **kwargs: Any
    ) -> None:
        """Removes the device from the connector's host, unless somebody has it open.

        Without a connector, from every host that an attachment names.
        """
        known = rows.known(volume)
        is_upload = known.is_uploaded and kwargs.get('force')
        if connector and is_upload and rows.named(connector) in known.hosts:
            # Cinder's own visit ends, on the host of an instance that keeps the device.
            return
        if connector:
            hosts = [rows.named(connector)]
        else:
            hosts = list(dict.fromkeys(known.hosts))
            known = dataclasses.replace(known, hosts=tuple(hosts))
        with messages.of_failure(volume, messages.DETACH):
            for host in hosts:
                self._detach(volume, known, host)

    def _detach(self, volume: Any, known: Known, host: str) -> None:
        if host not in self.fleet:
            LOG.warning('Volume %s: %s is no node of the fleet any more.', volume.id, host)
        placed = self._volumes.detach(known, host)
        if placed is not None:
            self._follow(volume, placed)

    def backup_use_temp_snapshot(self) -> bool:
        """Never: a copy of the volume is as quickly made, and can be attached."""
        return False

    # Snapshots

    @_told
    @_of_snapshot
    def create_snapshot(self, snapshot: Any) -> dict[str, Any]:
        """Takes a snapshot where the volume is written."""
        try:
            node = self._snapshots.create(rows.known_snapshot(snapshot))
        except errors.Unreachable as unheard:
            if unheard.node in self.fleet:
                # It may be there all the same, and is deleted there.
                snapshot.update({'provider_location': unheard.node})
                snapshot.save()
            raise
        self._follow(snapshot.volume, Placed(node.name))
        return {'provider_location': node.name}

    @_told
    @_of_snapshot
    def delete_snapshot(self, snapshot: Any) -> None:
        """Deletes a snapshot, as soon as nothing is copied from it."""
        with errors.busy(exception.SnapshotIsBusy):
            self._snapshots.delete(rows.known_snapshot(snapshot))

    @_told
    @_of_volume
    def revert_to_snapshot(self, context: Any, volume: Any, snapshot: Any) -> None:
        """Takes a volume back to a snapshot at once.

        Where it has left the snapshot's node, NotImplementedError has Cinder copy the
        snapshot's content instead.
        """
        taken = self._snapshots.find(rows.known_snapshot(snapshot))
        if not self._volumes.revert(rows.known(volume), taken.snapshot.id, taken.node):
            raise NotImplementedError()

    # Moving

    @_told
    @_of_volume
    def migrate_volume(
        self, context: Any, volume: Any, host: dict[str, Any]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Moves a volume to another node of the fleet, copying in the background."""
        return self._migrate(volume, host), None

    def _migrate(self, volume: Any, host: dict[str, Any]) -> bool:
        target = self._target(host)
        if target is None:
            return False
        self._volumes.migrate(rows.known(volume), target)
        return True

    @_told
    @_of_volume
    def retype(
        self, context: Any, volume: Any, new_type: Any, diff: Any, host: dict[str, Any]
    ) -> bool | tuple[bool, dict[str, Any]]:
        """Changes the type; a volume that nobody uses moves where the scheduler wants it.

        One in use stays with its guest, and that is what Cinder is told.
        """
        if '<is> true' in str((new_type.get('extra_specs') or {}).get('multiattach')).lower():
            raise exception.InvalidVolumeType(reason=rows.NOT_SHARED)
        if diff.get('encryption') and any(diff['encryption'].values()):
            return False
        target = self._target(host)
        if target is None:
            return False
        if target.name == rows.home(volume):
            return True
        try:
            return self._migrate(volume, host)
        except errors.InUse as error:
            LOG.info('Volume %s stays where it is: %s', volume.id, error)
            return True, {'host': volume.host, 'cluster_name': volume.cluster_name}

    def update_migrated_volume(
        self, ctxt: Any, volume: Any, new_volume: Any, original_volume_status: str
    ) -> dict[str, Any]:
        """After a host-assisted migration: agents go on knowing the copy by its own id."""
        return {
            '_name_id': new_volume.name_id,
            'provider_location': new_volume.provider_location,
        }

    # Management

    @_told
    @_of_volume
    def manage_existing(self, volume: Any, existing_ref: dict[str, Any]) -> dict[str, Any]:
        """Takes a volume of the agents' over; it keeps its id there."""
        rows.must_not_be_shared(volume)
        found = manage.volume(self._node(rows.home(volume)), existing_ref)
        return manage.claim(volume, objects.Volume, objects.VolumeList, '_name_id', found.id)

    @_told
    def manage_existing_get_size(self, volume: Any, existing_ref: dict[str, Any]) -> int:
        """Size of what is to be taken over, in GiB."""
        found = manage.volume(self._node(rows.home(volume)), existing_ref)
        return manage.size_gib(found.size_bytes)

    def unmanage(self, volume: Any) -> None:
        """Leaves the volume to the agents."""

    @_told
    def get_manageable_volumes(
        self,
        cinder_volumes: Any,
        marker: Any,
        limit: int,
        offset: int,
        sort_keys: list[str],
        sort_dirs: list[str],
    ) -> list[dict[str, Any]]:
        """Volumes of all nodes that answer, with what forbids taking them over."""
        entries = manage.volumes(self.fleet, cinder_volumes)
        return volume_utils.paginate_entries_list(
            entries, marker, limit, offset, sort_keys, sort_dirs
        )

    @_told
    @_of_snapshot
    def manage_existing_snapshot(
        self, snapshot: Any, existing_ref: dict[str, Any]
    ) -> dict[str, Any]:
        """Takes a snapshot of the agents' over; it keeps its id there."""
        taken = manage.snapshot(self._snapshots, rows.known(snapshot.volume), existing_ref)
        claimed = manage.claim(
            snapshot, objects.Snapshot, objects.SnapshotList, 'provider_id', taken.snapshot.id
        )
        return {**claimed, 'provider_location': taken.node.name}

    @_told
    def manage_existing_snapshot_get_size(
        self, snapshot: Any, existing_ref: dict[str, Any]
    ) -> int:
        """Size of the snapshot that is to be taken over, in GiB."""
        taken = manage.snapshot(self._snapshots, rows.known(snapshot.volume), existing_ref)
        return manage.size_gib(taken.snapshot.size_bytes)

    def unmanage_snapshot(self, snapshot: Any) -> None:
        """Leaves the snapshot to the agents."""

    @_told
    def get_manageable_snapshots(
        self,
        cinder_snapshots: Any,
        marker: Any,
        limit: int,
        offset: int,
        sort_keys: list[str],
        sort_dirs: list[str],
    ) -> list[dict[str, Any]]:
        """Snapshots of all nodes that answer, with what forbids taking them over."""
        entries = manage.snapshots(self.fleet, cinder_snapshots)
        return volume_utils.paginate_entries_list(
            entries, marker, limit, offset, sort_keys, sort_dirs
        )

    # Cinder's words and the agents'

    def _node(self, name: str) -> Node:
        if name not in self.fleet:
            raise exception.VolumeBackendAPIException(
                data=f'{name or "the host"} is no node of the fleet (dmlocal_nodes)'
            )
        return self.fleet[name]

    def _host(self, connector: dict[str, Any]) -> str:
        host = rows.named(connector)
        if host not in self.fleet:
            LOG.error('No agent is known on host %s (dmlocal_nodes).', host)
            missing = f'a node of the fleet as its host (dmlocal_nodes), not {host}'
            raise exception.InvalidConnectorException(missing=missing)
        return host

    def _target(self, host: dict[str, Any]) -> Node | None:
        """The node that Cinder means, if it is one of this backend's."""
        info = (host.get('capabilities') or {}).get('location_info')
        name = volume_utils.extract_host(host['host'], 'pool')
        if info != stats.location_info(self.fleet) or name not in self.fleet:
            return None
        return self.fleet[name]

    def _is_sent(self, volume: Any) -> bool:
        """Whether an operator wants a volume in use to be on another node than its guest.

        Cinder has Nova copy it to a new volume there then, and that one stays.
        """
        status, _, origin_id = (volume.migration_status or '').partition(':')
        if status != 'target':
            return False
        origin = objects.Volume.get_by_id(volume._context, origin_id)
        return rows.home(origin) in self.fleet and rows.section(origin) == rows.section(volume)

    def _follow(self, volume: Any, placed: Placed) -> None:
        """Has Cinder's record say where the volume is now."""
        if placed.home == rows.home(volume) or placed.home not in self.fleet:
            return
        volume.host = rows.in_pool(volume.host, placed.home)
        if volume.cluster_name:
            volume.cluster_name = rows.in_pool(volume.cluster_name, placed.home)
        LOG.info('Volume %s is on %s now.', volume.id, volume.host)
        volume.save()
