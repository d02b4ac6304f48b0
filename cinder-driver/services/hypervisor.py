"""nova-compute with guests that are pretended to.

Nova loads virt drivers from its own package only; `virt` becomes a part of that.
"""

from __future__ import annotations

# Before anything else of Nova is imported.
from nova import monkey_patch

monkey_patch.patch(backend='threading')

# ruff: noqa: E402
import pathlib
import sys

import nova.virt
from nova.cmd.compute import main

if __name__ == '__main__':
    nova.virt.__path__.append(str(pathlib.Path(__file__).parent / 'virt'))
    sys.exit(main())
