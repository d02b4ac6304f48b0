"""Volumes change hands: between Cinder and the agents, and between projects."""

from __future__ import annotations

import uuid
from typing import Any

from services import contents
from services.cloud import FilesTestCase


class Managed(FilesTestCase):
    def test_a_volume_is_left_to_the_agents_and_taken_over_again(self) -> None:
        volume = self.written('one')
        snapshot = self.block.snapshot(volume)
        self.block.act(snapshot, 'snapshots', os_unmanage={})
        self.block.wait_snapshot(snapshot, 'gone')
        self.block.act(volume, os_unmanage={})
        self.block.wait(volume, 'gone')
        self.assertEqual({'node-a': 'LOCAL'}, self.fleet.where(volume))
        [found] = self.manageable('volumes', volume)
        self.assertTrue(found['safe_to_manage'], found)
        taken = self.manage(found['reference'])
        self.assertNotEqual(volume, taken)
        [found] = self.manageable('volumes', volume)
        self.assertEqual(taken, found['cinder_id'])
        self.assert_content(taken, self.file('one'), 'node-b')
        back = self.manage_snapshot(taken, snapshot)
        self.block.delete_snapshot(back)
        self.delete(taken)

    def test_what_is_not_there_is_not_taken_over(self) -> None:
        unknown = str(uuid.uuid4())
        taken = self.start_managing({'source-id': unknown})
        self.block.wait(taken, 'error')
        self.delete(taken)
        # Cinder goes on counting what it could not take over.
        self.there.update(one for one in self.cloud.leaks() if one.startswith('quota'))

    def test_a_volume_is_given_to_another_project(self) -> None:
        volume = self.written('one')
        what = {'transfer': {'volume_id': volume, 'name': 'gift'}}
        gift = self.block.call('POST', '/volume-transfers', what)['transfer']
        to = self.cloud.as_service()
        accept = {'accept': {'auth_key': gift['auth_key']}}
        to.call('POST', f'/volume-transfers/{gift["id"]}/accept', accept)
        self.block.wait(volume, 'available')
        owner = self.block.show(volume)['os-vol-tenant-attr:tenant_id']
        self.assertEqual(self.cloud.service.project, owner)
        self.assert_content(volume, self.file('one'), 'node-a')
        self.delete(volume)

    def test_a_volume_grows_in_use_or_not(self) -> None:
        volume = self.written('one')
        self.block.act(volume, os_extend={'new_size': 2})
        self.block.wait(volume, 'available')
        with self.attached(volume, 'node-a') as device:
            self.fleet.agents['node-a'].open(volume)
            self.block.act(volume, os_extend={'new_size': 3})
            self.block.wait(volume, 'in-use')
            contents.assert_reads(device, self.file('one'), 3 << 30)
            self.fleet.agents['node-a'].shut(volume)
        self.delete(volume)

    def test_what_a_type_asks_of_the_hypervisor_reaches_it(self) -> None:
        limits = {'total_iops_sec': '500', 'total_bytes_sec': '1000000'}
        specs = {'qos_specs': {'name': 'limits', 'consumer': 'front-end', **limits}}
        made = self.block.call('POST', '/qos-specs', specs)['qos_specs']['id']
        kind = self.cloud.add_type('limited', {'volume_backend_name': 'dmlocal'})
        self.block.call('GET', f'/qos-specs/{made}/associate?vol_type_id={kind}')
        volume = self.create('limited')
        answer = self.block.attach(volume, str(uuid.uuid4()), 'node-a')
        self.assertEqual(limits, answer['connection_info']['qos_specs'])
        self.block.detach(answer['id'])
        self.delete(volume)
        self.block.call('GET', f'/qos-specs/{made}/disassociate?vol_type_id={kind}')
        self.block.call('DELETE', f'/types/{kind}')
        self.block.call('DELETE', f'/qos-specs/{made}')

    def manageable(self, kind: str, of: str) -> list[dict[str, Any]]:
        path = f'/manageable_{kind}/detail?host=fleet@dmlocal&limit=100'
        found = self.block.call('GET', path)[f'manageable-{kind}']
        return [one for one in found if one['reference']['source-id'] == of]

    def start_managing(self, reference: dict[str, str]) -> str:
        what = {'host': 'fleet@dmlocal#node-a', 'ref': reference, 'volume_type': 'local'}
        answer = self.block.call('POST', '/manageable_volumes', {'volume': what})
        return str(answer['volume']['id'])

    def manage(self, reference: dict[str, str]) -> str:
        taken = self.start_managing(reference)
        self.block.wait(taken, 'available')
        return taken

    def manage_snapshot(self, volume: str, snapshot: str) -> str:
        [found] = self.manageable('snapshots', snapshot)
        self.assertTrue(found['safe_to_manage'], found)
        what = {'volume_id': volume, 'ref': found['reference']}
        answer = self.block.call('POST', '/manageable_snapshots', {'snapshot': what})
        taken = str(answer['snapshot']['id'])
        self.block.wait_snapshot(taken, 'available')
        return taken
