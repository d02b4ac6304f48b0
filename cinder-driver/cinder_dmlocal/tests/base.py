"""What the tests share: a fleet of three, a driver, and Cinder and Nova as they call it.

`Cinder` does what nova.compute.manager and cinder.volume.manager do, in their order:
above all, the row of a new attachment is not there yet when its connection is made with
it, and remove_export follows every failure and every termination.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import datetime
import functools
import os
import tempfile
import unittest
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from cinder import coordination, exception, objects
from cinder.volume import configuration
from oslo_config import cfg
from oslo_utils import timeutils
from taskflow.types import failure

from cinder_dmlocal import options
from cinder_dmlocal.driver import DmLocalDriver
from cinder_dmlocal.tests.fake import Agent, FakeFleet

NODES = ['node-a', 'node-b', 'node-c']
SERVICE = 'fleet@dmlocal'


@dataclasses.dataclass
class Attachment:
    """A row of Cinder's."""

    instance_uuid: str
    attach_status: str = 'reserved'
    attached_host: str | None = None
    connector: dict[str, Any] | None = None
    id: str = dataclasses.field(default_factory=lambda: str(uuid.uuid4()))


@dataclasses.dataclass
class Volume:
    """A row of Cinder's."""

    size: int
    host: str
    status: str = 'available'
    id: str = dataclasses.field(default_factory=lambda: str(uuid.uuid4()))
    multiattach: bool = False
    cluster_name: str | None = None
    snapshot_id: str | None = None
    source_volid: str | None = None
    volume_attachment: list[Attachment] = dataclasses.field(default_factory=list)
    provider_location: str | None = None
    migration_status: str | None = None
    launched_at: datetime.datetime | None = None
    _name_id: str | None = None
    _context: Any = None
    saved: int = 0

    @property
    def name_id(self) -> str:
        return self._name_id or self.id

    def save(self) -> None:
        self.saved += 1

    def update(self, values: dict[str, Any] | None) -> None:
        for key, value in (values or {}).items():
            setattr(self, key, value)


@dataclasses.dataclass
class Snapshot:
    """A row of Cinder's."""

    volume: Volume
    id: str = dataclasses.field(default_factory=lambda: str(uuid.uuid4()))
    provider_location: str | None = None
    provider_id: str | None = None

    @property
    def volume_id(self) -> str:
        return self.volume.id

    def save(self) -> None:
        """Cinder's would be in the database now."""

    def update(self, values: dict[str, Any]) -> None:
        for key, value in values.items():
            setattr(self, key, value)


class Cinder:
    """The order of calls."""

    def __init__(self, driver: DmLocalDriver) -> None:
        self.driver = driver

    def create(self, node: str = 'node-a', size: int = 1) -> Volume:
        volume = Volume(size, f'{SERVICE}#{node}', 'creating')
        volume.update(self.driver.create_volume(volume))
        volume.status, volume.launched_at = 'available', timeutils.utcnow()
        return volume

    def reserve(self, volume: Volume, instance: str) -> Attachment:
        row = Attachment(instance)
        volume.volume_attachment.append(row)
        if volume.status == 'available':
            volume.status = 'reserved'
        return row

    def connect(self, volume: Volume, row: Attachment, host: str) -> str:
        """PUT of a connector on a reserved row; gives the device's path."""
        path = self._connection(volume, host)
        row.attach_status, row.attached_host = 'attaching', host
        row.connector = {'host': host}
        return path

    def create_attachment(self, volume: Volume, instance: str, host: str) -> Attachment:
        """POST with a connector. A failure leaves a reserved row without a host."""
        row = Attachment(instance)
        try:
            self._connection(volume, host)
        except Exception:
            volume.volume_attachment.append(row)
            raise
        row.attach_status, row.attached_host = 'attaching', host
        row.connector = {'host': host}
        volume.volume_attachment.append(row)
        return row

    def _connection(self, volume: Volume, host: str) -> str:
        connector = {'host': host, 'ip': '192.0.2.1', 'initiator': 'iqn'}
        self.driver.validate_connector(connector)
        self.driver.create_export(None, volume, connector)
        try:
            answer = self.driver.initialize_connection(volume, connector)
        except Exception:
            self.driver.remove_export(None, volume)
            raise
        assert answer['driver_volume_type'] == 'local'
        return str(answer['data']['device_path'])

    def complete(self, volume: Volume, row: Attachment) -> None:
        row.attach_status = 'attached'
        volume.status = 'in-use'

    def delete_attachment(self, volume: Volume, row: Attachment) -> None:
        """DELETE: the row goes only if the driver raises nothing."""
        if row.connector is not None:
            self.driver.terminate_connection(volume, row.connector, force=False)
            self.driver.remove_export(None, volume)
        volume.volume_attachment.remove(row)
        if not volume.volume_attachment:
            volume.status = 'available'
        elif all(left.attach_status == 'reserved' for left in volume.volume_attachment):
            volume.status = 'reserved'

    def attach(self, volume: Volume, host: str, instance: str | None = None) -> Attachment:
        """Attaches to an instance that opens the device."""
        row = self.reserve(volume, instance or str(uuid.uuid4()))
        self.connect(volume, row, host)
        self.complete(volume, row)
        return row


