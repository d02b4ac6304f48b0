"""What the pretended hypervisors of all hosts do: which guest has which device open.

Nova's virt driver (`virt/guests.py`) tells of everything that a guest would do, over a
unix socket, and waits for the answer. So a test knows where each guest runs, lets it
write, and decides what fails. What a device is, the machine knows: a pretended agent's,
or nothing here where somebody else does the writing.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pathlib
import socket
import socketserver
import threading
import uuid
from typing import Any, Protocol

LATER = 600.0


def ask(path: str, event: dict[str, Any]) -> Any:
    """The answer to an event; for the virt driver."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        with connection.makefile('rw') as stream:
            print(json.dumps(event), file=stream, flush=True)
            return json.loads(stream.readline())


def node_id(name: str) -> str:
    """The id of a node, the same whenever its nova-compute starts."""
    return str(uuid.uuid5(uuid.NAMESPACE_DNS, name))


class Machine(Protocol):
    """What is below the guests. Raises whatever the guest would meet."""

    def open(self, host: str, device: str) -> None:
        """A guest opens a device."""

    def shut(self, host: str, device: str) -> None:
        """It closes it."""

    def copy(self, host: str, old: str, new: str) -> None:
        """It goes on with another device that is to hold the same."""


@dataclasses.dataclass
class Guest:
    """An instance on a host; while it moves it is on two."""

    instance: str
    host: str
    name: str
    devices: list[str] = dataclasses.field(default_factory=list)
    is_on: bool = False


class Move:
    """A live migration that waits for the test."""

    def __init__(self) -> None:
        self._begun = threading.Event()
        self._outcome: str | None = None
        self._decided = threading.Event()

    def wait(self) -> None:
        """Waits until the guest is about to move: both hosts have it."""
        assert self._begun.wait(LATER), 'no live migration has begun'

    def decide(self, outcome: str) -> None:
        """Lets it go on: `done`, `failed` or `aborted`."""
        self._outcome = outcome
        self._decided.set()

    def take(self) -> str:
        """What was decided, as soon as it is."""
        self._begun.set()
        assert self._decided.wait(LATER), 'nobody decides how a live migration ends'
        assert self._outcome is not None
        return self._outcome


