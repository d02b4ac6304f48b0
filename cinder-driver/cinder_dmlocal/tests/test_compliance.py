"""The driver has Cinder's interface, in a way that can fail."""

from __future__ import annotations

import inspect
import unittest
from collections.abc import Callable
from typing import Any

from cinder.interface import util, volume_driver
from cinder.volume import driver as base

from cinder_dmlocal.driver import DmLocalDriver


def public(cls: type) -> dict[str, Callable[..., Any]]:
    """Methods of a class by their names."""
    members = inspect.getmembers(cls, inspect.isfunction)
    return {name: method for name, method in members if not name.startswith('_')}


def complaints(wanted: type, cls: type) -> list[str]:
    """What of an interface a class lacks, or takes other arguments for."""
    have, found = public(cls), []
    for name, method in public(wanted).items():
        if isinstance(inspect.getattr_static(cls, name, None), property):
            continue
        if name not in have:
            found.append(f'{name} is missing')
            continue
        if not accepts(have[name], method):
            found.append(f'{name}{inspect.signature(have[name])} is not as Cinder calls it')
    return found


def accepts(method: Callable[..., Any], wanted: Callable[..., Any]) -> bool:
    """Whether a method takes what Cinder passes, by place and by name."""
    parameters = inspect.signature(wanted).parameters.values()
    passed = (p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
    places = [p.name for p in passed if p.default is p.empty]
    try:
        inspect.signature(method).bind(*places)
    except TypeError:
        return False
    return True


class Compliance(unittest.TestCase):
    def test_the_driver_has_every_method_of_the_core(self) -> None:
        # Upstream has other arguments in this one's document than in its calls.
        found = complaints(volume_driver.VolumeDriverCore, DmLocalDriver)
        self.assertEqual([], [line for line in found if not line.startswith('clone_image')])

    def test_what_the_driver_overrides_is_called_as_in_cinders_own(self) -> None:
        ours = {n: m for n, m in vars(DmLocalDriver).items() if inspect.isfunction(m)}
        for name, method in ours.items():
            inherited = getattr(base.VolumeDriver, name, None)
            if inspect.isfunction(inherited) and not name.startswith('_'):
                with self.subTest(name):
                    self.assertTrue(accepts(method, inherited), inspect.signature(method))

    def test_a_class_without_the_methods_does_not_pass(self) -> None:
        class Empty:
            pass

        class Other(DmLocalDriver):
            def create_volume(self) -> None:  # type: ignore[override]
                pass

        self.assertTrue(complaints(volume_driver.VolumeDriverCore, Empty))
        self.assertTrue(complaints(volume_driver.VolumeDriverCore, Other))

    def test_upstreams_own_check_passes(self) -> None:
        # It finds nothing to check (inspect.ismethod of a class), but may once do.
        self.assertTrue(issubclass(DmLocalDriver, volume_driver.VolumeDriverCore))
        self.assertIn(DmLocalDriver, [found.cls for found in util.get_volume_drivers()])

    def test_groups_are_left_to_cinder(self) -> None:
        for name in ('create_group', 'create_group_snapshot', 'create_group_from_src'):
            self.assertNotIn(name, vars(DmLocalDriver))

    def test_it_may_run_active_active(self) -> None:
        self.assertTrue(DmLocalDriver.SUPPORTS_ACTIVE_ACTIVE)
