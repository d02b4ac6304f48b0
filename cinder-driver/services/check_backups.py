"""Backups to files, and what is restored from them."""

from __future__ import annotations

from typing import Any

from services.cloud import FilesTestCase


class Backups(FilesTestCase):
    def test_a_volume_is_restored_to_itself_to_another_and_to_a_new_one(self) -> None:
        volume = self.written('one')
        backup = self.backup(volume)
        self.write(volume, self.file('two'))
        self.restore(backup, volume)
        self.assert_content(volume, self.file('one'), 'node-a')
        other = self.create('node-b')
        self.restore(backup, other)
        self.assert_content(other, self.file('one'), 'node-b')
        new = self.restore(backup, None)
        self.assert_content(new, self.file('one'), self.node_of(new))
        self.delete_backup(backup)
        self.delete(volume, other, new)

    def test_a_volume_in_use_is_backed_up_as_it_was_at_one_moment(self) -> None:
        volume = self.written('one')
        with self.attached(volume, 'node-a'):
            self.fleet.agents['node-a'].open(volume)
            backup = self.backup(volume, force=True)
            self.assertEqual('LOCAL', self.fleet.where(volume)['node-a'])
            self.fleet.agents['node-a'].shut(volume)
        new = self.restore(backup, None)
        self.assert_content(new, self.file('one'), 'node-b')
        self.delete_backup(backup)
        self.delete(volume, new)

    def test_a_snapshot_is_backed_up(self) -> None:
        volume = self.written('one')
        snapshot = self.block.snapshot(volume)
        self.write(volume, self.file('two'))
        backup = self.backup(volume, snapshot_id=snapshot)
        self.restore(backup, volume)
        self.assert_content(volume, self.file('one'), 'node-a')
        self.delete_backup(backup)
        self.block.delete_snapshot(snapshot)
        self.delete(volume)

    def test_what_has_changed_is_backed_up_alone_also_after_a_move(self) -> None:
        volume = self.written('one')
        whole = self.backup(volume)
        self.write(volume, self.file('two'), 'node-b')
        changes = self.backup(volume, incremental=True)
        self.assertTrue(
            self.block.call('GET', f'/backups/{changes}')['backup']['is_incremental']
        )
        new = self.restore(changes, None)
        self.assert_content(new, self.file('two'), self.node_of(new))
        self.restore(whole, volume)
        self.assert_content(volume, self.file('one'), 'node-b')
        self.delete_backup(changes)
        self.delete_backup(whole)
        self.delete(volume, new)

    def backup(self, volume: str, **more: Any) -> str:
        what = {'backup': {'volume_id': volume, **more}}
        backup = str(self.block.call('POST', '/backups', what)['backup']['id'])
        self.wait(backup, 'available')
        self.block.wait(volume, 'available', 'in-use')
        return backup

    def wait(self, backup: str, wanted: str) -> None:
        def seen() -> bool:
            found = self.block.get(f'/backups/{backup}')
            status = found['backup']['status'] if found else 'gone'
            self.assertNotIn('error', status, found)
            return bool(status == wanted)

        self.cloud.processes.wait(f'backup {backup} is not {wanted}', seen)

    def restore(self, backup: str, volume: str | None) -> str:
        what = {'restore': {'volume_id': volume} if volume else {}}
        answer = self.block.call('POST', f'/backups/{backup}/restore', what)
        self.wait(backup, 'available')
        volume = str(answer['restore']['volume_id'])
        self.block.wait(volume, 'available')
        return volume

    def delete_backup(self, backup: str) -> None:
        self.block.call('DELETE', f'/backups/{backup}')
        self.wait(backup, 'gone')
