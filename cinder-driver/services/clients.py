"""What a test says to the services' interfaces, in their words."""

from __future__ import annotations

from typing import Any

import requests

from services.everybody import TOKEN
from services.processes import Processes


class Refused(AssertionError):
    """An interface answered with an error."""

    def __init__(self, what: str, answer: requests.Response) -> None:
        super().__init__(f'{what}: {answer.status_code} {answer.text[:600]}')
        self.status = answer.status_code
        self.text = answer.text


class Client:
    """An interface, called as an administrator."""

    def __init__(self, url: str, processes: Processes, headers: dict[str, str]) -> None:
        self.url = url
        self.processes = processes
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.headers.update(headers)

    def call(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Any:
        """The answer to any request; raises Refused."""
        answer = self._session.request(
            method,
            self.url + path,
            json=body,
            headers=headers,
            timeout=self.processes.patience + 60,
        )
        if answer.status_code >= 300:
            raise Refused(f'{method} {path}', answer)
        return answer.json() if answer.content else {}

    def get(self, path: str) -> Any:
        """What is there; None if nothing is."""
        try:
            return self.call('GET', path)
        except Refused as refused:
            if refused.status == 404:
                return None
            raise


def _connector(host: str) -> dict[str, str]:
    return {'host': host, 'ip': '127.0.0.1', 'initiator': 'iqn', 'mountpoint': 'vdb'}


class Block(Client):
    """Cinder's."""

    def __init__(
        self, url: str, processes: Processes, headers: dict[str, str] | None = None
    ) -> None:
        ours = {'X-Auth-Token': TOKEN, 'OpenStack-API-Version': 'volume 3.71'}
        super().__init__(url, processes, {**ours, **(headers or {})})

    def pools(self) -> set[str]:
        """Those that the scheduler knows."""
        try:
            answer = self.call('GET', '/scheduler-stats/get_pools')
        except (Refused, requests.ConnectionError):
            return set()
        return {pool['name'] for pool in answer['pools']}

    def create(self, size: int = 1, **more: Any) -> dict[str, Any]:
        """A volume that is there."""
        volume = self.call('POST', '/volumes', {'volume': {'size': size, **more}})
        return self.wait(volume['volume']['id'], 'available')

    def show(self, volume: str) -> dict[str, Any]:
        """A volume; one that is not there has the status `gone`."""
        answer = self.get(f'/volumes/{volume}')
        return answer['volume'] if answer else {'id': volume, 'status': 'gone'}

    def wait(self, volume: str, *states: str) -> dict[str, Any]:
        """A volume, once it has one of these states."""

        def seen() -> dict[str, Any] | None:
            row = self.show(volume)
            assert row['status'] in states or not row['status'].startswith('error'), row
            return row if row['status'] in states else None

        return self.processes.wait(f'{volume} is not {states}', seen)

    def act(self, one: str, kind: str = 'volumes', **action: Any) -> Any:
        """An action of a volume's, by its name with underscores."""
        named = {name.replace('_', '-', 1): body for name, body in action.items()}
        return self.call('POST', f'/{kind}/{one}/action', named)

    def attach(self, volume: str, instance: str, host: str) -> dict[str, Any]:
        """An attachment with its connector, completed, as Nova makes it."""
        body = {'volume_uuid': volume, 'instance_uuid': instance, 'connector': _connector(host)}
        made = self.call('POST', '/attachments', {'attachment': body})['attachment']
        self.call('POST', f'/attachments/{made["id"]}/action', {'os-complete': {}})
        return made

    def connect_again(self, attachment: str, host: str) -> None:
        """Connects the volume of an attachment once more, to where it is connected."""
        body = {'attachment': {'connector': _connector(host)}}
        self.call('PUT', f'/attachments/{attachment}', body)
        self.call('POST', f'/attachments/{attachment}/action', {'os-complete': {}})

    def detach(self, attachment: str) -> None:
        """The end of an attachment."""
        self.call('DELETE', f'/attachments/{attachment}')

    def attachments(self, volume: str) -> list[dict[str, Any]]:
        """All of a volume's, with their details."""
        path = f'/attachments/detail?all_tenants=1&volume_id={volume}'
        return self.call('GET', path)['attachments']

    def snapshot(self, volume: str) -> str:
        """A snapshot that is there, also of a volume in use."""
        what = {'snapshot': {'volume_id': volume, 'force': True}}
        snapshot = str(self.call('POST', '/snapshots', what)['snapshot']['id'])
        self.wait_snapshot(snapshot, 'available')
        return snapshot

    def wait_snapshot(self, snapshot: str, *states: str) -> None:
        """Waits until a snapshot has one of these states."""

        def seen() -> bool:
            answer = self.get(f'/snapshots/{snapshot}')
            status = answer['snapshot']['status'] if answer else 'gone'
            assert status in states or not status.startswith('error'), status
            return status in states

        self.processes.wait(f'{snapshot} is not {states}', seen)

    def delete_snapshot(self, snapshot: str) -> None:
        """The end of a snapshot."""
        self.call('DELETE', f'/snapshots/{snapshot}')
        self.wait_snapshot(snapshot, 'gone')

    def delete(self, volume: str) -> None:
        """The end of a volume."""
        self.call('DELETE', f'/volumes/{volume}')
        self.wait(volume, 'gone')


class Compute(Client):
    """Nova's."""

    def __init__(self, url: str, processes: Processes) -> None:
        super().__init__(
            url, processes, {'X-Auth-Token': TOKEN, 'OpenStack-API-Version': 'compute 2.100'}
        )

    def service(self, host: str) -> dict[str, Any] | None:
        """What Nova knows of a host's nova-compute."""
        path = f'/os-services?binary=nova-compute&host={host}'
        try:
            services = self.call('GET', path)['services']
        except (Refused, requests.ConnectionError):
            return None
        return services[0] if services else None

    def force_down(self, host: str, is_down: bool) -> None:
        """An operator's word that a host's compute is down."""
        service = self.service(host) or {}
        self.call('PUT', f'/os-services/{service["id"]}', {'forced_down': is_down})

    def make_flavors(self) -> None:
        """Two, of which the second is larger."""
        for number in (1, 2):
            flavor = {'id': str(number), 'name': f'm{number}', 'vcpus': number, 'disk': 0}
            self.call('POST', '/flavors', {'flavor': {**flavor, 'ram': 128 * number}})

    def boot(self, host: str | None, *volumes: str) -> str:
        """An instance that boots from the first volume; does not wait for it."""
        mapping = [
            {
                'boot_index': 0 if number == 0 else -1,
                'uuid': volume,
                'source_type': 'volume',
                'destination_type': 'volume',
                'delete_on_termination': False,
            }
            for number, volume in enumerate(volumes)
        ]
        server = {
            'name': 'guest',
            'flavorRef': '1',
            'networks': 'none',
            'block_device_mapping_v2': mapping,
            **({'host': host} if host else {}),
        }
        return str(self.call('POST', '/servers', {'server': server})['server']['id'])

    def show(self, server: str) -> dict[str, Any]:
        """An instance; one that is not there has the status `gone`."""
        answer = self.get(f'/servers/{server}')
        if answer is None:
            return {'status': 'gone', 'task': None, 'host': None}
        row = answer['server']
        return {
            'status': row['status'],
            'task': row['OS-EXT-STS:task_state'],
            'host': row['OS-EXT-SRV-ATTR:host'],
            'fault': (row.get('fault') or {}).get('message'),
        }

    def wait(self, server: str, *states: str) -> dict[str, Any]:
        """An instance, once it has one of these states and nothing goes on."""

        def seen() -> dict[str, Any] | None:
            row = self.show(server)
            if row['task'] is not None:
                return None
            assert row['status'] in states or row['status'] != 'ERROR', row
            return row if row['status'] in states else None

        return self.processes.wait(f'the instance {server} is not {states}', seen)

    def act(self, server: str, action: str, body: Any = None, version: str = '2.100') -> None:
        """An action of an instance's; does not wait for what it begins."""
        headers = {'OpenStack-API-Version': f'compute {version}'}
        self.call('POST', f'/servers/{server}/action', {action: body}, headers)

    def migrations(self, server: str) -> list[dict[str, Any]]:
        """An instance's, the last first."""
        path = f'/os-migrations?instance_uuid={server}'
        rows = self.call('GET', path)['migrations']
        return sorted(rows, key=lambda row: row['id'], reverse=True)

    def attach(self, server: str, volume: str) -> None:
        """Begins to attach a volume."""
        body = {'volumeAttachment': {'volumeId': volume}}
        self.call('POST', f'/servers/{server}/os-volume_attachments', body)

    def detach(self, server: str, volume: str) -> None:
        """Begins to detach a volume."""
        self.call('DELETE', f'/servers/{server}/os-volume_attachments/{volume}')

    def delete(self, server: str) -> None:
        """The end of an instance."""
        self.call('DELETE', f'/servers/{server}')
        self.wait(server, 'gone')
