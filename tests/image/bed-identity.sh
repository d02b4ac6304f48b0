#!/bin/sh
# Makes this node, fresh from the snapshot of an idle one, a node of its own:
#   identity NAME ADDRESS MAC MACHINE_ID SECONDS_SINCE_1970
set -eu

date --utc --set "@$5" >/dev/null
echo "$1" >/etc/hostname
hostname "$1"
echo "$4" >/etc/machine-id
printf 'ADDRESS=%s\nMAC=%s\n' "$2" "$3" >/etc/bed-identity
# A node that knows its name only until its power is cut would not come up again.
sync /etc/hostname /etc/machine-id /etc/bed-identity /etc
/usr/lib/bed/network
# The journal's directory is named after the machine.
systemctl --no-block restart systemd-journald.service
