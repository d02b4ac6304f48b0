"""What agents answer when they do not do what they are asked for.

An agent's answer carries a stable reason (docs/cli.md). Whoever calls an agent gets
one of the exceptions here; what a user or operator of Cinder sees is decided once, in
`for_cinder`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from cinder import exception
from google.rpc import error_details_pb2, status_pb2

from cinder_dmlocal.native import grpc

DOMAIN = 'dmlocal'

# Why a node does not answer that this service has never asked.
STRANGER = 'it is no node of the fleet (dmlocal_nodes)'

_DETAILS = 'grpc-status-details-bin'

# Statuses that say that nobody has answered. What was asked for may have been done.
_SILENCE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class AgentError(exception.VolumeBackendAPIException):
    """An agent has not done what it was asked for."""

    message = '%(data)s'

    def __init__(self, node: str, text: str) -> None:
        super().__init__(data=text)
        self.node = node


class Unreachable(AgentError):
    """An agent does not answer. What it was asked for may have been done."""

    def __init__(self, node: str, why: str) -> None:
        super().__init__(node, f'node {node} does not answer: {why}')


class Refused(AgentError):
    """An agent has refused, and has changed nothing."""

    def __init__(self, node: str, reason: str, text: str, metadata: Mapping[str, str]) -> None:
        super().__init__(node, f'node {node}: {text} ({reason})')
        self.reason = reason
        self.metadata = dict(metadata)


class Unasked(Unreachable):
    """An agent that may answer others was not asked: too many calls wait for it."""


class Forgotten(AgentError):
    """A node that was handed a volume has nothing of it; whoever gave it has it fenced."""

    def __init__(self, node: str, volume_id: str, source: str) -> None:
        super().__init__(
            node,
            f'node {node}, to which {source} has handed volume {volume_id}, has nothing of it: '
            'declare it dead (dmlocal_dead_nodes) if it was made anew',
        )


class Undecided(exception.MetadataUpdateFailure):
    """A volume may have been made although its node has not said so.

    Cinder tries another node after most failures of a creation, and forgets the first.
    This is of a class of which it does not: the volume, made or not, is still where
    Cinder's record says, and is deleted there.
    """

    message = '%(why)s; the volume may have been made there all the same.'


class InUse(exception.VolumeBackendAPIException):
    """Somebody has the device open: whoever it is, is not cut off."""

    message = (
        'Volume %(volume)s is in use on %(node)s: somebody has its device open there, and '
        'is not cut off.'
    )


class NotFound(exception.VolumeBackendAPIException):
    """No node that answers has the volume or snapshot; `failed` says what they said."""

    message = 'No node has %(what)s. Nodes that do not answer: %(silent)s.'

    def __init__(self, what: str, failed: Mapping[str, AgentError]) -> None:
        super().__init__(what=what, silent=', '.join(silent(failed)) or 'none')
        self.what = what
        self.failed = failed


class Lost(exception.VolumeBackendAPIException):
    """What is asked for was on a node that an operator has declared dead."""

    message = '%(what)s was on node %(node)s, which was declared dead: its data is lost.'


def silent(failed: Mapping[str, AgentError]) -> list[str]:
    """Names of the nodes that have not answered at all."""
    return sorted(name for name, e in failed.items() if isinstance(e, Unreachable))


def of_call(node: str, error: grpc.RpcError) -> AgentError:
    """What a failed call to an agent means."""
    code, text = error.code(), error.details() or ''
    for key, value in error.trailing_metadata() or ():
        if key != _DETAILS:
            continue
        for detail in status_pb2.Status.FromString(value).details:
            info = error_details_pb2.ErrorInfo()
            if detail.Unpack(info) and info.domain == DOMAIN:
                return Refused(node, info.reason, text, info.metadata)
    if code in _SILENCE:
        return Unreachable(node, text or code.name)
    return Refused(node, 'ANSWER_WITHOUT_REASON', f'{code.name}: {text}', {})


# What a caller of Cinder can do something about, beyond an operator's reading of logs.
_ADVICE: Mapping[str, str] = {
    'NO_ROOM': 'choose another node, or make room there',
    'ALWAYS_REMOTE': "volumes of that size are only used remotely there, by the node's rule",
    'POOL_MISSING': "the node's pool must be brought back",
    'VOLUME_MOVING': 'wait until the volume has arrived, then repeat',
    'CHAIN_TOO_DEEP': 'wait until the volume has arrived, then repeat',
    'SOURCE_AWAY': 'wait until the node that still holds data of it is back',
    'SOURCE_UNREACHABLE': 'the network between the two nodes is broken',
    'VOLUME_BUSY': 'repeat',
    'COPIES_EXHAUSTED': 'wait until earlier snapshots are whole, then repeat',
    'PORTS_EXHAUSTED': 'wait until other volumes have arrived, then repeat',
    'REGIONS_LOST': 'a part of it was lost with its node and must be rewritten first',
    'CONFIRMATION_REQUIRED': (
        'the node has booted, and the node that it was offered to does not answer; it '
        'opens when that node is back or is declared dead (dmlocal_dead_nodes)'
    ),
    'VOLUME_REMOTE': 'it is used over the network: localize or detach it first',
    'TARGET_MISSING': "the node's kernel lacks what a move needs",
    'ROLE_FORBIDDEN': 'the certificate of this service is not of the role driver',
}


# Refusals that end by themselves: what was to be deleted stays as it is until then.
_PASSING = frozenset(
    {
        'SNAPSHOT_IN_USE',
        'VOLUME_BUSY',
        'VOLUME_FENCED',
        'VOLUME_MOVING',
        'VOLUME_PUBLISHED',
        'VOLUME_REMOTE',
        'VOLUME_REVERTING',
    }
)


@contextlib.contextmanager
def busy(cls: type[exception.CinderException]) -> Iterator[None]:
    """Has Cinder leave what cannot be deleted yet as it was, instead of in an error."""
    try:
        yield
    except InUse as error:
        raise cls(str(error)) from error
    except Refused as refusal:
        if refusal.reason not in _PASSING:
            raise
        raise cls(for_cinder(refusal)) from refusal


def for_cinder(error: AgentError) -> str:
    """The text that whoever asked Cinder can act on."""
    advice = _ADVICE.get(error.reason) if isinstance(error, Refused) else None
    return f'{error.msg}; {advice}.' if advice else f'{error.msg}.'
