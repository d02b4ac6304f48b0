"""The fleet: configuration, certificates, deadlines, statistics of many nodes."""

from __future__ import annotations

import pathlib
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent import futures
from typing import Any
from unittest import mock

import grpc
from cinder import exception
from cinder.volume import configuration
from oslo_config import cfg

from cinder_dmlocal import errors, fleet, options
from cinder_dmlocal.driver import DmLocalDriver
from cinder_dmlocal.tests.base import (
    SERVICE,
    DriverTestCase,
    configured,
    write_certificates,
)
from cinder_dmlocal.tests.fake import GIB
from cinder_dmlocal.wire import dmlocal_pb2 as pb


class Configuration(DriverTestCase):
    def test_a_range_of_names_keeps_its_width(self) -> None:
        names = list(options.expand(['a', 'n-[008-011].x']))
        self.assertEqual(['a', 'n-008.x', 'n-009.x', 'n-010.x', 'n-011.x'], names)

    def test_an_endpoint_is_made_of_the_name_unless_it_is_told(self) -> None:
        found = configured(
            self.fleet,
            {},
            dmlocal_nodes=['a', 'b'],
            dmlocal_endpoint='{node}.example:1',
            dmlocal_endpoints={'b': '192.0.2.1:7'},
        )
        settings = options.Settings.read(found)
        self.assertEqual({'a': 'a.example:1', 'b': '192.0.2.1:7'}, settings.endpoints)

    def test_what_is_wrong_is_named_at_start(self) -> None:
        for values in (
            {'dmlocal_nodes': []},
            {'dmlocal_nodes': ['a', 'a']},
            {'dmlocal_nodes': ['a', 'n-[5-1]']},
            {'dmlocal_nodes': ['n-[1-2]-r[1-2]']},
            # As oslo.config gives n-[1,3-5].
            {'dmlocal_nodes': ['n-[1', '3-5]']},
            {'dmlocal_nodes': ['n-[1]']},
            {'dmlocal_nodes': ['a'], 'dmlocal_dead_nodes': ['b']},
            {'dmlocal_nodes': ['a'], 'dmlocal_ca': '/nowhere'},
        ):
            found = configured(self.fleet, {}, **values)
            driver = DmLocalDriver(configuration=found, host=SERVICE)
            with self.subTest(values), self.assertRaises(exception.InvalidConfigurationValue):
                driver.do_setup(None)

    def test_a_second_start_leaves_no_channels(self) -> None:
        first = self.driver.fleet['node-a']
        self.driver.do_setup(None)
        self.assertIsNot(first, self.driver.fleet['node-a'])
        with self.assertRaisesRegex(ValueError, 'closed'):
            first.look(first.nodes.GetNode, pb.GetNodeRequest())

    def test_every_option_says_what_it_is_for(self) -> None:
        [(group, listed)] = options.list_opts()
        self.assertEqual(configuration.SHARED_CONF_GROUP, group)
        for option in listed:
            self.assertTrue(option.help and option.name.startswith('dmlocal_'), option.name)


class Certificates(DriverTestCase):
    def look(self, **values: Any) -> None:
        node = self.make_driver(**values).fleet['node-a']
        node.look(node.nodes.GetNode, pb.GetNodeRequest())

    def test_another_node_at_the_address_is_not_believed(self) -> None:
        endpoints = {'node-a': self.fleet.endpoints['node-b']}
        with self.assertRaises(errors.Unreachable):
            self.look(dmlocal_nodes=['node-a'], dmlocal_endpoints=endpoints)

    def test_an_agent_of_another_authority_is_not_believed(self) -> None:
        with self.assertRaises(errors.Unreachable):
            self.look(dmlocal_ca=configured(self.fleet, {}).dmlocal_cert)

    def test_the_role_that_is_missing_is_named(self) -> None:
        text = errors.for_cinder(errors.Refused('node-a', 'ROLE_FORBIDDEN', 'no', {}))
        self.assertIn('role driver', text)


