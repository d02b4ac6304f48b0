"""What users are told where Cinder itself tells them nothing.

Users see messages from a list that is Cinder's and fixed; why something failed is in the
answer to whoever attaches, and in the log of cinder-volume. Of what Cinder's manager
tells by itself (blank volumes, growth, snapshots) nothing is told here.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from cinder.message import api, message_field

ATTACH = (message_field.Action.ATTACH_VOLUME, message_field.Detail.ATTACH_ERROR)
DETACH = (message_field.Action.UPDATE_ATTACHMENT, message_field.Detail.DETACH_ERROR)
CREATE = (
    message_field.Action.CREATE_VOLUME_FROM_BACKEND,
    message_field.Detail.DRIVER_FAILED_CREATE,
)


@functools.cache
def _messages() -> api.API:
    # Each one that is made ends the process's connections to the database.
    return api.API()


@contextlib.contextmanager
def of_failure(volume: Any, what: tuple[Any, Any], *, asked: bool = True) -> Iterator[None]:
    """Tells the user if what is inside fails.

    Nobody is told of what no user has `asked` for, as a copy that Cinder makes to back a
    volume up.
    """
    try:
        yield
    except Exception:
        context = volume._context
        if asked and context is not None:
            action, detail = what
            _messages().create(context, action, resource_uuid=volume.id, detail=detail)
        raise
