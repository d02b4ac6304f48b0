#!/bin/sh
# Mounts the root and hands over to it. All else that takes is built into the
# kernel; Debian's own initial RAM disk starts udev and LVM first, which takes
# longer under emulation than the rest of the kernel.
export PATH=/bin
mount -t devtmpfs devtmpfs /dev
mount -t sysfs sysfs /sys
insmod /virtio_blk.ko
while :; do
	# The order of vda and vdb is not stable.
	for disk in /sys/block/vd*; do
		test "$(cat "$disk/serial")" = root || continue
		mount -t ext4 -o rw,noatime "/dev/${disk##*/}" /root
		umount /sys
		mount -o move /dev /root/dev
		exec run-init /root /sbin/init
	done
	sleep 1
done
