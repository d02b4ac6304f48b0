"""Generates the agents' interface before the package is built."""

from __future__ import annotations

import pathlib
import shutil
import sys

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

HERE = pathlib.Path(__file__).parent

# In a checkout the interface stands beside this folder, in a source archive in it.
PROTOS = [HERE.parent / 'proto' / 'dmlocal' / 'v1', HERE / 'proto']


def find_proto() -> pathlib.Path:
    """The folder of the interface."""
    return next(path for path in PROTOS if (path / 'dmlocal.proto').is_file())


def generate(into: pathlib.Path) -> None:
    """Writes the modules of the interface into the folder that has the package."""
    import grpc_tools  # noqa: PLC0415 - only there while this is built
    from grpc_tools import protoc  # noqa: PLC0415

    well_known = pathlib.Path(grpc_tools.__file__).parent / '_proto'
    package = 'cinder_dmlocal/wire'
    arguments = [
        'protoc',
        f'-I{package}={find_proto()}',
        f'-I{well_known}',
        f'--python_out={into}',
        f'--pyi_out={into}',
        f'--grpc_python_out={into}',
        f'{package}/dmlocal.proto',
    ]
    if protoc.main(arguments) != 0:
        raise SystemExit('protoc failed')


class Build(build_py):
    """Adds the generated modules."""

    def run(self) -> None:
        """Generates into the source tree for an editable build, else beside it."""
        super().run()
        generate(HERE if self.editable_mode else pathlib.Path(self.build_lib))


class Archive(sdist):
    """Adds the interface, which a checkout has elsewhere."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Leaves out what was generated: whoever builds it generates it."""
        super().make_release_tree(base_dir, [name for name in files if '_pb2' not in name])
        into = pathlib.Path(base_dir) / 'proto'
        into.mkdir()
        shutil.copy(find_proto() / 'dmlocal.proto', into)


if __name__ == '__main__':
    if sys.argv[1:] == ['generate']:
        generate(HERE)
    else:
        setup(cmdclass={'build_py': Build, 'sdist': Archive})
