"""Node-local disks as Cinder volumes: a driver that asks the agents of dmlocal."""
