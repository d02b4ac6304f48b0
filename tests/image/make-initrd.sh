#!/bin/sh
# Makes /initrd.img out of /bed-init, inside the root of a node: klibc's few
# programs, and the one module that mounting the root needs.
set -eu

mkdir /initrd
cd /initrd
mkdir -p bin dev sys root usr/lib
cp /usr/lib/klibc/bin/* bin/
cp /usr/lib/klibc-*.so usr/lib/
cp /usr/lib/modules/*/kernel/drivers/block/virtio_blk.ko .
cp /bed-init init
find . | cpio --quiet --create --format newc >/initrd.img
