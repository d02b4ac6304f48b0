"""Cinder's services as processes: api, scheduler, any number of volume, and backup.

Over MariaDB and RabbitMQ. Without Keystone everybody is an administrator; with it, its
sections and paste file are given by whoever starts it.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from cinder_dmlocal.tests import trusting
from services.clients import Block as Client
from services.infra import Infra
from services.processes import Processes, free_ports, program

Sections = Mapping[str, Mapping[str, Any]]

_ETC = pathlib.Path(sys.prefix) / 'etc' / 'cinder'
HOST = 'fleet'


def agents(folder: pathlib.Path, endpoints: Mapping[str, str]) -> dict[str, Any]:
    """The section of a backend of this driver; the folder has the certificates."""
    return {
        'volume_driver': 'cinder_dmlocal.driver.DmLocalDriver',
        'dmlocal_nodes': ', '.join(endpoints),
        'dmlocal_endpoints': ', '.join(f'{node}:{at}' for node, at in endpoints.items()),
        'dmlocal_ca': folder / 'ca.pem',
        'dmlocal_cert': folder / 'driver.pem',
        'dmlocal_key': folder / 'driver.key',
    }


def merged(*all_sections: Sections) -> dict[str, dict[str, Any]]:
    """Sections of a configuration; what comes later counts more."""
    result: dict[str, dict[str, Any]] = {}
    for sections in all_sections:
        for name, settings in sections.items():
            result.setdefault(name, {}).update(settings)
    return result


def write(path: pathlib.Path, *all_sections: Sections) -> pathlib.Path:
    """A file that oslo.config reads."""
    lines = []
    for name, settings in merged(*all_sections).items():
        lines.append(f'[{name}]')
        for key, value in settings.items():
            values = value if isinstance(value, list) else [value]
            lines += [f'{key} = {one}' for one in values]
    path.write_text('\n'.join(lines) + '\n')
    return path


class Cinder:
    """Cinder's services, with what their configurations say."""

    def __init__(
        self,
        processes: Processes,
        infra: Infra,
        backends: Sections,
        more: Sections | None = None,
        paste: str | None = None,
    ) -> None:
        self.processes = processes
        self.folder = processes.folder / 'cinder'
        self.folder.mkdir()
        (self.folder / 'locks').mkdir()
        [self.port] = free_ports(1)
        self.url = f'http://127.0.0.1:{self.port}/v3'
        self.client = Client(self.url, self.processes)
        _make_root(processes.folder / 'bin')
        (self.folder / 'api-paste.ini').write_text(paste or trusting.paste())
        self._backends = backends
        self._sections = merged(self._own(infra, list(backends)), more or {})
        self._database = infra.database
        self.conf = write(self.folder / 'cinder.conf', self._sections, backends)

    def _own(self, infra: Infra, backends: list[str]) -> Sections:
        return {
            'DEFAULT': {
                'debug': 'true',
                'state_path': self.folder,
                'api_paste_config': self.folder / 'api-paste.ini',
                'resource_query_filters_file': _ETC / 'resource_filters.json',
                'auth_strategy': 'noauth',
                'osapi_volume_listen': '127.0.0.1',
                'osapi_volume_listen_port': self.port,
                'osapi_volume_workers': 1,
                'my_ip': '127.0.0.1',
                'host': HOST,
                'transport_url': infra.broker.url,
                'enabled_backends': ', '.join(backends),
                'default_volume_type': '__DEFAULT__',
                'scheduler_driver_init_wait_time': 1,
                'report_interval': 1,
                'service_down_time': 10,
                'periodic_interval': 2,
                'periodic_fuzzy_delay': 1,
                'backend_stats_polling_interval': 3,
                'rpc_response_timeout': 120,
                'quota_volumes': -1,
                'quota_snapshots': -1,
                'quota_gigabytes': -1,
                'quota_backups': -1,
                'quota_backup_gigabytes': -1,
            },
            **{name: {'volume_backend_name': name} for name in backends},
            'database': {'connection': infra.database.url('cinder')},
            'oslo_concurrency': {'lock_path': self.folder / 'locks'},
            'coordination': {'backend_url': f'file://{self.folder}'},
            'key_manager': {
                'backend': 'cinder.keymgr.conf_key_mgr.ConfKeyManager',
                'fixed_key': '0' * 64,
            },
        }

    def sync(self) -> None:
        """Makes the database."""
        self._database.create(['cinder'])
        self.processes.run(
            'cinder-manage',
            program('cinder.cmd.manage', '--config-file', self.conf, 'db', 'sync'),
        )

    def start(self, *names: str) -> None:
        """Starts services: `api`, `scheduler`, `backup` or `volume`."""
        for name in names:
            argv = program(f'cinder.cmd.{name}', '--config-file', self.conf)
            self.processes.start(f'cinder-{name}', argv)

    def start_volume(self, name: str, more: Sections) -> None:
        """Starts a cinder-volume whose configuration says something else or more."""
        path = self.folder / f'cinder-{name}.conf'
        conf = write(path, self._sections, self._backends, more)
        argv = program('cinder.cmd.volume', '--config-file', conf)
        self.processes.start(f'cinder-volume-{name}', argv)

    def restart_volume(self, more: Sections | None = None) -> None:
        """Kills cinder-volume, and starts it with something else or more configured."""
        self.processes.kill('cinder-volume')
        write(self.conf, self._sections, self._backends, more or {})
        self.start('volume')

    def wait(self, *pools: str) -> None:
        """Waits until the scheduler knows these pools."""
        self.processes.wait_for_port(self.port, 'cinder-api')
        wanted = set(pools)
        self.processes.wait(
            f'the scheduler does not know {wanted}', lambda: wanted <= self.client.pools()
        )


def _make_root(folder: pathlib.Path) -> None:
    """Stands in for sudo, which root does not need, and for what it would be asked to run.

    Cinder says `sudo cinder-rootwrap CONF COMMAND…`. What rootwrap allows is Cinder's
    affair, and its script knows only where this environment was made. Nothing is encrypted
    with the kernel of whoever tests.
    """
    folder.mkdir(exist_ok=True)
    helper = f'exec {sys.executable} -c "from oslo_privsep import daemon; daemon.helper_main()"'
    commands = {
        'sudo': 'shift 2; exec "$@"',
        'privsep-helper': f'{helper} "$@"',
        'cryptsetup': 'exit 1',
    }
    for name, command in commands.items():
        path = folder / name
        path.write_text(f'#!/bin/sh\n{command}\n')
        path.chmod(0o755)
