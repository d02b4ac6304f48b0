"""Cinder's own services over pretended agents: what Cinder really calls, and in which order.

Takes longer than the tests that are found by themselves:
`python -m unittest cinder_dmlocal.tests.check_whole`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import pathlib
import subprocess
import sys
import tempfile
import unittest
import uuid
from typing import Any

from cinder_dmlocal.tests.fake import GIB, FakeFleet, Refusal, Vol

NODES = ['node-a', 'node-b']
INSTANCE = str(uuid.uuid4())


@functools.cache
def whole() -> tuple[FakeFleet, subprocess.Popen[str], pathlib.Path]:
    """One Cinder for all tests, with its agents and its log; it ends with the tests."""
    fleet = FakeFleet(NODES)
    ending = contextlib.ExitStack()
    folder = pathlib.Path(ending.enter_context(tempfile.TemporaryDirectory()))
    # Only now, so that it comes before the end that the folder has by itself.
    atexit.register(ending.close)
    pair = fleet.authority.issue('driver')
    (folder / 'ca.pem').write_bytes(fleet.authority.cert)
    (folder / 'driver.pem').write_bytes(pair.cert)
    (folder / 'driver.key').write_bytes(pair.key)
    nodes = [f'{name}={endpoint}' for name, endpoint in fleet.endpoints.items()]
    with open(folder / 'stderr', 'w') as stderr:
        process = subprocess.Popen(
            [sys.executable, '-m', 'cinder_dmlocal.tests.whole', str(folder), *nodes],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    ending.callback(end, process)
    line = process.stdout.readline()
    if not line:
        raise AssertionError((folder / 'stderr').read_text()[-4000:])
    assert len(json.loads(line)['pools']) == 2, line
    return fleet, process, folder / 'cinder.log'


def end(process: subprocess.Popen[str]) -> None:
    """It ends with its orders."""
    process.stdin.close()
    try:
        process.wait(60)
    finally:
        # Or it would go on to write into a folder that is being removed.
        process.kill()
        process.wait()
        process.stdout.close()


class WholeCinder(unittest.TestCase):
    """What the tests share."""

    def setUp(self) -> None:
        self.fleet, self.process, self.log = whole()
        self.addCleanup(self.calm)

    def calm(self) -> None:
        """No agent fails any more."""
        for agent in self.fleet.agents.values():
            agent.is_down = False
            agent.says_refused.clear()
            agent.loses_answer.clear()

    def order(self, do: str, **order: Any) -> dict[str, Any]:
        print(json.dumps({'do': do, **order}), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        self.assertNotIn('error', answer)
        return answer

    def create(self, **more: Any) -> tuple[str, str]:
        """A volume and its node."""
        volume = self.order('create', **more)
        self.assertEqual('available', volume['status'], self.log.read_text()[-6000:])
        return volume['id'], volume['host'].partition('#')[2]

    def attach(self, volume: str, instance: str, host: str) -> str:
        answer = self.order('attach', volume=volume, instance=instance, host=host)
        self.assertEqual(f'/dev/mapper/dmlocal-{volume}', answer.get('path'), answer)
        return str(answer['id'])

    def detach(self, attachment: str) -> None:
        answer = self.order('detach', attachment=attachment)
        self.assertEqual(200, answer['status'], answer)

    def delete(self, volume: str) -> None:
        self.assertEqual('gone', self.order('delete', volume=volume)['status'])
        self.assertEqual({}, self.fleet.where(volume))

    def host(self, volume: str) -> str:
        states = ['available', 'in-use', 'reserved']
        found = self.order('wait', volume=volume, states=states)
        return str(found['host']).partition('#')[2]

    def call(self, method: str, path: str, body: Any = None, expected: int = 200) -> Any:
        answer = self.order('call', method=method, path=path, body=body)
        self.assertEqual(expected, answer['status'], answer)
        return answer['body']

    def kind(self, **specs: str) -> str:
        """A volume type."""
        body = {'volume_type': {'name': str(uuid.uuid4()), 'extra_specs': specs}}
        return str(self.call('POST', '/types', body)['volume_type']['id'])

    def told(self, volume: str) -> list[str]:
        """What Cinder has told the user of a volume."""
        messages = self.call('GET', f'/messages?resource_uuid={volume}')['messages']
        return [message['user_message'] for message in messages]


class Flows(WholeCinder):
    """What Nova and users order."""

    def test_a_guest_migrates_and_comes_back(self) -> None:
        volume, home = self.create()
        away = next(name for name in NODES if name != home)
        instance = str(uuid.uuid4())
        at_home = self.attach(volume, instance, home)
        self.fleet.agents[home].open(volume)
        # Given up once.
        at_away = self.attach(volume, instance, away)
        self.assertEqual({home: 'PUBLISHED', away: 'HELD'}, self.fleet.where(volume))
        self.detach(at_away)
        self.assertEqual({home: 'LOCAL'}, self.fleet.where(volume))
        # A live guest is not cut off.
        refusal = self.order('detach', attachment=at_home)
        self.assertEqual(500, refusal['status'])
        self.assertTrue(self.fleet.agents[home].write(volume, 'first'))
        at_away = self.attach(volume, instance, away)
        self.fleet.agents[home].shut(volume)
        self.detach(at_home)
        self.assertEqual({home: 'FENCED', away: 'HYDRATING'}, self.fleet.where(volume))
        self.assertEqual(away, self.host(volume))
        self.fleet.agents[away].arrive(volume)
        self.detach(at_away)
        self.delete(volume)

    def test_a_refusal_leaves_a_reserved_attachment_in_nobodys_way(self) -> None:
        volume, home = self.create()
        away = next(name for name in NODES if name != home)
        instance = str(uuid.uuid4())
        at_home = self.attach(volume, instance, home)
        self.fleet.agents[away].has_pool = False
        self.fleet.agents[away].capacity = 0
        agent = self.fleet.agents[away]
        agent.is_down = True
        answer = self.order('attach', volume=volume, instance=instance, host=away)
        self.assertGreaterEqual(answer['status'], 400)
        agent.is_down = False
        agent.has_pool, agent.capacity = True, 100 << 30
        self.attach(volume, instance, away)
        path = f'/attachments?volume_id={volume}'
        rows = self.order('call', method='GET', path=path)['body']['attachments']
        self.assertEqual(3, len(rows))
        for row in rows:
            if row['id'] != at_home:
                self.detach(row['id'])
        self.detach(at_home)
        self.delete(volume)

    def test_snapshots_clones_growth_and_deletion(self) -> None:
        volume, _home = self.create()
        snapshot = self.order('snapshot', volume=volume)
        self.assertEqual('available', snapshot['status'])
        made, _ = self.create(snapshot_id=snapshot['id'])
        cloned, _ = self.create(source_volid=volume)
        body = {'os-extend': {'new_size': 2}}
        grown = self.order('call', method='POST', path=f'/volumes/{cloned}/action', body=body)
        self.assertEqual(202, grown['status'])
        self.order('wait', volume=cloned, states=['available'])
        gone = self.order('delete_snapshot', snapshot=snapshot['id'])
        self.assertEqual('gone', gone['status'])
        for one in (made, cloned, volume):
            self.delete(one)

    def test_a_volume_migrates_within_the_fleet(self) -> None:
        volume, home = self.create()
        away = next(name for name in NODES if name != home)
        body = {'os-migrate_volume': {'host': f'fleet@dmlocal#{away}'}}
        self.order('call', method='POST', path=f'/volumes/{volume}/action', body=body)
        for _ in range(50):
            if self.host(volume) == away:
                break
        self.assertEqual({home: 'FENCED', away: 'HYDRATING'}, self.fleet.where(volume))
        self.fleet.agents[away].arrive(volume)
        self.order('wait', volume=volume, states=['available'])
        self.delete(volume)


class Answers(WholeCinder):
    """What becomes of what the driver raises."""

    def test_who_attaches_hears_why_it_failed(self) -> None:
        volume, home = self.create()
        away = next(name for name in NODES if name != home)
        agent = self.fleet.agents[away]
        agent.says_refused['Moves.Receive'] = Refusal('NO_ROOM', 'RESOURCE_EXHAUSTED')
        refusal = self.order('attach', volume=volume, instance=str(uuid.uuid4()), host=away)
        agent.says_refused.clear()
        self.assertEqual(500, refusal['status'])
        self.assertIn('NO_ROOM', json.dumps(refusal))
        self.assertIn('make room there', json.dumps(refusal))
        self.assertEqual(['attach volume:Failed to attach volume.'], self.told(volume))
        path = f'/attachments?volume_id={volume}'
        for row in self.call('GET', path)['attachments']:
            self.detach(row['id'])
        self.delete(volume)

    def test_a_host_without_an_agent_is_the_callers_mistake(self) -> None:
        volume, _home = self.create()
        body = {'attachment': {'volume_uuid': volume, 'instance_uuid': INSTANCE}}
        row = self.call('POST', '/attachments', body)['attachment']['id']
        body = {'attachment': {'connector': {'host': 'elsewhere'}}}
        refusal = self.call('PUT', f'/attachments/{row}', body, expected=400)
        self.assertIn('dmlocal_nodes', json.dumps(refusal))
        # Of a call that makes the attachment with its connector, Cinder's API says 500.
        answer = self.order('attach', volume=volume, instance=INSTANCE, host='elsewhere')
        self.assertEqual(500, answer['status'])
        self.assertIn('dmlocal_nodes', json.dumps(answer))
        for left in self.call('GET', f'/attachments?volume_id={volume}')['attachments']:
            self.detach(left['id'])
        self.delete(volume)

    def test_a_user_hears_of_a_detach_that_failed(self) -> None:
        volume, home = self.create()
        row = self.attach(volume, str(uuid.uuid4()), home)
        self.fleet.agents[home].open(volume)
        self.call('DELETE', f'/attachments/{row}', expected=500)
        self.assertEqual(['update attachment:Failed to detach volume.'], self.told(volume))
        self.fleet.agents[home].shut(volume)
        self.detach(row)
        self.delete(volume)

    def test_a_volume_that_is_open_stays_available(self) -> None:
        volume, home = self.create()
        vol = self.fleet.agents[home].volumes[volume]
        vol.attached, vol.opened = True, 1
        self.call('DELETE', f'/volumes/{volume}', expected=202)
        states = ['available', 'gone', 'error_deleting']
        self.assertEqual(
            'available', self.order('wait', volume=volume, states=states)['status']
        )
        vol.opened = 0
        self.delete(volume)

    def test_without_room_another_node_is_tried(self) -> None:
        for name in NODES:
            other = next(node for node in NODES if node != name)
            agent = self.fleet.agents[name]
            agent.says_refused['Volumes.Create'] = Refusal('NO_ROOM', 'RESOURCE_EXHAUSTED')
            volume, home = self.create()
            agent.says_refused.clear()
            self.assertEqual(other, home)
            self.delete(volume)

    def test_a_creation_without_an_answer_is_not_tried_elsewhere(self) -> None:
        for agent in self.fleet.agents.values():
            agent.loses_answer.add('Volumes.Create')
        volume = self.order('create')
        for agent in self.fleet.agents.values():
            agent.loses_answer.clear()
        self.assertEqual('error', volume['status'])
        self.assertEqual(
            [volume['host'].partition('#')[2]], list(self.fleet.where(volume['id']))
        )
        self.delete(volume['id'])

    def test_the_service_is_down_while_no_node_answers(self) -> None:
        self.assertEqual('up', self.order('service', state='up')['state'])
        for agent in self.fleet.agents.values():
            agent.is_down = True
        self.assertEqual('down', self.order('service', state='down')['state'])
        self.fleet.agents[NODES[1]].is_down = False
        self.assertEqual('up', self.order('service', state='up')['state'])
        self.fleet.agents[NODES[0]].is_down = False
        self.assertEqual(2, len(self.order('up', pools=2)['pools']))


class Features(WholeCinder):
    """What Cinder does by itself with what the driver gives it."""

    def test_capabilities_are_shown(self) -> None:
        shown = self.call('GET', '/capabilities/fleet@dmlocal')
        self.assertEqual(
            ('dmlocal', 'local'), (shown['vendor_name'], shown['storage_protocol'])
        )
        self.assertEqual('boolean', shown['properties']['qos']['type'])

    def test_front_end_qos_is_passed_through_and_changes_with_the_type(self) -> None:
        kinds = [self.kind(), self.kind()]
        for kind, limit in zip(kinds, ('100', '200'), strict=True):
            name = str(uuid.uuid4())
            spec = {'name': name, 'consumer': 'front-end', 'total_iops_sec': limit}
            qos = self.call('POST', '/qos-specs', {'qos_specs': spec})['qos_specs']['id']
            path = f'/qos-specs/{qos}/associate?vol_type_id={kind}'
            self.call('GET', path, expected=202)
        volume, home = self.create(volume_type=kinds[0])
        self.assertEqual({'total_iops_sec': '100'}, self.limits(volume, home))
        body = {'os-retype': {'new_type': kinds[1], 'migration_policy': 'never'}}
        self.call('POST', f'/volumes/{volume}/action', body, expected=202)
        self.order('wait', volume=volume, states=['available'])
        self.assertEqual({'total_iops_sec': '200'}, self.limits(volume, home))
        self.delete(volume)

    def limits(self, volume: str, host: str) -> Any:
        """What a hypervisor is told of a volume's limits."""
        row = self.attach(volume, str(uuid.uuid4()), host)
        info = self.call('GET', f'/attachments/{row}')['attachment']['connection_info']
        self.detach(row)
        return info['qos_specs']

    def test_groups_are_taken_snapshots_of_copied_and_deleted(self) -> None:
        kind = self.kind()
        body: dict[str, Any] = {'group_type': {'name': str(uuid.uuid4())}}
        group_type = self.call('POST', '/group_types', body, 202)['group_type']['id']
        body = {'group': {'group_type': group_type, 'volume_types': [kind]}}
        group = self.call('POST', '/groups', body, 202)['group']['id']
        self.assertEqual('available', self.group(group)['status'])
        for _ in range(2):
            self.create(volume_type=kind, group_id=group)
        body = {'group_snapshot': {'group_id': group}}
        taken = self.call('POST', '/group_snapshots', body, 202)['group_snapshot']['id']
        path, states = f'/group_snapshots/{taken}', ['available', 'error']
        row = self.order('until', path=path, kind='group_snapshot', states=states)
        self.assertEqual('available', row['status'])
        body = {'create-from-src': {'group_snapshot_id': taken}}
        copy = self.call('POST', '/groups/action', body, 202)['group']['id']
        self.assertEqual('available', self.group(copy)['status'])
        self.assertEqual(4, sum(len(agent.volumes) for agent in self.fleet.agents.values()))
        self.call('DELETE', f'/group_snapshots/{taken}', None, 202)
        self.order('until', path=path, kind='group_snapshot', states=['gone'])
        for one in (copy, group):
            body = {'delete': {'delete-volumes': True}}
            self.call('POST', f'/groups/{one}/action', body, 202)
            path = f'/groups/{one}'
            row = self.order('until', path=path, kind='group', states=['gone', 'error'])
            self.assertEqual('gone', row['status'])
        for agent in self.fleet.agents.values():
            self.assertEqual(({}, {}), (agent.volumes, agent.snapshots))

    def group(self, group: str) -> Any:
        states = ['available', 'error']
        return self.order('until', path=f'/groups/{group}', kind='group', states=states)

    def test_what_agents_have_is_taken_over_once(self) -> None:
        found = Vol(str(uuid.uuid4()), GIB)
        self.fleet.agents[NODES[0]].volumes[found.id] = found
        host = f'fleet@dmlocal#{NODES[0]}'
        body = {'volume': {'host': host, 'ref': {'source-id': found.id}}}
        ids = [self.call('POST', '/manageable_volumes', body, 202)['volume']['id']]
        states = ['available', 'error', 'error_managing']
        self.assertEqual(
            'available', self.order('wait', volume=ids[0], states=states)['status']
        )
        ids.append(self.call('POST', '/manageable_volumes', body, 202)['volume']['id'])
        row = self.order('wait', volume=ids[1], states=states)
        self.assertIn('error', row['status'])
        # The row of the refusal has nothing at the agents, and takes nothing with it.
        self.assertEqual('gone', self.order('delete', volume=ids[1])['status'])
        self.assertIn(found.id, self.fleet.agents[NODES[0]].volumes)
        self.assertEqual('gone', self.order('delete', volume=ids[0])['status'])
        self.assertEqual({}, self.fleet.agents[NODES[0]].volumes)
