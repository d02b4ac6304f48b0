"""Tests of the driver, against agents that are pretended to."""

import os

# Before grpc is loaded: it tells of every connection that ends.
os.environ.setdefault('GRPC_VERBOSITY', 'ERROR')
