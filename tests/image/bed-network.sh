#!/bin/sh
# Brings up a node's network cards: the bed's own at once, and the one on the
# shared segment as soon as the node knows who it is.
set -eu

udevadm wait --timeout=60 /sys/class/net/bed0 /sys/class/net/net0

ip -batch - <<BED
link set bed0 addrgenmode none
link set bed0 up
address replace fe80::1/64 dev bed0 nodad
BED

test -e /etc/bed-identity || exit 0
. /etc/bed-identity
ip -batch - <<NET
link set net0 addrgenmode none
link set net0 address $MAC
address replace $ADDRESS/24 dev net0
link set net0 up
NET
