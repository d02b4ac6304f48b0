"""Cinder's own services over pretended agents: what Cinder really calls, and in which order.

Takes longer than the tests that are found by themselves:
`python -m unittest cinder_dmlocal.tests.check_whole`.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile
import unittest
import uuid
from typing import Any, ClassVar

from cinder_dmlocal.tests.fake import FakeFleet

NODES = ['node-a', 'node-b']


class WholeCinder(unittest.TestCase):
    """One Cinder for all tests."""

    fleet: ClassVar[FakeFleet]
    process: ClassVar[subprocess.Popen[str]]

    @classmethod
    def setUpClass(cls) -> None:
        cls.fleet = FakeFleet(NODES)
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        path = pathlib.Path(folder.name)
        pair = cls.fleet.authority.issue('driver')
        (path / 'ca.pem').write_bytes(cls.fleet.authority.cert)
        (path / 'driver.pem').write_bytes(pair.cert)
        (path / 'driver.key').write_bytes(pair.key)
        nodes = [f'{name}={endpoint}' for name, endpoint in cls.fleet.endpoints.items()]
        cls.log = path / 'cinder.log'
        with open(path / 'stderr', 'w') as stderr:
            cls.process = subprocess.Popen(
                [sys.executable, '-m', 'cinder_dmlocal.tests.whole', folder.name, *nodes],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        cls.addClassCleanup(cls.end)
        line = cls.process.stdout.readline()
        if not line:
            raise AssertionError((path / 'stderr').read_text()[-4000:])
        assert len(json.loads(line)['pools']) == 2, line

    @classmethod
    def end(cls) -> None:
        """It ends with its orders."""
        cls.process.stdin.close()
        cls.process.wait(30)
        cls.process.stdout.close()

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
