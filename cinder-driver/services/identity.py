"""Keystone: who may do what, and where the services are.

Its tables and keys are made first; then it is served, and what the other services need is
said to its interface.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import requests

from services.block import Sections, write
from services.clients import Client
from services.infra import Infra
from services.processes import Processes, free_ports, module, program

REGION = 'RegionOne'
SERVICE_PROJECT = 'service'
# Of everybody: nothing here is a secret.
PASSWORD = 'password'


@dataclasses.dataclass(frozen=True)
class Scope:
    """A token, and what it is good for."""

    token: str
    project: str
    user: str


class Identity:
    """Keystone, with an administrator."""

    def __init__(self, processes: Processes, infra: Infra) -> None:
        self.processes = processes
        self.folder = processes.folder / 'keystone'
        self.folder.mkdir()
        [self.port] = free_ports(1)
        self.url = f'http://127.0.0.1:{self.port}/v3'
        self._database = infra.database
        keys = {kind: self.folder / kind for kind in ('fernet', 'credential')}
        for path in keys.values():
            path.mkdir(mode=0o700)
        self.conf = write(
            self.folder / 'keystone.conf',
            {
                'DEFAULT': {'public_endpoint': f'http://127.0.0.1:{self.port}'},
                'database': {'connection': infra.database.url('keystone')},
                'fernet_tokens': {'key_repository': keys['fernet']},
                'credential': {'key_repository': keys['credential']},
                # Longer than any run, and passwords that are checked in no time.
                'token': {'expiration': 36000},
                'identity': {'password_hash_rounds': 4},
                'cache': {'enabled': 'true', 'backend': 'dogpile.cache.memory'},
            },
        )

    def sync(self) -> None:
        """Makes tables, keys, and the administrator."""
        self._database.create(['keystone'])
        self._manage('db_sync')
        us = ('--keystone-user', 'root', '--keystone-group', 'root')
        self._manage('fernet_setup', *us)
        self._manage('credential_setup', *us)
        urls = [
            f'--bootstrap-{kind}-url={self.url}' for kind in ('public', 'internal', 'admin')
        ]
        password = f'--bootstrap-password={PASSWORD}'
        self._manage('bootstrap', password, f'--bootstrap-region-id={REGION}', *urls)

    def _manage(self, *arguments: str) -> None:
        conf = ('--config-file', str(self.conf))
        name = f'keystone-manage-{arguments[0]}'
        self.processes.run(name, program('keystone.cmd.manage', *conf, *arguments))

    def start(self) -> None:
        """Serves it, and makes the project of the services."""
        self.processes.start(
            'keystone',
            module('services.serve', 'keystone.wsgi.api', self.port),
            {'OS_KEYSTONE_CONFIG_FILES': str(self.conf)},
        )
        self.processes.wait_for_port(self.port, 'Keystone')
        self.admin = self.scope('admin', 'admin')
        self._client = Client(self.url, self.processes, {'X-Auth-Token': self.admin.token})
        self._roles = {role['name']: role['id'] for role in self._all('role')}
        project = {'name': SERVICE_PROJECT, 'domain_id': 'default'}
        self._project = self._make('project', project)

    def _all(self, kind: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._client.call('GET', f'/{kind}s')[f'{kind}s']
        return found

    def _make(self, kind: str, what: dict[str, Any]) -> str:
        return str(self._client.call('POST', f'/{kind}s', {kind: what})[kind]['id'])

    def add_service(self, name: str, kind: str, url: str) -> None:
        """A user that is a service, and where it is found."""
        user = {'name': name, 'domain_id': 'default', 'password': PASSWORD}
        user_id = self._make('user', user)
        for role in ('admin', 'service'):
            path = f'/projects/{self._project}/users/{user_id}/roles/{self._roles[role]}'
            self._client.call('PUT', path)
        service = self._make('service', {'name': name, 'type': kind})
        for interface in ('public', 'internal', 'admin'):
            where = {'interface': interface, 'url': url, 'region_id': REGION}
            self._make('endpoint', {'service_id': service, **where})

    def scope(self, user: str, project: str) -> Scope:
        """A token of a user's for a project."""
        who = {'name': user, 'domain': {'id': 'default'}, 'password': PASSWORD}
        scope = {'project': {'name': project, 'domain': {'id': 'default'}}}
        methods = {'methods': ['password'], 'password': {'user': who}}
        answer = requests.post(
            f'{self.url}/auth/tokens',
            json={'auth': {'identity': methods, 'scope': scope}},
            timeout=60,
        )
        answer.raise_for_status()
        token = answer.json()['token']
        return Scope(
            answer.headers['X-Subject-Token'], token['project']['id'], token['user']['id']
        )

    def section(self, name: str) -> dict[str, Any]:
        """What a service's configuration says of itself."""
        return {
            'auth_type': 'password',
            'auth_url': self.url,
            'www_authenticate_uri': self.url,
            'username': name,
            'password': PASSWORD,
            'project_name': SERVICE_PROJECT,
            'user_domain_id': 'default',
            'project_domain_id': 'default',
            'region_name': REGION,
        }

    def sections(self, name: str) -> Sections:
        """The sections of a service that checks tokens."""
        checks = {'service_token_roles': 'service', 'service_token_roles_required': 'true'}
        return {'keystone_authtoken': {**self.section(name), **checks}}
