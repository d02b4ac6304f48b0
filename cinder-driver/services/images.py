"""Glance, which keeps images as files."""

from __future__ import annotations

import pathlib
import shutil
import sys
from typing import Any

import requests

from services.block import write
from services.clients import Client
from services.identity import Identity
from services.infra import Infra
from services.processes import Processes, free_ports, module, program

_ETC = pathlib.Path(sys.prefix) / 'etc' / 'glance'


class Images:
    """Glance's interface, which is all there is of it."""

    def __init__(self, processes: Processes, infra: Infra, identity: Identity) -> None:
        self.processes = processes
        self.folder = processes.folder / 'glance'
        self.folder.mkdir()
        [self.port] = free_ports(1)
        self.url = f'http://127.0.0.1:{self.port}'
        self._database = infra.database
        for name in ('images', 'staging', 'tasks'):
            (self.folder / name).mkdir()
        shutil.copy(_ETC / 'glance-api-paste.ini', self.folder)
        self.conf = write(
            self.folder / 'glance-api.conf',
            {
                'DEFAULT': {
                    'enabled_backends': 'files:file',
                    'worker_self_reference_url': self.url,
                    'enabled_import_methods': '[]',
                },
                'glance_store': {'default_backend': 'files'},
                'files': {'filesystem_store_datadir': self.folder / 'images'},
                'os_glance_staging_store': {
                    'filesystem_store_datadir': self.folder / 'staging'
                },
                'os_glance_tasks_store': {'filesystem_store_datadir': self.folder / 'tasks'},
                'database': {'connection': infra.database.url('glance')},
                'paste_deploy': {'flavor': 'keystone'},
                **identity.sections('glance'),
            },
        )

    def sync(self) -> None:
        """Makes the tables."""
        self._database.create(['glance'])
        conf = ('--config-file', str(self.conf))
        self.processes.run('glance-manage', program('glance.cmd.manage', *conf, 'db_sync'))

    def start(self) -> None:
        """Serves it."""
        self.processes.start(
            'glance',
            module('services.serve', 'glance.wsgi.api', self.port),
            {'OS_GLANCE_CONFIG_DIR': str(self.folder)},
        )

    def wait(self, token: str) -> None:
        """Waits until it listens."""
        self.processes.wait_for_port(self.port, 'Glance')
        self._headers = {'X-Auth-Token': token}
        self.client = Client(f'{self.url}/v2', self.processes, self._headers)

    def upload(self, path: pathlib.Path, form: str, **more: Any) -> str:
        """Makes an image of a file; gives its id."""
        what = {'name': path.name, 'disk_format': form, 'container_format': 'bare', **more}
        image = self.client.call('POST', '/images', what)['id']
        self.put(image, path)
        return str(image)

    def put(self, image: str, path: pathlib.Path) -> None:
        """Gives an image its content."""
        headers = {**self._headers, 'Content-Type': 'application/octet-stream'}
        with open(path, 'rb') as file:
            url = f'{self.client.url}/images/{image}/file'
            requests.put(url, data=file, headers=headers, timeout=180).raise_for_status()

    def wait_for(self, image: str) -> dict[str, Any]:
        """An image, once its content is there."""

        def seen() -> dict[str, Any] | None:
            found: dict[str, Any] = self.client.call('GET', f'/images/{image}')
            assert found['status'] not in ('killed', 'deleted'), found
            return found if found['status'] == 'active' else None

        found: dict[str, Any] = self.processes.wait(f'image {image} is not there', seen)
        return found

    def download(self, image: str, path: pathlib.Path) -> pathlib.Path:
        """Writes an image's content to a file."""
        url = f'{self.client.url}/images/{image}/file'
        with (
            requests.get(url, headers=self._headers, stream=True, timeout=180) as answer,
            open(path, 'wb') as file,
        ):
            answer.raise_for_status()
            for piece in answer.iter_content(1 << 20):
                file.write(piece)
        return path

    def change(self, image: str, patch: list[dict[str, Any]]) -> None:
        """Changes what is said of an image."""
        kind = {'Content-Type': 'application/openstack-images-v2.1-json-patch'}
        self.client.call('PATCH', f'/images/{image}', patch, headers=kind)

    def delete(self, image: str) -> None:
        """The end of an image."""
        self.client.call('DELETE', f'/images/{image}')