class Statistics(DriverTestCase):
    def names(self) -> list[str]:
        stats = self.driver.get_volume_stats(refresh=True)
        return [pool['pool_name'] for pool in stats['pools']]

    def test_each_node_is_a_pool_with_what_is_free(self) -> None:
        self.cinder.create('node-b', 30)
        stats = self.driver.get_volume_stats(refresh=True)
        pools = {pool['pool_name']: pool for pool in stats['pools']}
        self.assertEqual({'node-a', 'node-b', 'node-c'}, set(pools))
        self.assertEqual(100, pools['node-b']['total_capacity_gb'])
        self.assertEqual(70, pools['node-b']['free_capacity_gb'])
        self.assertEqual(30, pools['node-b']['provisioned_capacity_gb'])
        self.assertFalse(pools['node-b']['multiattach'])

    def test_a_copy_may_be_made_of_what_is_in_another_pool(self) -> None:
        self.driver.init_capabilities()
        self.assertTrue(self.driver.capabilities['clone_across_pools'])

    def test_a_dead_node_has_no_pool_and_the_others_go_on(self) -> None:
        self.agent('b').is_down = True
        self.assertEqual(['node-a', 'node-c'], self.names())
        self.cinder.create('node-a')
        self.agent('b').is_down = False
        self.assertIn('node-b', self.names())

    def test_a_node_without_a_pool_has_none_here(self) -> None:
        self.agent('c').has_pool = False
        self.assertEqual(['node-a', 'node-b'], self.names())

    def test_what_is_known_of_the_fleet_grows_old(self) -> None:
        clock = mock.patch.object(fleet.time, 'monotonic', return_value=time.monotonic())
        now = clock.start()
        self.addCleanup(clock.stop)
        self.assertEqual(['node-a', 'node-b', 'node-c'], self.names())
        self.fleet.order.clear()
        self.assertTrue(self.driver.initialized)
        self.assertEqual([], self.fleet.order)
        # The statistics have not been asked for since.
        for letter in 'abc':
            self.agent(letter).is_down = True
        now.return_value += 60
        self.assertFalse(self.driver.initialized)
        self.agent('c').is_down = False
        self.assertFalse(self.driver.initialized)
        now.return_value += 60
        self.assertTrue(self.driver.initialized)

    def test_one_of_many_that_answers_is_enough(self) -> None:
        clock = mock.patch.object(fleet.time, 'monotonic', return_value=time.monotonic())
        now = clock.start()
        self.addCleanup(clock.stop)
        self.names()
        few = mock.patch.object(fleet, '_FEW', 1)
        few.start()
        self.addCleanup(few.stop)
        first = self.driver.fleet._answering[0]
        self.fleet.order.clear()
        now.return_value += 60
        self.assertTrue(self.driver.initialized)
        self.assertEqual([f'{first} Nodes.GetNode'], self.fleet.order)
        self.fleet.agents[first].is_down = True
        now.return_value += 60
        self.assertTrue(self.driver.initialized)

    def test_the_service_is_up_while_any_node_answers(self) -> None:
        self.driver = self.make_driver(dmlocal_look_timeout=0.2)
        for letter in 'abc':
            self.agent(letter).is_down = True
        self.assertEqual([], self.names())
        self.assertFalse(self.driver.initialized)
        self.agent('c').is_down = False
        # Nobody is asked again before the timeout for looks is over.
        until = time.monotonic() + 10
        while not self.driver.initialized and time.monotonic() < until:
            time.sleep(0.01)
        self.assertTrue(self.driver.initialized)


