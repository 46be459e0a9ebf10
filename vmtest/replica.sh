#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# What the scenarios of replication do in their guests. The volume is called data where it is written and copy
# where it is replicated to; both have their origin on vdc and their store on vdd.
#
#   replica.sh upstream HOST [OPTIONS]   makes data with a file system, to be replicated to HOST
#   replica.sh downstream HOST [OPTIONS] makes copy, a replica of HOST's data
#   replica.sh write ROUND               overwrites a file, removes one, and syncs
#   replica.sh slow RATE                 what this machine sends is so slow from now on
#   replica.sh sum data|copy             checksum of the newest snapshot that both have, a line for each 16 MiB
#   replica.sh kill ROUND                kills a process of replication or of the volume, another one each round
#   replica.sh killed LEAST              says how many of each kind were killed; fails if fewer than LEAST of one
# A command that fails in the middle of a pipe or of $() has failed: else the checksums of what could not be
# read would be equal.
set -euo pipefail
shopt -s inherit_errexit

last() { ddsnap status --last "/var/run/zumastor/servers/$1"; }

# A checksum of each 16 MiB, so that a difference says where it is.
sums() {
	local at mib
	mib=$(($(blockdev --getsize64 "$1") / 1048576))
	for ((at = 0; at < mib; at += 16)); do
		dd if="$1" bs=1M skip=$at count=16 status=none | md5sum
	done
}

case $1 in
upstream)
	host=$2
	shift 2
	zumastor define volume data /dev/vdc /dev/vdd --initialize
	mkfs.ext4 -q /dev/mapper/data
	zumastor define master data
	zumastor define target data "$host" -n copy "$@"
	;;
downstream)
	host=$2
	shift 2
	zumastor define volume copy /dev/vdc /dev/vdd --initialize
	zumastor define source copy "$host" -n data "$@"
	;;
write)
	cd /var/mount/zumastor/data
	rm -f "file$((($2 + 3) % 8))"
	head -c "$((1 + RANDOM % 3))M" /dev/urandom >"file$(($2 % 8))"
	echo "round $2" >round
	sync -f .
	;;
slow)
	tc qdisc replace dev eth1 root netem rate "$2"
	;;
sum)
	# The replica has each snapshot twice: as it arrived, and to be mounted.
	number=$(last "$2")
	[ "$2" = data ] || number=$((number - 1))
	sums "/dev/mapper/$2($number)"
	;;
kill)
	# What pumps the stream is the other machine's ssh here, and zumastor where it comes in. OpenSSH 9.8 and later
	# have a program of its own for each session.
	kinds=(daemon server pump agent)
	patterns=('^(/usr/s?bin/)?zumastor daemon' 'ddsnap server' '^ssh |zumastor (receive|send)|sshd(-session)?: root@notty' 'ddsnap agent')
	at=$(($2 % 4))
	# There may be none of it just now.
	if pkill -KILL -f "${patterns[at]}"; then
		echo "${kinds[at]}" >>/root/killed
	fi
	;;
killed)
	sort /root/killed | uniq -c
	for kind in daemon server pump agent; do
		[ "$(grep -c "^$kind$" /root/killed)" -ge "$2" ]
	done
	;;
*)
	echo "$0: what is $1?" >&2
	exit 2
	;;
esac
