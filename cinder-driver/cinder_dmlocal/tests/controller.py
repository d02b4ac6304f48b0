"""Cinder on a host of its own, which attaches volumes itself: with Glance and cinder-backup.

    python -m cinder_dmlocal.tests.controller FOLDER NODE=HOST:PORT…

As `whole`, with more that can be ordered. The host is one of the nodes, and this runs as
root there. Glance is a process of its own, which ends with this one.
"""

from __future__ import annotations

# Before anything else is imported: Cinder's services run in green threads.
from cinder import monkey_patch

monkey_patch.patch()

# ruff: noqa: E402
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any

import cinder.privsep
import eventlet
import os_brick.privileged
import requests
from cinder import service

from cinder_dmlocal.tests import whole

IMAGES = 'http://127.0.0.1:19292'

# What everybody may do, because nobody has proved to be somebody.
_ALLOWED = [
    *(f'{verb}_image' for verb in ('add', 'get', 'modify', 'delete', 'upload', 'download')),
    'get_images',
]


def configuration(folder: pathlib.Path) -> str:
    """What cinder.conf says beyond that of `whole`.

    The services of one process tell the database only of the last of them that they live.
    """
    return f"""
[DEFAULT]
service_down_time = 86400
report_interval = 10
debug = false
image_compress_on_upload = false
glance_api_servers = {IMAGES}
backup_driver = cinder.backup.drivers.posix.PosixBackupDriver
backup_posix_path = {folder}/backups
backup_compression_algorithm = none
backup_file_size = 33554432
image_conversion_dir = {folder}/conversion

[dmlocal]
dmlocal_look_timeout = 20
"""


def _glance_configuration(folder: pathlib.Path) -> str:
    stores = ''.join(
        f'[{section}]\nfilesystem_store_datadir = {folder}/{name}\n'
        for section, name in (
            ('files', 'images'),
            ('os_glance_staging_store', 'staging'),
            ('os_glance_tasks_store', 'tasks'),
        )
    )
    return f"""[DEFAULT]
enabled_backends = files:file
enabled_import_methods = []
worker_self_reference_url = {IMAGES}
[glance_store]
default_backend = files
{stores}[database]
connection = sqlite:///{folder}/glance.sqlite
[oslo_policy]
enforce_scope = false
policy_file = {folder}/policy.json
"""


