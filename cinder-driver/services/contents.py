"""What volumes and images hold, and whether it is still that, byte by byte."""

from __future__ import annotations

import pathlib
import random
import shutil

_PIECE = 64 << 10
_LIKE_A_DISK = 1 << 20


def make(path: pathlib.Path, size: int, seed: str = '') -> pathlib.Path:
    """A file with pieces that are all different, at its ends and in between, and holes."""
    chance = random.Random(seed)
    with open(path, 'wb') as file:
        file.truncate(size)
        for at in {0, size - _PIECE, *(chance.randrange(size - _PIECE) for _ in range(8))}:
            file.seek(at)
            file.write(chance.randbytes(_PIECE))
    return path


def write(device: pathlib.Path, content: pathlib.Path) -> None:
    """Writes a file's content to the beginning of a device, as a guest would."""
    with open(device, 'r+b') as target, open(content, 'rb') as source:
        shutil.copyfileobj(source, target, _LIKE_A_DISK)


def assert_reads(device: pathlib.Path, content: pathlib.Path, size: int) -> None:
    """A device is so long, begins with a file's content, and is blank after that."""
    with open(device, 'rb') as shown, open(content, 'rb') as wanted:
        at = 0
        while piece := shown.read(_LIKE_A_DISK):
            expected = wanted.read(len(piece))
            expected += bytes(len(piece) - len(expected))
            assert piece == expected, f'{device} is not {content} at {at}'
            at += len(piece)
        assert at == size, f'{device} has {at} bytes, not {size}'
        assert not wanted.read(1), f'{device} is shorter than {content}'
