"""What becomes of a volume once an operator has declared a node dead."""

from __future__ import annotations

from cinder_dmlocal.tests.base import SERVICE, DriverTestCase


class Lost(DriverTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.volume = self.cinder.create()

    def test_a_controller_that_is_lost_gives_back_what_it_visited(self) -> None:
        self.volume.status = 'downloading'
        self.driver.initialize_connection(self.volume, {'host': 'node-b'})
        self.agent('b').write(self.volume.id, 'image')
        self.agent('b').is_down = True
        self.volume.status = 'available'
        with self.refused('node-b does not answer'):
            self.driver.initialize_connection(self.volume, {'host': 'node-a'})
        self.cinder.driver = self.make_driver(dmlocal_dead_nodes=['node-b'])
        self.cinder.attach(self.volume, 'node-a')
        self.assertEqual('LOCAL', self.agent('a').volumes[self.volume.id].state)
        self.assertEqual(['image'], self.agent('a').volumes[self.volume.id].data)

    def test_what_has_left_a_lost_node_unheard_is_found(self) -> None:
        row = self.cinder.attach(self.volume, 'node-b')
        self.agent('b').arrive(self.volume.id)
        self.cinder.delete_attachment(self.volume, row)
        self.volume.host = f'{SERVICE}#node-a'
        self.agent('a').is_down = True
        self.cinder.driver = self.make_driver(dmlocal_dead_nodes=['node-a'])
        self.cinder.attach(self.volume, 'node-c')
        self.assert_where(self.volume, b='FENCED', c='HYDRATING')

    def test_what_a_lost_node_has_a_copy_of_is_not_taken_back(self) -> None:
        self.cinder.attach(self.volume, 'node-b')
        self.agent('b').is_down = True
        driver = self.make_driver(dmlocal_dead_nodes=['node-b'])
        with self.refused('lost'):
            driver.initialize_connection(self.volume, {'host': 'node-a'})
        self.assert_where(self.volume, a='FENCED', b='HYDRATING')
