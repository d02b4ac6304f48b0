"""What a test says to the services' interfaces, in their words."""

from __future__ import annotations

from typing import Any

import requests

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
            method, self.url + path, json=body, headers=headers, timeout=180
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


class Block(Client):
    """Cinder's."""

    def __init__(
        self, url: str, processes: Processes, headers: dict[str, str] | None = None
    ) -> None:
        ours = {'X-Auth-Token': 'admin:project', 'OpenStack-API-Version': 'volume 3.71'}
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

    def act(self, volume: str, **action: Any) -> Any:
        """An action of a volume's, by its name with underscores."""
        named = {name.replace('_', '-', 1): body for name, body in action.items()}
        return self.call('POST', f'/volumes/{volume}/action', named)

    def attach(self, volume: str, instance: str, host: str) -> dict[str, Any]:
        """An attachment with its connector, completed, as Nova makes it."""
        connector = {'host': host, 'ip': '127.0.0.1', 'initiator': 'iqn', 'mountpoint': 'vdb'}
        body = {'volume_uuid': volume, 'instance_uuid': instance, 'connector': connector}
        made = self.call('POST', '/attachments', {'attachment': body})['attachment']
        self.call('POST', f'/attachments/{made["id"]}/action', {'os-complete': {}})
        return made

    def detach(self, attachment: str) -> None:
        """The end of an attachment."""
        self.call('DELETE', f'/attachments/{attachment}')

    def attachments(self, volume: str) -> list[dict[str, Any]]:
        """All of a volume's, with their details."""
        path = f'/attachments/detail?all_tenants=1&volume_id={volume}'
        return self.call('GET', path)['attachments']

    def delete(self, volume: str) -> None:
        """The end of a volume."""
        self.call('DELETE', f'/volumes/{volume}')
        self.wait(volume, 'gone')
