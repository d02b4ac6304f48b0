"""Runs the main function of a module: `python -m services.program MODULE ARGUMENT…`.

The scripts that pip writes know only the folder in which their environment was made.
"""

from __future__ import annotations

import importlib
import os
import sys


def main() -> None:
    """Becomes that program."""
    name = sys.argv.pop(1)
    sys.argv[0] = os.path.join(sys.prefix, 'bin', name)
    sys.exit(importlib.import_module(name).main())


if __name__ == '__main__':
    main()
