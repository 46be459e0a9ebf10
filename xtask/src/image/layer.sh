#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# Makes a guest disk: layer.sh DIR BASE.tar FLAVOUR DEB...
# Leaves DIR/root.img, DIR/vmlinuz and, for Debian's own kernel, DIR/initrd.
# Runs as root in a mount name space of its own, so nothing it mounts outlives it.
set -eu
dir=$1 base=$2 flavour=$3
shift 3
[ "${1-}" != -- ] || shift

root=$dir/root
mkdir "$root"
tar --numeric-owner -xf "$base" -C "$root"
mkdir -p "$root/srv/debs"
for deb; do
	[ "$deb" != -- ] || continue
	cp "$deb" "$root/srv/debs/"
done

mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
[ -e "$root/etc/resolv.conf" ] || : >"$root/etc/resolv.conf"
cp /etc/resolv.conf "$root/etc/resolv.conf.build" 2>/dev/null || :
mount --bind "$root/etc/resolv.conf.build" "$root/etc/resolv.conf" 2>/dev/null || :
# Services are not started inside a build.
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
chmod 755 "$root/usr/sbin/policy-rc.d"

in_root() {
	DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8 HOME=/root \
		PATH=/usr/sbin:/usr/bin:/sbin:/bin chroot "$root" "$@"
}

case $flavour in
stock)
	in_root apt-get -q update
	# Fetches what our packages depend on; they are not installed.
	if ls "$root"/srv/debs/*.deb >/dev/null 2>&1; then
		in_root sh -c 'apt-get -q -y --no-install-recommends -o APT::Keep-Downloaded-Packages=true --download-only install /srv/debs/*.deb'
	fi
	;;
*)
	# Without lists first: usually every dependency is in the base already.
	in_root sh -c 'apt-get -q -y --no-install-recommends install /srv/debs/*.deb ||
		{ apt-get -q update &&
		apt-get -q -y --no-install-recommends install /srv/debs/*.deb; }'
	rm -r "$root/srv/debs"
	;;
esac
if [ "$flavour" = dkms ]; then
	# apt goes on when DKMS cannot build, and so would this.
	for release in "$root"/lib/modules/*; do
		in_root modinfo -k "${release##*/}" -F filename dm-ddsnap
	done
fi

rm "$root/usr/sbin/policy-rc.d"
umount "$root/etc/resolv.conf" 2>/dev/null || :
rm -f "$root/etc/resolv.conf.build"
umount -l "$root/dev"
umount "$root/proc"

echo node >"$root/etc/hostname"
printf '127.0.0.1 localhost\n127.0.1.1 node\n' >"$root/etc/hosts"
printf '/dev/vda / ext4 errors=remount-ro 0 0\n' >"$root/etc/fstab"
# The journal of before a power cut is part of a scenario's evidence.
mkdir -p "$root/var/log/journal"
# The agent is how the harness reaches the guest; a server on the network is
# started by `vm ssh` when a person asks for it.
rm -f "$root/etc/systemd/system/multi-user.target.wants/ssh.service" \
	"$root/etc/systemd/system/sockets.target.wants/ssh.socket"
# Now and then it does not hear that it is to end, and systemd would wait a minute and a half for it: no shutdown
# of ours is to be measured by that.
mkdir -p "$root/etc/systemd/system/qemu-guest-agent.service.d"
printf '[Service]\nTimeoutStopSec=5\n' >"$root/etc/systemd/system/qemu-guest-agent.service.d/stop.conf"
# Work by the clock would disturb what is measured.
for unit in apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer e2scrub_reap.service \
	fstrim.timer dpkg-db-backup.timer man-db.timer systemd-networkd-wait-online.service; do
	ln -sf /dev/null "$root/etc/systemd/system/$unit"
done

cp "$(ls "$root"/boot/vmlinuz-* | tail -n 1)" "$dir/vmlinuz"
if ls "$root"/boot/initrd.img-* >/dev/null 2>&1; then
	cp "$(ls "$root"/boot/initrd.img-* | tail -n 1)" "$dir/initrd"
fi
mke2fs -q -t ext4 -L root -d "$root" "$dir/root.img" 4G
rm -rf --one-file-system "$root"