class Hypervisors:
    """All hosts' guests, and the socket at which they are told of."""

    def __init__(self, path: pathlib.Path, machine: Machine) -> None:
        self.machine = machine
        self.told: list[tuple[str, str]] = []
        self._guests: dict[tuple[str, str], Guest] = {}
        self._moves: dict[str, Move] = {}
        self._failures: collections.Counter[tuple[str, str]] = collections.Counter()
        self._clinging: set[tuple[str, str]] = set()
        self._lock = threading.RLock()
        handler = type('Handler', (_Handler,), {'hypervisors': self})
        self._server = socketserver.ThreadingUnixStreamServer(str(path), handler)
        self._server.daemon_threads = True
        self.environment = {'DMLOCAL_HYPERVISORS': os.fspath(path)}
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def end(self) -> None:
        """Takes nothing more."""
        self._server.shutdown()
        self._server.server_close()

    # What a test says and asks

    def fail(self, event: str, host: str, times: int = 1) -> None:
        """Has the next such events on a host fail."""
        self._failures[event, host] += times

    def hold(self, instance: str) -> Move:
        """Has the next live migration of an instance wait."""
        move = self._moves[instance] = Move()
        return move

    def cling(self, host: str, instance: str, *, still: bool = True) -> None:
        """Has what is left of a guest keep its devices open when it should go."""
        key = (host, instance)
        if still:
            self._clinging.add(key)
            return
        self._clinging.discard(key)
        guest = self._guests.get(key)
        if guest is not None and not guest.is_on:
            self._end(guest)

    def lose(self, host: str) -> None:
        """The host loses power; its guests are gone, and nobody closes anything."""
        with self._lock:
            for key in [key for key in self._guests if key[0] == host]:
                # Whoever still has it in hand has nothing to close.
                self._guests.pop(key).devices.clear()

    def power_off(self, host: str, instance: str) -> None:
        """Somebody ends a guest on its host, without Nova."""
        self._end(self._guests[host, instance])

    def where(self, instance: str) -> list[str]:
        """The hosts on which an instance runs."""
        guests = [guest for guest in self._guests.values() if guest.instance == instance]
        return sorted(guest.host for guest in guests if guest.is_on)

    def opened(self) -> list[Guest]:
        """Guests that have something open."""
        return [guest for guest in self._guests.values() if guest.devices]

    # What happens

    def take(self, event: dict[str, Any]) -> dict[str, Any]:
        """Does what an event says; the answer to it."""
        kind, host = event['event'], event['host']
        if kind != 'list':
            self.told.append((kind, host))
        if self._failures[kind, host] > 0:
            self._failures[kind, host] -= 1
            return {'error': f'{kind} fails on {host}, as the test wants it'}
        if kind == 'move':
            return self._move(event)
        with self._lock:
            return getattr(self, f'_{kind}')(event) or {}

    def _guest(self, event: dict[str, Any], host: str | None = None) -> Guest:
        key = (host or event['host'], event['instance'])
        if key not in self._guests:
            self._guests[key] = Guest(event['instance'], key[0], event['name'])
        return self._guests[key]

    def _list(self, event: dict[str, Any]) -> dict[str, Any]:
        guests = [guest for guest in self._guests.values() if guest.host == event['host']]
        return {'guests': [dataclasses.asdict(guest) for guest in guests]}

    def _start(self, event: dict[str, Any]) -> None:
        guest = self._guest(event)
        self._open(guest, event['devices'])
        guest.is_on = True

    def _stop(self, event: dict[str, Any]) -> None:
        guest = self._guest(event)
        guest.is_on = False
        self._shut(guest, list(guest.devices))

    def _end(self, event: dict[str, Any] | Guest) -> None:
        guest = event if isinstance(event, Guest) else self._guest(event)
        guest.is_on = False
        key = (guest.host, guest.instance)
        if key not in self._clinging:
            self._shut(guest, list(guest.devices))
            self._guests.pop(key, None)

    def _plug(self, event: dict[str, Any]) -> None:
        self._open(self._guest(event), event['devices'])

    def _unplug(self, event: dict[str, Any]) -> None:
        guest = self._guest(event)
        if (guest.host, guest.instance) in self._clinging:
            return
        self._shut(guest, [one for one in event['devices'] if one in guest.devices])

    def _swap(self, event: dict[str, Any]) -> None:
        old, new = event['devices']
        guest = self._guest(event)
        self._open(guest, [new])
        self.machine.copy(guest.host, old, new)
        self._shut(guest, [old])

    def _grow(self, event: dict[str, Any]) -> None:
        """The device has a new size by itself."""

    def _await(self, event: dict[str, Any]) -> None:
        """Its devices are there before a guest arrives; nobody opens them yet."""

    def _move(self, event: dict[str, Any]) -> dict[str, Any]:
        """QEMU at the destination opens what it will use, and waits for the guest."""
        with self._lock:
            source = self._guest(event)
            target = self._guest(event, event['to'])
            self._open(target, source.devices)
        move = self._moves.get(event['instance'])
        outcome = move.take() if move else 'done'
        with self._lock:
            self._moves.pop(event['instance'], None)
            if outcome == 'done':
                self._end(source)
                target.is_on = True
            else:
                self._end(target)
        return {'outcome': outcome}

    def _abort(self, event: dict[str, Any]) -> None:
        self._moves[event['instance']].decide('aborted')

    def _recall(self, event: dict[str, Any]) -> None:
        """Nothing: QEMU at the destination has ended by itself."""

    def _open(self, guest: Guest, devices: list[str]) -> None:
        for device in devices:
            if device not in guest.devices:
                self.machine.open(guest.host, device)
                guest.devices.append(device)

    def _shut(self, guest: Guest, devices: list[str]) -> None:
        for device in devices:
            self.machine.shut(guest.host, device)
            guest.devices.remove(device)


class _Handler(socketserver.StreamRequestHandler):
    hypervisors: Hypervisors

    def handle(self) -> None:
        event = json.loads(self.rfile.readline())
        try:
            answer = self.hypervisors.take(event)
        except Exception as error:  # noqa: BLE001 - a guest that does not start
            answer = {'error': repr(error)}
        self.wfile.write(json.dumps(answer).encode() + b'\n')
