"""Cinder and Nova over a fleet, and what a test does with them in every flow."""

from __future__ import annotations

from collections.abc import Mapping

from services.block import Cinder, agents
from services.hypervisors import Hypervisors, Machine
from services.infra import Infra
from services.nova import Nova
from services.processes import Processes


class Cloud:
    """All services, with a compute on each node of the fleet."""

    def __init__(
        self, processes: Processes, endpoints: Mapping[str, str], machine: Machine
    ) -> None:
        folder = processes.folder
        self.processes = processes
        self.nodes = list(endpoints)
        self.hypervisors = Hypervisors(folder / 'hypervisors', machine)
        infra = Infra(processes)
        section = {
            **agents(folder, endpoints),
            'dmlocal_close_timeout': 1,
            'dmlocal_look_timeout': 2,
        }
        self._cinder = Cinder(processes, infra, {'dmlocal': section})
        self._nova = Nova(processes, infra, self._cinder, self.hypervisors)
        self._cinder.sync()
        self._cinder.start('api', 'scheduler', 'volume')
        self._nova.sync()
        self._nova.start(*self.nodes)
        self._cinder.wait(*(f'fleet@dmlocal#{node}' for node in self.nodes))
        self.volumes = self._cinder.client
        self.servers = self._nova.client
        self.servers.make_flavors()
        self.database = infra.database
