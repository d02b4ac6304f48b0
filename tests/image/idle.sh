#!/bin/sh
# Readies a freshly booted node for the snapshot that all nodes start from.
set -eu

# What a table may name, and what an export or import needs. Debian's kernels
# lack dm-clone: it is the bed's own build.
for module in configfs dm-clone dm-crypt dm-delay dm-multipath dm-round-robin \
	dm-snapshot dm-thin-pool dm-zero loop nvme-tcp nvmet nvmet-tcp tls; do
	modprobe "$module"
done
test -d /sys/kernel/config/nvmet

udevadm settle
disk=/dev/disk/by-id/virtio-pool
vgcreate --quiet --dataalignment 1m dmlocal "$disk"
lvcreate --quiet --type thin-pool --size 6g --poolmetadatasize 64m --chunksize 64k \
	--zero y --discards passdown --name pool dmlocal
lvchange --quiet --errorwhenfull y dmlocal/pool
udevadm settle

# Warm what every scenario runs.
lvs --reportformat json dmlocal >/dev/null
dmsetup targets >/dev/null
nvme version >/dev/null
sync
