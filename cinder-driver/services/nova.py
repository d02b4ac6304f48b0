"""Nova's services as processes: api, conductor, scheduler, computes; and placement.

Neither Keystone nor Glance nor Neutron: everybody is an administrator, instances boot
from volumes and have no network. The computes have the names of nodes.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

from services.block import Cinder, Sections, write
from services.clients import Compute
from services.everybody import TOKEN
from services.hypervisors import Hypervisors, node_id
from services.infra import Infra
from services.processes import Processes, free_ports, module, program

_ETC = pathlib.Path(sys.prefix) / 'etc' / 'nova'
_DATABASES = ['nova_api', 'nova_cell0', 'nova_cell1', 'placement']


class Nova:
    """Nova's services, with what their configurations say."""

    def __init__(
        self,
        processes: Processes,
        infra: Infra,
        cinder: Cinder,
        hypervisors: Hypervisors,
        port: int,
    ) -> None:
        self.processes = processes
        self.folder = processes.folder / 'nova'
        self.folder.mkdir()
        (self.folder / 'locks').mkdir()
        self._infra = infra
        self._hypervisors = hypervisors
        # When each compute had last reported before it was started.
        self._reported: dict[str, str | None] = {}
        self.port = port
        self._placement, self._networks = free_ports(2)
        self.client = Compute(f'http://127.0.0.1:{self.port}/v2.1', processes)
        self._sections = self._own(infra, cinder)
        self._write_paste()
        self.conf = write(self.folder / 'nova.conf', self._sections)
        self._placement_folder = self.folder / 'placement'
        self._placement_folder.mkdir()
        database = {'connection': infra.database.url('placement')}
        self._placement_conf = write(
            self._placement_folder / 'placement.conf',
            {'api': {'auth_strategy': 'noauth2'}, 'placement_database': database},
        )

    def _own(self, infra: Infra, cinder: Cinder) -> Sections:
        return {
            'DEFAULT': {
                'debug': 'true',
                'state_path': self.folder,
                'my_ip': '127.0.0.1',
                'host': 'controller',
                'transport_url': infra.broker.url,
                'compute_driver': 'guests.Hypervisor',
                'report_interval': 1,
                'service_down_time': 10,
                'manager_shutdown_timeout': 0,
                'graceful_shutdown_timeout': 5,
                'heal_instance_info_cache_interval': 0,
                'sync_power_state_interval': -1,
                'shelved_offload_time': 0,
                'use_cow_images': 'false',
                'rpc_response_timeout': 120,
            },
            'api_database': {'connection': infra.database.url('nova_api')},
            'database': {'connection': infra.database.url('nova_cell1')},
            'wsgi': {'api_paste_config': self.folder / 'api-paste.ini'},
            'oslo_concurrency': {'lock_path': self.folder / 'locks'},
            'placement': _without_keystone(self._placement, 'admin'),
            'cinder': {
                **_without_keystone(cinder.port, TOKEN),
                'endpoint_template': f'{cinder.url}/%(project_id)s',
            },
            'neutron': _without_keystone(self._networks, TOKEN),
            # Told in notifications; nobody is there.
            'glance': {'endpoint_override': 'http://127.0.0.1:1'},
            'service_user': {
                'send_service_user_token': 'true',
                'auth_type': 'admin_token',
                'endpoint': 'http://127.0.0.1:1',
                'token': 'service',
            },
            'scheduler': {'workers': 1},
            'conductor': {'workers': 1},
            'quota': {'instances': -1, 'cores': -1, 'ram': -1},
            'vnc': {'enabled': 'false'},
        }

    def _write_paste(self) -> None:
        text = (_ETC / 'api-paste.ini').read_text()
        theirs = 'keystonemiddleware.auth_token:filter_factory'
        assert theirs in text
        ours = text.replace(theirs, 'services.everybody:factory')
        (self.folder / 'api-paste.ini').write_text(ours)

    def sync(self) -> None:
        """Makes the databases."""
        database = self._infra.database
        database.create(_DATABASES)
        # Placement's beside Nova's.
        placement = program(
            'placement.cmd.manage', '--config-dir', self._placement_folder, 'db', 'sync'
        )
        beside = self.processes.start('placement-manage', placement)
        self._manage('api_db', 'sync')
        connection = database.url('nova_cell0')
        self._manage('cell_v2', 'map_cell0', '--database_connection', connection)
        self._manage('db', 'sync')
        self._manage('cell_v2', 'create_cell', '--name', 'cell1')
        self.processes.finish(beside)

    def _manage(self, *arguments: Any) -> None:
        argv = program('nova.cmd.manage', '--config-file', self.conf, *arguments)
        self.processes.run('nova-manage', argv)

    def start(self, *hosts: str) -> None:
        """Starts everything, with computes on these hosts."""
        start = self.processes.start
        start('networks', module('services.networks', self._networks))
        start(
            'placement',
            module('services.serve', 'placement.wsgi.api', self._placement),
            {'OS_PLACEMENT_CONFIG_DIR': str(self._placement_folder)},
        )
        self.processes.wait_for_port(self._placement, 'placement')
        for name in ('conductor', 'scheduler'):
            argv = program(f'nova.cmd.{name}', '--config-file', self.conf)
            start(f'nova-{name}', argv)
        start(
            'nova-api',
            module('services.serve', 'nova.wsgi.osapi_compute', self.port),
            {'OS_NOVA_CONFIG_DIR': str(self.folder)},
        )
        for host in hosts:
            self.start_compute(host)
        self.processes.wait_for_port(self.port, 'nova-api')
        for host in hosts:
            self.wait_for_compute(host)
        self._manage('cell_v2', 'discover_hosts')

    def start_compute(self, host: str) -> None:
        """Starts a host's nova-compute."""
        self.note_report(host)
        state = self.folder / host
        state.mkdir(exist_ok=True)
        # Nova refuses to start on a host that it knows and that has lost its id.
        (state / 'compute_id').write_text(node_id(host))
        conf = write(
            self.folder / f'{host}.conf', {'DEFAULT': {'host': host, 'state_path': state}}
        )
        files = ('--config-file', self.conf, '--config-file', conf)
        argv = module('services.hypervisor', *files)
        self.processes.start(f'nova-compute-{host}', argv, self._hypervisors.environment)

    def note_report(self, host: str) -> None:
        """Notes when Nova last heard of a host's compute; whoever touches its row counts."""
        self._reported[host] = (self.client.service(host) or {}).get('updated_at')

    def has_compute(self, host: str) -> bool:
        """Whether a host's nova-compute was started and not killed."""
        return self.processes.has(f'nova-compute-{host}')

    def kill_compute(self, host: str) -> None:
        """Kills a host's nova-compute."""
        self.processes.kill(f'nova-compute-{host}')

    def wait_for_compute(self, host: str) -> None:
        """Waits until a host's nova-compute reports, since that was noted."""

        def is_up() -> bool:
            service = self.client.service(host) or {}
            return service.get('state') == 'up' and (
                service['updated_at'] != self._reported[host]
            )

        self.processes.wait(f'nova-compute on {host} is down', is_up)


def _without_keystone(port: int, token: str) -> dict[str, Any]:
    endpoint = f'http://127.0.0.1:{port}'
    return {
        'auth_type': 'admin_token',
        'endpoint': endpoint,
        'endpoint_override': endpoint,
        'token': token,
    }
