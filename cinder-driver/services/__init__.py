"""Real services, started by tests: MariaDB, RabbitMQ, Cinder and Nova as processes.

Nothing of this is installed with the driver. Each run has a folder of its own, listens
on ports that are free, and leaves no process behind.
"""
