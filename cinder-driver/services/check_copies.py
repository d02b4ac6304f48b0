"""Snapshots, what is made of them, and groups."""

from __future__ import annotations

from typing import Any

from services.cloud import FilesTestCase

GROUP_TYPE = 'together'


class Copies(FilesTestCase):
    def test_a_snapshot_and_what_is_made_of_it_keep_what_was_there(self) -> None:
        volume = self.written('one', 'local')
        snapshot = self.block.snapshot(volume)
        made = []
        # Also after the volume has left its snapshot: Cinder looks for it at the volume's.
        for node in ('node-a', 'node-b'):
            with self.subTest(node):
                self.write(volume, self.file('two'), node)
                made.append(self.create('local', snapshot_id=snapshot))
                self.assert_content(made[-1], self.file('one'), node)
        self.delete(*made)
        self.block.delete_snapshot(snapshot)
        self.delete(volume)

    def test_a_clone_keeps_what_was_there_when_it_was_made(self) -> None:
        volume = self.written('one')
        same = self.create(source_volid=volume)
        larger = self.create(source_volid=volume, size=2)
        self.write(volume, self.file('two'))
        self.assert_content(same, self.file('one'), 'node-a')
        self.assert_content(larger, self.file('one'), 'node-b')
        self.delete(same, larger, volume)

    def test_a_volume_in_use_has_snapshots_taken_by_force(self) -> None:
        volume = self.written('one')
        with self.attached(volume, 'node-a'):
            self.fleet.agents['node-a'].open(volume)
            snapshot = self.block.snapshot(volume)
            self.fleet.agents['node-a'].shut(volume)
        made = self.create('node-a', snapshot_id=snapshot)
        self.assert_content(made, self.file('one'), 'node-a')
        self.delete(made)
        self.block.delete_snapshot(snapshot)
        self.delete(volume)

    def test_a_volume_is_taken_back_to_its_snapshot_also_after_it_has_moved(self) -> None:
        volume = self.written('one')
        snapshot = self.block.snapshot(volume)
        for node in ('node-a', 'node-b'):
            with self.subTest(node):
                self.write(volume, self.file('two'), node)
                self.block.act(volume, revert={'snapshot_id': snapshot})
                self.block.wait(volume, 'available')
                self.assert_content(volume, self.file('one'), node)
        self.block.delete_snapshot(snapshot)
        self.delete(volume)


class Groups(FilesTestCase):
    def test_a_group_is_snapshot_and_copied_volume_by_volume(self) -> None:
        kind = self.cloud.group_type(GROUP_TYPE)
        types = [self.cloud.types['node-a'], self.cloud.types['node-b']]
        group = self.call('groups', {'group_type': kind, 'volume_types': types})
        first = self.create('node-a', group_id=group)
        second = self.create('node-b', group_id=group)
        self.write(first, self.file('one'), 'node-a')
        self.write(second, self.file('two'), 'node-b')
        taken = self.call('group_snapshots', {'group_id': group})
        self.write(first, self.file('three'), 'node-a')
        of = {'group_snapshot_id': taken}
        self.block.call('POST', '/groups/action', {'create-from-src': of})
        copy = self.newest(group)
        self.wait_for('groups', copy)
        members = self.members(copy)
        self.assertEqual(2, len(members))
        contents = {'node-a': 'one', 'node-b': 'two'}
        for volume in members:
            kind = self.block.show(volume)['volume_type']
            self.assert_content(volume, self.file(contents[kind]), kind)
        self.block.call('DELETE', f'/group_snapshots/{taken}')
        self.wait_for('group_snapshots', taken, is_gone=True)
        for one in (copy, group):
            gone = {'delete': {'delete-volumes': True}}
            self.block.call('POST', f'/groups/{one}/action', gone)
            self.wait_for('groups', one, is_gone=True)

    def call(self, kind: str, what: dict[str, Any]) -> str:
        """Makes one of these; gives its id, once it is there."""
        made = str(self.block.call('POST', f'/{kind}', {kind[:-1]: what})[kind[:-1]]['id'])
        self.wait_for(kind, made)
        return made

    def wait_for(self, kind: str, one: str, *, is_gone: bool = False) -> None:
        def seen() -> bool:
            found = self.block.get(f'/{kind}/{one}')
            status = found[kind[:-1]]['status'] if found else 'gone'
            self.assertNotIn('error', status)
            return bool(status == ('gone' if is_gone else 'available'))

        self.cloud.processes.wait(f'{one} of {kind}', seen)

    def newest(self, other: str) -> str:
        groups = self.block.call('GET', '/groups')['groups']
        [found] = [group['id'] for group in groups if group['id'] != other]
        return str(found)

    def members(self, group: str) -> list[str]:
        answer = self.block.call('GET', f'/volumes/detail?group_id={group}')
        return [volume['id'] for volume in answer['volumes']]
