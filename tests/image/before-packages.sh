#!/bin/sh
# A hook of mmdebstrap's: how the initial RAM disk is to be made, told before
# the kernel package makes it. Everything else a node needs to mount its root
# is built into the kernel.
set -eu

mkdir -p "$1/etc/initramfs-tools/conf.d"
printf 'MODULES=list\nCOMPRESS=gzip\nRESUME=none\n' >"$1/etc/initramfs-tools/conf.d/bed"
printf 'virtio_blk\n' >"$1/etc/initramfs-tools/modules"
