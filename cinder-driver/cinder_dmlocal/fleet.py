"""The nodes of the fleet, and how their agents are called.

One channel for each node, made when the driver starts and connected when it is first
used; mutual TLS, in which the other end must prove to be *that* node, whatever address
it was found under. Every call has a deadline.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from oslo_log import log as logging

from cinder_dmlocal import errors, native
from cinder_dmlocal.native import grpc
from cinder_dmlocal.options import Settings
from cinder_dmlocal.wire import dmlocal_pb2 as pb
from cinder_dmlocal.wire import dmlocal_pb2_grpc as pb_grpc

LOG = logging.getLogger(__name__)

T = TypeVar('T')

# Looks and calls at one node at the same time. Where threads are green all share native ones,
# 20 by default: a node that says nothing must leave the others enough of them. Calls come
# after looks, so that only a node that falls silent in between has its share of both.
_LOOKS, _CALLS = 4, 8

# A connection that has failed is tried again after this time at most. Until then whoever
# asks hears of that failure, which may be over: a look waits for the next attempt.
_RECONNECT_MS = 500

# For how many timeouts it is believed that nodes answer, and how many are asked then.
_FRESH, _FEW = 3, 8


class Node:
    """A node's agent, and the calls on it.

    `look` is for what the agent knows at once, `call` for what it has to do.
    """

    def __init__(
        self, name: str, endpoint: str, credentials: grpc.ChannelCredentials, settings: Settings
    ) -> None:
        self.name = name
        # The agent's pool that is used; empty stands for its first.
        self.pool = settings.pool
        self._settings = settings
        # Cinder's own threads wait for these, so they are of their kind.
        self._looks = threading.Semaphore(_LOOKS)
        self._calls = threading.Semaphore(_CALLS)
        self._silent_at, self._was_heard = 0.0, False
        self._channel = grpc.secure_channel(
            endpoint,
            credentials,
            options=[
                # Whoever listens there must be this node.
                ('grpc.ssl_target_name_override', name),
                ('grpc.enable_http_proxy', 0),
                # A node that was away is tried again at once, not after minutes.
                ('grpc.initial_reconnect_backoff_ms', _RECONNECT_MS),
                ('grpc.max_reconnect_backoff_ms', _RECONNECT_MS),
                ('grpc.max_receive_message_length', -1),
            ],
        )
        self.nodes = pb_grpc.NodesStub(self._channel)
        self.volumes = pb_grpc.VolumesStub(self._channel)
        self.snapshots = pb_grpc.SnapshotsStub(self._channel)
        self.moves = pb_grpc.MovesStub(self._channel)

    def __repr__(self) -> str:
        """For logs."""
        return f'<node {self.name}>'

    @property
    def is_dead(self) -> bool:
        """Whether an operator has declared it dead for ever."""
        return self.name in self._settings.dead

    def look(self, method: Callable[..., T], request: Any) -> T:
        """Asks for what the agent knows. Raises errors.AgentError."""
        return self._in_turn(self._looks, method, request)

    def call(self, method: Callable[..., T], request: Any) -> T:
        """Has the agent do something. Raises errors.AgentError."""
        return self._in_turn(self._calls, method, request, self._settings.call_timeout)

    def _in_turn(
        self,
        turns: threading.Semaphore,
        method: Callable[..., T],
        request: Any,
        timeout: float | None = None,
    ) -> T:
        began = time.monotonic()
        if not turns.acquire(timeout=self._settings.call_timeout):
            raise errors.Unasked(self.name, 'too many calls wait for it')
        try:
            if self._silent_at > began:
                # Whoever has waited meanwhile would hear nothing either.
                raise errors.Unasked(self.name, 'it has not answered others')
            return native.natively(lambda: self.blocking(method, request, timeout))
        except errors.Unreachable as error:
            if not isinstance(error, errors.Unasked):
                self._silent_at = time.monotonic()
            raise
        finally:
            turns.release()

    def blocking(
        self, method: Callable[..., T], request: Any, timeout: float | None = None
    ) -> T:
        """The same at once, in a thread that may block. Raises errors.AgentError."""
        if self.is_dead:
            raise errors.Unreachable(self.name, 'it was declared dead')
        try:
            answer = method(request, timeout=timeout or self._settings.look_timeout)
        except grpc.RpcError as error:
            is_away = error.code() is grpc.StatusCode.UNAVAILABLE
            if is_away and timeout is None and self._was_heard:
                return self._once_more(method, request, error)
            raise errors.of_call(self.name, error) from None
        self._was_heard = True
        return answer

    def _once_more(self, method: Callable[..., T], request: Any, unheard: Any) -> T:
        """What an agent answers that may be back since it was last tried."""
        more: dict[str, Any] = {'timeout': 2 * _RECONNECT_MS / 1000, 'wait_for_ready': True}
        try:
            return method(request, **more)
        except grpc.RpcError as error:
            silent = isinstance(errors.of_call(self.name, error), errors.Unreachable)
            raise errors.of_call(self.name, unheard if silent else error) from None

    def close(self) -> None:
        """Ends the channel."""
        self._channel.close()


@dataclasses.dataclass(frozen=True)
class Answers:
    """What the nodes that were asked have answered, each by its name."""

    given: Mapping[str, Any]
    failed: Mapping[str, errors.AgentError]

    @property
    def came(self) -> list[str]:
        """The nodes that have answered, and be it by refusing."""
        refused = (n for n, e in self.failed.items() if not isinstance(e, errors.Unreachable))
        return [*self.given, *refused]


class Fleet:
    """All nodes that the configuration names."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        credentials = grpc.ssl_channel_credentials(
            root_certificates=settings.ca,
            private_key=settings.key,
            certificate_chain=settings.cert,
        )
        self._nodes = {
            name: Node(name, endpoint, credentials, settings)
            for name, endpoint in settings.endpoints.items()
        }
        # What was last known of the fleet, and when: whether any node answers, and which.
        self._is_reachable, self._known_at = True, time.monotonic()
        self._answering = self.names

    def __contains__(self, name: str) -> bool:
        """Whether a node of that name is configured."""
        return name in self._nodes

    def __getitem__(self, name: str) -> Node:
        """A node by its name. Raises KeyError."""
        return self._nodes[name]

    @property
    def names(self) -> list[str]:
        """Names of all nodes, in the order of the configuration."""
        return list(self._nodes)

    @property
    def pool(self) -> str:
        """The pool that is used on every node; empty stands for each agent's first."""
        return self._settings.pool

    def ask(
        self,
        method: Callable[[Node], Callable[..., Any]],
        request: Any,
        names: Iterable[str] | None = None,
    ) -> Answers:
        """Asks several nodes, all of them by default, for what they know at once.

        Takes as long as the slowest, at most the timeout for looks for each
        `dmlocal_at_once` nodes.
        """
        nodes = [self._nodes[name] for name in (self.names if names is None else names)]
        answers = native.natively(lambda: self._ask(nodes, method, request))
        if names is None:
            self._is_reachable, self._known_at = bool(answers.came), time.monotonic()
            self._answering = answers.came
        return answers

    def _ask(
        self, nodes: list[Node], method: Callable[[Node], Callable[..., Any]], request: Any
    ) -> Answers:
        thread_of = native.threading().Thread
        given: dict[str, Any] = {}
        failed: dict[str, errors.AgentError] = {}
        waiting = list(reversed(nodes))

        def worker() -> None:
            while waiting:
                try:
                    # One operation of the interpreter, so no lock is needed.
                    node = waiting.pop()
                except IndexError:
                    return
                try:
                    given[node.name] = node.blocking(method(node), request)
                except errors.AgentError as error:
                    failed[node.name] = error

        count = min(len(nodes), self._settings.at_once)
        workers = [thread_of(target=worker, daemon=True) for _ in range(count)]
        for thread in workers:
            thread.start()
        for thread in workers:
            thread.join()
        return Answers(given, failed)

    def must_have_answered(self, what: str, failed: Mapping[str, errors.AgentError]) -> None:
        """Raises errors.Unreachable if a node that may have what is missing says nothing.

        A node that was declared dead has nothing any more.
        """
        silent = [n for n in errors.silent(failed) if not self._nodes[n].is_dead]
        if silent:
            raise errors.Unreachable(', '.join(silent), f'nobody else has {what}')

    def pools(self) -> Answers:
        """The pool of each node that answers and has it; of every other, why not."""
        answers = self.ask(lambda node: node.nodes.ListPools, pb.ListPoolsRequest())
        given, failed = {}, dict(answers.failed)
        for name, answer in answers.given.items():
            pool = self._pool_of(answer.pools)
            if pool is None or not pool.present:
                failed[name] = errors.AgentError(name, f'node {name} has no such pool')
            else:
                given[name] = pool
        return Answers(given, failed)

    def _pool_of(self, pools: Iterable[Any]) -> Any | None:
        return next((pool for pool in pools if self.pool in ('', pool.name)), None)

    def answers(self) -> bool:
        """Whether any node answers, as far as is known.

        The statistics tell, but seldom. In between a few of those are asked that did
        answer, and everybody once none of them does; while nobody has, not more often
        than the timeout for looks.
        """
        timeout = self._settings.look_timeout
        fresh = _FRESH * timeout if self._is_reachable else timeout
        if time.monotonic() - self._known_at < fresh:
            return self._is_reachable
        few = self._answering[:_FEW]
        if few and self._are_there(few):
            self._known_at = time.monotonic()
            return True
        return self._are_there(None)

    def _are_there(self, names: list[str] | None) -> bool:
        answers = self.ask(lambda node: node.nodes.GetNode, pb.GetNodeRequest(), names)
        return bool(answers.came)

    def close(self) -> None:
        """Ends all channels."""
        for node in self._nodes.values():
            node.close()
