"""What becomes of a volume once an operator has declared a node dead."""

from __future__ import annotations

import copy

from cinder import exception

from cinder_dmlocal.tests.base import SERVICE, DriverTestCase
from cinder_dmlocal.tests.fake import Refusal


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

    def test_what_is_not_taken_back_is_not_called_lost(self) -> None:
        self.visit_and_die()
        for reason in ('POOL_MISSING', 'ROLE_FORBIDDEN', 'GRANT_UNKNOWN'):
            self.agent('a').says_refused['Moves.Reclaim'] = Refusal(reason)
            for act in (self.attach_at_home, self.delete):
                with self.refused(reason):
                    act()
        self.agent('a').says_refused.clear()
        self.attach_at_home()
        self.assert_where(self.volume, a='LOCAL', b='REMOTE')

    def test_what_a_silent_node_may_have_is_not_called_lost(self) -> None:
        self.agent('a').is_down = self.agent('c').is_down = True
        self.cinder.driver = self.make_driver(dmlocal_dead_nodes=['node-a'])
        for act in (self.attach_at_home, self.delete):
            with self.refused('node-c', 'does not answer'):
                act()
        self.agent('c').is_down = False
        with self.refused('lost'):
            self.attach_at_home()
        self.delete()

    def test_what_a_node_that_was_made_anew_had_is_not_forgotten(self) -> None:
        self.visit_and_die()
        self.cinder.driver = self.driver
        self.agent('b').is_down = False
        there = self.agent('b').volumes.pop(self.volume.id)
        for act in (self.attach_at_home, self.delete):
            with self.refused('node-b', 'has nothing of it', 'dmlocal_dead_nodes'):
                act()
        self.agent('b').volumes[self.volume.id] = there

    def test_a_home_that_has_let_go_does_not_hide_the_volume(self) -> None:
        row = self.cinder.attach(self.volume, 'node-b')
        self.agent('b').open(self.volume.id)
        old = copy.copy(self.agent('a').volumes[self.volume.id])
        self.agent('b').arrive(self.volume.id)
        old.state, old.peer = 'RELEASING', ''
        self.agent('a').volumes[old.id] = old
        self.volume.host, self.volume.volume_attachment = f'{SERVICE}#node-a', []
        with self.assertRaisesRegex(exception.VolumeIsBusy, 'node-b'):
            self.delete()
        self.volume.volume_attachment = [row]

    def test_what_failed_to_be_taken_over_is_left_to_the_agents(self) -> None:
        self.volume.status = 'error_managing_deleting'
        self.delete()
        self.assert_where(self.volume, a='LOCAL')

    def visit_and_die(self) -> None:
        self.volume.status = 'downloading'
        self.driver.initialize_connection(self.volume, {'host': 'node-b'})
        self.volume.status = 'available'
        self.agent('b').is_down = True
        self.cinder.driver = self.make_driver(dmlocal_dead_nodes=['node-b'])

    def attach_at_home(self) -> None:
        self.cinder.driver.initialize_connection(self.volume, {'host': 'node-a'})

    def delete(self) -> None:
        self.cinder.driver.delete_volume(self.volume)
