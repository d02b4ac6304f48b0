"""Cinder's api, scheduler and volume service in one process, with this driver.

    python -m cinder_dmlocal.tests.whole FOLDER NODE=HOST:PORT…

FOLDER has ca.pem, driver.pem and driver.key, and takes what Cinder writes: who starts this
again with the same folder goes on. A node without an endpoint is declared dead. Each line
of standard input is an order, {"do": …}, and each has one line of standard output as its
answer; the first line says that all is up. SQLite, no message broker, no Keystone.
"""

from __future__ import annotations

# Before anything else is imported: Cinder's services run in green threads.
from cinder import monkey_patch

monkey_patch.patch()

# ruff: noqa: E402
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import eventlet
import os_brick
import requests
from cinder import objects, rpc, service, version
from cinder.cmd import volume as cmd_volume
from cinder.common import (
    config,  # noqa: F401 - registers the options
    constants,
)
from cinder.db import migration
from eventlet import tpool
from oslo_config import cfg
from oslo_log import log as logging

from cinder_dmlocal.tests import trusting

PORT = 18779
SOON = 180.0

# What docs/cinder.md recommends: what had no room is not asked again.
FILTERS = 'AvailabilityZoneFilter,CapacityFilter,CapabilitiesFilter,IgnoreAttemptedHostsFilter'


def configuration(folder: pathlib.Path, nodes: dict[str, str]) -> str:
    """Text of cinder.conf."""
    etc = pathlib.Path(sys.prefix) / 'etc' / 'cinder'
    (folder / 'api-paste.ini').write_text(trusting.paste())
    endpoints = ', '.join(f'{name}:{endpoint}' for name, endpoint in nodes.items() if endpoint)
    return f"""[DEFAULT]
log_file = {folder}/cinder.log
debug = true
state_path = {folder}
api_paste_config = {folder}/api-paste.ini
rootwrap_config = {etc}/rootwrap.conf
resource_query_filters_file = {etc}/resource_filters.json
auth_strategy = noauth
osapi_volume_listen = 127.0.0.1
osapi_volume_listen_port = {PORT}
osapi_volume_workers = 1
my_ip = 127.0.0.1
host = fleet
transport_url = kombu+memory://
enabled_backends = dmlocal
default_volume_type = __DEFAULT__
scheduler_driver_init_wait_time = 1
report_interval = 1
service_down_time = 15
scheduler_default_filters = {FILTERS}
periodic_interval = 2
backend_stats_polling_interval = 3
rpc_response_timeout = 120
quota_volumes = -1

[dmlocal]
volume_driver = cinder_dmlocal.driver.DmLocalDriver
volume_backend_name = dmlocal
dmlocal_nodes = {', '.join(nodes)}
dmlocal_endpoints = {endpoints}
dmlocal_dead_nodes = {', '.join(name for name, endpoint in nodes.items() if not endpoint)}
dmlocal_ca = {folder}/ca.pem
dmlocal_cert = {folder}/driver.pem
dmlocal_key = {folder}/driver.key
dmlocal_call_timeout = 100

[database]
connection = sqlite:///{folder}/cinder.sqlite

[oslo_concurrency]
lock_path = {folder}

[coordination]
backend_url = file://{folder}

[key_manager]
backend = cinder.keymgr.conf_key_mgr.ConfKeyManager
fixed_key = {'0' * 64}
"""


def start(folder: pathlib.Path, nodes: dict[str, str], more: str = '') -> list[Any]:
    """Starts the three services; gives them so that somebody keeps them.

    What `more` of the configuration says counts more.
    """
    path = folder / 'cinder.conf'
    path.write_text(configuration(folder, nodes) + more)
    objects.register_all()
    cfg.CONF(['--config-file', str(path)], project='cinder', version=version.version_string())
    logging.setup(cfg.CONF, 'cinder')
    os_brick.setup(cfg.CONF)
    migration.db_sync()
    rpc.init(cfg.CONF)
    cfg.CONF.register_opt(cmd_volume.host_opt, group='dmlocal')
    # Services of one process have one row for their heartbeats: it is cinder-volume's.
    scheduler = service.Service.create(binary=constants.SCHEDULER_BINARY, report_interval=0)
    volume = service.Service.create(
        host='fleet@dmlocal',
        service_name='dmlocal',
        binary=constants.VOLUME_BINARY,
        coordination=True,
    )
    api = service.WSGIService('osapi_volume')
    for one in (scheduler, volume, api):
        one.start()
    return [scheduler, volume, api]


