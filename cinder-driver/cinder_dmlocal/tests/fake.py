"""Agents that are pretended to: real gRPC over mutual TLS, and pretended devices.

They refuse what `dmlocald` refuses, with its reasons, and keep what a volume holds as a
list of what was written to it, so that a test can see whether anything was lost; with a
folder, also in files that Cinder can read and write (`disks`). What happens on a node
without the driver (a guest that opens, writes and closes its device, a copy that arrives)
is done by methods with plain names.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import pathlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
from google.protobuf import any_pb2, message_factory
from google.rpc import error_details_pb2, status_pb2

from cinder_dmlocal.tests.calls import GIB, Calls, Refusal, Snap, Vol
from cinder_dmlocal.tests.certificates import Authority
from cinder_dmlocal.tests.disks import Disks
from cinder_dmlocal.wire import dmlocal_pb2 as pb

__all__ = ['GIB', 'Agent', 'FakeFleet', 'Gate', 'Refusal', 'Snap', 'Vol']

# Longer than any test waits for anything.
_PATIENCE = 300.0


@dataclasses.dataclass
class Gate:
    """Has one call wait, before it is done or after that, until it may go on."""

    is_done_first: bool = False
    reached: threading.Event = dataclasses.field(default_factory=threading.Event)
    opened: threading.Event = dataclasses.field(default_factory=threading.Event)
    left: threading.Event = dataclasses.field(default_factory=threading.Event)

    def lead(self, act: Callable[[], Any]) -> Any:
        """Does that, with a stop on the way."""
        try:
            answer = act() if self.is_done_first else None
            self.reached.set()
            self.opened.wait(_PATIENCE)
            return answer if self.is_done_first else act()
        finally:
            self.left.set()


class Agent(Calls):
    """One node."""

    def __init__(self, name: str, fleet: FakeFleet) -> None:
        self.name = name
        self.fleet = fleet
        self.reset()

    def reset(self) -> None:
        """As a node that has just been set up."""
        self.volumes: dict[str, Vol] = {}
        self.snapshots: dict[str, Snap] = {}
        self.capacity = 100 * GIB
        self.has_pool = True
        # [receive] when_full = "remote"
        self.takes_remote = False
        self.is_down = False
        self.says_refused: dict[str, Refusal] = {}
        self.loses_answer: set[str] = set()
        self.gates: dict[str, Gate] = {}
        self.passed: list[Gate] = []
        self.calls: collections.Counter[str] = collections.Counter()

    def serve(self, method: str, request: Any, context: Any) -> Any:
        """Answers one call."""
        gate = self.gates.pop(method, None)
        if gate is None:
            return self._answer(method, request, context)
        self.passed.append(gate)
        return gate.lead(lambda: self._answer(method, request, context))

    def _answer(self, method: str, request: Any, context: Any) -> Any:
        with self.fleet.lock, self.fleet.serving():
            if self.is_down:
                context.abort(grpc.StatusCode.UNAVAILABLE, 'connection refused')
            self.calls[method] += 1
            self.fleet.order.append(f'{self.name} {method}')
            try:
                if method in self.says_refused:
                    raise self.says_refused[method]
                answer = getattr(self, method.lower().replace('.', '_'))(request)
            except Refusal as refusal:
                self._refuse(refusal, context)
            if method in self.loses_answer:
                context.abort(grpc.StatusCode.UNAVAILABLE, 'connection lost')
            return answer

    @staticmethod
    def _refuse(refusal: Refusal, context: Any) -> None:
        info = error_details_pb2.ErrorInfo(
            reason=refusal.reason, domain='dmlocal', metadata=refusal.metadata
        )
        detail = any_pb2.Any()
        detail.Pack(info)
        status = status_pb2.Status(
            code=refusal.code.value[0], message=refusal.reason, details=[detail]
        )
        metadata = (('grpc-status-details-bin', status.SerializeToString()),)
        context.set_trailing_metadata(metadata)
        context.abort(refusal.code, refusal.reason)

    # What happens on the node

    def open(self, volume_id: str) -> None:
        """Somebody opens the device."""
        vol = self.volumes[volume_id]
        assert vol.attached, f'{self.name} has no device of {volume_id}'
        vol.opened += 1

    def shut(self, volume_id: str) -> None:
        """Somebody closes it."""
        self.volumes[volume_id].opened -= 1

    def write(self, volume_id: str, what: str) -> bool:
        """Whether a write is acknowledged. A held one asks for the switch, and waits."""
        vol = self.volumes[volume_id]
        assert vol.attached, f'{self.name} has no device of {volume_id}'
        assert vol.state != 'FENCED', f'a guest on {self.name} meets errors'
        if vol.state == 'HELD':
            vol.held_writes.append(what)
            self.ask_for_fence(vol)
            return not vol.held_writes
        if vol.is_remote:
            self.fleet.agents[vol.source].volumes[vol.id].data.append(what)
        vol.data.append(what)
        return True

    def ask_for_fence(self, vol: Vol) -> bool:
        """What a held copy does by itself once something waits in it."""
        source = self.fleet.agents[vol.source]
        at_source = source.volumes.get(vol.id)
        if source.is_down or at_source is None or at_source.grant_id != vol.grant_id:
            return False
        if at_source.opened:
            return False
        at_source.state = 'FENCED'
        vol.state = 'REMOTE' if vol.is_remote else 'HYDRATING'
        vol.data = [*at_source.data, *vol.held_writes]
        if vol.is_remote:
            at_source.data = list(vol.data)
        else:
            self.own(vol)
        vol.held_writes = []
        if self.fleet.copies_at_once and vol.state == 'HYDRATING':
            self.arrive(vol.id)
        return True

    def arrive(self, volume_id: str) -> None:
        """Everything is copied; the source lets go."""
        vol = self.volumes[volume_id]
        assert vol.state == 'HYDRATING', vol.state
        self.fleet.agents[vol.source].drop(volume_id)
        vol.state, vol.source, vol.grant_id = 'LOCAL', '', ''

    def boot(self) -> None:
        """The node loses power and boots: nobody has anything open any more."""
        self.is_down = False
        for vol in self.volumes.values():
            vol.opened = 0
            vol.must_confirm = bool(vol.lent_to)


class FakeFleet:
    """Several agents, each with a server of its own.

    With a folder their devices are files there. With `copies_at_once` nothing is copied in
    the background: what is received arrives as soon as it is switched over.
    """

    def __init__(
        self,
        names: list[str],
        folder: pathlib.Path | None = None,
        *,
        authority: Authority | None = None,
        copies_at_once: bool = False,
    ) -> None:
        self.lock = threading.RLock()
        self.served = 0.0
        self.disks = Disks(folder)
        self.copies_at_once = copies_at_once
        self.authority = authority or Authority()
        self.agents = {name: Agent(name, self) for name in names}
        self.reset()
        self._servers = []
        self.endpoints: dict[str, str] = {}
        for name, agent in self.agents.items():
            server, port = self._serve(agent)
            self._servers.append(server)
            self.endpoints[name] = f'127.0.0.1:{port}'

    def _serve(self, agent: Agent) -> tuple[Any, int]:
        server = grpc.server(futures.ThreadPoolExecutor(4))
        for service in pb.DESCRIPTOR.services_by_name.values():
            handlers = {m.name: _handler(agent, service.name, m) for m in service.methods}
            handler = grpc.method_handlers_generic_handler(service.full_name, handlers)
            server.add_generic_rpc_handlers((handler,))
        pair = self.authority.issue('agent', agent.name)
        credentials = grpc.ssl_server_credentials(
            [(pair.key, pair.cert)], self.authority.cert, require_client_auth=True
        )
        port = server.add_secure_port('127.0.0.1:0', credentials)
        server.start()
        return server, port

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Adds up the time in which agents do what they are asked for."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.served += time.perf_counter() - began

    def reset(self) -> None:
        """As a fleet that has just been set up."""
        self.order: list[str] = []
        self.grants: set[str] = set()
        for agent in self.agents.values():
            agent.reset()

    def left(self) -> list[str]:
        """Everything that the agents have: nothing may be left at the end of a test."""
        return [
            f'{agent.name} {kind} {one.id} {one.state}'
            for agent in self.agents.values()
            for kind, ones in (('volume', agent.volumes), ('snapshot', agent.snapshots))
            for one in ones.values()
        ]

    def stop(self) -> None:
        """Nobody answers any more."""
        for agent in self.agents.values():
            for gate in agent.passed:
                gate.opened.set()
        for server in self._servers:
            server.stop(None).wait()

    def where(self, volume_id: str) -> dict[str, str]:
        """The state of each copy of a volume, by node."""
        agents = self.agents.values()
        return {a.name: a.volumes[volume_id].state for a in agents if volume_id in a.volumes}


def _handler(agent: Agent, service: str, method: Any) -> Any:
    request = message_factory.GetMessageClass(method.input_type)
    answer = message_factory.GetMessageClass(method.output_type)
    name = f'{service}.{method.name}'
    return grpc.unary_unary_rpc_method_handler(
        lambda message, context: agent.serve(name, message, context),
        request_deserializer=request.FromString,
        response_serializer=answer.SerializeToString,
    )
