#!/bin/sh
# A hook of mmdebstrap's: makes the root directory $1 that of an idle node.
# Nothing here knows which node it will be; see bed-identity.
set -eu

root=$1

cat >"$root/etc/fstab" <<'FSTAB'
LABEL=root / ext4 rw,noatime 0 0
FSTAB
: >"$root/etc/machine-id"
echo node >"$root/etc/hostname"
{
	echo 127.0.0.1 localhost
	number=11
	for letter in a b c d e f g h; do
		echo "10.77.0.$number node-$letter"
		number=$((number + 1))
	done
} >"$root/etc/hosts"

# Unpacking modules at every boot takes longer than loading them.
find "$root/usr/lib/modules" -name '*.ko.xz' -exec xz --decompress {} +

# Modules are loaded before a scenario starts, so that none pays for it.
cat >"$root/etc/modules-load.d/bed.conf" <<'MODULES'
configfs
dm-clone
dm-crypt
dm-delay
dm-multipath
dm-round-robin
dm-snapshot
dm-thin-pool
dm-zero
loop
nvme-tcp
nvmet
nvmet-tcp
tls
MODULES

# What a processor or a chip offers that no node needs: loading it takes longer
# than all that a node does need.
for module in acpi_cpufreq ata_generic ata_piix button ccp evdev i2c_piix4 kvm kvm_amd \
	kvm_intel pata_acpi pcspkr powernow_k8 psmouse serio_raw; do
	echo "blacklist $module"
done >"$root/etc/modprobe.d/bed.conf"

# Cards are named by their slots, which the bed chooses: net0 is on the segment
# that nodes share, bed0 leads to the bed alone.
cat >"$root/etc/systemd/network/10-net0.link" <<'LINK'
[Match]
Path=pci-0000:00:03.0
[Link]
Name=net0
LINK
cat >"$root/etc/systemd/network/10-bed0.link" <<'LINK'
[Match]
Path=pci-0000:00:04.0
[Link]
Name=bed0
LINK

# Thin pools are watched by what is under test, and archives of metadata only
# cost time here.
mkdir -p "$root/etc/lvm"
cat >"$root/etc/lvm/lvm.conf" <<'LVM'
activation {
	monitoring = 0
}
backup {
	archive = 0
}
devices {
	use_devicesfile = 0
	scan_lvs = 0
}
LVM

# Logs outlive a power cut.
mkdir -p "$root/var/log/journal" "$root/etc/systemd/journald.conf.d"
cat >"$root/etc/systemd/journald.conf.d/bed.conf" <<'JOURNALD'
[Journal]
SyncIntervalSec=1s
RateLimitIntervalSec=0
SystemMaxUse=64M
JOURNALD

mkdir -p "$root/etc/systemd/system.conf.d"
cat >"$root/etc/systemd/system.conf.d/bed.conf" <<'MANAGER'
[Manager]
DefaultTimeoutStopSec=20s
MANAGER

cat >"$root/usr/lib/systemd/system/dmlocal-guest.service" <<'UNIT'
[Unit]
Description=Runs commands for the test bed
DefaultDependencies=no
After=local-fs.target
Before=shutdown.target
Conflicts=shutdown.target

[Service]
ExecStartPre=/usr/lib/bed/network
ExecStart=/usr/lib/bed/dmlocal-guest
Environment=HOME=/root LANG=C.UTF-8
KillMode=process

[Install]
WantedBy=multi-user.target
UNIT

chroot "$root" systemctl --quiet enable dmlocal-guest.service
# The getty would hang up whatever prints to the console; the rest only keeps
# two busy processors busier.
chroot "$root" systemctl --quiet mask \
	serial-getty@ttyS0.service getty@tty1.service console-getty.service \
	apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
	e2scrub_reap.service fstrim.timer logrotate.timer systemd-tmpfiles-clean.timer \
	systemd-timesyncd.service systemd-networkd.service systemd-resolved.service \
	systemd-random-seed.service systemd-update-utmp.service systemd-pcrmachine.service \
	nvmf-autoconnect.service nvmefc-boot-connections.service lvm2-monitor.service \
	blk-availability.service cryptdisks.service cryptdisks-early.service \
	systemd-logind.service systemd-firstboot.service ldconfig.service \
	systemd-binfmt.service proc-sys-fs-binfmt_misc.automount proc-sys-fs-binfmt_misc.mount \
	modprobe@efi_pstore.service modprobe@fuse.service modprobe@drm.service \
	sys-fs-fuse-connections.mount dev-hugepages.mount dev-mqueue.mount \
	sys-kernel-tracing.mount systemd-sysusers.service systemd-journal-catalog-update.service \
	systemd-update-done.service systemd-hwdb-update.service systemd-pstore.service \
	systemd-udev-load-credentials.service uuidd.socket
chroot "$root" systemctl --quiet set-default multi-user.target
