"""What Nova and Cinder do with volumes of an instance that stays where it is."""

from __future__ import annotations

from services.case import Guest, NovaCase
from services.clients import Refused

A, B = 'node-a', 'node-b'


class InUse(NovaCase):
    def test_a_volume_comes_and_goes(self) -> None:
        guest = self.guest(A)
        more = self.cloud.volume(A)
        self.cloud.attach(guest.server, more)
        guest.add(more)
        guest.write()
        guest.runs_on(A)
        self.cloud.detach(guest.server, more)
        guest.drop(more)
        self.cloud.volumes.delete(more)
        self.assertEqual({}, self.fleet.where(more))
        guest.finish()

    def test_a_volume_for_which_there_is_no_room_is_not_attached(self) -> None:
        guest = self.guest(A)
        more = self.cloud.volume(B)
        with self.no_room(A):
            self.cloud.servers.attach(guest.server, more)
            self.cloud.volumes.wait(more, 'attaching', 'reserved', 'in-use')
            self.cloud.volumes.wait(more, 'available')
        self.assertEqual([], self.rows(more))
        self.assertEqual({B: 'LOCAL'}, self.fleet.where(more))
        guest.write()
        guest.runs_on(A)
        self.cloud.volumes.delete(more)
        guest.finish()

    def test_a_second_instance_is_refused(self) -> None:
        guest = self.guest(A)
        other = self.guest(B)
        with self.assertRaises(Refused) as refused:
            self.cloud.servers.attach(other.server, guest.volumes[1])
        self.assertEqual(400, refused.exception.status)
        guest.runs_on(A)
        self.cloud.servers.delete(other.server)
        for volume in other.volumes:
            self.cloud.volumes.wait(volume, 'available')
            self.cloud.volumes.delete(volume)
        guest.finish()

    def test_a_guest_that_stops_and_starts_keeps_its_volumes(self) -> None:
        guest = self.guest(A)
        self.cloud.stop(guest.server)
        self.assertEqual([], self.cloud.hypervisors.where(guest.server))
        self.cloud.start(guest.server)
        guest.write()
        self.assertEqual('ACTIVE', self.cloud.reboot(guest.server))
        guest.write()
        guest.runs_on(A)
        guest.finish()

    def test_a_guest_that_does_not_start_leaves_its_volumes_free(self) -> None:
        root = self.cloud.volume(A, bootable=True)
        self.cloud.hypervisors.fail('start', A)
        server = self.cloud.boot(A, [root], states=('ERROR', 'ACTIVE'))
        self.assertEqual('ERROR', self.cloud.servers.show(server)['status'])
        self.cloud.servers.delete(server)
        self.cloud.volumes.wait(root, 'available')
        self.assertEqual([], self.rows(root))
        self.cloud.volumes.delete(root)
        self.assert_clean()

    def test_a_guest_without_room_for_its_volume_is_not_started(self) -> None:
        root = self.cloud.volume(B)
        self.cloud.volumes.act(root, os_set_bootable={'bootable': True})
        with self.no_room(A):
            server = self.cloud.boot(A, [root], states=('ERROR', 'ACTIVE'))
        self.assertEqual('ERROR', self.cloud.servers.show(server)['status'])
        self.cloud.servers.delete(server)
        self.cloud.volumes.wait(root, 'available')
        self.assertEqual({B: 'LOCAL'}, self.fleet.where(root))
        self.cloud.volumes.delete(root)
        self.assert_clean()

    def test_a_volume_grows_below_its_guest(self) -> None:
        guest = self.guest(A)
        self.cloud.volumes.act(guest.volumes[1], os_extend={'new_size': 2})
        self.until(
            'the volume does not grow',
            lambda: self.cloud.volumes.wait(guest.volumes[1], 'in-use')['size'] == 2,
        )
        with self.fleet.lock:
            self.assertEqual(2 << 30, self.fleet.agents[A].volumes[guest.volumes[1]].size)
        self.until(
            'the hypervisor is not told',
            lambda: ('grow', A) in self.cloud.hypervisors.told,
        )
        guest.write()
        guest.runs_on(A)
        guest.finish()

    def test_a_snapshot_is_taken_below_a_guest(self) -> None:
        guest = self.guest(A)
        body = {'snapshot': {'volume_id': guest.volumes[1], 'force': True}}
        made = self.cloud.volumes.call('POST', '/snapshots', body)['snapshot']['id']
        path = f'/snapshots/{made}'
        self.until(
            'the snapshot is not made',
            lambda: self.cloud.volumes.get(path)['snapshot']['status'] == 'available',
        )
        with self.fleet.lock:
            self.assertEqual(['1'], self.fleet.agents[A].snapshots[made].data)
        guest.write()
        self.cloud.volumes.call('DELETE', path)
        self.until('it stays', lambda: self.cloud.volumes.get(path) is None)
        guest.finish()

    # Another volume in its place

    def test_a_volume_that_an_operator_migrates_is_used_from_afar(self) -> None:
        guest, data = self._guest_with_another()
        self._migrate_in_use(data, 'fleet@dmlocal#node-b')
        guest.is_copied(data)
        self.assertEqual({A: 'REMOTE', B: 'FENCED'}, self.fleet.where(guest.id(data)))
        guest.write()
        self.assertEqual(A, guest.host)
        shown = self.cloud.volumes.show(data)
        self.assertEqual('fleet@dmlocal#node-b', shown['os-vol-host-attr:host'])
        guest.reads()
        # It is at home where the guest goes next.
        self.assertEqual('completed', self.cloud.live_migrate(guest.server, B))
        guest.write()
        self.assertEqual(B, guest.host)
        guest.reads()
        guest.arrive()
        guest.finish()

    def test_a_volume_in_use_changes_its_backend_and_back(self) -> None:
        guest, data = self._guest_with_another()
        for backend in ('other', 'dmlocal'):
            self._retype_in_use(data, backend)
            guest.is_copied(data)
            guest.write()
            self.assertEqual(A, guest.host)
            guest.reads()
            self.until(
                'Cinder does not attach it', lambda: self.rows(data) == [('attached', A)]
            )
        guest.arrive()
        guest.finish()

    # Helpers

    def _guest_with_another(self) -> tuple[Guest, str]:
        """A guest that has a volume of the backend, of any node, as well."""
        guest = self.guest(A)
        data = self.cloud.volume('dmlocal')
        self.cloud.attach(guest.server, data)
        guest.add(data)
        guest.arrive()
        guest.write()
        return guest, data

    def _retype_in_use(self, volume: str, backend: str) -> None:
        body = {'new_type': backend, 'migration_policy': 'on-demand'}
        self.cloud.volumes.act(volume, os_retype=body)

        def is_done() -> bool:
            row = self.cloud.volumes.show(volume)
            self.assertNotEqual('error', row['os-vol-mig-status-attr:migstat'], row)
            return row['volume_type'] == backend and row['status'] == 'in-use'

        self.until(f'{volume} does not become {backend}', is_done)

    def _migrate_in_use(self, volume: str, host: str) -> None:
        body = {'host': host, 'force_host_copy': False, 'lock_volume': False}
        self.cloud.volumes.act(volume, os_migrate_volume=body)

        def is_done() -> bool:
            row = self.cloud.volumes.show(volume)
            status = row['os-vol-mig-status-attr:migstat']
            self.assertNotEqual('error', status)
            return status == 'success' and row['status'] == 'in-use'

        self.until(f'{volume} does not migrate', is_done)
