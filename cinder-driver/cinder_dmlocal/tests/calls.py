"""What pretended agents do when they are called; see `fake`."""

from __future__ import annotations

import dataclasses
import pathlib
import uuid
from typing import TYPE_CHECKING, Any

import grpc

from cinder_dmlocal.wire import dmlocal_pb2 as pb

if TYPE_CHECKING:
    from cinder_dmlocal.tests.fake import FakeFleet

GIB = 1 << 30


class Refusal(Exception):
    """What an agent answers instead of doing something."""

    def __init__(self, reason: str, code: str = 'FAILED_PRECONDITION', **metadata: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.code = grpc.StatusCode[code]
        self.metadata = metadata


@dataclasses.dataclass
class Vol:
    """A copy of a volume."""

    id: str
    size: int
    state: str = 'LOCAL'
    generation: int = 1
    incarnation: str = dataclasses.field(default_factory=lambda: str(uuid.uuid4()))
    pool: str = 'local'
    attached: bool = False
    opened: int = 0
    held_writes: list[str] = dataclasses.field(default_factory=list)
    data: list[str] = dataclasses.field(default_factory=list)
    # What its device shows, where devices are files.
    file: pathlib.Path | None = None
    made_of: Any = None
    # At the source, and at the destination.
    grant_id: str = ''
    peer: str = ''
    hold: bool = False
    source: str = ''
    is_remote: bool = False
    lent_to: str = ''
    must_confirm: bool = False
    passing: bool = False
    has_failed: bool = False


@dataclasses.dataclass
class Snap:
    """A snapshot."""

    id: str
    volume: str
    size: int
    data: list[str]
    file: pathlib.Path | None = None
    incarnation: str = dataclasses.field(default_factory=lambda: str(uuid.uuid4()))
    state: str = 'AVAILABLE'
    pool: str = 'local'


def _shown_state(vol: Vol) -> str:
    if vol.has_failed:
        return 'FAILED'
    # What a copy lacks says more than that it goes on already.
    return 'HYDRATING' if vol.state == 'PUBLISHED' and vol.source else vol.state


class Calls:
    """The interface, method by method: service_method(request)."""

    name: str
    fleet: FakeFleet
    volumes: dict[str, Vol]
    snapshots: dict[str, Snap]
    capacity: int
    has_pool: bool
    takes_remote: bool

    def ask_for_fence(self, vol: Vol) -> bool:
        """Whether the source of a held copy is fenced."""
        raise NotImplementedError

    # Nodes

    def nodes_getnode(self, request: Any) -> Any:
        return pb.Node(name=self.name, endpoint=f'https://{self.name}:7450', host_nqn='nqn')

    def nodes_listpools(self, request: Any) -> Any:
        if not self.has_pool:
            return pb.ListPoolsResponse()
        pool = pb.Pool(
            name='local',
            size_bytes=self.capacity,
            free_bytes=self._free(),
            provisioned_bytes=self.capacity - self._free(),
            present=True,
        )
        return pb.ListPoolsResponse(pools=[pool])

    def _free(self) -> int:
        return self.capacity - sum(v.size for v in self.volumes.values() if not v.is_remote)

    def _need(self, size: int) -> None:
        if not self.has_pool:
            raise Refusal('POOL_NOT_FOUND', 'NOT_FOUND')
        if size > self._free():
            raise Refusal('NO_ROOM', 'RESOURCE_EXHAUSTED', pool='local')

    # Volumes

    def _vol(self, request: Any) -> Vol:
        vol = self.volumes.get(request.id)
        fields = request.DESCRIPTOR.fields_by_name
        if vol is None:
            raise Refusal('VOLUME_NOT_FOUND', 'NOT_FOUND')
        if (
            'incarnation' in fields
            and request.HasField('incarnation')
            and request.incarnation != vol.incarnation
        ):
            raise Refusal('VOLUME_NOT_FOUND', 'NOT_FOUND')
        if (
            'generation' in fields
            and request.HasField('generation')
            and request.generation != vol.generation
        ):
            raise Refusal('GENERATION_STALE')
        return vol

    def show(self, vol: Vol) -> Any:
        shown = pb.Volume(
            id=vol.id,
            size_bytes=vol.size,
            state=pb.VolumeState.Value(f'VOLUME_STATE_{_shown_state(vol)}'),
            attached=vol.attached,
            generation=vol.generation,
            incarnation=vol.incarnation,
            pool=vol.pool,
        )
        if vol.attached:
            shown.device_path = self.fleet.disks.device(self.name, vol.id, vol.file)
        if vol.grant_id:
            shown.grant_id = vol.grant_id
        if vol.peer:
            shown.peer_node = vol.peer
        if vol.source:
            shown.source_node = vol.source
        if vol.state == 'HELD':
            shown.held_writes = len(vol.held_writes)
        if vol.data and not vol.is_remote:
            shown.allocated_bytes = len(vol.data) << 16
        if vol.made_of is not None:
            shown.source.CopyFrom(vol.made_of)
        return shown

    def volumes_create(self, request: Any) -> Any:
        there = self.volumes.get(request.id)
        if request.HasField('source'):
            assert not request.size_bytes, 'the source has the size'
            if there is None:
                there = self._made_of(request.id, request.source)
            elif there.made_of != request.source:
                raise Refusal('VOLUME_EXISTS', 'ALREADY_EXISTS', field='source')
            elif there.passing:
                raise Refusal('VOLUME_EXISTS', 'ALREADY_EXISTS', field='state')
        elif there is None:
            self._need(request.size_bytes)
            file = self.fleet.disks.blank(request.size_bytes)
            there = Vol(request.id, request.size_bytes, file=file)
        elif there.made_of is not None:
            raise Refusal('VOLUME_EXISTS', 'ALREADY_EXISTS', field='source')
        elif there.size != request.size_bytes:
            raise Refusal('VOLUME_EXISTS', 'ALREADY_EXISTS', field='size_bytes')
        self.volumes[request.id] = there
        return self.show(there)

    def _made_of(self, volume_id: str, origin: Any) -> Vol:
        content = self._content(origin)
        self._need(content.size)
        file = self.fleet.disks.copy(content.file)
        made_of = {'data': list(content.data), 'file': file, 'made_of': origin}
        return Vol(volume_id, content.size, **made_of)

    def _content(self, origin: Any) -> Snap | Vol:
        if origin.snapshot_id:
            snap = self.snapshots.get(origin.snapshot_id)
            if snap is None:
                raise Refusal('SNAPSHOT_NOT_FOUND', 'NOT_FOUND')
            return snap
        vol = self.volumes.get(origin.volume_id)
        if vol is None:
            raise Refusal('VOLUME_NOT_FOUND', 'NOT_FOUND')
        if vol.state not in ('LOCAL', 'PUBLISHED'):
            raise Refusal('VOLUME_MOVING')
        return vol

    def volumes_delete(self, request: Any) -> Any:
        try:
            vol = self._vol(request)
        except Refusal as refusal:
            if refusal.reason == 'VOLUME_NOT_FOUND':
                return pb.DeleteVolumeResponse()
            raise
        if vol.is_remote:
            raise Refusal('VOLUME_REMOTE', node=vol.source)
        if vol.attached or vol.opened:
            raise Refusal('VOLUME_ATTACHED')
        if vol.state not in ('LOCAL', 'HYDRATING', 'STALLED'):
            reasons = {'PUBLISHED': 'VOLUME_PUBLISHED', 'FENCED': 'VOLUME_FENCED'}
            raise Refusal(reasons.get(vol.state, 'VOLUME_MOVING'))
        self.drop(vol.id)
        if vol.source:
            self.fleet.agents[vol.source].drop(vol.id)
        return pb.DeleteVolumeResponse()

    def drop(self, volume_id: str) -> None:
        """Forgets a copy; with it goes its file, but not one that is its source's."""
        vol = self.volumes.pop(volume_id, None)
        self.fleet.disks.no_device(self.name, volume_id)
        if vol is not None and vol.state not in ('HELD', 'REMOTE'):
            self.fleet.disks.remove(vol.file)

    def volumes_get(self, request: Any) -> Any:
        return self.show(self._vol(request))

    def volumes_list(self, request: Any) -> Any:
        return pb.ListVolumesResponse(volumes=[self.show(v) for v in self.volumes.values()])

    def volumes_extend(self, request: Any) -> Any:
        vol = self._vol(request)
        if vol.is_remote:
            raise Refusal('VOLUME_REMOTE', node=vol.source)
        if vol.state not in ('LOCAL', 'HYDRATING', 'PUBLISHED'):
            raise Refusal('VOLUME_FENCED' if vol.state == 'FENCED' else 'VOLUME_MOVING')
        if request.size_bytes < vol.size:
            raise Refusal('SIZE_SMALLER', 'INVALID_ARGUMENT')
        self._need(request.size_bytes - vol.size)
        vol.size = request.size_bytes
        self.fleet.disks.resize(vol.file, vol.size)
        return self.show(vol)

    def volumes_attach(self, request: Any) -> Any:
        vol = self._vol(request)
        if vol.state == 'FENCED':
            raise Refusal('VOLUME_FENCED', node=vol.peer)
        if vol.state == 'PUBLISHED' and not vol.hold:
            raise Refusal('VOLUME_PUBLISHED', node=vol.peer)
        if vol.must_confirm and vol.state != 'HELD':
            if not request.HasField('generation'):
                raise Refusal('CONFIRMATION_REQUIRED', node=vol.lent_to)
            vol.must_confirm = False
        vol.attached = True
        return self.show(vol)

    def volumes_detach(self, request: Any) -> Any:
        vol = self._vol(request)
        if vol.opened:
            raise Refusal('HANDLE_IN_USE', path=f'/dev/mapper/dmlocal-{vol.id}')
        vol.attached = False
        self.fleet.disks.resize(vol.file, vol.size)
        self.fleet.disks.no_device(self.name, vol.id)
        if vol.state == 'REMOTE':
            self.fleet.agents[vol.source].come_home(vol.id)
            self.drop(vol.id)
        return self.show(vol)

    def come_home(self, volume_id: str) -> None:
        """What was used elsewhere and is all here is the volume again."""
        vol = self.volumes[volume_id]
        vol.state, vol.grant_id, vol.peer = 'LOCAL', '', ''
        vol.generation += 2

    def volumes_revert(self, request: Any) -> Any:
        vol = self._vol(request)
        if vol.attached:
            raise Refusal('VOLUME_ATTACHED')
        snap = self.snapshots.get(request.snapshot_id)
        if snap is None:
            raise Refusal('SNAPSHOT_NOT_FOUND', 'NOT_FOUND')
        vol.data = list(snap.data)
        self.fleet.disks.remove(vol.file)
        vol.file = self.fleet.disks.copy(snap.file)
        self.fleet.disks.resize(vol.file, vol.size)
        return self.show(vol)

    # Snapshots

    def _show_snapshot(self, snap: Snap) -> Any:
        return pb.Snapshot(
            id=snap.id,
            volume_id=snap.volume,
            size_bytes=snap.size,
            incarnation=snap.incarnation,
            pool=snap.pool,
            state=pb.SnapshotState.Value(f'SNAPSHOT_STATE_{snap.state}'),
        )

    def snapshots_create(self, request: Any) -> Any:
        if request.id not in self.snapshots:
            vol = self.volumes.get(request.volume_id)
            if vol is None:
                raise Refusal('VOLUME_NOT_FOUND', 'NOT_FOUND')
            if vol.state not in ('LOCAL', 'PUBLISHED', 'HYDRATING'):
                raise Refusal('VOLUME_FENCED' if vol.state == 'FENCED' else 'VOLUME_MOVING')
            file = self.fleet.disks.copy(vol.file)
            snap = Snap(request.id, vol.id, vol.size, list(vol.data), file)
            self.fleet.disks.resize(file, vol.size)
            self.snapshots[request.id] = snap
        return self._show_snapshot(self.snapshots[request.id])

    def snapshots_delete(self, request: Any) -> Any:
        snap = self.snapshots.pop(request.id, None)
        if snap is not None:
            self.fleet.disks.remove(snap.file)
        return pb.DeleteSnapshotResponse()

    def snapshots_get(self, request: Any) -> Any:
        if request.id not in self.snapshots:
            raise Refusal('SNAPSHOT_NOT_FOUND', 'NOT_FOUND')
        return self._show_snapshot(self.snapshots[request.id])

    def snapshots_list(self, request: Any) -> Any:
        shown = [self._show_snapshot(snap) for snap in self.snapshots.values()]
        return pb.ListSnapshotsResponse(snapshots=shown)

    # Moves

    def moves_grant(self, request: Any) -> Any:
        assert request.host_nqn and request.endpoint
        if request.node == self.name:
            raise Refusal('MOVE_TO_SELF', 'INVALID_ARGUMENT')
        if request.grant_id in self.fleet.grants:
            raise Refusal('GRANT_EXISTS', 'ALREADY_EXISTS')
        if request.HasField('source'):
            if request.id in self.volumes:
                raise Refusal('VOLUME_EXISTS', 'ALREADY_EXISTS', field='state')
            vol = self._made_of(request.id, request.source)
            vol.passing = True
            self.volumes[request.id] = vol
        else:
            vol = self._vol(request)
            if vol.state == 'PUBLISHED':
                raise Refusal('VOLUME_MOVING')
            if vol.is_remote:
                raise Refusal('VOLUME_REMOTE', node=vol.source)
            if vol.state not in ('LOCAL', 'HYDRATING'):
                raise Refusal('VOLUME_FENCED' if vol.state == 'FENCED' else 'VOLUME_MOVING')
            if vol.must_confirm:
                raise Refusal('CONFIRMATION_REQUIRED', node=vol.lent_to)
            if vol.attached and not request.hold:
                raise Refusal('VOLUME_ATTACHED')
        self.fleet.grants.add(request.grant_id)
        vol.state, vol.peer, vol.hold = 'PUBLISHED', request.node, request.hold
        vol.grant_id, vol.lent_to = request.grant_id, request.node
        return pb.Grant(
            id=request.grant_id,
            volume_id=vol.id,
            incarnation=vol.incarnation,
            generation=vol.generation,
            size_bytes=vol.size,
            source_node=self.name,
            node=request.node,
            hold=request.hold,
            begins=vol.passing,
        )

    def moves_receive(self, request: Any) -> Any:
        grant = request.grant
        assert grant.node == self.name
        there = self.volumes.get(grant.volume_id)
        if there is not None and there.grant_id == grant.id:
            return self.show(there)
        if there is not None and there.state != 'FENCED':
            raise Refusal('VOLUME_EXISTS', 'ALREADY_EXISTS', field='grant')
        if there is not None and there.attached:
            raise Refusal('HANDLE_IN_USE')
        stays = request.mode == pb.RECEIVE_MODE_REMOTE
        is_full = not self.has_pool or (self.takes_remote and grant.size_bytes > self._free())
        is_remote = stays or (is_full and request.mode == 0 and not request.pool)
        source = self.fleet.agents[grant.source_node].volumes[grant.volume_id]
        if not is_remote:
            self._need(grant.size_bytes)
        elif source.source:
            raise Refusal('CHAIN_TOO_DEEP')
        vol = Vol(
            grant.volume_id,
            grant.size_bytes,
            state='HELD',
            generation=grant.generation + 1,
            incarnation=grant.incarnation,
            attached=not grant.begins,
            grant_id=grant.id,
            source=grant.source_node,
            is_remote=is_remote,
            made_of=source.made_of,
            file=source.file,
        )
        self.drop(vol.id)
        self.volumes[vol.id] = vol
        if not grant.hold:
            self.ask_for_fence(vol)
        return self.show(vol)

    def moves_switch(self, request: Any) -> Any:
        vol = self._vol(request)
        if vol.state != 'HELD':
            raise Refusal('VOLUME_NOT_HELD')
        if self.fleet.agents[vol.source].is_down:
            raise Refusal('SOURCE_UNREACHABLE', 'UNAVAILABLE', node=vol.source)
        if not self.ask_for_fence(vol):
            raise Refusal('SOURCE_ACTIVE')
        return self.show(vol)

    def moves_abort(self, request: Any) -> Any:
        vol = self._vol(request)
        if vol.state == 'PUBLISHED':
            return self._take_back(vol)
        if vol.state != 'HELD':
            raise Refusal('GRANT_FENCED')
        source = self.fleet.agents[vol.source]
        at_source = source.volumes.get(vol.id)
        is_open = at_source is not None and at_source.grant_id == vol.grant_id
        if vol.held_writes and is_open:
            raise Refusal('WRITTEN_AT_DESTINATION')
        assert not vol.opened, f'a guest on {self.name} is cut off'
        self.drop(vol.id)
        if is_open and not source.is_down:
            source._take_back(at_source)
        return pb.AbortResponse()

    def moves_revoke(self, request: Any) -> Any:
        vol = self.volumes.get(request.volume_id)
        if vol is None or vol.grant_id != request.grant_id:
            raise Refusal('GRANT_UNKNOWN', 'PERMISSION_DENIED')
        if vol.state != 'PUBLISHED':
            raise Refusal('GRANT_FENCED')
        self._take_back(vol)
        return pb.RevokeResponse()

    def moves_reclaim(self, request: Any) -> Any:
        vol = self.volumes.get(request.volume_id)
        if vol is None or vol.grant_id != request.grant_id:
            raise Refusal('GRANT_UNKNOWN', 'PERMISSION_DENIED')
        if request.generation != vol.generation:
            raise Refusal('GENERATION_STALE')
        there = self.fleet.agents[vol.peer].volumes.get(vol.id)
        if there is None or there.state != 'REMOTE':
            raise Refusal('GRANT_FENCED')
        self.come_home(vol.id)
        return pb.ReclaimResponse()

    def _take_back(self, vol: Vol) -> Any:
        if vol.passing:
            self.drop(vol.id)
        vol.state = 'HYDRATING' if vol.source else 'LOCAL'
        vol.peer, vol.grant_id = '', ''
        return pb.AbortResponse()

    def own(self, vol: Vol) -> None:
        """From now on a copy is not shown its source's content but its own."""
        vol.file = self.fleet.disks.copy(vol.file)
        self.fleet.disks.resize(vol.file, vol.size)
        self.fleet.disks.device(self.name, vol.id, vol.file)

    def moves_localize(self, request: Any) -> Any:
        vol = self._vol(request)
        if vol.is_remote:
            self._need(vol.size)
            vol.is_remote, vol.state = False, 'HYDRATING'
            self.own(vol)
        return self.show(vol)
