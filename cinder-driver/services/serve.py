"""Serves a WSGI application: `python -m services.serve MODULE PORT`.

The module has it as `application`. Its configuration is found through the environment.
"""

from __future__ import annotations

import importlib
import sys


def main() -> None:
    """Serves until it is killed."""
    name, port = sys.argv[1], int(sys.argv[2])
    # What is imported reads the arguments as its own.
    del sys.argv[1:]
    module = importlib.import_module(name)
    import waitress  # noqa: PLC0415 - after what may have to patch the process

    waitress.serve(
        module.application,
        host='127.0.0.1',
        port=port,
        threads=8,
        max_request_body_size=1 << 40,
    )


if __name__ == '__main__':
    main()