def start_glance(folder: pathlib.Path) -> None:
    """Starts it; whoever asks is an administrator."""
    if not folder.exists():
        for name in ('images', 'staging', 'tasks'):
            (folder / name).mkdir(parents=True)
        shutil.copy(pathlib.Path(sys.prefix) / 'etc/glance/glance-api-paste.ini', folder)
        (folder / 'glance-api.conf').write_text(_glance_configuration(folder))
        (folder / 'policy.json').write_text(json.dumps(dict.fromkeys(_ALLOWED, '@')))
        sync = 'import sys; from glance.cmd.manage import main; sys.exit(main())'
        conf = ['--config-file', str(folder / 'glance-api.conf')]
        subprocess.run([sys.executable, '-c', sync, *conf, 'db_sync'], check=True)
    listen = IMAGES.removeprefix('http://')
    with open(folder / 'log', 'a') as log:
        program = [sys.executable, '-m', 'waitress', f'--listen={listen}']
        subprocess.Popen(
            ['setpriv', '--pdeathsig', 'KILL', *program, 'glance.wsgi.api:application'],
            env={**os.environ, 'OS_GLANCE_CONFIG_DIR': str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def start(folder: pathlib.Path, nodes: dict[str, str]) -> list[Any]:
    """Starts everything; returns when Glance answers."""
    for name in ('backups', 'conversion'):
        (folder / name).mkdir(exist_ok=True)
    start_glance(folder / 'glance')
    # What needs root is done here, and not by a helper that sudo starts.
    cinder.privsep.sys_admin_pctxt.set_client_mode(False)
    os_brick.privileged.default.set_client_mode(False)
    kept = whole.start(folder, nodes, configuration(folder))
    backup = service.Service.create(
        binary='cinder-backup', coordination=True, service_name='backup', process_number=1
    )
    backup.start()
    until = time.monotonic() + whole.SOON
    while not _answers():
        assert time.monotonic() < until, 'Glance does not answer'
        eventlet.sleep(0.2)
    return [*kept, backup]


def _answers() -> bool:
    try:
        return requests.get(f'{IMAGES}/v2/images', timeout=30).ok
    except requests.ConnectionError:
        return False


class Orders(whole.Orders):
    """What may be ordered of these services."""

    def up(self, pools: int) -> dict[str, Any]:
        """Waits until the scheduler knows the pools of all nodes but this."""
        return super().up(pools - 1)

    def image(self, path: str, form: str) -> dict[str, Any]:
        """An image of a file."""
        what = {'name': path, 'disk_format': form, 'container_format': 'bare'}
        image = requests.post(f'{IMAGES}/v2/images', json=what, timeout=180).json()['id']
        headers = {'Content-Type': 'application/octet-stream'}
        with open(path, 'rb') as file:
            url = f'{IMAGES}/v2/images/{image}/file'
            requests.put(url, data=file, headers=headers, timeout=180).raise_for_status()
        return {'id': image}

    def upload(self, volume: str, form: str) -> dict[str, Any]:
        """An image of a volume; waits until it is there."""
        body = {'image_name': volume, 'disk_format': form, 'container_format': 'bare'}
        action = {'os-volume_upload_image': body}
        answer = self.call('POST', f'/volumes/{volume}/action', action)
        image = answer['body']['os-volume_upload_image']['image_id']
        return {'id': image, **self.wait(volume, ['available', 'in-use', 'error'])}

    def delete_image(self, image: str) -> dict[str, Any]:
        """The end of an image."""
        answer = requests.delete(f'{IMAGES}/v2/images/{image}', timeout=180)
        return {'status': answer.status_code}

    def backup(self, volume: str, *, force: bool = False) -> dict[str, Any]:
        """A backup; waits until it is there."""
        body = {'backup': {'volume_id': volume, 'force': force}}
        backup = self.call('POST', '/backups', body)['body']['backup']['id']
        row = self.until(f'/backups/{backup}', 'backup', ['available', 'error'])
        return {'id': backup, 'status': row['status']}

    def restore(self, backup: str, volume: str) -> dict[str, Any]:
        """A volume gets a backup's content; waits until it has it."""
        self.call('POST', f'/backups/{backup}/restore', {'restore': {'volume_id': volume}})
        self.until(f'/backups/{backup}', 'backup', ['available', 'error'])
        return self.wait(volume, ['available', 'error', 'error_restoring'])

    def delete_backup(self, backup: str) -> dict[str, Any]:
        """The end of a backup."""
        self.call('DELETE', f'/backups/{backup}')
        return self.until(f'/backups/{backup}', 'backup', ['gone', 'error'])

    def copy(self, volume: str, node: str) -> dict[str, Any]:
        """Has Cinder itself copy a volume to another pool; waits until it has."""
        body = {'host': f'fleet@dmlocal#{node}', 'force_host_copy': True}
        self.call('POST', f'/volumes/{volume}/action', {'os-migrate_volume': body})
        until = time.monotonic() + whole.SOON
        while True:
            row = self.call('GET', f'/volumes/{volume}')['body']['volume']
            status = row['os-vol-mig-status-attr:migstat']
            if status in {'success', 'error'} or time.monotonic() > until:
                return {
                    'status': status,
                    'host': row['os-vol-host-attr:host'],
                    'id': row['os-vol-mig-status-attr:name_id'],
                }
            eventlet.sleep(0.2)


if __name__ == '__main__':
    whole.main(start, Orders)
