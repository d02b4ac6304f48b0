"""Where a volume is: the copies that nodes have of it, and which of them is the volume.

Nothing here is remembered. Cinder's record of a volume says where to look first; what
the agents answer is the truth. A volume that moved when nobody was listening, because
the guest's first write at its new node switched it over, is found all the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from oslo_log import log as logging

from cinder_dmlocal import errors
from cinder_dmlocal.fleet import Fleet, Node
from cinder_dmlocal.wire import dmlocal_pb2 as pb

LOG = logging.getLogger(__name__)

T = TypeVar('T')

# States in which a copy is the volume: nobody else has the right to write.
_OWNERS = frozenset(
    {
        pb.VOLUME_STATE_LOCAL,
        pb.VOLUME_STATE_HYDRATING,
        pb.VOLUME_STATE_COLLAPSING,
        pb.VOLUME_STATE_PUBLISHED,
        pb.VOLUME_STATE_REMOTE,
        pb.VOLUME_STATE_STALLED,
        pb.VOLUME_STATE_FAILED,
        pb.VOLUME_STATE_DAMAGED,
    }
)


@dataclasses.dataclass(frozen=True)
class Known:
    """What Cinder knows of a volume.

    `hosts` has the host of each attachment that has one, so a host may be there twice.
    Unless it `was_made` its creation has failed, or has not ended yet. While Cinder makes
    an image of it, it `is_uploaded`, whether or not an instance uses it as well.
    """

    id: str
    home: str
    hosts: tuple[str, ...] = ()
    was_made: bool = False
    is_uploaded: bool = False


@dataclasses.dataclass(frozen=True)
class Copy:
    """A volume as one node has it."""

    node: Node
    volume: Any

    @property
    def is_held(self) -> bool:
        """Whether it is received, and waits for the fence of its source; or did, and failed."""
        has_failed = self.volume.state == pb.VOLUME_STATE_FAILED
        is_waiting = has_failed and self.volume.HasField('held_writes')
        return bool(is_waiting or self.volume.state == pb.VOLUME_STATE_HELD)

    @property
    def is_offered(self) -> bool:
        """Whether it is offered to another node, and not fenced yet."""
        # One that is still received itself shows what it lacks instead of PUBLISHED.
        return self.is_owner and bool(self.volume.peer_node)

    @property
    def is_remote(self) -> bool:
        """Whether it is used here while its data is at its source."""
        return bool(self.volume.state == pb.VOLUME_STATE_REMOTE)

    @property
    def is_fenced(self) -> bool:
        """Whether the right to write has gone to another node."""
        return bool(self.volume.state == pb.VOLUME_STATE_FENCED)

    @property
    def is_owner(self) -> bool:
        """Whether it is the volume."""
        return self.volume.state in _OWNERS and not self.is_held

    @property
    def home(self) -> str:
        """The node that the volume belongs to: what is only held may yet be given up."""
        is_elsewhere = self.is_remote or self.is_held
        return str(self.volume.source_node) if is_elsewhere else self.node.name

    def is_promised(self, other: Copy | None) -> bool:
        """Whether it is offered under the grant by which the other is held."""
        return (
            other is not None
            and self.is_offered
            and other.is_held
            and self.volume.grant_id == other.volume.grant_id
        )

    def which(self) -> dict[str, Any]:
        """What names this copy in a request, so that a late one hits nothing else."""
        return {
            'id': self.volume.id,
            'generation': self.volume.generation,
            'incarnation': self.volume.incarnation,
        }


@dataclasses.dataclass(frozen=True)
class Found:
    """What was found of a volume."""

    fleet: Fleet
    known: Known
    copies: dict[str, Copy] = dataclasses.field(default_factory=dict)
    failed: dict[str, errors.AgentError] = dataclasses.field(default_factory=dict)

    @property
    def owner(self) -> Copy | None:
        """The copy that is the volume.

        While a switch is under way that is the destination's: its source is fenced,
        and it goes on by itself.

        A copy that has never been handed over can only be where it was created. One that
        is elsewhere is what a creation left whose answer was lost, and holds nothing.
        """
        owners = [copy for copy in self.copies.values() if copy.is_owner]
        owners = [copy for copy in owners if not self._is_left_over(copy)]
        if owners:
            return max(owners, key=lambda copy: copy.volume.generation)
        for copy in self.copies.values():
            if copy.is_fenced:
                heir = self.copies.get(copy.volume.peer_node)
                if heir is not None and heir.volume.grant_id == copy.volume.grant_id:
                    return heir
        return None

    def _is_left_over(self, copy: Copy) -> bool:
        if copy.volume.generation > 1 or copy.node.name == self.known.home:
            return False
        if copy.volume.attached or copy.volume.allocated_bytes:
            # Cinder writes hosts by itself, too.
            return False
        return not copy.is_promised(self.copies.get(copy.volume.peer_node))

    def must_have_owner(self) -> Copy:
        """The same.

        Raises errors.Lost, errors.NotFound, or what the node that should have it has
        answered, if there is none; errors.Unreachable if it may be on a silent node.
        """
        owner = self.owner
        if owner is not None:
            self._must_be_the_last(owner)
            return owner
        for name in self._likely():
            if name and name not in self.fleet:
                raise errors.Unreachable(name, errors.STRANGER)
            error = self.failed.get(name)
            if error is None or _is_absent(error):
                continue
            if self.fleet[name].is_dead:
                self.fleet.must_have_answered(f'volume {self.known.id}', self.failed)
                raise errors.Lost(what=f'Volume {self.known.id}', node=name)
            raise error
        for copy in self.copies.values():
            if copy.is_fenced:
                raise errors.Forgotten(copy.volume.peer_node, self.known.id, copy.node.name)
        raise errors.NotFound(f'volume {self.known.id}', self.failed)

    def _must_be_the_last(self, owner: Copy) -> None:
        """Raises errors.Unreachable if the volume's home is silent and may have a later copy.

        A copy that has never been handed over is elsewhere only if the volume has left it,
        or somebody has brought it back.
        """
        home = self.known.home
        error = self.failed.get(home)
        if owner.volume.generation > 1 or not isinstance(error, errors.Unreachable):
            return
        if not self.fleet[home].is_dead:
            raise error

    def _likely(self) -> list[str]:
        """Nodes that should have the volume, the likeliest first."""
        heirs = [copy.volume.peer_node for copy in self.copies.values() if copy.is_fenced]
        sources = [copy.volume.source_node for copy in self.copies.values() if copy.is_held]
        return [*heirs, *sources, self.known.home]


def find(fleet: Fleet, known: Known, first: str | None = None) -> Found:
    """Looks for a volume's copies: on the node `first`, then where Cinder believes it.

    What a copy says of other nodes is followed. Only where none of these has the volume,
    and the node that should have it has answered or is declared dead, is everybody asked.
    Nodes that do not answer are noted, not raised. What a dead node used over the network
    is taken back from it.
    """
    found = _look(fleet, known, first)
    used_afar = _used_by_the_dead(found) if found.owner is None else None
    if used_afar is None or _has_gone(used_afar):
        return found
    return _look(fleet, known, first)


def _look(fleet: Fleet, known: Known, first: str | None) -> Found:
    found = Found(fleet, known)
    _follow(found, [known.home] if first is None else [first, known.home])
    if found.owner is None:
        _follow(found, known.hosts)
    if found.owner is None and _says_nothing_of_others(found, known.home):
        _ask_the_rest(found)
    return found


def _says_nothing_of_others(found: Found, name: str) -> bool:
    """Whether a node will never have the volume again, and does not tell who has."""
    copy = found.copies.get(name)
    if copy is not None:
        return not (copy.is_fenced or copy.is_held)
    is_dead = name in found.fleet and found.fleet[name].is_dead
    return is_dead or _is_absent(found.failed.get(name))


def _used_by_the_dead(found: Found) -> Copy | None:
    """A copy whose right to write a dead node has, with a copy of its own or without."""
    for copy in found.copies.values():
        peer = copy.volume.peer_node
        if copy.is_fenced and peer in found.fleet and found.fleet[peer].is_dead:
            return copy
    return None


def _has_gone(copy: Copy) -> bool:
    """Takes a volume back that was used over the network; whether it is gone instead.

    Raises errors.AgentError if nobody says that it is: then it may be here.
    """
    request = pb.ReclaimRequest(
        volume_id=copy.volume.id,
        grant_id=copy.volume.grant_id,
        incarnation=copy.volume.incarnation,
        generation=copy.volume.generation,
    )
    try:
        copy.node.call(copy.node.moves.Reclaim, request)
    except errors.Refused as refusal:
        if refusal.reason != 'GRANT_FENCED':
            raise
        # The dead node had a copy, which was the later one.
        return True
    LOG.warning(
        'Volume %s is taken back on %s from %s, which is declared dead.',
        copy.volume.id,
        copy.node.name,
        copy.volume.peer_node,
    )
    return False


def where_written(fleet: Fleet, known: Known, act: Callable[[Copy], T]) -> tuple[Copy, T]:
    """Does something to a volume where it is written, and tells which copy that was.

    A switch may come between the look and the act: what is refused then is done where
    the volume has gone.
    """
    owner = find(fleet, known).must_have_owner()
    try:
        return owner, act(owner)
    except errors.Refused:
        later = find(fleet, known).must_have_owner()
        if later.node is owner.node and later.volume.generation == owner.volume.generation:
            raise
    return later, act(later)


def _follow(found: Found, names: Iterable[str]) -> None:
    request = pb.GetVolumeRequest(id=found.known.id)
    waiting = list(names)
    while waiting:
        name = waiting.pop(0)
        if name in found.copies or name in found.failed or name not in found.fleet:
            continue
        node = found.fleet[name]
        try:
            copy = Copy(node, node.look(node.volumes.Get, request))
        except errors.AgentError as error:
            found.failed[name] = error
            continue
        found.copies[name] = copy
        if copy.is_offered or copy.is_fenced:
            waiting.insert(0, copy.volume.peer_node)
        elif copy.is_held:
            waiting.insert(0, copy.volume.source_node)


def _is_absent(error: errors.AgentError | None) -> bool:
    return isinstance(error, errors.Refused) and error.reason == 'VOLUME_NOT_FOUND'


def _ask_the_rest(found: Found) -> None:
    fleet = found.fleet
    rest = [n for n in fleet.names if n not in found.copies and n not in found.failed]
    request = pb.GetVolumeRequest(id=found.known.id)
    answers = fleet.ask(lambda node: node.volumes.Get, request, rest)
    for name, volume in answers.given.items():
        found.copies[name] = Copy(fleet[name], volume)
    found.failed.update(answers.failed)
