"""Whether the services start, work together, and leave nothing behind.

`python -m unittest services.check_base`, in the environment of services/requirements.txt.
"""

from __future__ import annotations

import os
import pathlib
import tempfile
import unittest
import uuid

from cinder_dmlocal.tests.fake import FakeFleet
from services.block import Cinder, agents
from services.infra import Infra
from services.processes import Processes

NODES = ['node-a', 'node-b']


def keep_certificates(fleet: FakeFleet, folder: pathlib.Path) -> None:
    """Writes what the driver reads."""
    pair = fleet.authority.issue('driver')
    (folder / 'ca.pem').write_bytes(fleet.authority.cert)
    (folder / 'driver.pem').write_bytes(pair.cert)
    (folder / 'driver.key').write_bytes(pair.key)


def processes_below(folder: pathlib.Path) -> list[str]:
    """Processes that have the folder in their arguments or environment."""
    found = []
    for process in pathlib.Path('/proc').glob('[0-9]*'):
        try:
            told = (process / 'cmdline').read_bytes() + (process / 'environ').read_bytes()
        except OSError:
            continue
        if process.name != str(os.getpid()) and os.fsencode(folder) in told:
            found.append(f'{process.name} {told[:200]!r}')
    return found


class Base(unittest.TestCase):
    def test_a_volume_lives_and_nothing_is_left(self) -> None:
        with tempfile.TemporaryDirectory(prefix='dmlocal-services-') as name:
            folder = pathlib.Path(name)
            with Processes(folder) as processes:
                self._live(folder, processes)
                self.assertNotEqual([], processes_below(folder))
            self.assertEqual([], processes_below(folder))

    def _live(self, folder: pathlib.Path, processes: Processes) -> None:
        fleet = FakeFleet(NODES)
        keep_certificates(fleet, folder)
        infra = Infra(processes)
        cinder = Cinder(processes, infra, {'dmlocal': agents(folder, fleet.endpoints)})
        cinder.sync()
        cinder.start('api', 'scheduler', 'volume', 'backup')
        cinder.wait(*(f'fleet@dmlocal#{node}' for node in NODES))
        volume = cinder.client.create()
        home = volume['os-vol-host-attr:host'].partition('#')[2]
        self.assertEqual({home: 'LOCAL'}, fleet.where(volume['id']))
        away = next(node for node in NODES if node != home)
        made = cinder.client.attach(volume['id'], str(uuid.uuid4()), away)
        path = f'/dev/mapper/dmlocal-{volume["id"]}'
        self.assertEqual(path, made['connection_info']['device_path'])
        self.assertEqual('HYDRATING', fleet.where(volume['id'])[away])
        self.assertEqual('in-use', cinder.client.show(volume['id'])['status'])
        cinder.client.detach(made['id'])
        cinder.client.wait(volume['id'], 'available')
        cinder.client.delete(volume['id'])
        self.assertEqual({}, fleet.where(volume['id']))


if __name__ == '__main__':
    unittest.main()
