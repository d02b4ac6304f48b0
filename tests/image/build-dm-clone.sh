#!/bin/sh
# Builds dm-clone for the kernel whose headers are installed here: Debian's
# kernels come without it. Runs inside a root of its own; leaves /dm-clone.ko.
set -eu

kernel=$(basename "$(echo /lib/modules/*)")
mkdir /module
cd /module
tar --extract --strip-components=1 --wildcards \
	--file "$(echo /usr/src/linux-source-*.tar.xz)" \
	'*/drivers/md/dm-clone-target.c' \
	'*/drivers/md/dm-clone-metadata.c' \
	'*/drivers/md/dm-clone-metadata.h' \
	'*/drivers/md/dm.h' \
	'*/drivers/md/dm-stats.h' \
	'*/drivers/md/persistent-data/*.h'
cd drivers/md
cat >Kbuild <<'KBUILD'
obj-m := dm-clone.o
ccflags-y := -I$(src)
dm-clone-y := dm-clone-target.o dm-clone-metadata.o
KBUILD
make --directory "/lib/modules/$kernel/build" M="$PWD" modules
strip --strip-debug dm-clone.ko
cp dm-clone.ko /dm-clone.ko
