"""Node-local disks as Cinder volumes: a driver that asks the agents of dmlocal."""

import os

# Before grpc is loaded. Otherwise it starts its threads anew in every process that Cinder
# forks to run a command; now and then one of them finds its files closed and aborts it.
os.environ.setdefault('GRPC_ENABLE_FORK_SUPPORT', 'false')
