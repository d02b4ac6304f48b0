"""The agents' interface, generated from proto/dmlocal/v1/dmlocal.proto when this is built."""
