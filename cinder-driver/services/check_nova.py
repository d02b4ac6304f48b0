"""Real Nova and Cinder over pretended agents: every flow, with its failures.

`python -m unittest services.check_nova`, in the environment of services/requirements.txt.
All the tests share one cloud; each leaves it empty.
"""

from __future__ import annotations

import unittest
from typing import Any

from services import case, cold_moves, live_migrations, volumes_in_use


def load_tests(loader: Any, standard_tests: Any, pattern: Any) -> unittest.TestSuite:
    """The tests, in the order in which somebody would want to know."""
    modules = [live_migrations, cold_moves, volumes_in_use]
    return case.Suite([loader.loadTestsFromModule(module) for module in modules])
