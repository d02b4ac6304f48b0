"""Cinder and Nova over a fleet, and what is done with an instance in every flow.

Each method here waits until Nova is done, however that ended; what came of it is looked
at by whoever called it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from services.block import Cinder, agents
from services.clients import Refused
from services.everybody import TOKEN
from services.hypervisors import Hypervisors, Machine
from services.infra import Infra
from services.nova import Nova
from services.processes import Processes, free_ports

# Up to this version of its interface, Nova starts an evacuated instance.
_STARTS_EVACUATED = '2.94'


class Cloud:
    """All services, with a compute on each node of the fleet.

    Other backends than the fleet's are named with the endpoints of their nodes; `defaults`
    are settings of Cinder's own section.
    """

    def __init__(
        self,
        processes: Processes,
        endpoints: Mapping[str, str],
        machine: Machine,
        settings: Mapping[str, Any],
        others: Mapping[str, Mapping[str, str]] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        folder = processes.folder
        self.nodes = list(endpoints)
        self.hypervisors = Hypervisors(folder / 'hypervisors', machine)
        infra = Infra(processes)
        backends = {
            name: {**agents(folder, nodes), **settings}
            for name, nodes in {'dmlocal': endpoints, **(others or {})}.items()
        }
        [port] = free_ports(1)
        # Cinder tells Nova that a volume has grown, and has it swap volumes.
        nova = {'auth_type': 'admin_token', 'token': TOKEN}
        more = {
            'DEFAULT': defaults or {},
            'nova': {**nova, 'endpoint': f'http://127.0.0.1:{port}/v2.1'},
        }
        self.cinder = Cinder(processes, infra, backends, more)
        self.nova = Nova(processes, infra, self.cinder, self.hypervisors, port)
        self.cinder.sync()
        self.cinder.start('api', 'scheduler', 'volume')
        self.nova.sync()
        self.nova.start(*self.nodes)
        self.wait_for_pools()
        self.volumes = self.cinder.client
        self.servers = self.nova.client
        self.processes = processes
        self._migrated: dict[str, int] = {}
        self.servers.make_flavors()
        # Types for those that are to be created on a node, or in a backend.
        for node in self.nodes:
            specs = {'pool_name': node, 'volume_backend_name': 'dmlocal'}
            self._add_type(node, specs)
        for name in backends:
            self._add_type(name, {'volume_backend_name': name})

    def _add_type(self, name: str, specs: dict[str, str]) -> None:
        body = {'volume_type': {'name': name, 'extra_specs': specs}}
        self.volumes.call('POST', '/types', body)

    def wait_for_pools(self, nodes: Sequence[str] = ()) -> None:
        """Waits until Cinder's scheduler knows these nodes, or all."""
        self.cinder.wait(*(f'fleet@dmlocal#{node}' for node in nodes or self.nodes))

    def end(self) -> None:
        """Has the guests gone. Processes are ended by whoever began them."""
        self.hypervisors.end()

    def declare_dead(self, nodes: Sequence[str]) -> None:
        """An operator's word, which cinder-volume reads when it starts."""
        self.cinder.restart_volume({'dmlocal': {'dmlocal_dead_nodes': ', '.join(nodes)}})

    # Beginning

    def volume(self, node: str | None = None, *, bootable: bool = False) -> str:
        """A volume of 1 GiB, on a node that it is to be created on or on any."""
        more = {'volume_type': node} if node else {}
        volume = str(self.volumes.create(**more)['id'])
        if bootable:
            self.volumes.act(volume, os_set_bootable={'bootable': True})
        return volume

    def boot(self, host: str | None, volumes: Sequence[str], states: Sequence[str] = ()) -> str:
        """An instance that runs, or has one of these states."""
        server = self.servers.boot(host, *volumes)
        self.servers.wait(server, *(states or ('ACTIVE',)))
        return server

    # Moving

    def live_migrate(self, server: str, to: str | None) -> str:
        """Live-migrates an instance; how the migration ended."""
        self.begin_live_migration(server, to)
        return self.end_of_migration(server)

    def begin_live_migration(self, server: str, to: str | None) -> None:
        """Has Nova begin one."""
        self._note_migrations(server)
        body = {'host': to, 'block_migration': 'auto'}
        self.servers.act(server, 'os-migrateLive', body)

    def end_of_migration(self, server: str) -> str:
        """How the last migration of an instance ended."""
        ended = {'completed', 'failed', 'error', 'cancelled', 'done'}

        def seen() -> str | None:
            last = self._last_migration(server)
            return str(last['status']) if last and last['status'] in ended else None

        status = str(self.processes.wait(f'{server} does not end migrating', seen))
        self.servers.wait(server, 'ACTIVE', 'SHUTOFF', 'ERROR')
        return status

    def _note_migrations(self, server: str) -> None:
        """What there is before another one begins."""
        self._migrated[server] = len(self.servers.migrations(server))

    def _last_migration(self, server: str) -> dict[str, Any] | None:
        """The one that has begun since; Nova's record of it comes later than its answer."""
        rows = self.servers.migrations(server)
        return rows[0] if len(rows) > self._migrated.get(server, 0) else None

    def abort_live_migration(self, server: str) -> None:
        """Has Nova give one up that goes on."""

        def is_accepted() -> bool:
            migration = self._last_migration(server)
            if migration is None:
                return False
            try:
                self.servers.call('DELETE', f'/servers/{server}/migrations/{migration["id"]}')
            except Refused as refused:
                # It is not `running` yet.
                assert refused.status in {400, 409}, refused
                return False
            return True

        self.processes.wait(f'{server} cannot be aborted', is_accepted)

    def migrate(self, server: str, to: str) -> str:
        """Migrates an instance cold; its status."""
        return self._act(server, 'migrate', {'host': to}, 'VERIFY_RESIZE', 'ERROR')

    def resize(self, server: str, flavor: str) -> str:
        """Gives an instance another flavor, on another host; its status."""
        return self._act(server, 'resize', {'flavorRef': flavor}, 'VERIFY_RESIZE', 'ERROR')

    def confirm(self, server: str) -> str:
        """Ends a resize or cold migration."""
        return self._act(server, 'confirmResize', None, 'ACTIVE')

    def revert(self, server: str) -> str:
        """Takes it back."""
        return self._act(server, 'revertResize', None, 'ACTIVE', 'ERROR')

    def shelve(self, server: str) -> str:
        """Shelves an instance, and has it leave its host."""
        return self._act(server, 'shelve', None, 'SHELVED_OFFLOADED')

    def unshelve(self, server: str, to: str) -> str:
        """Unshelves it; its status."""
        body = {'host': to}
        return self._act(server, 'unshelve', body, 'ACTIVE', 'SHELVED_OFFLOADED', 'ERROR')

    def evacuate(self, server: str, to: str) -> str:
        """Has it started elsewhere, as its host is down; its status."""
        self._note_migrations(server)
        version = _STARTS_EVACUATED
        self.servers.act(server, 'evacuate', {'host': to}, version)
        self.end_of_migration(server)
        return str(self.servers.wait(server, 'ACTIVE', 'ERROR')['status'])

    # Staying

    def reboot(self, server: str) -> str:
        """Reboots it hard; its status."""
        return self._act(server, 'reboot', {'type': 'HARD'}, 'ACTIVE', 'ERROR')

    def stop(self, server: str) -> str:
        """Stops it."""
        return self._act(server, 'os-stop', None, 'SHUTOFF')

    def start(self, server: str) -> str:
        """Starts it."""
        return self._act(server, 'os-start', None, 'ACTIVE')

    def reset(self, server: str) -> None:
        """An administrator's word that it is well."""
        self._act(server, 'os-resetState', {'state': 'active'}, 'ACTIVE')

    def attach(self, server: str, volume: str) -> None:
        """Attaches a volume."""
        self.servers.attach(server, volume)
        self.volumes.wait(volume, 'in-use')
        self.processes.wait(
            f'{volume} is not attached',
            lambda: all(
                row['status'] == 'attached' for row in self.volumes.attachments(volume)
            ),
        )

    def detach(self, server: str, volume: str) -> None:
        """Detaches a volume."""
        self.servers.detach(server, volume)
        self.volumes.wait(volume, 'available')

    def _act(self, server: str, action: str, body: Any, *states: str) -> str:
        self.servers.act(server, action, body)
        return str(self.servers.wait(server, *states)['status'])

    # A host's compute

    def delete_attachment(self, volume: str, host: str) -> None:
        """An operator deletes what Nova does not know of any more."""
        rows = self.volumes.show(volume)['attachments']
        [row] = [row for row in rows if row['host_name'] == host]
        self.volumes.detach(row['attachment_id'])

    def kill_compute(self, host: str) -> None:
        """Kills it, and has Nova know that it is down."""
        self.nova.kill_compute(host)
        self.servers.force_down(host, is_down=True)

    def revive_compute(self, host: str) -> None:
        """Starts it again."""
        self.nova.start_compute(host)

        def is_allowed() -> bool:
            try:
                self.servers.force_down(host, is_down=False)
            except Refused as refused:
                # Not while an evacuation has yet to be cleared up by it.
                assert refused.status == 400, refused
                return False
            return True

        self.processes.wait(f'{host} stays forced down', is_allowed)
        # It may seem up for what it has reported before it was killed.
        self.nova.note_report(host)
        self.nova.wait_for_compute(host)
