"""Images become volumes and volumes images; what an image held is fetched once."""

from __future__ import annotations

import subprocess
import uuid

from services import contents
from services.cloud import CONTROLLER, FilesTestCase


class ImageTestCase(FilesTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.content = self.file('content')

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


class Images(ImageTestCase):
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

    def test_a_volume_becomes_an_image(self) -> None:
        volume = self.create()
        self.write(volume, self.content)
        for form in ('raw', 'qcow2'):
            with self.subTest(form):
                self.assert_image(self.image_of(volume, form), form)
        self.assertEqual({'node-a': 'LOCAL'}, self.fleet.where(volume))
        self.delete(volume)

    def test_a_volume_in_use_becomes_an_image_by_force(self) -> None:
        volume = self.create()
        self.write(volume, self.content)
        with self.attached(volume, 'node-a'):
            self.fleet.agents['node-a'].open(volume)
            image = self.image_of(volume, 'raw', force=True)
            self.assertEqual('in-use', self.block.wait(volume, 'in-use')['status'])
            self.assertEqual('LOCAL', self.fleet.where(volume)['node-a'])
            self.fleet.agents['node-a'].shut(volume)
        self.assert_image(image, 'raw')
        self.delete(volume)

    def image_of(self, volume: str, form: str, **more: object) -> str:
        what = {'image_name': 'made', 'disk_format': form, 'container_format': 'bare', **more}
        answer = self.block.act(volume, os_volume_upload_image=what)
        image = answer['os-volume_upload_image']['image_id']
        self.addCleanup(self.cloud.images.delete, image)
        self.cloud.images.wait_for(image)
        self.block.wait(volume, 'available', 'in-use')
        return str(image)

    def assert_image(self, image: str, form: str) -> None:
        path = self.cloud.images.download(image, self.folder / 'image')
        raw = self.folder / 'raw'
        convert = ['qemu-img', 'convert', '-f', form, '-O', 'raw', str(path), str(raw)]
        subprocess.run(convert, check=True)
        contents.assert_reads(raw, self.content, 1 << 30)


class Reimage(ImageTestCase):
    """A volume that is there is given what an image holds, in place of what it held."""

    def test_a_volume_that_has_moved_is_given_an_image_where_it_is(self) -> None:
        volume = self.create('node-a')
        for form in ('raw', 'qcow2'):
            with self.subTest(form):
                self.write(volume, self.file('one'), 'node-b')
                self.reimage(volume, self.upload(form))
                self.assertEqual({'node-b': 'LOCAL'}, self.fleet.where(volume))
                self.assert_content(volume, self.content, 'node-b')
        self.delete(volume)

    def test_a_volume_that_an_instance_keeps_while_it_is_rebuilt(self) -> None:
        volume = self.written('one')
        kept = {'volume_uuid': volume, 'instance_uuid': str(uuid.uuid4())}
        made = self.block.call('POST', '/attachments', {'attachment': kept})['attachment']
        self.block.wait(volume, 'reserved')
        self.reimage(volume, self.upload(), 'reserved')
        self.assertEqual({'node-a': 'LOCAL'}, self.fleet.where(volume))
        self.block.detach(made['id'])
        self.assert_content(volume, self.content, 'node-a')
        self.delete(volume)

    def reimage(self, volume: str, image: str, status: str = 'available') -> None:
        what = {'image_id': image, 'reimage_reserved': status == 'reserved'}
        self.block.act(volume, os_reimage=what)
        self.block.wait(volume, status)


class Cache(ImageTestCase):
    """What an image held is fetched once, and cloned from then on."""

    def test_the_second_volume_of_an_image_copies_nothing_on_any_node(self) -> None:
        image = self.upload()
        first = self.create('node-a', imageRef=image)
        [cached] = self.cached()
        for node in ('node-a', 'node-b'):
            with self.subTest(node):
                self.fleet.order.clear()
                volume = self.create(node, imageRef=image)
                self.assertEqual('true', self.block.show(volume)['bootable'])
                mine = [call for call in self.fleet.order if call.startswith(CONTROLLER)]
                self.assertEqual([], [call for call in mine if 'Receive' in call])
                self.assert_content(volume, self.content, node)
                self.delete(volume)
        self.assertEqual([cached], self.cached())
        self.delete(first, cached)

    def test_an_entry_gives_way_to_others(self) -> None:
        made = []
        for _ in range(3):
            made.append(self.create('node-a', imageRef=self.upload()))
        cached = self.cached()
        self.assertEqual(2, len(cached))
        self.delete(*made, *cached)

    def test_an_image_that_has_changed_is_fetched_anew(self) -> None:
        image = self.upload()
        first = self.create('node-a', imageRef=image)
        [outdated] = self.cached()
        changed = [{'op': 'add', 'path': '/note', 'value': 'changed'}]
        self.cloud.images.change(image, changed)
        second = self.create('node-a', imageRef=image)
        self.block.wait(outdated, 'gone')
        [cached] = self.cached()
        self.assertNotEqual(outdated, cached)
        self.delete(first, second, cached)
