#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# What the scenarios power-cut-5 and power-cut-50 do in a guest. There are two volumes: e, ext4 on vdb
# with its store on vdc, and x, XFS on vdd with its store on vde.
#
#   cuts.sh setup            makes both
#   cuts.sh check SUMS STAMP ROUND
#                            checks what a power cut has left of what stamp and synced gave and wrote, mounts both
#   cuts.sh snapshot ROUND SUMS
#                            takes snapshots; prints their checksums, a line for all: those of older ones, which
#                            check has compared, from SUMS
#   cuts.sh stamp ROUND      writes files and syncs them; prints what to give to check
#   cuts.sh load ROUND       writes, overwrites and removes files, with fio beside it, without an end
#   cuts.sh synced ROUND     overwrites a file of each, in any order, with what tells round and place; syncs it
# A command that fails in the middle of a pipe or of $() has failed: else what could not be read counts as a
# checksum like another.
set -euo pipefail
shopt -s inherit_errexit

origin() { [ "$1" = e ] && echo /dev/vdb || echo /dev/vdd; }
store() { [ "$1" = e ] && echo /dev/vdc || echo /dev/vde; }
socket() { echo "/var/run/zumastor/servers/$1"; }

# The first 64 MiB are what the file systems have.
sum_of() {
	local name=$1-snapshot-$2 sectors
	if [ ! -e "/dev/mapper/$name" ]; then
		sectors=$(ddsnap status --size "$(socket "$1")" "$2")
		dmsetup create "$name" --table \
			"0 $sectors ddsnap $(store "$1") $(origin "$1") /var/run/zumastor/agents/$1 $2"
		# Many questions at a time, or each waits for an answer of its own.
		blockdev --setra 8192 "/dev/mapper/$name"
	fi
	head -c 64M "/dev/mapper/$name" | md5sum | cut -c1-32
}

tags_of() { ddsnap list "$(socket "$1")" | sed -n 's/^\ttag= \([0-9]*\) .*/\1/p'; }

# Snapshots that the load makes have higher tags, and come and go.
LOAD=10000

# Every other snapshot of both volumes, with its checksum unless that is in $1: "e/1=... e/2=... x/1=..."
sums() {
	local volume tag tags known
	for volume in e x; do
		tags=$(tags_of $volume)
		for tag in $tags; do
			[ "$tag" -lt $LOAD ] || continue
			known=$(grep -o "\b$volume/$tag=[0-9a-f]*" <<<"$1") || known=$volume/$tag=$(sum_of $volume "$tag")
			echo -n "$known "
		done
	done
	echo
}

mount_both() {
	mkdir -p /mnt/e /mnt/x
	mount /dev/mapper/e /mnt/e
	mount /dev/mapper/x /mnt/x
}

setup() {
	local volume
	for volume in e x; do
		zumastor define volume $volume "$(origin $volume)" "$(store $volume)" --initialize
	done
	mkfs.ext4 -q /dev/mapper/e
	# So small a file system XFS makes only for tests that say who they are.
	TEST_DIR=x TEST_DEV=x QA_CHECK_FS=x mkfs.xfs -q -K -d size=64m /dev/mapper/x
	mount_both
	# That what check relies on can fail: a block of another round is none of this one.
	fio_synced /mnt/e/synced 1 --do_verify=0 --end_fsync=1
	fio_synced /mnt/e/synced 1 --verify_only
	printf x | dd of=/mnt/e/synced bs=1 seek=99999 conv=notrunc,fsync status=none
	if (fio_synced /mnt/e/synced 1 --verify_only || fio_synced /mnt/e/synced 2 --verify_only) >/dev/null; then exit 1; fi
}

