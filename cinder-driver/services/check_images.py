"""Images become volumes and volumes images; what an image held is fetched once."""

from __future__ import annotations

import pathlib
import subprocess
import tempfile

from services import contents
from services.cloud import CONTROLLER, CloudTestCase

_MIB = 1 << 20


class Images(CloudTestCase):
    def setUp(self) -> None:
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.content = contents.make(self.folder / 'content', 24 * _MIB)

    def upload(self, form: str = 'raw') -> str:
        """An image of the content, which goes when the test is over."""
        path = self.content
        if form != 'raw':
            path = self.folder / f'content.{form}'
            convert = ['qemu-img', 'convert', '-O', form, str(self.content), str(path)]
            subprocess.run(convert, check=True)
        image = self.cloud.images.upload(path, form)
        self.addCleanup(self.cloud.images.delete, image)
        return image

    def test_an_image_becomes_a_bootable_volume(self) -> None:
        for form in ('raw', 'qcow2'):
            with self.subTest(form):
                image = self.upload(form)
                volume = self.create('other', imageRef=image)
                self.assertEqual('true', self.block.show(volume)['bootable'])
                self.assert_content(volume, self.content, 'node-x')
                self.delete(volume)

    def test_it_is_written_from_where_cinder_runs_and_nowhere_copied(self) -> None:
        fleet = self.cloud.fleets['other']
        volume = self.create('other', imageRef=self.upload())
        self.assertIn(f'{CONTROLLER} Moves.Receive', fleet.order)
        self.assertEqual({'node-x': 'LOCAL'}, fleet.where(volume))
        self.delete(volume)
