"""Stands in Nova's interface where Keystone's token would be checked.

Everybody is an administrator of one project.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PROJECT = '1' * 32
TOKEN = f'admin:{PROJECT}'

_HEADERS = {
    'HTTP_X_AUTH_TOKEN': TOKEN,
    'HTTP_X_IDENTITY_STATUS': 'Confirmed',
    'HTTP_X_PROJECT_ID': PROJECT,
    'HTTP_X_PROJECT_NAME': 'project',
    'HTTP_X_TENANT_ID': PROJECT,
    'HTTP_X_PROJECT_DOMAIN_ID': 'default',
    'HTTP_X_USER_DOMAIN_ID': 'default',
    'HTTP_X_USER_ID': '2' * 32,
    'HTTP_X_USER_NAME': 'admin',
    'HTTP_X_ROLES': 'admin,manager,member,reader,service',
    'HTTP_X_SERVICE_CATALOG': '[]',
}


def factory(global_config: Any, **local: Any) -> Callable[[Any], Any]:
    """A filter for Paste."""

    def pipe(application: Any) -> Any:
        def answer(environ: dict[str, Any], start: Any) -> Any:
            return application({**environ, **_HEADERS}, start)

        return answer

    return pipe
