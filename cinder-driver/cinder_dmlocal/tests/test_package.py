"""What is handed out: a source archive that can be built by itself, and its wheel."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unittest
import zipfile

from cinder_dmlocal import options

HERE = pathlib.Path(__file__).parents[2]


def run(folder: pathlib.Path, *arguments: str, path: str = '') -> str:
    """Runs Python somewhere; gives what it prints."""
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', *arguments],
        cwd=folder,
        env={**os.environ, 'PYTHONPATH': path},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise AssertionError(done.stdout + done.stderr)
    return done.stdout


class Package(unittest.TestCase):
    """Needs no network: what builds it is installed with the tests."""

    folder: pathlib.Path
    installed: pathlib.Path

    @classmethod
    def setUpClass(cls) -> None:
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = pathlib.Path(folder.name)
        beside = ('egg_info', '--egg-base', folder.name)
        run(HERE, 'setup.py', '--quiet', *beside, 'sdist', '--dist-dir', folder.name)
        [archive] = cls.folder.glob('*.tar.gz')
        with tarfile.open(archive) as opened:
            cls.sources = opened.getnames()
        shutil.unpack_archive(archive, cls.folder)
        unpacked = cls.folder / archive.name.removesuffix('.tar.gz')
        pip = ('-m', 'pip', '--quiet', '--no-input')
        offline = ('--no-deps', '--no-index', '--no-build-isolation')
        run(unpacked, *pip, 'wheel', *offline, '--wheel-dir', folder.name, '.')
        [wheel] = cls.folder.glob('*.whl')
        with zipfile.ZipFile(wheel) as zipped:
            cls.files = zipped.namelist()
        cls.installed = cls.folder / 'installed'
        run(cls.folder, *pip, 'install', *offline, '--target', str(cls.installed), str(wheel))

    def test_the_source_has_the_agents_interface_and_nothing_generated(self) -> None:
        names = [name.rpartition('/')[2] for name in self.sources]
        self.assertIn('dmlocal.proto', names)
        self.assertEqual([], [name for name in names if '_pb2' in name])

    def test_the_wheel_has_the_generated_code_and_says_that_it_is_typed(self) -> None:
        for name in ('dmlocal_pb2.py', 'dmlocal_pb2.pyi', 'dmlocal_pb2_grpc.py'):
            self.assertIn(f'cinder_dmlocal/wire/{name}', self.files)
        self.assertIn('cinder_dmlocal/py.typed', self.files)
        self.assertEqual([], [name for name in self.files if '/tests/' in name])

    def test_what_is_installed_is_the_driver(self) -> None:
        program = 'from cinder_dmlocal import driver; print(driver.__file__)'
        printed = run(self.folder, '-c', program, path=str(self.installed))
        self.assertEqual(str(self.installed / 'cinder_dmlocal' / 'driver.py'), printed.strip())

    def test_the_generator_of_configurations_lists_every_option_with_its_help(self) -> None:
        program = ('-m', 'oslo_config.generator', '--namespace', 'cinder_dmlocal')
        printed = run(self.folder, *program, path=str(self.installed))
        text = ' '.join(printed.replace('\n# ', ' ').split())
        for option in options.OPTIONS:
            self.assertIn(f'{option.help} (', text)
            self.assertIn(f'#{option.name} =', printed)
