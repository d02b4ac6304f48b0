"""Nova's virt driver for guests that are pretended to: `nova.virt.guests.Hypervisor`.

Control of a guest is Nova's own pretended driver's. What a guest does to its devices is
told to the test (`services.hypervisors`) at the moments at which libvirt's QEMU would do
it, and the test says what comes of it: every event waits for its answer.
"""

from __future__ import annotations

import os
from typing import Any

from nova import exception
from nova.compute import power_state
from nova.virt import driver, fake

from services.hypervisors import ask, node_id


def _devices(info: Any) -> list[str]:
    mapping = driver.block_device_info_get_mapping(info)
    return [_device(one['connection_info']) for one in mapping]


def _device(connection_info: Any) -> str:
    return connection_info['data']['device_path']


class Hypervisor(fake.FakeDriver):
    """One host's; it knows its guests again when nova-compute is restarted."""

    vcpus = 1000
    memory_mb = 1 << 20
    local_gb = 10000

    def init_host(self, host: str) -> None:
        super().init_host(host)
        for guest in self._tell('list')['guests']:
            state = power_state.RUNNING if guest['is_on'] else power_state.SHUTDOWN
            known = fake.FakeInstance(guest['name'], state, guest['instance'])
            self.instances[guest['instance']] = known

    def get_available_resource(self, nodename: str) -> Any:
        resource = super().get_available_resource(nodename)
        if resource:
            resource['uuid'] = node_id(nodename)
        return resource

    def get_nodenames_by_uuid(self, refresh: bool = False) -> dict[str, str]:
        return {node_id(name): name for name in self.get_available_nodes()}

    def _tell(self, event: str, instance: Any = None, **more: Any) -> Any:
        named = {} if instance is None else {'instance': instance.uuid, 'name': instance.name}
        answer = ask(
            os.environ['DMLOCAL_HYPERVISORS'],
            {'event': event, 'host': self._host, **named, **more},
        )
        if 'error' in answer:
            raise exception.NovaException(answer['error'])
        return answer

    # A guest begins and ends

    def spawn(
        self,
        context: Any,
        instance: Any,
        image_meta: Any,
        injected_files: Any,
        admin_password: Any,
        allocations: Any,
        network_info: Any = None,
        block_device_info: Any = None,
        power_on: bool = True,
        accel_info: Any = None,
    ) -> None:
        devices = _devices(block_device_info)
        if power_on and devices:
            self._tell('start', instance, devices=devices)
        super().spawn(
            context,
            instance,
            image_meta,
            injected_files,
            admin_password,
            allocations,
            network_info,
            block_device_info,
            power_on,
            accel_info,
        )

    def destroy(self, context: Any, instance: Any, *args: Any, **more: Any) -> None:
        self._tell('end', instance)
        super().destroy(context, instance, *args, **more)

    def power_off(self, instance: Any, *args: Any, **more: Any) -> None:
        self._tell('stop', instance)
        super().power_off(instance, *args, **more)

    def power_on(
        self,
        context: Any,
        instance: Any,
        network_info: Any,
        block_device_info: Any = None,
        *args: Any,
        **more: Any,
    ) -> None:
        super().power_on(context, instance, network_info, block_device_info, *args, **more)
        self._tell('start', instance, devices=_devices(block_device_info))

    def reboot(
        self,
        context: Any,
        instance: Any,
        network_info: Any,
        reboot_type: str,
        block_device_info: Any = None,
        *args: Any,
        **more: Any,
    ) -> None:
        if reboot_type == 'HARD':
            self._tell('stop', instance)
        super().reboot(
            context, instance, network_info, reboot_type, block_device_info, *args, **more
        )

    # It moves

    def migrate_disk_and_power_off(
        self, context: Any, instance: Any, *args: Any, **more: Any
    ) -> None:
        self._tell('stop', instance)

    def finish_revert_migration(
        self,
        context: Any,
        instance: Any,
        network_info: Any,
        migration: Any,
        block_device_info: Any = None,
        power_on: bool = True,
        share_info: Any = None,
    ) -> None:
        super().finish_revert_migration(
            context, instance, network_info, migration, block_device_info, power_on, share_info
        )
        if power_on:
            self._tell('start', instance, devices=_devices(block_device_info))

    def pre_live_migration(
        self,
        context: Any,
        instance: Any,
        block_device_info: Any,
        network_info: Any,
        disk_info: Any,
        migrate_data: Any,
    ) -> Any:
        self._tell('await', instance, devices=_devices(block_device_info))
        return migrate_data

    def live_migration(
        self,
        context: Any,
        instance: Any,
        dest: str,
        post_method: Any,
        recover_method: Any,
        block_migration: bool = False,
        migrate_data: Any = None,
    ) -> None:
        outcome = self._tell('move', instance, to=dest)['outcome']
        if outcome == 'done':
            post_method(context, instance, dest, block_migration, migrate_data)
        else:
            status = {'failed': 'error', 'aborted': 'cancelled'}[outcome]
            recover_method(context, instance, dest, migrate_data, migration_status=status)

    def live_migration_abort(self, instance: Any) -> None:
        self._tell('abort', instance)

    def post_live_migration(
        self, context: Any, instance: Any, block_device_info: Any, migrate_data: Any = None
    ) -> None:
        self.instances.pop(instance.uuid, None)

    def rollback_live_migration_at_destination(
        self, context: Any, instance: Any, *args: Any, **more: Any
    ) -> None:
        self._tell('recall', instance)

    # Its volumes come and go

    def attach_volume(
        self, context: Any, connection_info: Any, instance: Any, *args: Any, **more: Any
    ) -> None:
        self._tell('plug', instance, devices=[_device(connection_info)])

    def detach_volume(
        self, context: Any, connection_info: Any, instance: Any, *args: Any, **more: Any
    ) -> None:
        self._tell('unplug', instance, devices=[_device(connection_info)])

    def swap_volume(
        self,
        context: Any,
        old_connection_info: Any,
        new_connection_info: Any,
        instance: Any,
        mountpoint: str,
        resize_to: int,
    ) -> None:
        devices = [_device(old_connection_info), _device(new_connection_info)]
        self._tell('swap', instance, devices=devices)

    def extend_volume(
        self, context: Any, connection_info: Any, instance: Any, requested_size: int
    ) -> None:
        self._tell('grow', instance, devices=[_device(connection_info)])
