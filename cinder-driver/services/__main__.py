"""Runs checks: `python -m services [-v] [-k NAME] [MODULE…]`.

Without modules all of them. What a test has left open is closed with the cloud.
"""

from __future__ import annotations

import sys
import unittest

from services import cloud

# Those that have a cloud of their own come first; the others share one.
CHECKS = (
    'base',
    'nova',
    'images',
    'copies',
    'encryption',
    'moves',
    'backups',
    'managed',
    'messages',
    'many',
    'tempest',
    'restarts',
    'cluster',
)


def main() -> None:
    """Runs them, and ends the cloud whatever comes of it."""
    given = sys.argv[1:]
    if not any(argument.startswith('services.') for argument in given):
        given += [f'services.check_{name}' for name in CHECKS]
    try:
        program = unittest.main(module=None, argv=['services', *given], exit=False)
    finally:
        cloud.end_shared()
    sys.exit(not program.result.wasSuccessful())


if __name__ == '__main__':
    main()
