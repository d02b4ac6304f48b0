"""What pretended agents give as devices: names only, or files that can be read and written.

With a folder, each copy of a volume has a file as long as the volume, full of holes, and
a node's device of it is a link to whichever file the node would show: its own, or its
source's while the copy is held or remote. So links change hands as devices do, and
whatever still has an old file open writes where nobody looks.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import uuid


class Disks:
    """The devices of a fleet."""

    def __init__(self, folder: pathlib.Path | None) -> None:
        self._folder = folder

    def blank(self, size: int) -> pathlib.Path | None:
        """A file that has never been written."""
        if self._folder is None:
            return None
        path = self._new(self._folder)
        with open(path, 'xb') as file:
            file.truncate(size)
        return path

    def copy(self, of: pathlib.Path | None) -> pathlib.Path | None:
        """A file of its own with the same content."""
        if self._folder is None or of is None:
            return None
        path = self._new(self._folder)
        subprocess.run(['cp', '--sparse=always', '--reflink=auto', of, path], check=True)
        return path

    @staticmethod
    def _new(folder: pathlib.Path) -> pathlib.Path:
        return folder / f'data-{uuid.uuid4()}'

    @staticmethod
    def resize(path: pathlib.Path | None, size: int) -> None:
        """Has a file be as long as its volume: qemu-img makes files as long as images."""
        if path is not None:
            os.truncate(path, size)

    @staticmethod
    def remove(path: pathlib.Path | None) -> None:
        """Nobody shows this file any more."""
        if path is not None:
            path.unlink(missing_ok=True)

    def device(self, node: str, volume_id: str, path: pathlib.Path | None) -> str:
        """Path of a node's device, which from now on shows that file."""
        if self._folder is None or path is None:
            return f'/dev/mapper/dmlocal-{volume_id}'
        link = self._link(self._folder, node, volume_id)
        if not link.is_symlink() or link.readlink() != path:
            link.parent.mkdir(exist_ok=True)
            link.with_suffix('.new').symlink_to(path)
            link.with_suffix('.new').replace(link)
        return str(link)

    def no_device(self, node: str, volume_id: str) -> None:
        """The node has no device of the volume any more."""
        if self._folder is not None:
            self._link(self._folder, node, volume_id).unlink(missing_ok=True)

    @staticmethod
    def _link(folder: pathlib.Path, node: str, volume_id: str) -> pathlib.Path:
        return folder / node / f'dmlocal-{volume_id}'
