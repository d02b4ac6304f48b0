"""MariaDB and RabbitMQ from Debian's packages, for one run each, on the loopback."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable

import pymysql

from services.processes import Processes, free_ports

_USER = 'os'

# Debian's program in PATH changes to a user of its own first.
_RABBITMQ = '/usr/lib/rabbitmq/bin/rabbitmq-server'


class Database:
    """MariaDB without anything that would make data survive a power cut."""

    def __init__(self, processes: Processes) -> None:
        self.folder = processes.folder / 'mariadb'
        self.folder.mkdir()
        [self.port] = free_ports(1)
        self._socket = str(self.folder / 'socket')
        self._processes = processes
        data = self.folder / 'data'
        processes.run(
            'mariadb-install',
            [
                'mariadb-install-db',
                '--no-defaults',
                '--user=root',
                f'--datadir={data}',
                '--skip-test-db',
                '--skip-name-resolve',
                '--auth-root-authentication-method=normal',
            ],
        )
        processes.start(
            'mariadb',
            [
                'mariadbd',
                '--no-defaults',
                '--user=root',
                f'--datadir={data}',
                f'--socket={self._socket}',
                f'--pid-file={self.folder / "pid"}',
                '--bind-address=127.0.0.1',
                f'--port={self.port}',
                '--max-connections=1000',
                '--skip-log-bin',
                '--skip-name-resolve',
                '--innodb-flush-log-at-trx-commit=0',
                '--innodb-flush-method=nosync',
                '--innodb-doublewrite=0',
            ],
        )

    def wait(self) -> None:
        """Waits until it answers."""
        self._processes.wait_for_port(self.port, 'MariaDB')
        self.ask(f"create user '{_USER}'@'%' identified by '{_USER}'")

    def create(self, names: Iterable[str]) -> None:
        """Makes databases."""
        for name in names:
            self.ask(f'create database {name} character set utf8mb4')
            self.ask(f"grant all on {name}.* to '{_USER}'@'%'")

    def ask(self, statement: str) -> list[tuple[object, ...]]:
        """The rows that a statement gives."""
        connection = pymysql.connect(
            unix_socket=self._socket, user='root', autocommit=True, charset='utf8mb4'
        )
        with connection, connection.cursor() as cursor:
            cursor.execute(statement)
            return list(cursor.fetchall())

    def url(self, name: str) -> str:
        """What a service's configuration says."""
        where = f'{_USER}:{_USER}@127.0.0.1:{self.port}'
        return f'mysql+pymysql://{where}/{name}?charset=utf8mb4'


class Broker:
    """RabbitMQ, with an epmd of its own: there is one for all of a machine otherwise."""

    def __init__(self, processes: Processes) -> None:
        self.folder = processes.folder / 'rabbitmq'
        self.folder.mkdir()
        self.port, epmd, distribution = free_ports(3)
        self.url = f'rabbit://guest:guest@127.0.0.1:{self.port}/'
        self._processes = processes
        address = {'ERL_EPMD_PORT': str(epmd), 'ERL_EPMD_ADDRESS': '127.0.0.1'}
        processes.start('epmd', ['epmd', '-address', '127.0.0.1', '-port', str(epmd)])
        processes.wait_for_port(epmd, 'epmd')
        plugins = self.folder / 'plugins'
        plugins.write_text('[].\n')
        processes.start(
            'rabbitmq',
            [_RABBITMQ],
            {
                **address,
                'HOME': str(self.folder),
                'RABBITMQ_NODENAME': 'rabbit@localhost',
                'RABBITMQ_NODE_IP_ADDRESS': '127.0.0.1',
                'RABBITMQ_NODE_PORT': str(self.port),
                'RABBITMQ_DIST_PORT': str(distribution),
                'RABBITMQ_MNESIA_BASE': str(self.folder / 'mnesia'),
                'RABBITMQ_LOG_BASE': str(self.folder / 'log'),
                'RABBITMQ_PID_FILE': str(self.folder / 'pid'),
                'RABBITMQ_ENABLED_PLUGINS_FILE': str(plugins),
                'RABBITMQ_CONF_ENV_FILE': '/dev/null',
                'RABBITMQ_CONFIG_FILE': str(self._configuration()),
                # No busy waiting, and two threads: a test sends little.
                'RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS': '+S 2:2 +sbwt none +sbwtdcpu none '
                '+sbwtdio none -kernel inet_dist_use_interface {127,0,0,1}',
            },
        )

    def wait(self) -> None:
        """Waits until it listens."""
        self._processes.wait_for_port(self.port, 'RabbitMQ')

    def _configuration(self) -> pathlib.Path:
        path = self.folder / 'rabbitmq.conf'
        # Its own measure of what is free knows nothing of the tests beside it.
        path.write_text(
            'vm_memory_high_watermark.relative = 0.8\ndisk_free_limit.absolute = 50MB\n'
        )
        return path


class Infra:
    """Both, started side by side."""

    def __init__(self, processes: Processes) -> None:
        self.broker = Broker(processes)
        self.database = Database(processes)
        self.database.wait()
        self.broker.wait()