@functools.cache
def shared_fleet() -> FakeFleet:
    """Servers take long to start: all tests of a process share these."""
    return FakeFleet(NODES)


@functools.cache
def _prepared() -> str:
    """A folder for certificates, and Cinder's locks as it makes them."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    objects.register_all()
    cfg.CONF([], project='cinder', default_config_files=[])
    cfg.CONF.set_override('backend_url', f'file://{folder.name}', group='coordination')
    coordination.COORDINATOR.start()
    return folder.name


def write_certificates(fleet: FakeFleet, folder: str) -> dict[str, str]:
    """The driver's certificates in a folder, and their options."""
    pair = fleet.authority.issue('driver')
    named = {'ca': fleet.authority.cert, 'cert': pair.cert, 'key': pair.key}
    for name, content in named.items():
        with open(os.path.join(folder, f'{name}.pem'), 'wb') as file:
            file.write(content)
    return {f'dmlocal_{name}': os.path.join(folder, f'{name}.pem') for name in named}


def configured(fleet: FakeFleet, endpoints: dict[str, str], **values: Any) -> Any:
    """The configuration of a backend that knows the agents at those endpoints."""
    values = {**write_certificates(fleet, _prepared()), **values}
    values.setdefault('dmlocal_nodes', list(endpoints))
    values.setdefault('dmlocal_endpoints', endpoints)
    values.setdefault('dmlocal_close_timeout', 0)
    return section(**values)


def section(**values: Any) -> Any:
    """The configuration of a backend."""
    group = f'backend-{uuid.uuid4()}'
    found = configuration.Configuration(options.OPTIONS, config_group=group)
    for name, value in values.items():
        cfg.CONF.set_override(name, value, group=group)
    return found


def stays_here(error: BaseException) -> bool:
    """Whether Cinder lets a creation that has failed so be, and tries no other node."""
    # Cinder's modules need to be imported in the driver's order.
    from cinder.volume.flows.manager import create_volume  # noqa: PLC0415

    task = create_volume.OnFailureRescheduleTask(None, None, None, None, True)
    return failure.Failure.from_exception(error).check(*task.no_reschedule_types) is not None


class DriverTestCase(unittest.TestCase):
    """A driver and the agents it asks."""

    def setUp(self) -> None:
        self.fleet = shared_fleet()
        self.fleet.reset()
        self.driver = self.make_driver()
        self.cinder = Cinder(self.driver)

    def make_driver(self, **values: Any) -> DmLocalDriver:
        found = configured(self.fleet, self.fleet.endpoints, **values)
        driver = DmLocalDriver(configuration=found, host=SERVICE)
        driver.do_setup(None)
        driver.check_for_setup_error()
        driver.set_initialized()
        self.addCleanup(driver.fleet.close)
        return driver

    def agent(self, letter: str) -> Agent:
        return self.fleet.agents[f'node-{letter}']

    def before(self, letter: str, method: str, act: Callable[[], Any]) -> None:
        """Has something happen just before an agent does what it is asked for next."""
        agent = self.agent(letter)
        does = getattr(agent, method)

        def late(request: Any) -> Any:
            agent.__dict__.pop(method, None)
            act()
            return does(request)

        setattr(agent, method, late)
        self.addCleanup(agent.__dict__.pop, method, None)

    def assert_where(self, volume: Any, **states: str) -> None:
        """The copies of a volume: assert_where(volume, a='LOCAL')."""
        expected = {f'node-{letter}': state for letter, state in states.items()}
        self.assertEqual(expected, self.fleet.where(volume.name_id))

    def assert_home(self, volume: Volume, letter: str) -> None:
        self.assertEqual(f'{SERVICE}#node-{letter}', volume.host)

    @contextlib.contextmanager
    def refused(self, *words: str) -> Iterator[Any]:
        """What is inside is refused, and the text has these words."""
        with self.assertRaises(exception.CinderException) as caught:
            yield caught
        for word in words:
            self.assertIn(word, str(caught.exception))
