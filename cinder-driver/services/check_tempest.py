"""Tempest's tests of Cinder's interface, with everything that the driver can do.

What needs instances is skipped by Tempest itself, as there is no Nova here. What is left
out besides has its reason in tempest-excluded.txt.
"""

from __future__ import annotations

import collections
import pathlib
import re
import sys
import unittest

import tempest

from services.block import Sections, write
from services.cloud import CloudTestCase
from services.contents import make
from services.identity import PASSWORD, REGION
from services.processes import DRIVER, free_ports, module, program

_TESTS = r'^tempest\.(api\.volume|scenario\.test_volume)'
_EXCLUDED = pathlib.Path(__file__).with_name('tempest-excluded.txt')
_SKIPPED = re.compile(r'\.\.\. SKIPPED: (.*)')


class Tempest(CloudTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.folder = self.cloud.folder / 'tempest'
        self.folder.mkdir()
        content = make(self.folder / 'image', 24 << 20)
        self.image = self.cloud.images.upload(content, 'raw', visibility='public')
        self.addCleanup(self.cloud.images.delete, self.image)
        self.pretend_networks()

    def pretend_networks(self) -> None:
        """Without networks, Tempest leaves out tests that need none."""
        processes, [port] = self.cloud.processes, free_ports(1)
        process = processes.start('networks', module('services.networks', port))
        self.addCleanup(processes.forget, process)
        self.addCleanup(process.kill)
        processes.wait_for_port(port, 'Neutron')
        self.cloud.identity.add_service('neutron', 'network', f'http://127.0.0.1:{port}')

    def test_everything_that_the_driver_can_do_passes(self) -> None:
        write(self.folder / 'tempest.conf', self.settings())
        packages = pathlib.Path(tempest.__file__).parent.parent
        found = f'test_path = {packages}/tempest/test_discover\ntop_dir = {packages}\n'
        (self.folder / '.stestr.conf').write_text(f'[DEFAULT]\n{found}')
        # What runs the tests keeps its results where it is started.
        here = ['env', '--chdir', str(self.folder)]
        how = ('--concurrency', '2', '--exclude-list', str(_EXCLUDED))
        environment = {
            'TEMPEST_CONFIG_DIR': str(self.folder),
            'TEMPEST_CONFIG': 'tempest.conf',
            'PYTHON': sys.executable,
            'PYTHONPATH': str(DRIVER),
        }
        run = [*here, *program('stestr.cli', 'run', *how, _TESTS)]
        process = self.cloud.processes.start('tempest', run, environment)
        status = process.popen.wait()
        self.cloud.processes.forget(process)
        told = process.log.read_text()
        self.tell(told)
        self.delete(*self.cached())
        failed = [line for line in told.splitlines() if line.endswith('... FAILED')]
        self.assertEqual((0, []), (status, failed), told[-20000:])

    def settings(self) -> Sections:
        here = {'lock_path': self.folder / 'locks'}
        return {
            'DEFAULT': {'log_file': self.folder / 'tempest.log', 'debug': 'true'},
            'oslo_concurrency': here,
            'auth': {
                'use_dynamic_credentials': 'true',
                'create_isolated_networks': 'false',
                'admin_username': 'admin',
                'admin_password': PASSWORD,
                'admin_project_name': 'admin',
                'admin_domain_name': 'Default',
            },
            'identity': {'uri_v3': self.cloud.identity.url, 'region': REGION},
            'identity-feature-enabled': {'api_v3': 'true'},
            'service_available': {
                'cinder': 'true',
                'glance': 'true',
                'nova': 'false',
                'neutron': 'true',
                'swift': 'false',
                'horizon': 'false',
            },
            'compute': {'image_ref': self.image, 'image_ref_alt': self.image},
            'volume': {
                'backend_names': 'dmlocal, other',
                'storage_protocol': 'local',
                'vendor_name': 'dmlocal',
                'backup_driver': 'posix',
                # Agents rename nothing: a volume is known by its id.
                'manage_volume_ref': 'source-id, %s',
                'manage_snapshot_ref': 'source-id, %s',
                'min_microversion': '3.0',
                'max_microversion': 'latest',
            },
            'volume-feature-enabled': {
                'multi_backend': 'true',
                'backup': 'true',
                'snapshot': 'true',
                'clone': 'true',
                'manage_volume': 'true',
                'manage_snapshot': 'true',
                'extend_attached_volume': 'true',
                'extend_volume_with_snapshot': 'true',
            },
        }

    @staticmethod
    def tell(told: str) -> None:
        """Says how many tests were run, and why others were not."""
        skipped = collections.Counter(_SKIPPED.findall(told))
        counts = re.findall(r'^ - (\w+): (\d+)$', told, re.MULTILINE)
        print('Tempest:', ', '.join(f'{what} {count}' for what, count in counts))
        for reason, count in sorted(skipped.items()):
            print(f'  {count} skipped: {reason}')


if __name__ == '__main__':
    unittest.main()
