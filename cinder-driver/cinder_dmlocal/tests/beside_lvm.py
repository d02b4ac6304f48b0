"""How soon volumes are usable, beside Cinder's LVM driver: blank ones, and of a cached image.

    python -m cinder_dmlocal.tests.beside_lvm FOLDER GROUP FROM HERE VOLUME… NODE=HOST:PORT…

Runs as root on the node HERE, where GROUP is a volume group without anything else in it. The
VOLUMEs are on the node FROM: cache entries of 1 GiB, with images of more and more in them.
FOLDER has ca.pem, driver.pem and driver.key. Both drivers are called as Cinder's create
volume flow and its attachments do, in this one process.

Prints {"dmlocal": {VOLUME: [SECONDS, …]}, "lvm": [SECONDS, …], "blank": …}: for this driver
until the first block of a new volume was read here, for the other until the copy was made;
"blank" has the same of blank volumes. What the other driver makes is read where it is, and
neither exported nor connected to: a volume of its that Nova attaches takes longer.
"""

from __future__ import annotations

from cinder import objects

# Before drivers are imported: they name its classes.
objects.register_all()

# ruff: noqa: E402
import json
import logging
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import cinder.privsep
import os_brick.privileged
from cinder import coordination
from cinder.brick.local_dev import lvm as local_lvm
from cinder.volume import configuration
from cinder.volume import driver as driver_options
from cinder.volume.drivers import lvm
from oslo_config import cfg

from cinder_dmlocal.driver import DmLocalDriver
from cinder_dmlocal.tests.base import SERVICE, Volume, section

ROUNDS, BLANK_ROUNDS = 3, 9


def main() -> None:
    """Measures, strictly in turns."""
    folder, group, source, here, *rest = sys.argv[1:]
    logging.disable(logging.CRITICAL)
    nodes = dict(one.split('=', 1) for one in rest if '=' in one)
    entries = [Volume(1, f'{SERVICE}#{source}', id=one) for one in rest if '=' not in one]
    cfg.CONF([], project='cinder', default_config_files=[])
    cfg.CONF.set_override('backend_url', f'file://{folder}', group='coordination')
    cfg.CONF.set_override('lock_path', folder, group='oslo_concurrency')
    coordination.COORDINATOR.start()
    cinder.privsep.sys_admin_pctxt.set_client_mode(False)
    os_brick.privileged.default.set_client_mode(False)
    ours = _ours(pathlib.Path(folder), nodes)
    theirs = _theirs(group, 'default')
    copied = _named(Volume(1, SERVICE))
    theirs.create_volume(copied)
    fill = ['dmlocal-writer', 'fill', '--device', theirs.local_path(copied), '--seed', '1']
    subprocess.run(fill, check=True, stdout=subprocess.DEVNULL)
    dmlocal: dict[str, list[float]] = {entry.id: [] for entry in entries}
    copies = []
    for _ in range(ROUNDS):
        for entry in entries:
            taken = _used(
                ours, lambda made, of=entry: ours.create_cloned_volume(made, of), here
            )
            dmlocal[entry.id].append(taken)
        copies.append(_copied(theirs, copied))
    theirs.delete_volume(copied)
    print(json.dumps({'dmlocal': dmlocal, 'lvm': copies, 'blank': _blank(ours, group, here)}))


def _blank(ours: DmLocalDriver, group: str, here: str) -> dict[str, list[float]]:
    """Blank volumes, thin ones of both."""
    theirs = _theirs(group, 'thin')
    taken: dict[str, list[float]] = {'dmlocal': [], 'lvm': []}
    for _ in range(BLANK_ROUNDS):
        taken['dmlocal'].append(_used(ours, ours.create_volume, here))
        volume = _named(Volume(1, SERVICE))

        def use(volume: _Row = volume) -> None:
            theirs.create_volume(volume)
            _read(theirs.local_path(volume))

        taken['lvm'].append(_timed(use))
        theirs.delete_volume(volume)
    return taken


def _ours(folder: pathlib.Path, nodes: dict[str, str]) -> DmLocalDriver:
    found = section(
        dmlocal_nodes=list(nodes),
        dmlocal_endpoints=nodes,
        dmlocal_ca=str(folder / 'ca.pem'),
        dmlocal_cert=str(folder / 'driver.pem'),
        dmlocal_key=str(folder / 'driver.key'),
        dmlocal_look_timeout=20,
        dmlocal_call_timeout=100,
    )
    driver = DmLocalDriver(configuration=found, host=SERVICE)
    driver.do_setup(None)
    driver.check_for_setup_error()
    driver.set_initialized()
    # Connections are made before anything is measured.
    driver.get_volume_stats(refresh=True)
    return driver


def _theirs(group: str, kind: str) -> Any:
    found = configuration.Configuration(
        [*lvm.volume_opts, *driver_options.volume_opts], config_group=kind
    )
    for name, value in {
        'volume_group': group,
        'lvm_type': kind,
        'volume_clear': 'none',
        'target_helper': 'fake',
    }.items():
        cfg.CONF.set_override(name, value, group=kind)
    driver = lvm.LVMVolumeDriver(configuration=found, host=SERVICE)
    driver.vg = local_lvm.LVM(group, 'sudo', lvm_type=kind, executor=driver._execute)
    driver.check_for_setup_error()
    return driver


class _Row(dict[str, Any]):
    """A volume of which its driver asks by names in brackets and with dots."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


def _named(volume: Volume) -> _Row:
    name = f'volume-{volume.id}'
    return _Row(id=volume.id, name=name, name_id=volume.id, size=volume.size)


def _timed(act: Callable[[], None]) -> float:
    began = time.monotonic()
    act()
    return time.monotonic() - began


def _read(path: str) -> None:
    with open(path, 'rb', buffering=0) as device:
        assert len(device.read(4096)) == 4096


def _used(driver: DmLocalDriver, create: Callable[[Volume], Any], here: str) -> float:
    volume, connector = Volume(1, f'{SERVICE}#{here}', 'creating'), {'host': here}

    def use() -> None:
        create(volume)
        volume.status = 'reserved'
        _read(driver.initialize_connection(volume, connector)['data']['device_path'])

    took = _timed(use)
    driver.terminate_connection(volume, connector)
    # What is still being copied ends with it.
    driver.delete_volume(volume)
    return took


def _copied(driver: Any, source: _Row) -> float:
    volume = _named(Volume(1, SERVICE))
    took = _timed(lambda: driver.create_cloned_volume(volume, source))
    driver.delete_volume(volume)
    return took


if __name__ == '__main__':
    main()
