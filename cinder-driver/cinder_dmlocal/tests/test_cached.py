"""What services of a cluster find in Cinder's image cache."""

from __future__ import annotations

import datetime
from typing import Any
from unittest import mock

from oslo_config import cfg

from cinder_dmlocal.tests.base import SERVICE, DriverTestCase, Volume

CLUSTER = 'cluster@dmlocal'
CHANGED = datetime.datetime(2026, 1, 2, 3, 4, 5)


class Cached(DriverTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.want_cache(True)
        self.cached = self.cinder.create('node-a')
        self.entry = {
            'volume_id': self.cached.id,
            'cluster_name': f'{CLUSTER}#node-a',
            'image_updated_at': CHANGED,
            'size': 1,
        }
        self.driver.db = mock.Mock()
        self.driver.db.image_volume_cache_get_all.return_value = [self.entry]
        for name, found in (
            ('cinder.objects.Volume.get_by_id', self.cached),
            ('cinder.context.get_internal_tenant_context', mock.Mock()),
        ):
            patch = mock.patch(name, return_value=found)
            patch.start()
            self.addCleanup(patch.stop)

    def want_cache(self, is_wanted: bool) -> None:
        group = self.driver.configuration.config_group
        cfg.CONF.set_override('image_volume_cache_enabled', is_wanted, group=group)

    def clone(self, cluster: str | None = f'{CLUSTER}#node-b') -> tuple[Volume, bool]:
        """A volume of the image, and whether it was made of a cached one."""
        volume = Volume(1, f'{SERVICE}#node-b', 'creating', cluster_name=cluster)
        meta: dict[str, Any] = {
            'id': 'image',
            'updated_at': CHANGED.replace(tzinfo=datetime.timezone.utc),
        }
        _update, is_made = self.driver.clone_image(None, volume, None, meta, None)
        return volume, is_made

    def test_a_cached_volume_is_found_from_another_pool(self) -> None:
        volume, is_made = self.clone()
        self.assertTrue(is_made)
        self.assert_where(volume, a='LOCAL')
        used = self.driver.db.image_volume_cache_get_and_update_last_used
        self.assertEqual({'cluster_name': f'{CLUSTER}#node-a'}, used.call_args.kwargs)

    def test_a_cache_that_is_not_wanted_is_not_used(self) -> None:
        self.want_cache(False)
        volume, is_made = self.clone()
        self.assertFalse(is_made)
        self.assert_where(volume)

    def test_without_a_cluster_cinder_looks_for_it(self) -> None:
        volume, is_made = self.clone(cluster=None)
        self.assertFalse(is_made)
        self.assert_where(volume)

    def test_what_does_not_serve_is_passed_over(self) -> None:
        later = CHANGED + datetime.timedelta(seconds=1)
        for field, value in (
            ('cluster_name', 'cluster@another#node-a'),
            ('cluster_name', None),
            ('image_updated_at', later),
            ('size', 2),
        ):
            with self.subTest(field=field, value=value):
                self.driver.db.image_volume_cache_get_all.return_value = [
                    {**self.entry, field: value}
                ]
                volume, is_made = self.clone()
                self.assertFalse(is_made)
                self.assert_where(volume)

    def test_a_cached_volume_whose_node_is_silent_is_passed_over(self) -> None:
        self.agent('a').is_down = True
        volume, is_made = self.clone()
        self.assertFalse(is_made)
        self.agent('a').is_down = False
        self.assert_where(volume)
