"""What the driver has the agents do with volumes.

Every function begins by finding the volume (`copies`), so that repeating one goes on
from wherever the last one was interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from oslo_log import log as logging
from oslo_utils import units

from cinder_dmlocal import errors, handover
from cinder_dmlocal.copies import Copy, Found, Known, find, where_written
from cinder_dmlocal.fleet import Fleet, Node
from cinder_dmlocal.options import Settings
from cinder_dmlocal.wire import dmlocal_pb2 as pb

LOG = logging.getLogger(__name__)

# How often it is seen whether a device is closed by now, in seconds.
_AGAIN = 0.25

# Refusals that say that what a look has shown is not there any more.
_GONE = ('VOLUME_NOT_FOUND', 'GENERATION_STALE')


@dataclasses.dataclass(frozen=True)
class Placed:
    """Where a volume is after something was done with it."""

    home: str
    device_path: str = ''


@contextlib.contextmanager
def _undecided() -> Iterator[None]:
    """What is inside makes a volume: if no answer comes, it may be there."""
    try:
        yield
    except errors.Unasked:
        raise
    except errors.Unreachable as error:
        raise errors.Undecided(why=error.msg) from error


class Volumes:
    """The volumes of the fleet.

    Methods raise errors.AgentError where an agent refuses or does not answer, and the
    other exceptions of `errors` as they say.
    """

    def __init__(self, fleet: Fleet, settings: Settings) -> None:
        self._fleet = fleet
        self._settings = settings

    # Beginning and end

    def create(self, volume_id: str, size_gib: int, node: Node) -> None:
        """Creates a blank volume on a node.

        Raises errors.Undecided if that may have been done although nobody has said so.
        """
        # A node that does not answer this has not been asked for anything.
        there = self._look(node, volume_id)
        if there is not None and there.HasField('source'):
            # Cinder downloads an image instead where a copy of a cached one is in doubt.
            left = pb.DeleteVolumeRequest(**Copy(node, there).which())
            node.call(node.volumes.Delete, left)
        request = pb.CreateVolumeRequest(
            id=volume_id, size_bytes=size_gib * units.Gi, pool=self._settings.pool
        )
        with _undecided():
            node.call(node.volumes.Create, request)

    def create_of(self, volume_id: str, size_gib: int, origin: pb.Origin, at: Node) -> None:
        """Makes a volume of a snapshot or volume on the node that has that.

        Nothing is copied. If the node refuses, nothing is left there. Raises
        errors.Undecided if it may have been made although nobody has said so.
        """
        request = pb.CreateVolumeRequest(id=volume_id, source=origin)
        with _undecided():
            volume = at.call(at.volumes.Create, request)
            self._grow_new(Copy(at, volume), size_gib)

    def receive_of(
        self, volume_id: str, size_gib: int, origin: pb.Origin, at: Node, node: Node
    ) -> None:
        """Makes a volume on `node` of a snapshot or volume that is on the node `at`.

        It is usable at once, and copied in the background. Raises errors.Undecided if it
        may have been made although nobody has said so.
        """
        there = self._look(node, volume_id)
        with _undecided():
            if there is None or there.source != origin:
                there = self._receive_new(volume_id, origin, at, node)
            self._grow_new(Copy(node, there), size_gib)

    def _receive_new(
        self, volume_id: str, origin: pb.Origin, at: Node, node: Node
    ) -> pb.Volume:
        begun = self._look(at, volume_id)
        if begun is not None and Copy(at, begun).is_offered:
            # For a receive that never came.
            handover.revoke(at, volume_id, begun.grant_id)
        pool = self._settings.pool
        return handover.move(volume_id, at, node, pool, hold=False, origin=origin).volume

    @staticmethod
    def _grow_new(copy: Copy, size_gib: int) -> None:
        """Grows a volume that was made of a smaller one, or takes it away again."""
        size = size_gib * units.Gi
        if copy.volume.size_bytes >= size:
            return
        node, which = copy.node, copy.which()
        try:
            node.call(node.volumes.Extend, pb.ExtendVolumeRequest(size_bytes=size, **which))
        except errors.Refused:
            node.call(node.volumes.Delete, pb.DeleteVolumeRequest(**which))
            raise

    @staticmethod
    def _look(node: Node, volume_id: str) -> pb.Volume | None:
        try:
            return node.look(node.volumes.Get, pb.GetVolumeRequest(id=volume_id))
        except errors.Refused as refusal:
            if refusal.reason != 'VOLUME_NOT_FOUND':
                raise
            return None

    def delete(self, known: Known) -> None:
        """Deletes a volume, wherever it is; one that is nowhere is deleted already.

        Raises errors.InUse if somebody has its device open, and errors.Unreachable if it
        was made, is not found, and may be on a node that says nothing.
        """
        found = find(self._fleet, known)
        try:
            owner = found.must_have_owner()
        except errors.NotFound as missing:
            if known.was_made:
                self._fleet.must_have_answered(missing.what, missing.failed)
            LOG.warning('Volume %s is deleted from Cinder only: %s', known.id, missing)
            for copy in found.copies.values():
                if copy.is_offered:
                    # A copy that was made for a receive that never came.
                    handover.revoke(copy.node, known.id, copy.volume.grant_id)
            return
        except errors.Lost as lost:
            LOG.warning('%s It is deleted from Cinder only.', lost)
            return
        try:
            owner = self._rest(found, owner)
        except errors.NotFound:
            # It was to begin with a receive, which is given up.
            return
        owner.node.call(owner.node.volumes.Delete, pb.DeleteVolumeRequest(**owner.which()))

    def _rest(self, found: Found, owner: Copy) -> Copy:
        """The volume once it is offered to nobody and has no device.

        Raises errors.InUse if somebody has its device open, errors.NotFound if it was
        only being made, and what `_settle` raises.
        """
        owner = self._settle(found, owner)
        was_remote = owner.is_remote
        if owner.volume.attached:
            owner = self._close(owner)
        # A remote one has gone home by being closed.
        return self.find(found.known) if was_remote else owner

    def revert(self, known: Known, snapshot_id: str, at: Node) -> bool:
        """Takes a volume back to a snapshot of it that is on the node `at`.

        False, and nothing is done, if the volume is not on that node any more.
        """
        found = find(self._fleet, known)
        owner = found.must_have_owner()
        if owner.node is not at:
            return False
        owner = self._rest(found, owner)
        request = pb.RevertVolumeRequest(snapshot_id=snapshot_id, **owner.which())
        at.call(at.volumes.Revert, request)
        return True

    def find(self, known: Known) -> Copy:
        """The copy that is the volume."""
        return find(self._fleet, known).must_have_owner()

    def find_local(self, known: Known) -> Copy:
        """The same, once its data is, or is being copied to, where it is used.

        A volume that is used over the network can only be read and written there.
        """
        return self._localized(self.find(known))

    def where_written(self, known: Known, act: Callable[[Copy], None]) -> Copy:
        """Does something to a volume where it is written; that copy is the answer."""

        def locally(owner: Copy) -> Copy:
            copy = self._localized(owner)
            act(copy)
            return copy

        return where_written(self._fleet, known, locally)[1]

    def _localized(self, owner: Copy) -> Copy:
        if not owner.is_remote:
            return owner
        request = pb.LocalizeRequest(pool=self._settings.pool, **owner.which())
        return Copy(owner.node, owner.node.call(owner.node.moves.Localize, request))

    def extend(self, known: Known, size_gib: int) -> Placed:
        """Grows a volume where it is written."""
        size = size_gib * units.Gi

        def grow(owner: Copy) -> None:
            request = pb.ExtendVolumeRequest(size_bytes=size, **owner.which())
            owner.node.call(owner.node.volumes.Extend, request)

        return Placed(self.where_written(known, grow).home)

    # Attaching

    def attach(self, known: Known, node: Node, *, visits: bool = False) -> Placed:
        """Makes the device exist on a node, and tells its path.

        Where the volume is on another node, it is moved: with a hold while an attachment
        of Cinder's still uses it there, as in a live migration, or at once. If it only
        `visits`, its data stays where it is. Repeating this gives the same answer.

        Raises errors.InUse if it is open elsewhere although no attachment is there.
        """
        mode = pb.RECEIVE_MODE_REMOTE if visits else pb.RECEIVE_MODE_UNSPECIFIED
        return self._attach(known, node, mode)

    def _attach(self, known: Known, node: Node, mode: Any) -> Placed:
        found = find(self._fleet, known, node.name)
        owner = found.must_have_owner()
        here = found.copies.get(node.name)
        if owner.node is node and (owner.volume.attached or not owner.is_offered):
            # If it is offered, its guest is about to leave; until then it has it.
            return self._open(owner)
        if here is not None and owner.is_promised(here):
            return self._open(here)
        owner = self._settle(found, owner)
        if owner.node is node:
            return self._open(owner)
        is_used = owner.volume.attached and owner.node.name in known.hosts
        if owner.volume.attached and not is_used:
            # Whoever used it there is gone, but its agent was not there to hear it.
            was_remote = owner.is_remote
            owner = self._close(owner)
            if was_remote:
                # It has gone home by being closed.
                return self._attach(known, node, mode)
        owner = self._localized(owner)
        if here is not None and here.volume.attached and not here.is_held:
            # The device of an earlier stay, which leads nowhere any more.
            self._close(here)
        pool = self._settings.pool
        try:
            copy = handover.move(known.id, owner.node, node, pool, hold=is_used, mode=mode)
        except errors.Refused as refusal:
            self._must_be_for_the_dead(owner, refusal)
            self._open(owner)
            owner = owner if is_used else self._close(owner)
            copy = handover.move(known.id, owner.node, node, pool, hold=is_used, mode=mode)
        path = str(copy.volume.device_path)
        return Placed(copy.home, path) if path else self._open(copy)

    def _open(self, copy: Copy) -> Placed:
        request = pb.AttachVolumeRequest(id=copy.volume.id)
        try:
            volume = copy.node.call(copy.node.volumes.Attach, request)
        except errors.Refused as refusal:
            self._must_be_for_the_dead(copy, refusal)
            request.generation = copy.volume.generation
            volume = copy.node.call(copy.node.volumes.Attach, request)
        return Placed(copy.home, str(volume.device_path))

    def _must_be_for_the_dead(self, copy: Copy, refusal: errors.Refused) -> None:
        """Raises the refusal, unless it waits for a node that was declared dead."""
        borrower = refusal.metadata.get('node', '')
        is_dead = borrower in self._fleet and self._fleet[borrower].is_dead
        if refusal.reason != 'CONFIRMATION_REQUIRED' or not is_dead:
            raise refusal
        LOG.warning(
            'Volume %s is opened on %s without the word of %s, which is declared dead.',
            copy.volume.id,
            copy.node.name,
            borrower,
        )

    def detach(self, known: Known, host: str) -> Placed | None:
        """Ends what an attachment had on a host; None if nothing is known of the volume.

        Whoever has the device open there is never cut off, whatever Cinder says: the
        answer then is errors.InUse. A host that another attachment names as well keeps
        the device. An agent that does not answer is passed over: its node may be dead,
        and what it has is cleared away before the volume is used elsewhere. What ends
        between the look and the call, as a source that is let go, is looked for again.
        """
        others = list(known.hosts)
        if host in others:
            others.remove(host)
        if host in others:
            LOG.info('Volume %s stays on %s: another attachment is there.', known.id, host)
            owner = find(self._fleet, known, host).owner
            return Placed(owner.home) if owner else None
        try:
            return self._detach_again(known, host, others)
        except errors.Unreachable as error:
            LOG.warning('Volume %s is not detached on %s: %s', known.id, host, error.msg)
        except (errors.NotFound, errors.Lost) as missing:
            LOG.warning('%s Nothing is left to detach on %s.', missing, host)
        return None

    def _detach_again(self, known: Known, host: str, others: list[str]) -> Placed | None:
        try:
            return self._detach(known, host, others)
        except errors.Refused as refusal:
            if refusal.reason not in _GONE:
                raise
            LOG.info('Volume %s is looked for again: %s', known.id, refusal.msg)
        return self._detach(known, host, others)

    def _detach(self, known: Known, host: str, others: list[str]) -> Placed | None:
        found = find(self._fleet, known, host)
        here = found.copies.get(host)
        if here is None:
            error = found.failed.get(host)
            if isinstance(error, errors.Unreachable):
                LOG.warning('Volume %s is not detached on %s: %s', known.id, host, error.msg)
            owner = found.owner
            return Placed(owner.home) if owner else None
        if here is found.owner:
            return self._leave_owner(found, here, others)
        if here.is_held:
            return self._leave(found, here)
        if here.volume.attached:
            self._forget_handle(here)
        return Placed(found.owner.home) if found.owner else None

    def _leave(self, found: Found, here: Copy) -> Placed | None:
        """The destination of a held move is not wanted any more: a roll-back.

        That nobody has it open is what speaks for it; Cinder's word alone does not.
        """
        self._close(here)
        source = found.copies.get(here.volume.source_node)
        handover.give_up(here, source)
        owner = find(self._fleet, found.known, here.volume.source_node or None).owner
        return Placed(owner.home) if owner else None

    def _leave_owner(self, found: Found, here: Copy, others: Iterable[str]) -> Placed:
        """The node that has the volume does not use it any more.

        If another node holds it that Cinder has an attachment on, the guest has gone
        there: that its device is closed here is the proof. Where Cinder itself reads it
        for an image, that visit goes on, and gives the volume up when it ends.
        """
        home = here.home
        here = self._close(here)
        if not here.is_offered:
            return Placed(home)
        if here.volume.peer_node not in others:
            is_visited = found.known.is_uploaded
            return Placed(home if is_visited else self._settle(found, here).home)
        heir = found.copies.get(here.volume.peer_node)
        if heir is None:
            LOG.warning('Volume %s stays held: %s', here.volume.id, found.failed)
            return Placed(home)
        try:
            request = pb.SwitchRequest(**heir.which())
            heir = Copy(heir.node, heir.node.call(heir.node.moves.Switch, request))
        except errors.AgentError as error:
            # It is switched already, or its agent goes on asking by itself.
            LOG.warning('Volume %s: %s', here.volume.id, error.msg)
            owner = find(self._fleet, found.known, heir.node.name).owner
            return Placed(owner.home if owner else home)
        return Placed(heir.home)

    def _close(self, copy: Copy) -> Copy:
        """Removes the device on a node, once nobody has it open.

        Raises errors.InUse if somebody still has after the timeout for closing.
        """
        until = time.monotonic() + self._settings.close_timeout
        request = pb.DetachVolumeRequest(**copy.which())
        while True:
            try:
                return Copy(copy.node, copy.node.call(copy.node.volumes.Detach, request))
            except errors.Refused as refusal:
                if refusal.reason == 'VOLUME_FAILED' and copy.is_held:
                    # Nobody has it open, and it can only be given up.
                    return copy
                if refusal.reason != 'HANDLE_IN_USE':
                    raise
            if time.monotonic() >= until:
                raise errors.InUse(volume=copy.volume.id, node=copy.node.name)
            time.sleep(_AGAIN)

    def _forget_handle(self, copy: Copy) -> None:
        """Removes what is left of a device through which nothing can be written."""
        request = pb.DetachVolumeRequest(**copy.which())
        try:
            copy.node.call(copy.node.volumes.Detach, request)
        except errors.AgentError as error:
            LOG.info('Volume %s: %s', copy.volume.id, error.msg)

    # Moving

    def migrate(self, known: Known, node: Node) -> Placed:
        """Moves a volume that nobody uses; or makes the copy of one that is remote here.

        Raises errors.InUse if it is used: it moves with its guest.
        """
        found = find(self._fleet, known, node.name)
        owner = found.must_have_owner()
        if owner.node is node:
            if owner.is_remote:
                self._localized(owner)
            elif owner.volume.attached and not known.hosts:
                # What an earlier call that was interrupted has left.
                self._close(owner)
            return Placed(node.name)
        if owner.volume.attached:
            if owner.node.name in known.hosts:
                raise errors.InUse(volume=known.id, node=owner.node.name)
            self._close(owner)
        # Where there is no room it is refused: used remotely, it would not have moved.
        self._attach(known, node, pb.RECEIVE_MODE_LOCAL)
        copy = find(self._fleet, known, node.name).must_have_owner()
        self._close(copy)
        return Placed(node.name)

    def _settle(self, found: Found, owner: Copy) -> Copy:
        """Ends an offer that nobody makes use of, and gives the volume as it is then.

        Raises errors.InUse if the destination has it open, and errors.Unreachable if
        Cinder has an attachment on a destination that does not answer or is not known.
        """
        for copy in found.copies.values():
            is_stray = copy.is_held and copy is not owner and not owner.is_promised(copy)
            if is_stray:
                self._close(copy)
                handover.give_up(copy, None)
        if not owner.is_offered:
            return owner
        peer = owner.volume.peer_node
        held = found.copies.get(peer)
        if held is not None:
            self._close(held)
            handover.give_up(held, owner)
        else:
            self._must_have_answered(found, peer)
            handover.revoke(owner.node, owner.volume.id, owner.volume.grant_id)
        return find(self._fleet, found.known, owner.node.name).must_have_owner()

    def _must_have_answered(self, found: Found, peer: str) -> None:
        """Whom an attachment names, and nobody declares dead, may have a guest."""
        if peer not in found.known.hosts:
            return
        if peer not in self._fleet:
            raise errors.Unreachable(peer, 'it is no node of the fleet (dmlocal_nodes)')
        error = found.failed.get(peer)
        if isinstance(error, errors.Unreachable) and not self._fleet[peer].is_dead:
            raise error
