"""The configuration options of a backend, and what they mean together."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

from cinder.volume import configuration as volume_configuration
from oslo_config import cfg

OPTIONS: list[cfg.Opt] = [
    cfg.ListOpt(
        'dmlocal_nodes',
        default=[],
        help=(
            'Names of the nodes of the fleet, as Nova reports its hosts. Each node is a '
            'pool of this backend. [001-500] in a name stands for a range of numbers of '
            'that width: node-[001-500]. A name has one range at most.'
        ),
    ),
    cfg.StrOpt(
        'dmlocal_endpoint',
        default='{node}:7450',
        help=(
            "Where a node's agent listens, as HOST:PORT; {node} stands for the node's "
            'name. Whatever the host is called here, its certificate must name the node.'
        ),
    ),
    cfg.DictOpt(
        'dmlocal_endpoints',
        default={},
        help='Agents that listen elsewhere than dmlocal_endpoint says: NODE:HOST:PORT, …',
    ),
    cfg.StrOpt(
        'dmlocal_ca',
        default='/etc/dmlocal/pki/ca.pem',
        help="File with the certificate of the authority that issued the agents' "
        'certificates (PEM).',
    ),
    cfg.StrOpt(
        'dmlocal_cert',
        default='/etc/dmlocal/pki/driver.pem',
        help='File with the certificate of this service, of the role driver (PEM).',
    ),
    cfg.StrOpt(
        'dmlocal_key',
        default='/etc/dmlocal/pki/driver.key',
        help='File with the private key of dmlocal_cert (PEM).',
    ),
    cfg.StrOpt(
        'dmlocal_pool',
        default='',
        help="Name of the agents' pool that volumes are placed in; empty stands for "
        "each agent's first.",
    ),
    cfg.FloatOpt(
        'dmlocal_look_timeout',
        default=5.0,
        min=0.1,
        help='Seconds in which an agent must answer what it knows at once; later it '
        'counts as unreachable.',
    ),
    cfg.FloatOpt(
        'dmlocal_call_timeout',
        default=50.0,
        min=1.0,
        help='Seconds in which an agent must have done something. Keep it below '
        'rpc_response_timeout, so that whoever asked Cinder hears why it failed.',
    ),
    cfg.FloatOpt(
        'dmlocal_close_timeout',
        default=10.0,
        min=0.0,
        help='Seconds that a detach waits for whoever still has the device open, as a '
        'hypervisor that is just ending, before it is refused.',
    ),
    cfg.IntOpt(
        'dmlocal_at_once',
        default=64,
        min=1,
        help='Agents that are asked at the same time when the whole fleet is asked.',
    ),
    cfg.ListOpt(
        'dmlocal_dead_nodes',
        default=[],
        help=(
            'Nodes that an operator declares dead for ever. They are not asked any more. '
            'Volumes and snapshots on them can be deleted, and a volume elsewhere that '
            'waits for their word is opened without it. A node that comes back must be '
            'emptied before it is taken off this list.'
        ),
    ),
]

_RANGE = re.compile(r'^(?P<before>.*)\[(?P<first>\d+)-(?P<last>\d+)\](?P<after>.*)$')


def list_opts() -> list[tuple[str, list[cfg.Opt]]]:
    """What oslo-config-generator lists."""
    return [(volume_configuration.SHARED_CONF_GROUP, OPTIONS)]


def expand(names: Sequence[str]) -> Iterator[str]:
    """The names, each range among them written out.

    Raises ValueError for a range that stands for nothing, and for brackets that are none.
    """
    for name in names:
        match = _RANGE.match(name)
        rest = name if match is None else match['before'] + match['after']
        if '[' in rest or ']' in rest:
            raise ValueError(f'dmlocal_nodes: {name} is not a name with one range at most')
        if match is None:
            yield name
            continue
        first, last = match['first'], match['last']
        if int(first) > int(last):
            raise ValueError(f'dmlocal_nodes: the range of {name} stands for no number')
        for number in range(int(first), int(last) + 1):
            yield f'{match["before"]}{number:0{len(first)}}{match["after"]}'


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options of one backend, read and checked.

    Durations are in seconds.
    """

    endpoints: dict[str, str]
    ca: bytes
    cert: bytes
    key: bytes
    pool: str
    look_timeout: float
    call_timeout: float
    close_timeout: float
    at_once: int
    dead: frozenset[str]

    @classmethod
    def read(cls, configuration: Any) -> Settings:
        """Reads a backend's section.

        Raises ValueError if it names no node, or one twice, or in a way that `expand`
        does not know, and OSError if a file of the certificates cannot be read.
        """
        names = list(expand(configuration.dmlocal_nodes))
        if not names:
            raise ValueError('dmlocal_nodes names no node')
        if len(set(names)) != len(names):
            raise ValueError('dmlocal_nodes names a node twice')
        elsewhere = configuration.dmlocal_endpoints
        strangers = (set(elsewhere) | set(configuration.dmlocal_dead_nodes)) - set(names)
        if strangers:
            raise ValueError(f'dmlocal_nodes does not name {", ".join(sorted(strangers))}')
        template = configuration.dmlocal_endpoint
        return cls(
            endpoints={n: elsewhere.get(n) or template.replace('{node}', n) for n in names},
            ca=_content(configuration.dmlocal_ca),
            cert=_content(configuration.dmlocal_cert),
            key=_content(configuration.dmlocal_key),
            pool=configuration.dmlocal_pool,
            look_timeout=configuration.dmlocal_look_timeout,
            call_timeout=configuration.dmlocal_call_timeout,
            close_timeout=configuration.dmlocal_close_timeout,
            at_once=configuration.dmlocal_at_once,
            dead=frozenset(configuration.dmlocal_dead_nodes),
        )


def _content(path: str) -> bytes:
    with open(path, 'rb') as file:
        return file.read()