class Orders:
    """What may be ordered, each in the words of Cinder's API."""

    def __init__(self) -> None:
        self._session = requests.Session()
        self._session.headers.update(
            {'X-Auth-Token': 'admin:project', 'OpenStack-API-Version': 'volume 3.71'}
        )

    def call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """Any request."""
        url = f'http://127.0.0.1:{PORT}/v3{path}'
        answer = self._session.request(method, url, json=body, timeout=180)
        content = answer.json() if answer.content else {}
        return {'status': answer.status_code, 'body': content}

    def wait(self, volume: str, states: list[str]) -> dict[str, Any]:
        """Until the volume has one of these states; `gone` is one."""
        row = self.until(f'/volumes/{volume}', 'volume', states)
        return {'status': row['status'], 'host': row.get('os-vol-host-attr:host')}

    def until(self, path: str, kind: str, states: list[str]) -> dict[str, Any]:
        """Until what is at the path has one of these states; `gone` is one."""
        until = time.monotonic() + SOON
        while True:
            body = self.call('GET', path)['body']
            row: dict[str, Any] = body.get(kind, {'status': 'gone'})
            if row['status'] in states or time.monotonic() > until:
                return row
            eventlet.sleep(0.1)

    def create(self, size: int = 1, **more: Any) -> dict[str, Any]:
        """A volume; waits until it is there."""
        answer = self.call('POST', '/volumes', {'volume': {'size': size, **more}})
        volume = answer['body']['volume']['id']
        return {'id': volume, **self.wait(volume, ['available', 'error'])}

    def attach(self, volume: str, instance: str, host: str) -> dict[str, Any]:
        """An attachment with its connector, completed, as live migration makes it."""
        body = {'volume_uuid': volume, 'instance_uuid': instance, 'connector': _connector(host)}
        return self._complete(self.call('POST', '/attachments', {'attachment': body}))

    def reserve(self, volume: str, instance: str) -> dict[str, Any]:
        """An attachment without a connector, which keeps the volume for an instance."""
        body = {'volume_uuid': volume, 'instance_uuid': instance}
        answer = self.call('POST', '/attachments', {'attachment': body})
        return {'status': answer['status'], 'id': answer['body']['attachment']['id']}

    def connect(self, attachment: str, host: str) -> dict[str, Any]:
        """The connector of a reserved attachment, which is completed."""
        body = {'connector': _connector(host)}
        path = f'/attachments/{attachment}'
        return self._complete(self.call('PUT', path, {'attachment': body}))

    def _complete(self, answer: dict[str, Any]) -> dict[str, Any]:
        if answer['status'] >= 300:
            return answer
        attachment = answer['body']['attachment']
        done = self.call('POST', f'/attachments/{attachment["id"]}/action', {'os-complete': {}})
        info = attachment['connection_info']
        return {'status': done['status'], 'id': attachment['id'], 'path': info['device_path']}

    def detach(self, attachment: str) -> dict[str, Any]:
        """The end of an attachment."""
        return self.call('DELETE', f'/attachments/{attachment}')

    def delete(self, volume: str) -> dict[str, Any]:
        """The end of a volume."""
        self.call('DELETE', f'/volumes/{volume}')
        return self.wait(volume, ['gone', 'error_deleting'])

    def snapshot(self, volume: str) -> dict[str, Any]:
        """A snapshot; waits until it is there."""
        body = {'snapshot': {'volume_id': volume, 'force': True}}
        snapshot = self.call('POST', '/snapshots', body)['body']['snapshot']['id']
        row = self.until(f'/snapshots/{snapshot}', 'snapshot', ['available', 'error'])
        return {'id': snapshot, 'status': row['status']}

    def delete_snapshot(self, snapshot: str) -> dict[str, Any]:
        """The end of a snapshot."""
        self.call('DELETE', f'/snapshots/{snapshot}')
        return self.until(f'/snapshots/{snapshot}', 'snapshot', ['gone', 'error_deleting'])

    def service(self, state: str) -> dict[str, Any]:
        """Waits until cinder-volume is up or down."""
        until = time.monotonic() + SOON
        while True:
            answer = self.call('GET', '/os-services?binary=cinder-volume')
            [found] = answer['body']['services']
            if found['state'] == state or time.monotonic() > until:
                return dict(found)
            eventlet.sleep(0.2)

    def up(self, pools: int) -> dict[str, Any]:
        """Waits until the scheduler knows so many pools."""
        until = time.monotonic() + SOON
        while True:
            answer = self.call('GET', '/scheduler-stats/get_pools')
            names = [pool['name'] for pool in answer['body'].get('pools', [])]
            if len(names) >= pools or time.monotonic() > until:
                return {'pools': sorted(names)}
            eventlet.sleep(0.2)


def _connector(host: str) -> dict[str, Any]:
    return {'host': host, 'ip': '10.77.0.1', 'initiator': 'iqn', 'mountpoint': 'vdb'}


def obey(orders: Orders, answers: Any) -> None:
    """Does what standard input says, until it ends."""
    while line := tpool.execute(sys.stdin.readline):
        order = json.loads(line)
        try:
            answer = getattr(orders, order.pop('do'))(**order)
        except Exception as error:  # noqa: BLE001 - whoever ordered it is told
            answer = {'error': repr(error)}
        print(json.dumps(answer), file=answers, flush=True)


def main(
    begin: Callable[..., list[Any]] = start, orders_of: Callable[[], Orders] = Orders
) -> None:
    """Begins, and ends with standard input."""
    folder = pathlib.Path(sys.argv[1])
    nodes = dict(argument.split('=', 1) for argument in sys.argv[2:])
    # What libraries print is not an answer.
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    kept = begin(folder, nodes)
    orders = orders_of()
    alive = sum(1 for endpoint in nodes.values() if endpoint)
    print(json.dumps(orders.up(alive)), file=answers, flush=True)
    obey(orders, answers)
    del kept
    os._exit(0)


if __name__ == '__main__':
    main()