check() {
	local sums=$1 stamp=$2 round=$3 volume one tags
	for volume in e x; do
		ddsnap check "$(store $volume)" --origin "$(origin $volume)" >/run/check-$volume ||
			{ cat /run/check-$volume; exit 1; }
		zumastor define volume $volume "$(origin $volume)" "$(store $volume)"
	done
	# Mounting replays the journals; after that there must be nothing to mend.
	mount_both
	umount /mnt/e /mnt/x
	e2fsck -f -n /dev/mapper/e >/run/e2fsck 2>&1 || { cat /run/e2fsck; exit 1; }
	xfs_repair -n /dev/mapper/x >/run/xfs_repair 2>&1 || { cat /run/xfs_repair; exit 1; }
	mount_both
	local now
	now=$(sums "")
	for one in $sums; do
		case " $now " in *" $one "*) ;; *) echo "snapshot $one is not among: $now"; exit 1 ;; esac
	done
	# Those that the load was making may be there or not.
	for volume in e x; do
		tags=$(tags_of $volume)
		for one in $tags; do
			[ "$one" -lt $LOAD ] || { sum_of $volume "$one" >/dev/null; drop $volume "$one"; }
		done
	done
	[ -z "$stamp" ] || [ "$(read_stamp)" = "$stamp" ] || { echo "what was synced is not there"; exit 1; }
	for volume in e x; do
		fio_synced /mnt/$volume/synced "$round" --verify_only ||
			{ echo "what fio synced in round $round is not in /mnt/$volume"; exit 1; }
	done
}

drop() {
	[ ! -e "/dev/mapper/$1-snapshot-$2" ] || dmsetup remove "$1-snapshot-$2"
	ddsnap delete "$(socket "$1")" "$2"
}

# Each block of the file FILE of round ROUND, written or read and compared: fio_synced FILE ROUND OPTIONS
fio_synced() {
	local file=$1 round=$2
	shift 2
	fio --name=synced --filename="$file" --size=1M --bs=4k --direct=1 --ioengine=libaio --iodepth=8 \
		--rw=randwrite --verify=pattern --verify_pattern="\"round $round at \"%o" --verify_fatal=1 "$@" \
		>/run/fio-synced 2>&1 || { cat /run/fio-synced; return 1; }
}

synced() {
	local volume
	for volume in e x; do
		fio_synced /mnt/$volume/synced "$1" --do_verify=0 --end_fsync=1
	done
}

read_stamp() { cat /mnt/[ex]/stamp/* | md5sum | cut -c1-32; }

stamp() {
	local dir
	for dir in /mnt/e/stamp /mnt/x/stamp; do
		rm -rf $dir && mkdir $dir
		dd if=/dev/urandom of=$dir/data bs=64k count=$((1 + RANDOM % 16)) status=none
		echo "$1" >$dir/round
	done
	sync
	read_stamp
}

# Three at most of each volume; the oldest goes.
snapshot() {
	local volume tag all tags
	for volume in e x; do
		tags=()
		all=$(tags_of $volume)
		for tag in $all; do
			[ "$tag" -ge $LOAD ] || tags+=("$tag")
		done
		[ ${#tags[@]} -lt 3 ] || drop $volume "${tags[0]}"
		ddsnap create "$(socket $volume)" "$1"
	done
	sums "${2:-}"
}

load() {
	local dir i=0 name last=0
	for dir in /mnt/e /mnt/x; do
		mkdir -p $dir/files
		fio --name=load --filename=$dir/fio --size=8M --direct=1 --ioengine=libaio --iodepth=8 \
			--rw=randwrite --bsrange=1k-32k --blockalign=1k --fsync=40 --rate_iops=60 --time_based --runtime=600 \
			>/dev/null 2>&1 &
	done
	while :; do
		i=$((i + 1))
		for dir in /mnt/e /mnt/x; do
			name=$dir/files/$((RANDOM % 40))
			case $((RANDOM % 4)) in
			0) rm -f $name ;;
			1) mv -f $name $dir/files/$((RANDOM % 40)) 2>/dev/null || true ;;
			2) dd if=/dev/urandom of=$name bs=4k count=$((1 + RANDOM % 60)) conv=notrunc,fsync status=none ;;
			3) dd if=/dev/urandom of=$name bs=1k count=$((1 + RANDOM % 200)) status=none ;;
			esac
		done
		# One may be being made or deleted when the power goes.
		if [ $((i % 5)) = 0 ]; then
			for dir in e x; do
				[ $last = 0 ] || ddsnap delete "$(socket $dir)" $last || true
				ddsnap create "$(socket $dir)" $((LOAD + i)) || true
			done
			last=$((LOAD + i))
		fi
	done
}

"$@"