class Deadlines(DriverTestCase):
    def test_an_agent_that_says_nothing_is_not_waited_for(self) -> None:
        with socket.create_server(('127.0.0.1', 0)) as silent:
            port = silent.getsockname()[1]
            endpoints = {**self.fleet.endpoints, 'node-b': f'127.0.0.1:{port}'}
            driver = self.make_driver(dmlocal_endpoints=endpoints, dmlocal_look_timeout=0.3)
            volume = self.cinder.create()
            volume.host = f'{SERVICE}#node-b'
            with self.refused('node-b', 'does not answer'):
                driver.extend_volume(volume, 2)

    def test_every_call_has_the_deadline_of_its_kind(self) -> None:
        driver = self.make_driver(dmlocal_look_timeout=3, dmlocal_call_timeout=30)
        node, given = driver.fleet['node-a'], []

        def method(request: Any, timeout: float) -> None:
            given.append(timeout)

        node.look(method, None)
        node.call(method, None)
        driver.fleet.ask(lambda node: method, None)
        self.assertEqual([3, 30, 3, 3, 3], given)

    def test_five_hundred_silent_nodes_fit_between_two_statistics(self) -> None:
        defaults = {option.name: option.default for option in options.OPTIONS}
        cfg.CONF.import_opt('backend_stats_polling_interval', 'cinder.volume.manager')
        interval = cfg.CONF.backend_stats_polling_interval
        rounds = -(-500 // defaults['dmlocal_at_once'])
        self.assertLess(rounds * defaults['dmlocal_look_timeout'], interval)

    def test_five_hundred_nodes_are_asked(self) -> None:
        names = [f'hv-{number:03}' for number in range(500)]
        server, endpoint = self.crowd(names)
        endpoints = dict.fromkeys(names, endpoint)
        with socket.socket() as unused:
            unused.bind(('127.0.0.1', 0))
            # On ten nodes nobody listens.
            for name in names[::50]:
                endpoints[name] = f'127.0.0.1:{unused.getsockname()[1]}'
            driver = self.make_driver(
                dmlocal_nodes=['hv-[000-499]'],
                dmlocal_endpoints=endpoints,
                dmlocal_look_timeout=50,
            )
            stats = driver.get_volume_stats(refresh=True)
        server.stop(None)
        self.assertEqual(490, len(stats['pools']))

    def test_a_node_that_is_back_is_heard_at_once(self) -> None:
        server, endpoint = self.crowd(['node-a'])
        endpoints = {**self.fleet.endpoints, 'node-a': endpoint}
        node = self.make_driver(dmlocal_endpoints=endpoints).fleet['node-a']
        node.look(node.nodes.ListPools, pb.ListPoolsRequest())
        server.stop(None).wait()
        with self.refused('node-a does not answer'):
            node.look(node.nodes.ListPools, pb.ListPoolsRequest())
        server, _ = self.crowd(['node-a'], endpoint)
        answer = node.look(node.nodes.ListPools, pb.ListPoolsRequest())
        server.stop(None)
        self.assertEqual('local', answer.pools[0].name)

    def crowd(self, names: list[str], endpoint: str = '127.0.0.1:0') -> tuple[Any, str]:
        """One server that is many nodes."""
        pool = pb.Pool(name='local', size_bytes=GIB, present=True)
        answer = pb.ListPoolsResponse(pools=[pool])
        handler = grpc.unary_unary_rpc_method_handler(
            lambda request, context: answer,
            request_deserializer=pb.ListPoolsRequest.FromString,
            response_serializer=pb.ListPoolsResponse.SerializeToString,
        )
        server = grpc.server(futures.ThreadPoolExecutor(4))
        handlers = grpc.method_handlers_generic_handler(
            'dmlocal.v1.Nodes', {'ListPools': handler}
        )
        server.add_generic_rpc_handlers((handlers,))
        pair = self.fleet.authority.issue('agent', *names)
        credentials = grpc.ssl_server_credentials(
            [(pair.key, pair.cert)], self.fleet.authority.cert, require_client_auth=True
        )
        port = server.add_secure_port(endpoint, credentials)
        server.start()
        return server, f'127.0.0.1:{port}'


class Native(DriverTestCase):
    def green(self, what: str) -> str:
        """What a process says whose threads eventlet has made green."""
        with tempfile.TemporaryDirectory() as folder:
            write_certificates(self.fleet, folder)
            program = [sys.executable, '-m', 'cinder_dmlocal.tests.green', folder]
            done = subprocess.run(
                [*program, self.fleet.endpoints['node-a'], what],
                cwd=pathlib.Path(__file__).parents[2],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
        self.assertEqual(0, done.returncode, done.stderr)
        return done.stdout.strip()

    def test_calls_to_one_node_meet_without_harm_where_threads_are_green(self) -> None:
        self.assertEqual('4800', self.green('meet'))

    def test_a_silent_node_keeps_no_other_waiting_where_threads_are_green(self) -> None:
        self.assertEqual('answered', self.green('silence'))

    def test_more_calls_than_a_node_may_have_wait_for_their_turn(self) -> None:
        nodes = self.make_driver(dmlocal_call_timeout=1).fleet
        node = nodes['node-a']
        begun = threading.Barrier(5)
        ends = threading.Event()

        def method(request: Any, timeout: float) -> None:
            begun.wait(10)
            ends.wait(10)

        with futures.ThreadPoolExecutor(4) as callers:
            calls = [callers.submit(node.look, method, None) for _ in range(4)]
            begun.wait(10)
            with self.refused('node-a does not answer', 'too many calls'):
                node.look(node.nodes.GetNode, pb.GetNodeRequest())
            # What asks the whole fleet waits for nobody.
            asked = nodes.ask(lambda n: n.nodes.GetNode, pb.GetNodeRequest())
            self.assertIn('node-a', asked.given)
            ends.set()
            for call in calls:
                call.result()
        node.look(node.nodes.GetNode, pb.GetNodeRequest())

    def test_whoever_waits_while_a_node_falls_silent_does_not_ask_it_too(self) -> None:
        node = self.driver.fleet['node-a']
        turns = threading.Semaphore(1)
        begun, waits, ends = threading.Event(), threading.Event(), threading.Event()
        asked: list[None] = []

        def acquire(timeout: float) -> bool:
            if begun.is_set():
                waits.set()
            return turns.acquire(timeout=timeout)

        def silent(request: Any, timeout: float) -> None:
            begun.set()
            ends.wait(10)
            raise errors.Unreachable('node-a', 'nothing is heard')

        node._looks = mock.Mock(acquire=acquire, release=turns.release)
        with futures.ThreadPoolExecutor(2) as callers:
            first = callers.submit(node.look, silent, None)
            begun.wait(10)
            second = callers.submit(
                node.look, lambda request, timeout: asked.append(None), None
            )
            waits.wait(10)
            ends.set()
            for call, why in ((first, 'nothing is heard'), (second, 'not answered others')):
                with self.refused(why):
                    call.result()
        self.assertEqual([], asked)
        node.look(node.nodes.GetNode, pb.GetNodeRequest())

    def test_questions_to_many_are_asked_at_the_same_time(self) -> None:
        # Nobody is answered before all have been asked.
        meeting = threading.Barrier(3, timeout=10)

        def method(node: fleet.Node) -> Any:
            def call(request: Any, timeout: float) -> str:
                meeting.wait()
                return node.name

            return call

        answers = self.driver.fleet.ask(method, None)
        self.assertEqual(set(self.fleet.agents), set(answers.given))
