#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
#
# Tests dm-ddsnap against fake-server. Run as root, in a guest: it makes loop
# and device-mapper devices and, when the target is at fault, may hang or crash
# the machine. It builds nothing: `make` has to have made fake-server and stomp
# beside this file, and the module has to be loaded or loadable.
#
#	run.sh [NAME...]	all tests, or those named
#
# Prints "ok NAME" or "not ok NAME: why"; exit code 1 if any test failed.

here=$(cd "$(dirname "$0")" && pwd)
key=/test/agents/volume
shift=14
chunk=$((1 << shift))
origin_mib=16
store_mib=96
sectors=$((origin_mib * 2048))
tmp=$(mktemp -d) || exit 1
ctl_socket=$tmp/control
failed=0
server=
loops=

#
# Helpers
#

# fail WHY...: for use as "... || fail why || return"
fail() {
	[ -n "$why" ] || why=$*
	return 1
}

# within SECONDS COMMAND...: until it succeeds
within() {
	local end=$((SECONDS + $1 + 1))
	shift
	until "$@" >/dev/null 2>&1; do
		[ $SECONDS -lt $end ] || return 1
		sleep 0.05
	done
}

milliseconds() { echo $(($(date +%s%N) / 1000000)); }

ctl() { timeout 90 "$here/fake-server" ctl "$ctl_socket" "$@"; }

# stat NAME: one number of fake-server's
stat() { ctl stats 2>/dev/null | tr ' ' '\n' | sed -n "s/^$1=//p"; }

has() { [ "$(stat "$1")" -ge "$2" ] 2>/dev/null; }

ended() { ! kill -0 "$1" 2>/dev/null; }

# start_server [new]
start_server() {
	# The layer of stoppable() is not between the server and the devices.
	"$here/fake-server" serve $key $store_loop $served_origin "$tmp/state" \
		"$ctl_socket" $shift "$@" 2>>"$tmp/server.err" &
	server=$!
	within 20 ctl ping || fail "fake-server does not come up: $(tail -1 "$tmp/server.err")"
}

kill_server() {
	[ -n "$server" ] || return 0
	kill -CONT $server 2>/dev/null
	kill -9 $server 2>/dev/null
	wait $server 2>/dev/null
	server=
	# Closing the file is what counts, and it is over when wait returns.
}

create_device() { # NAME ID [FEATURES...]
	local name=$1 id=$2
	shift 2
	timeout 100 dmsetup create "$name" --table \
		"0 $sectors ddsnap $store $origin $key $id $*"
}

make_origin() { create_device origin -1 "$@" || fail "no origin device"; }

make_snapshot() { # TAG [FEATURES...]
	local tag=$1
	shift
	ctl create "$tag" >/dev/null || fail "no snapshot $tag" || return
	create_device "snap$tag" "$tag" "$@" || fail "no device for snapshot $tag"
}

org=/dev/mapper/origin

# put DEVICE CHUNK LETTER [COUNT]: chunks full of a letter
put() {
	head -c $((chunk * ${4:-1})) /dev/zero | tr '\0' "$3" |
		timeout 100 dd of="$1" bs=$chunk seek="$2" count="${4:-1}" \
			iflag=fullblock oflag=direct conv=notrunc status=none
}

# run DEVICE CHUNK LETTER COUNT: the same as one write
run() {
	head -c $((chunk * $4)) /dev/zero | tr '\0' "$3" |
		timeout 100 dd of="$1" bs=$((chunk * $4)) seek=$((chunk * $2)) count=1 \
			iflag=fullblock oflag=direct,seek_bytes conv=notrunc status=none
}

# get DEVICE CHUNK: what its bytes are, each named once
get() {
	timeout 100 dd if="$1" bs=$chunk skip="$2" count=1 iflag=direct status=none |
		od -An -v -tx1 -w1 | sort -u | tr -d '\n '
}

# holds DEVICE CHUNK LETTER
holds() {
	local want is
	want=$(printf '%02x' "'$3")
	[ "$3" = 0 ] && want=00
	is=$(get "$1" "$2")
	[ "$is" = "$want" ] || fail "chunk $2 of $1 holds $is, not $want"
}

# expect_error WHY COMMAND...
expect_error() {
	local why_not=$1
	shift
	if "$@" 2>"$tmp/error"; then fail "$why_not"; fi
}

# What the kernel has said since the test began.
log() { dmesg | sed "1,/run.sh: $name begins/d"; }
log_has() { log | grep -qF -- "$1"; }
log_count() { log | grep -cF -- "$1"; }

# silent_for SECONDS TEXT: the kernel has not said it for so long
silent_for() {
	local last
	last=$(dmesg | grep -F -- "$2" | tail -n 1 | sed 's/^\[ *\([0-9]*\).*/\1/')
	[ -z "$last" ] || [ $(($(cut -d. -f1 /proc/uptime) - last)) -gt $1 ]
}

# told RESULT: also in the kernel's log, where it is when this does not come to its end.
told() {
	echo "$1"
	echo "run.sh: $1" >/dev/kmsg
}

set_up() {
	why=
	echo "run.sh: $name begins" >/dev/kmsg
	: >"$tmp/server.err"
	rm -f "$tmp"/ledger* "$tmp"/low* "$tmp"/high*
	blkdiscard -z $origin_loop
	origin=$origin_loop
	store=$store_loop
	served_origin=$origin_loop
	sectors=$((origin_mib * 2048))
	echo 1024 >/sys/module/dm_ddsnap/parameters/max_waiting
}

clean_up() {
	local device job
	kill_server
	dmsetup resume layer >/dev/null 2>&1
	for job in $(jobs -p); do
		kill -9 "$job" 2>/dev/null
		within 60 ended "$job" || fail "a process does not end"
	done
	jobs >/dev/null
	for device in $(dmsetup ls 2>/dev/null | sed -n 's/^\(snap[0-9]*\|origin\|other\)\t.*/\1/p'); do
		timeout 60 dmsetup remove --retry "$device" ||
			timeout 60 dmsetup remove --force "$device" ||
			fail "device $device stays"
	done
	if dmsetup info layer >/dev/null 2>&1; then
		timeout 60 dmsetup remove --retry layer || fail "device layer stays"
	fi
	[ ! -e /proc/driver/ddsnap/origin ] || fail "counters stay"
	[ -z "$loops" ] || losetup -d $loops || fail "a loop device stays"
	loops=
	if log | grep -E \
		'BUG:|WARNING:|Oops|KASAN|possible (recursive|circular|irq)|blocked for more|list_(add|del) corruption' \
		>"$tmp/kernel"; then
		fail "kernel: $(head -1 "$tmp/kernel")"
	fi
}

# The origin or the store gets a layer that can be stopped: what was sent down
# then stays in flight until go. That shows orders without a race against the
# clock.
stoppable() {
	dmsetup create layer --table "0 $sectors linear $origin_loop 0" ||
		fail "no layer under the origin" || return
	origin=/dev/mapper/layer
}
stoppable_store() {
	dmsetup create layer --table "0 $((store_mib * 2048)) linear $store_loop 0" ||
		fail "no layer under the store" || return
	store=/dev/mapper/layer
}
stop() { dmsetup suspend --noflush --nolockfs layer || fail "layer not stopped"; }
go() { dmsetup resume layer || fail "layer not resumed"; }

# still PID: it goes on running, for as long as it would need to end by mistake
still() {
	sleep 1
	kill -0 "$1" 2>/dev/null
}

stomp() { timeout 200 "$here/stomp" "$@"; }

#
# Tests
#

t_arguments() {
	local long
	long=$(printf '%0200d' 0)
	local line
	while read -r line; do
		line=${line//SNAP/$store}
		line=${line//ORG/$origin}
		line=${line//LONG/$long}
		expect_error "taken: $line" dmsetup create origin --table "$line" || return
	done <<-EOF
		0 $sectors ddsnap
		0 $sectors ddsnap SNAP ORG $key
		0 $sectors ddsnap SNAP ORG $key -2
		0 $sectors ddsnap SNAP ORG $key 4294967296
		0 $sectors ddsnap SNAP ORG $key x
		0 $sectors ddsnap SNAP ORG LONG -1
		0 $sectors ddsnap SNAP SNAP $key -1
		0 $sectors ddsnap /dev/nothere ORG $key -1
		0 $sectors ddsnap SNAP /dev/nothere $key -1
		0 $sectors ddsnap SNAP ORG $key -1 1 server_timeout
		0 $sectors ddsnap SNAP ORG $key -1 2 nothing 3
		0 $sectors ddsnap SNAP ORG $key -1 2 server_timeout 86401
		0 $sectors ddsnap SNAP ORG $key -1 0 server_timeout
	EOF
	log_has "ID must be -1 for the origin" || fail "no word about the ID"
}

t_no_server() {
	local start
	start=$(milliseconds)
	expect_error "created without a server" create_device origin -1 2 server_timeout 1 || return
	[ $(($(milliseconds) - start)) -lt 5000 ] || fail "it took too long" || return
	log_has "no snapshot server is attached under this socket name" || fail "no word about the server" || return
	expect_error "created without a server" create_device origin -1 2 server_timeout 0
}

t_create_killed() {
	dmsetup create origin --table "0 $sectors ddsnap $store $origin $key -1" &
	local pid=$!
	sleep 0.5
	kill -0 $pid || fail "it did not wait" || return
	kill -9 $pid
	wait $pid 2>/dev/null
	start_server new || return
	[ "$(stat identify)" = 0 ] || fail "the killed one is still there"
}

t_create_waits() {
	create_device origin -1 &
	local pid=$!
	sleep 0.5
	start_server new || return
	wait $pid || fail "not created when the server came" || return
	holds $org 0 0
}

t_identify_errors() {
	start_server new || return
	expect_error "unknown snapshot created" create_device snap7 7 || return
	log_has "knows no snapshot of this ID" || fail "no word about the ID" || return
	sectors=$((sectors - chunk / 512)) expect_error "wrong size created" create_device origin -1 || return
	log_has "the snapshot server $sectors" || fail "no word about the size" || return
	ctl fail 1 5 >/dev/null
	expect_error "squashed snapshot created" create_device snap7 7 || return
	log_has "squashed" || fail "no word about squashing" || return
	ctl fail 1 0 >/dev/null
	make_origin || return
	expect_error "second origin created" create_device other -1 || return
	log_has "another origin device exists" || fail "no word about the other origin"
}

t_table_and_status() {
	start_server new || return
	make_origin 2 server_timeout 17 || return
	make_snapshot 4 || return
	status_is origin "1 state=active gate=open unique=bits reads=R writes=0 questions=0 released_at_once=0 discards_dropped=0 waiting=0" &&
		status_is snap4 "1 state=active reads=R writes=0 questions=Q released_at_once=0 discards_dropped=0 waiting=0" || return
	local numbers
	numbers="$(lsblk_numbers $store) $(lsblk_numbers $origin)"
	[ "$(dmsetup table origin)" = "0 $sectors ddsnap $numbers $key -1 2 server_timeout 17" ] ||
		fail "table is $(dmsetup table origin)" || return
	[ "$(dmsetup table snap4)" = "0 $sectors ddsnap $numbers $key 4" ] ||
		fail "table is $(dmsetup table snap4)"
}

# status_is NAME WORDS: what is read of a device is not ours alone, so reads are R, and a snapshot's questions Q
status_is() {
	local is pattern='s/reads=[0-9]*/reads=R/'
	[ "$1" = origin ] || pattern="$pattern;s/questions=[0-9]*/questions=Q/"
	is=$(dmsetup status "$1" | sed "$pattern")
	[ "$is" = "0 $sectors ddsnap $2" ] || fail "status of $1 is $is"
}

# in_status NAME WORD
in_status() { dmsetup status "$1" | grep -q " $2\( \|$\)"; }
status_has() { in_status "$@" || fail "no $2: $(dmsetup status "$1")"; }

lsblk_numbers() { cat /sys/class/block/"$(basename "$1")"/dev; }

# What a device was doing was told in /proc alone, under a name that a renaming left behind.
t_status() {
	start_server new && make_origin 2 server_timeout 6 && make_snapshot 0 2 server_timeout 6 || return
	put $org 1 a && put $org 1 b && put $org 2 c || fail "write" || return
	blkdiscard -o $((chunk * 8)) -l $chunk $org || fail "discard" || return
	status_is origin "1 state=active gate=open unique=bits reads=R writes=4 questions=2 released_at_once=1 discards_dropped=1 waiting=0" || return
	ctl silent on >/dev/null
	put $org 3 a &
	local write=$!
	within 5 in_status origin waiting=1 || fail "no write waits: $(dmsetup status origin)" || return
	ctl silent off >/dev/null
	wait $write || fail "the write failed" || return
	ctl begin >/dev/null && ctl reached >/dev/null || fail "barrier" || return
	status_has origin gate=closed || return
	ctl end >/dev/null || fail "end" || return
	status_has origin gate=open || return
	ctl all-unique >/dev/null || fail "not taken" || return
	status_has origin unique=all || return
	ctl stop >/dev/null || fail "not taken" || return
	status_has snap0 state=stopped && status_has origin state=active || return
	kill_server
	status_has origin state=waiting || return
	within 15 in_status origin state=failing || fail "$(dmsetup status origin)" || return
	start_server || return
	status_has origin state=active && status_has origin unique=bits && status_has snap0 state=stopped
}

# io_uring handed each request to a thread: the target knew nothing of requests that must not wait.
t_nowait() {
	start_server new && make_origin && make_snapshot 0 || return
	local snap=/dev/mapper/snap0 write
	# Nothing to be asked, and the server's answer. (udev reads the first chunks: they may be cached.)
	nowait $org 101 ok && nowait $org 101 ok n && nowait $org 101 ok m && nowait $snap 101 ok && nowait $snap 102 ok n || return
	[ "$(stat copies)" = 2 ] || fail "$(stat copies) copies, 2 wanted" || return
	holds $org 101 m && holds $snap 101 0 && holds $snap 102 n && holds $org 102 0 || return
	# No room.
	echo 1 >/sys/module/dm_ddsnap/parameters/max_waiting
	ctl silent on >/dev/null
	put $org 109 a &
	write=$!
	within 5 counter_is waiting 1 || fail "no write waits" || return
	nowait $org 108 EAGAIN n && nowait $snap 108 EAGAIN && nowait $org 108 ok && nowait $org 101 ok o || return
	counter_is waiting 1 || fail "$(counter waiting) bios wait, 1 wanted" || return
	ctl silent off >/dev/null
	wait $write || fail "the write failed" || return
	echo 1024 >/sys/module/dm_ddsnap/parameters/max_waiting
	# A snapshot is being created.
	ctl begin >/dev/null && ctl reached >/dev/null || fail "barrier" || return
	nowait $org 101 EAGAIN n && nowait $org 108 EAGAIN n && nowait $org 108 ok && nowait $snap 108 ok || return
	ctl end >/dev/null || fail "end" || return
	nowait $org 101 ok p && nowait $org 108 ok p || return
	# No server.
	kill_server
	nowait $org 107 EAGAIN n && nowait $snap 107 EAGAIN && nowait $snap 107 EAGAIN n && nowait $org 107 ok && nowait $org 108 ok q || return
	start_server || return
	nowait $org 107 ok q || return
	holds $org 101 p && holds $org 108 q && holds $org 107 q && holds $snap 108 0 && holds $snap 107 0
}

# nowait DEVICE CHUNK RESULT [LETTER]: a read, or a write of LETTERs, that must not wait
nowait() {
	local is
	is=$(timeout 10 "$here/stomp" nowait "$1" $((chunk * $2)) $chunk $4)
	[ "$is" = "$3" ] || fail "nowait${4:+ write} of chunk $2 of $1: ${is:-no end}, not $3"
}

t_origin_read_write() {
	start_server new || return
	make_origin || return
	put $org 3 a || fail "write" || return
	holds $org 3 a || return
	holds $org 2 0 || return
	holds $origin_loop 3 a
}

t_copy_out() {
	start_server new || return
	make_origin || return
	put $org 0 a 4 || fail "write" || return
	make_snapshot 0 || return
	put $org 1 b || fail "write" || return
	holds /dev/mapper/snap0 1 a || return
	holds $org 1 b || return
	holds /dev/mapper/snap0 2 a || return
	make_snapshot 2 || return
	put $org 1 c || fail "write" || return
	holds /dev/mapper/snap0 1 a || return
	holds /dev/mapper/snap2 1 b || return
	holds $org 1 c
}

t_unique() {
	local i
	start_server new || return
	make_origin || return
	make_snapshot 0 && make_snapshot 2 && make_snapshot 4 || return
	for i in 1 2 3 4 5 6 7 8; do
		put $org 5 $i || fail "write" || return
	done
	[ "$(stat origin_write)" = 1 ] || fail "$(stat origin_write) questions for 8 writes" || return
	[ "$(stat copies)" = 1 ] || fail "$(stat copies) copies for one chunk" || return
	make_snapshot 6 || return
	put $org 5 x && put $org 5 y || fail "write" || return
	[ "$(stat origin_write)" = 2 ] || fail "$(stat origin_write) questions after the snapshot" || return
	[ "$(stat copies)" = 2 ] || fail "$(stat copies) copies after the snapshot" || return
	holds /dev/mapper/snap0 5 0 && holds /dev/mapper/snap4 5 0 &&
		holds /dev/mapper/snap6 5 8 && holds $org 5 y || return
	# One write over unique and shared chunks, one over unique ones alone.
	put $org 4 z 4 || fail "write" || return
	[ "$(stat origin_write)" = 5 ] || fail "$(stat origin_write) questions: 5 wanted" || return
	put $org 4 w 4 || fail "write" || return
	[ "$(stat origin_write)" = 5 ] || fail "unique chunks asked about" || return
	holds $org 4 w && holds $org 7 w && holds /dev/mapper/snap6 4 0
}

t_snapshot_write() {
	start_server new || return
	make_origin || return
	put $org 0 a 4 || fail "write" || return
	make_snapshot 0 && make_snapshot 2 || return
	put $org 1 b || fail "write" || return
	# One still on the origin, one copied out already; partly and whole.
	head -c 512 /dev/zero | tr '\0' s |
		dd of=/dev/mapper/snap0 bs=512 seek=$((2 * chunk / 512 + 3)) oflag=direct conv=notrunc status=none ||
		fail "write of a snapshot" || return
	put /dev/mapper/snap0 1 t || fail "write of a snapshot" || return
	[ "$(get /dev/mapper/snap0 2)" = 6173 ] || fail "chunk 2 holds $(get /dev/mapper/snap0 2)" || return
	holds /dev/mapper/snap0 1 t && holds /dev/mapper/snap0 3 a &&
		holds /dev/mapper/snap2 1 a && holds /dev/mapper/snap2 2 a &&
		holds $org 1 b && holds $org 2 a || return
	put $org 2 c || fail "write" || return
	[ "$(get /dev/mapper/snap0 2)" = 6173 ] || fail "the origin's write reached the snapshot" || return
	holds /dev/mapper/snap2 2 a
}

t_discard_and_zeroes() {
	start_server new || return
	make_origin || return
	put $org 0 a 64 || fail "write" || return
	make_snapshot 0 || return
	# Neither begins nor ends with a chunk.
	blkdiscard -z -o $((chunk / 2)) -l $((chunk * 20)) $org || fail "write-zeroes" || return
	holds $org 5 0 || return
	[ "$(get $org 0)" = 0061 ] || fail "chunk 0 holds $(get $org 0)" || return
	[ "$(get $org 20)" = 0061 ] || fail "chunk 20 holds $(get $org 20)" || return
	holds $org 21 a && holds $org 29 a && holds $org 50 a || return
	local i
	for i in 0 1 10 20 21 30 35 49 50 63; do
		holds /dev/mapper/snap0 $i a || return
	done
	[ "$(stat copies)" = 21 ] || fail "$(stat copies) copies, 21 wanted" || return
	# Unique by now: no question.
	blkdiscard -z -o $((chunk * 2)) -l $((chunk * 10)) $org || fail "write-zeroes" || return
	[ "$(stat origin_write)" = 65 ] || fail "$(stat origin_write) questions, 65 wanted" || return
	blkdiscard -z -o 0 -l $((chunk * 3 + 512)) /dev/mapper/snap0 || fail "write-zeroes of a snapshot" || return
	holds /dev/mapper/snap0 2 0 && holds /dev/mapper/snap0 4 a && holds $org 21 a || return
	[ "$(get /dev/mapper/snap0 3)" = 0061 ] || fail "chunk 3 holds $(get /dev/mapper/snap0 3)" || return
	expect_error "a snapshot takes discards" blkdiscard -l $chunk /dev/mapper/snap0
}

# A discard copied out each of its chunks: the weekly fstrim filled the store and squashed snapshots.
t_discard() {
	start_server new || return
	make_origin || return
	put $org 0 a 64 || fail "write" || return
	make_snapshot 0 && make_snapshot 2 || return
	# Nothing is unique: nothing happens, and nobody is asked, whatever the server does.
	ctl silent on >/dev/null
	timeout 20 blkdiscard -o $((chunk * 30)) -l $((chunk * 20)) $org || fail "discard" || return
	ctl silent off >/dev/null
	[ "$(stat origin_write)" = 64 ] || fail "$(stat origin_write) questions, 64 wanted" || return
	holds $org 35 a || return
	# Unique are 4 to 7 and 10: these go to the disk, the part of a chunk too.
	put $org 4 b 4 && put $org 10 b || fail "write" || return
	[ "$(stat copies)" = 5 ] || fail "$(stat copies) copies, 5 wanted" || return
	blkdiscard -o $((chunk * 2 + chunk / 2)) -l $((chunk * 8)) $org || fail "discard" || return
	holds $org 2 a && holds $org 3 a && holds $org 4 0 && holds $org 7 0 &&
		holds $org 8 a && holds $org 9 a || return
	[ "$(get $org 10)" = 0062 ] || fail "chunk 10 holds $(get $org 10)" || return
	local i
	for i in 2 3 4 7 8 9 10 30 35 49; do
		holds /dev/mapper/snap0 $i a && holds /dev/mapper/snap2 $i a || return
	done
	[ "$(stat copies)" = 5 ] || fail "$(stat copies) copies, 5 wanted" || return
	[ "$(stat origin_write)" = 69 ] || fail "$(stat origin_write) questions, 69 wanted" || return
	# Not in a barrier either: it would change what the new snapshot shows.
	ctl begin >/dev/null && ctl reached >/dev/null || fail "barrier" || return
	timeout 20 blkdiscard -o $((chunk * 10)) -l $chunk $org || fail "discard in a barrier" || return
	ctl end >/dev/null || fail "end" || return
	[ "$(get $org 10)" = 0062 ] || fail "discarded in a barrier" || return
	# Nor does one wait for a server that is not there.
	kill_server
	timeout 20 blkdiscard -o $((chunk * 40)) -l $chunk $org || fail "discard without a server"
}

# Without a snapshot each chunk was asked about: mkfs.xfs of a new 2 TB volume took 23 minutes.
t_all_unique() {
	start_server new && make_origin || return
	ctl all-unique >/dev/null || fail "not taken" || return
	put $org 0 a 64 || fail "write" || return
	blkdiscard -o $((chunk * 8)) -l $((chunk * 8)) $org || fail "discard" || return
	blkdiscard -z -o $((chunk * 16)) -l $((chunk * 8)) $org || fail "write-zeroes" || return
	[ "$(stat origin_write)" = 0 ] || fail "$(stat origin_write) questions" || return
	holds $org 7 a && holds $org 8 0 && holds $org 15 0 && holds $org 16 0 && holds $org 24 a || return
	# It ends with the next snapshot.
	make_snapshot 0 || return
	put $org 1 b || fail "write" || return
	blkdiscard -o $((chunk * 30)) -l $((chunk * 8)) $org || fail "discard" || return
	[ "$(stat origin_write)" = 1 ] || fail "$(stat origin_write) questions, 1 wanted" || return
	holds /dev/mapper/snap0 1 a && holds /dev/mapper/snap0 30 a && holds $org 30 a || return
	# It means nothing in a barrier.
	ctl begin >/dev/null && ctl all-unique >/dev/null && ctl reached >/dev/null &&
		ctl end >/dev/null || fail "barrier" || return
	put $org 2 b || fail "write" || return
	[ "$(stat origin_write)" = 2 ] || fail "taken in a barrier" || return
	# And it ends with the server.
	ctl all-unique >/dev/null || fail "not taken" || return
	kill_server
	start_server || return
	put $org 3 b || fail "write" || return
	[ "$(stat origin_write)" = 1 ] || fail "it outlived the server" || return
	holds /dev/mapper/snap0 2 a && holds /dev/mapper/snap0 3 a
}

# A read that is on its way to the origin is not outrun, and a server that lies is not believed.
t_all_unique_and_reads() {
	stoppable && start_server new && make_origin && make_snapshot 0 || return
	local read before
	before=$(stat snapshot_read)
	stop || return
	get /dev/mapper/snap0 6 >"$tmp/read" &
	read=$!
	within 20 has snapshot_read $((before + 1)) || fail "no question" || return
	within 20 snapshot_waits 0 || fail "not answered" || return
	ctl all-unique >/dev/null || fail "not taken" || return
	put $org 6 n &
	local write=$!
	within 20 has origin_write 1 || fail "the write did not ask" || return
	still $write || fail "the write did not wait for the read" || return
	go || return
	wait $write || fail "the write failed" || return
	wait $read
	[ "$(cat "$tmp/read")" = 00 ] || fail "the read saw $(cat "$tmp/read")" || return
	ctl all-unique >/dev/null || fail "not taken" || return
	expect_error "read from the origin" dd if=/dev/mapper/snap0 of=/dev/null bs=$chunk skip=9 count=1 iflag=direct status=none || return
	log_has "maps a snapshot's chunk 9 to the origin, which may have been written since" || fail "no word about it" || return
	holds /dev/mapper/snap0 6 0
}

# That a chunk may be written without asking was not held against an answer that the origin still has it.
t_stale_mapping() {
	start_server new && make_origin && make_snapshot 0 || return
	put $org 3 a || fail "write" || return
	ctl stale on >/dev/null
	expect_error "read from the origin" dd if=/dev/mapper/snap0 of=/dev/null bs=$chunk skip=3 count=1 iflag=direct status=none || return
	log_has "maps a snapshot's chunk 3 to the origin, which may have been written since" || fail "no word about it" || return
	holds /dev/mapper/snap0 4 0 || return
	ctl stale off >/dev/null
	holds /dev/mapper/snap0 3 0
}

# Write-zeroes of a large device made a bio for each of its chunks, without a bound.
t_throttle() {
	start_server new && make_origin && make_snapshot 0 || return
	echo 32 >/sys/module/dm_ddsnap/parameters/max_waiting
	ctl silent on >/dev/null
	blkdiscard -z $org &
	local zeroes=$!
	# A run of as many chunks as there is room for.
	within 10 counter_is waiting 1 || fail "$(counter waiting) bios wait, 1 wanted" || return
	# Who waits for room is not in the way of a barrier, or of a suspension.
	timeout 100 dd if=/dev/mapper/snap0 of=/dev/null bs=64k count=32 iflag=direct status=none &
	local read=$!
	still $zeroes || fail "the write-zeroes ended" || return
	counter_is waiting 1 || fail "$(counter waiting) bios wait, 1 wanted" || return
	[ "$(stat longest_run)" = 32 ] || fail "a run of $(stat longest_run) chunks, 32 wanted" || return
	# Slow, so that it does not end before the barrier begins.
	ctl delay 100000 >/dev/null
	ctl silent off >/dev/null
	ctl begin >/dev/null && ctl reached >/dev/null || fail "barrier" || return
	ctl delay 0 >/dev/null
	still $zeroes || fail "write-zeroes did not wait for the barrier" || return
	[ "$(counter waiting)" -le 33 ] || fail "$(counter waiting) bios wait" || return
	ctl end >/dev/null || fail "end" || return
	wait $zeroes || fail "write-zeroes failed" || return
	wait $read || fail "the read failed" || return
	[ "$(stat copies)" = $((sectors * 512 / chunk)) ] || fail "$(stat copies) copies" || return
	holds $org 77 0
}

# questions N CHUNKS: so many ORIGIN_WRITEs were asked, about so many chunks
questions() {
	[ "$(stat origin_write) $(stat asked_chunks)" = "$1 $2" ] ||
		fail "$(stat origin_write) questions about $(stat asked_chunks) chunks, $1 about $2 wanted"
}

# Each chunk was a question of its own, and a bio of its own: 64 for an overwrite of 1 MiB.
t_run() {
	local i
	start_server new && make_origin && run $org 0 a 64 && run $org 64 a 64 || fail "write" || return
	make_snapshot 0 && make_snapshot 2 || return
	questions 2 128 || return
	# The longest, and one more chunk than that.
	run $org 0 b 64 && run $org 64 b 65 || fail "write" || return
	questions 5 257 || return
	[ "$(stat longest_run)" = 64 ] || fail "a run of $(stat longest_run) chunks" || return
	[ "$(stat copies)" = 129 ] || fail "$(stat copies) copies, 129 wanted" || return
	for i in 0 1 31 63 64 127; do
		holds /dev/mapper/snap0 $i a && holds /dev/mapper/snap2 $i a && holds $org $i b || return
	done
	holds /dev/mapper/snap2 128 0 && holds $org 128 b && holds $org 129 0 || return
	# All unique: nobody is asked.
	run $org 3 c 60 || fail "write" || return
	questions 5 257 || return
	holds $org 3 c && holds $org 62 c && holds $org 63 b || return
	# Parts of chunks at both ends.
	head -c $chunk /dev/zero | tr '\0' d | dd of=$org bs=$chunk seek=$((chunk * 201 - 512)) count=1 \
		iflag=fullblock oflag=direct,seek_bytes conv=notrunc status=none || fail "write" || return
	questions 6 259 || return
	[ "$(get $org 200) $(get $org 201)" = "0064 0064" ] || fail "chunks hold $(get $org 200) $(get $org 201)" || return
	holds /dev/mapper/snap0 200 0 && holds /dev/mapper/snap0 201 0 || return
	# A snapshot in between: all of them are asked about anew.
	make_snapshot 4 || return
	run $org 0 e 64 || fail "write" || return
	questions 7 323 || return
	holds /dev/mapper/snap4 0 b && holds /dev/mapper/snap4 3 c && holds /dev/mapper/snap0 3 a && holds $org 63 e
}

# What is unique at the ends of a run is not asked about, what is so within is.
t_run_partly_unique() {
	start_server new && make_origin && make_snapshot 0 || return
	put $org 10 a 3 && put $org 15 a && put $org 18 a 2 || fail "write" || return
	questions 6 6 || return
	# 10 to 19, of which 13 and 14, 16 and 17 are shared.
	run $org 10 b 10 || fail "write" || return
	questions 7 11 || return
	[ "$(stat copies)" = 10 ] || fail "$(stat copies) copies, 10 wanted" || return
	run $org 10 c 10 || fail "write" || return
	questions 7 11 || return
	local i
	for i in 10 12 13 14 15 16 17 18 19; do
		holds $org $i c && holds /dev/mapper/snap0 $i 0 || return
	done
}

# Runs that overlap are answered each for itself.
t_run_overlapping() {
	start_server new && make_origin && make_snapshot 0 || return
	ctl silent on >/dev/null
	local one two three four
	run $org 0 a 20 &
	one=$!
	within 5 has queued 1 || fail "no question" || return
	run $org 10 a 20 &
	two=$!
	put $org 15 a &
	three=$!
	within 5 has queued 3 || fail "$(stat queued) questions" || return
	# The very same run joins.
	run $org 0 a 20 &
	four=$!
	within 5 counter_is waiting 4 || fail "$(counter waiting) wait" || return
	questions 3 41 || return
	# The others do not depend on the first.
	ctl silent off >/dev/null
	wait $one && wait $two && wait $three && wait $four || fail "a write failed" || return
	[ "$(stat copies)" = 30 ] || fail "$(stat copies) copies, 30 wanted" || return
	local i
	for i in 0 9 10 15 19 20 29; do
		holds $org $i a && holds /dev/mapper/snap0 $i 0 || return
	done
	holds $org 30 0 || return
	run $org 0 b 30 || fail "write" || return
	questions 3 41
}

# A run waits for the snapshot's reads of all its chunks, one after the other.
t_run_and_reads() {
	stoppable && start_server new && make_origin && make_snapshot 0 || return
	local reads write before other
	before=$(stat snapshot_read)
	stop || return
	get /dev/mapper/snap0 3 >"$tmp/read3" &
	reads=$!
	get /dev/mapper/snap0 9 >"$tmp/read9" &
	reads="$reads $!"
	within 20 has snapshot_read $((before + 2)) || fail "no questions" || return
	within 20 snapshot_waits 0 || fail "not answered" || return
	run $org 0 n 16 &
	write=$!
	within 20 has copies 16 || fail "not copied out" || return
	# Its other chunks are not held up.
	put $org 5 m &
	other=$!
	within 20 has origin_write 2 || fail "no question" || return
	within 20 counter_is waiting 1 || fail "$(counter waiting) wait, 1 wanted" || return
	# It is granted and not started: not drained, but asked again.
	ctl begin >/dev/null || fail "begin" || return
	go || return
	ctl reached >/dev/null || fail "the barrier waits for a granted run" || return
	wait $reads $other || fail "a read or a write failed" || return
	[ "$(cat "$tmp/read3") $(cat "$tmp/read9")" = "00 00" ] || fail "the reads saw $(cat "$tmp/read3") $(cat "$tmp/read9")" || return
	still $write || fail "the run went through the barrier" || return
	holds $origin_loop 0 0 && holds $origin_loop 15 0 && holds $origin_loop 5 m || return
	ctl end >/dev/null || fail "end" || return
	wait $write || fail "the write failed" || return
	questions 3 33 || return
	holds $origin_loop 0 n && holds $origin_loop 15 n && holds /dev/mapper/snap0 3 0 && holds /dev/mapper/snap0 9 0 || return
	# Without a barrier the end of the last read lets it go, whatever became of the server.
	before=$(stat snapshot_read)
	stop || return
	get /dev/mapper/snap0 40 >"$tmp/read3" &
	reads=$!
	get /dev/mapper/snap0 55 >"$tmp/read9" &
	reads="$reads $!"
	within 20 has snapshot_read $((before + 2)) || fail "no questions" || return
	within 20 snapshot_waits 0 || fail "not answered" || return
	run $org 32 n 32 &
	write=$!
	within 20 has copies 48 || fail "not copied out" || return
	still $write || fail "the write ended before the reads" || return
	counter_is waiting 1 || fail "the run did not wait for the reads" || return
	kill_server
	go || return
	wait $write || fail "the write failed" || return
	wait $reads
	[ "$(cat "$tmp/read3") $(cat "$tmp/read9")" = "00 00" ] || fail "the reads saw $(cat "$tmp/read3") $(cat "$tmp/read9")" || return
	holds $origin_loop 32 n && holds $origin_loop 40 n && holds $origin_loop 63 n
}

# A chunk that cannot be copied out fails its run, and nothing else; no bit is set for it.
t_run_fails() {
	start_server new && make_origin && make_snapshot 0 || return
	ctl bad-chunk 12 >/dev/null
	expect_error "written" run $org 8 a 8 || return
	holds $origin_loop 8 0 && holds $origin_loop 12 0 && holds $origin_loop 15 0 || return
	run $org 13 b 8 && put $org 8 b || fail "a write of other chunks failed" || return
	questions 3 17 || return
	ctl bad-chunk -1 >/dev/null
	run $org 8 c 8 || fail "write" || return
	# 8 and 13 on are unique by now: 9 to 12 are left.
	questions 4 21 || return
	local i
	for i in 8 9 12 15; do
		holds $org $i c && holds /dev/mapper/snap0 $i 0 || return
	done
	# Too old, as any other question; the late answer means nothing.
	timeout 20 dmsetup suspend origin &&
		dmsetup load origin --table "0 $sectors ddsnap $store $origin $key -1 2 server_timeout 2" &&
		timeout 20 dmsetup resume origin || fail "reload" || return
	ctl silent on >/dev/null
	expect_error "written" run $org 100 d 10 || return
	ctl silent off >/dev/null
	within 5 queued_is 0 || fail "$(stat queued) are queued" || return
	holds $origin_loop 100 0 || return
	run $org 100 e 10 || fail "write" || return
	holds $org 109 e && holds /dev/mapper/snap0 109 0
}

queued_is() { [ "$(stat queued)" = "$1" ]; }

# All that waits was one group for the server, however much it was.
t_run_bound() {
	start_server new && make_origin && make_snapshot 0 || return
	echo 8192 >/sys/module/dm_ddsnap/parameters/max_waiting
	ctl delay 200000 >/dev/null
	put $org 0 a &
	within 5 has origin_write 1 || fail "no question" || return
	dd if=/dev/zero of=$org bs=16M count=1 oflag=direct conv=notrunc status=none &
	local one=$!
	blkdiscard -z $org && wait $one || fail "write" || return
	ctl delay 0 >/dev/null
	[ "$(stat longest_run)" = 64 ] || fail "a run of $(stat longest_run) chunks" || return
	[ "$(stat longest_read)" -le 1024 ] || fail "$(stat longest_read) chunks in a read" || return
	[ "$(stat copies)" = $((sectors * 512 / chunk)) ] || fail "$(stat copies) copies"
}

# The device was shorter than the disk, without a word.
t_odd_length() {
	# Seven sectors in the last chunk.
	served_origin=$(losetup -f --show --sizelimit $((chunk * 33 + 7 * 512)) "$tmp/origin") || return
	loops=$served_origin
	origin=$served_origin
	sectors=$((chunk / 512 * 33 + 7))
	start_server new && make_origin || return
	[ "$(blockdev --getsz $org)" = $sectors ] || fail "the origin has $(blockdev --getsz $org) sectors" || return
	put_end $org a || fail "write" || return
	make_snapshot 0 && make_snapshot 2 || return
	[ "$(blockdev --getsz /dev/mapper/snap0)" = $sectors ] || fail "the snapshot has other sectors" || return
	holds /dev/mapper/snap0 33 a || return
	put_end $org b || fail "write" || return
	holds $org 33 b && holds /dev/mapper/snap0 33 a && holds /dev/mapper/snap2 33 a || return
	put_end /dev/mapper/snap0 c || fail "write of a snapshot" || return
	holds /dev/mapper/snap0 33 c && holds /dev/mapper/snap2 33 a && holds $org 33 b || return
	# The end of it, and all of the device.
	head -c 512 /dev/zero | tr '\0' d | dd of=$org bs=512 seek=$((sectors - 1)) oflag=direct conv=notrunc status=none || fail "write" || return
	[ "$(get $org 33)" = 6264 ] || fail "chunk 33 holds $(get $org 33)" || return
	[ "$(stat origin_write)" = 2 ] || fail "$(stat origin_write) questions, 2 wanted" || return
	# A run that ends with it.
	head -c $((chunk + 7 * 512)) /dev/zero | tr '\0' e | dd of=$org bs=$((chunk + 7 * 512)) seek=$((chunk * 32)) \
		iflag=fullblock oflag=direct,seek_bytes conv=notrunc status=none || fail "write" || return
	questions 3 3 || return
	make_snapshot 6 || return
	head -c $((chunk * 2 + 7 * 512)) /dev/zero | tr '\0' f | dd of=$org bs=$((chunk * 2 + 7 * 512)) seek=$((chunk * 31)) \
		iflag=fullblock oflag=direct,seek_bytes conv=notrunc status=none || fail "write" || return
	questions 4 6 || return
	holds $org 31 f && holds $org 33 f && holds /dev/mapper/snap6 33 e && holds /dev/mapper/snap6 31 0 && holds /dev/mapper/snap2 33 a || return
	blkdiscard -z $org || fail "write-zeroes" || return
	holds $org 33 0 && holds /dev/mapper/snap6 33 e && holds /dev/mapper/snap2 33 a || return
	[ "$(dd if=/dev/mapper/snap2 bs=64k iflag=direct status=none | wc -c)" = $((sectors * 512)) ] || fail "it cannot be read to its end" || return
	blkdiscard $org || fail "discard" || return
	# A length of its own for an old snapshot is not taken, a sector more or less.
	sectors=$((sectors - 1)) expect_error "wrong size created" create_device snap4 2
}

# put_end DEVICE LETTER: the short last chunk
put_end() {
	head -c $((7 * 512)) /dev/zero | tr '\0' "$2" |
		timeout 100 dd of="$1" bs=512 seek=$((sectors - 7)) iflag=fullblock oflag=direct conv=notrunc status=none
}

# A snapshot had the store's sectors, and a file system made for smaller ones did not mount.
t_sector_sizes() {
	local large
	large=$(losetup -f --show --sector-size 4096 "$tmp/store") || return
	loops=$large
	start_server new || return
	store=$large expect_error "a store of larger sectors was taken" create_device origin -1 || return
	log_has "logical sectors are larger than the origin's" || fail "no word about the sectors" || return
	kill_server
	served_origin=$(losetup -f --show --sector-size 4096 "$tmp/origin") || return
	loops="$loops $served_origin"
	origin=$served_origin
	start_server new && make_origin && make_snapshot 0 || return
	local device
	for device in $org /dev/mapper/snap0; do
		[ "$(blockdev --getss $device)" = 4096 ] || fail "$device has sectors of $(blockdev --getss $device)" || return
	done
	put $org 1 a && holds /dev/mapper/snap0 1 0 && holds $org 1 a
}

t_flush_and_fua() {
	start_server new || return
	make_origin || return
	make_snapshot 0 || return
	local device
	for device in $org /dev/mapper/snap0; do
		dd if=/dev/zero of=$device bs=4k count=32 oflag=direct,dsync conv=notrunc status=none || fail "dsync on $device" || return
		dd if=/dev/zero of=$device bs=4k count=256 conv=fsync,notrunc status=none || fail "fsync on $device" || return
	done
	kill_server
	# Flushes ask nobody.
	timeout 20 sync $org || fail "flush of the origin" || return
	timeout 20 sync /dev/mapper/snap0 || fail "flush of the snapshot"
}

t_read_tracking() {
	stoppable && start_server new && make_origin && make_snapshot 0 || return
	local read write before
	before=$(stat snapshot_read)
	stop || return
	get /dev/mapper/snap0 6 >"$tmp/read" &
	read=$!
	within 20 has snapshot_read $((before + 1)) || fail "no question" || return
	put $org 6 n &
	write=$!
	within 20 has copies 1 || fail "not copied out" || return
	sleep 1
	[ "$(counter waiting)" = 1 ] || fail "the write did not wait for the read" || return
	# A write already granted does not hold up a barrier.
	ctl begin >/dev/null && ctl reached >/dev/null || fail "the barrier waits for a granted write" || return
	go || return
	wait $read
	[ "$(cat "$tmp/read")" = 00 ] || fail "the read saw $(cat "$tmp/read")" || return
	still $write || fail "the write went through the barrier" || return
	ctl end >/dev/null || fail "end of the barrier" || return
	wait $write || fail "the write failed" || return
	[ "$(stat origin_write)" = 2 ] || fail "not asked again after the barrier" || return
	holds $origin_loop 6 n && holds /dev/mapper/snap0 6 0
}

# The end of the read releases the write, whatever became of the server.
t_read_tracking_release() {
	stoppable && start_server new && make_origin && make_snapshot 0 || return
	local read write before
	before=$(stat snapshot_read)
	stop || return
	get /dev/mapper/snap0 6 >"$tmp/read" &
	read=$!
	within 20 has snapshot_read $((before + 1)) || fail "no question" || return
	put $org 6 n &
	write=$!
	within 20 has copies 1 || fail "not copied out" || return
	# The next server knows nothing of the read; the write has to wait for it.
	kill_server
	start_server || return
	within 20 has origin_write 1 || fail "not asked again" || return
	sleep 1
	[ "$(counter waiting)" = 1 ] || fail "the write did not wait for the read" || return
	go || return
	wait $write || fail "the write failed" || return
	wait $read
	[ "$(cat "$tmp/read")" = 00 ] || fail "the read saw $(cat "$tmp/read")" || return
	holds $origin_loop 6 n && holds /dev/mapper/snap0 6 0
}

t_barrier_drains() {
	stoppable && start_server new && make_origin || return
	put $org 8 a || fail "write" || return
	local write held reached
	stop || return
	put $org 8 b &
	write=$!
	within 20 counter_is released_at_once 1 || fail "the write was not released at once" || return
	ctl begin >/dev/null || fail "begin" || return
	put $org 8 c &
	held=$!
	ctl reached >"$tmp/reached" &
	reached=$!
	still $reached || fail "reached with a write in flight" || return
	go || return
	wait $reached || fail "not reached" || return
	wait $write || fail "the write failed" || return
	still $held || fail "a write went through the barrier" || return
	holds $origin_loop 8 b || return
	[ "$(stat origin_write)" = 1 ] || fail "a question was sent during the barrier" || return
	ctl end >/dev/null || fail "end" || return
	wait $held || fail "the held write failed" || return
	holds $origin_loop 8 c
}

# A write that had to ask is drained as one that had not.
t_barrier_drains_asked() {
	stoppable && start_server new && make_origin || return
	local write reached
	stop || return
	put $org 8 b &
	write=$!
	within 20 has origin_write 1 || fail "no question" || return
	within 20 counter_is waiting 0 || fail "not answered" || return
	ctl begin >/dev/null || fail "begin" || return
	ctl reached >"$tmp/reached" &
	reached=$!
	still $reached || fail "reached with a write in flight" || return
	go || return
	wait $reached || fail "not reached" || return
	wait $write || fail "the write failed" || return
	ctl end >/dev/null || fail "end"
}

counter() { sed -n "s/^$1: //p" /proc/driver/ddsnap/origin; }
counter_is() { [ "$(counter "$1")" = "$2" ]; }

t_counters() {
	start_server new || return
	make_origin || return
	put $org 1 a && put $org 1 b && holds $org 1 b || return
	counter_is writes 2 && counter_is questions 1 && counter_is released_at_once 1 &&
		counter_is waiting 0 || fail "$(tr '\n' ' ' </proc/driver/ddsnap/origin)"
}

# load SECONDS: stomp at work; $load is its pid
load() {
	"$here/stomp" write $org "$tmp/ledger" 4 "$1" $RANDOM >"$tmp/load" 2>&1 &
	load=$!
	within 20 test -s "$tmp/ledger" || fail "no load"
}

bounded_snapshot() { # TAG
	cp "$tmp/ledger" "$tmp/low$1"
	ctl create "$1" >/dev/null || fail "no snapshot $1" || return
	cp "$tmp/ledger" "$tmp/high$1"
	create_device "snap$1" "$1" || fail "no device for snapshot $1"
}

check_all() { # TAG...
	local tag
	for tag; do
		stomp check "/dev/mapper/snap$tag" "$tmp/low$tag" "$tmp/high$tag" 2>"$tmp/check" ||
			fail "snapshot $tag: $(cat "$tmp/check")" || return
	done
}

end_of_load() {
	kill -TERM $load 2>/dev/null
	within 60 ended $load || fail "the load does not end" || return
	wait $load || fail "load: $(cat "$tmp/load")" || return
	stomp check $org "$tmp/ledger" "$tmp/ledger" 2>"$tmp/check" ||
		fail "origin: $(cat "$tmp/check")"
}

t_barrier_under_load() {
	start_server new || return
	make_origin || return
	load 100 || return
	local tag
	for tag in 0 2 4; do
		sleep 1
		bounded_snapshot $tag || return
		check_all $tag || return
	done
	sleep 1
	end_of_load || return
	check_all 0 2 4
}

t_server_killed_under_load() {
	start_server new || return
	make_origin || return
	load 100 || return
	local i
	bounded_snapshot 0 || return
	for i in 1 2 3 4 5 6; do
		sleep 0.$((RANDOM % 9))
		kill_server
		sleep 0.$((RANDOM % 9))
		start_server || return
		[ $i != 3 ] || bounded_snapshot 2 || return
	done
	end_of_load || return
	check_all 0 2
}

t_snapshot_read_under_load() {
	start_server new || return
	make_origin || return
	load 100 || return
	bounded_snapshot 0 || return
	local i
	for i in 1 2 3; do
		check_all 0 || return
		kill_server
		start_server || return
	done
	put /dev/mapper/snap0 1 p || fail "snapshot write" || return
	holds /dev/mapper/snap0 1 p || return
	end_of_load
}

t_server_lost_in_barrier() {
	start_server new || return
	make_origin || return
	put $org 0 a 2 || fail "write" || return
	ctl begin >/dev/null && ctl reached >/dev/null && ctl commit 9 >/dev/null || fail "barrier" || return
	kill_server
	# The chunk was unique, but the snapshot needs it.
	put $org 1 b &
	local write=$!
	sleep 0.5
	kill -0 $write || fail "written though the snapshot was committed" || return
	holds $origin_loop 1 a || return
	start_server || return
	wait $write || fail "the write failed" || return
	create_device snap9 9 || fail "no device" || return
	holds /dev/mapper/snap9 1 a && holds $org 1 b
}

t_server_lost_in_draining() {
	stoppable && start_server new && make_origin || return
	put $org 0 a || fail "write" || return
	local write
	stop || return
	put $org 0 b &
	write=$!
	within 20 counter_is released_at_once 1 || fail "not released at once" || return
	ctl begin >/dev/null || fail "begin" || return
	kill_server
	start_server || return
	# In flight since before the loss, and still counted.
	[ "$(ctl created-early)" = "err EPROTO" ] || fail "CREATED before REACHED was taken" || return
	go || return
	wait $write || fail "the write failed" || return
	put $org 0 c || fail "write" || return
	ctl create 1 >/dev/null || fail "no snapshot afterwards"
}

t_server_timeout() {
	start_server new || return
	make_origin 2 server_timeout 2 || return
	make_snapshot 0 2 server_timeout 2 || return
	put $org 1 a || fail "write" || return
	kill_server
	local start
	start=$(milliseconds)
	expect_error "written without a server" put $org 2 b || return
	[ $(($(milliseconds) - start)) -ge 1500 ] || fail "it did not wait" || return
	[ $(($(milliseconds) - start)) -lt 8000 ] || fail "it waited too long" || return
	start=$(milliseconds)
	expect_error "written without a server" put $org 2 b || return
	expect_error "read without a server" dd if=/dev/mapper/snap0 of=/dev/null bs=4k count=1 iflag=direct status=none || return
	[ $(($(milliseconds) - start)) -lt 1500 ] || fail "later I/O waited again" || return
	holds $org 1 a || return
	put $org 1 c || fail "a unique chunk cannot be written" || return
	start_server || return
	put $org 2 d || fail "write with the new server" || return
	holds $org 2 d && holds /dev/mapper/snap0 2 0 && holds /dev/mapper/snap0 1 0 || return
	[ "$(log_count 'the snapshot server is gone')" = 1 ] || fail "$(log_count 'the snapshot server is gone') lines for the loss" || return
	[ "$(log_count 'no snapshot server for')" = 1 ] || fail "$(log_count 'no snapshot server for') lines for failing" || return
	[ "$(log_count 'is attached again')" = 1 ] || fail "$(log_count 'is attached again') lines for the return"
}

t_timeout_zero() {
	start_server new || return
	make_origin 2 server_timeout 0 || return
	make_snapshot 0 || return
	kill_server
	local start
	start=$(milliseconds)
	expect_error "written without a server" put $org 2 b || return
	[ $(($(milliseconds) - start)) -lt 1500 ] || fail "it waited" || return
	start_server || return
	put $org 2 d || fail "write with the new server"
}

t_remove_without_server() {
	start_server new || return
	make_origin 2 server_timeout 4 || return
	make_snapshot 0 || return
	kill_server
	local start
	start=$(milliseconds)
	timeout 20 dmsetup remove --retry snap0 || fail "remove" || return
	put $org 2 b 2>/dev/null &
	local write=$!
	within 5 counter_is waiting 1 || fail "no write waits" || return
	timeout 30 dmsetup remove --force origin 2>/dev/null
	if wait $write; then fail "the write succeeded" || return; fi
	within 5 remove_if_there origin || fail "remove --force" || return
	[ $(($(milliseconds) - start)) -lt 20000 ] || fail "it took too long"
}

remove_if_there() { ! dmsetup info "$1" >/dev/null 2>&1 || dmsetup remove "$1"; }

t_suspend_without_server() {
	start_server new || return
	make_origin || return
	make_snapshot 0 || return
	kill_server
	# Not flushing: pushed back, done after the resumption.
	put $org 2 b &
	local write=$!
	get /dev/mapper/snap0 3 >"$tmp/read" &
	local read=$!
	within 5 counter_is waiting 1 || fail "no write waits" || return
	timeout 20 dmsetup suspend --noflush --nolockfs origin || fail "suspend --noflush" || return
	timeout 20 dmsetup suspend --noflush --nolockfs snap0 || fail "suspend --noflush" || return
	counter_is waiting 0 || fail "the write was not pushed back" || return
	kill -0 $write || fail "the write ended" || return
	timeout 20 dmsetup resume origin || fail "resume" || return
	start_server || return
	timeout 20 dmsetup resume snap0 || fail "resume" || return
	wait $write || fail "the write failed" || return
	wait $read
	[ "$(cat "$tmp/read")" = 00 ] || fail "the read saw $(cat "$tmp/read")" || return
	holds $org 2 b
}

# A flushing suspension failed all I/O at once, though the server was only being restarted.
t_flushing_suspension_waits() {
	start_server new || return
	make_origin 2 server_timeout 6 || return
	kill_server
	put $org 4 b &
	local write=$!
	within 5 counter_is waiting 1 || fail "no write waits" || return
	timeout 30 dmsetup suspend origin &
	local suspend=$!
	still $suspend || fail "suspended with a write that waits" || return
	start_server || return
	wait $write || fail "the write failed" || return
	wait $suspend || fail "suspend" || return
	timeout 20 dmsetup resume origin || fail "resume" || return
	holds $org 4 b || return
	# Without a server it ends when the I/O does.
	kill_server
	put $org 5 b 2>/dev/null &
	write=$!
	within 5 counter_is waiting 1 || fail "no write waits" || return
	local start
	start=$(milliseconds)
	timeout 30 dmsetup suspend origin || fail "suspend" || return
	[ $(($(milliseconds) - start)) -lt 15000 ] || fail "suspending took too long" || return
	if wait $write; then fail "the write succeeded" || return; fi
	timeout 20 dmsetup resume origin || fail "resume" || return
	start_server || return
	put $org 5 c || fail "the write after the resumption failed"
}

# waits_for SECONDS PID: it ends with an error, and in that time, give or take
waits_for() {
	local start
	start=$(milliseconds)
	within $(($1 + 8)) ended $2 || fail "what waits does not end" || return
	if wait $2; then fail "it succeeded" || return; fi
	[ $(($(milliseconds) - start)) -ge $((($1 - 2) * 1000)) ] || fail "it did not wait"
}

# A server that hangs had no limit: writes waited for ever, and so did suspend and remove --force.
t_stuck_server() {
	start_server new || return
	make_origin 2 server_timeout 4 || return
	make_snapshot 0 2 server_timeout 4 || return
	put $org 1 a || fail "write" || return
	kill -STOP $server
	put $org 2 b 2>/dev/null &
	local write=$!
	get /dev/mapper/snap0 3 >"$tmp/read" 2>/dev/null &
	local read=$!
	within 5 counter_is waiting 1 || fail "no write waits" || return
	waits_for 4 $write || return
	within 4 ended $read || fail "the read waits longer" || return
	[ -z "$(cat "$tmp/read")" ] || fail "the read saw $(cat "$tmp/read")" || return
	log_has "the snapshot server has not answered in time" || fail "no word about it" || return
	put $org 1 b || fail "a unique chunk cannot be written" || return
	# A suspension ends, flushing or not.
	put $org 2 b 2>/dev/null &
	write=$!
	within 5 counter_is waiting 1 || fail "no write waits" || return
	timeout 15 dmsetup suspend origin || fail "suspend" || return
	timeout 5 dmsetup resume origin || fail "resume" || return
	if wait $write; then fail "the write succeeded" || return; fi
	put $org 2 b 2>/dev/null &
	write=$!
	within 5 counter_is waiting 1 || fail "no write waits" || return
	timeout 15 dmsetup suspend --noflush --nolockfs origin || fail "suspend --noflush" || return
	timeout 5 dmsetup resume origin || fail "resume" || return
	if wait $write; then fail "the write succeeded" || return; fi
	# It goes on: its late answers are taken, and mean nothing.
	kill -CONT $server
	put $org 2 c || fail "write" || return
	holds $org 2 c && holds /dev/mapper/snap0 2 0 && holds /dev/mapper/snap0 3 0 || return
	ctl create 2 >/dev/null || fail "no snapshot" || return
	# And a removal by force.
	kill -STOP $server
	put $org 7 b 2>/dev/null &
	write=$!
	within 5 counter_is waiting 1 || fail "no write waits" || return
	local start
	start=$(milliseconds)
	timeout 40 dmsetup remove --force origin 2>/dev/null
	[ $(($(milliseconds) - start)) -lt 20000 ] || fail "remove --force took too long" || return
	if wait $write; then fail "the write succeeded" || return; fi
	within 20 remove_if_there origin || fail "remove --force"
}

# With room for 64 each further 64 requests waited for the whole time of their own: a minute for each MiB of a
# file that somebody wrote.
t_stuck_server_many() {
	local start ms
	start_server new && make_origin 2 server_timeout 4 || return
	ctl create 0 >/dev/null || fail "no snapshot" || return
	echo 64 >/sys/module/dm_ddsnap/parameters/max_waiting
	kill -STOP $server
	start=$(milliseconds)
	expect_error "a write was answered" timeout 90 dd if=/dev/zero of=$org \
		bs=16M count=1 oflag=direct conv=notrunc status=none || return
	ms=$(($(milliseconds) - start))
	status_has origin state=silent || return
	# 1,024 chunks are 16 times what there is room for: 64 s, or 4 and 15 times less than two.
	[ $ms -ge 3500 ] || fail "failed after $ms ms" || return
	[ $ms -lt 45000 ] || fail "failed only after $ms ms" || return
	# It goes on, and has its time again.
	kill -CONT $server
	put $org 5 a && holds $org 5 a || return
	ctl begin >/dev/null && ctl reached >/dev/null || fail "barrier" || return
	put $org 6 b &
	still $! && still $! && still $! || fail "a write had less than its time" || return
	ctl end >/dev/null || fail "end" || return
	wait $! || fail "the write failed" || return
	holds $org 6 b
}

# The server that followed a silent one had a second for its first answer: what it was asked meanwhile failed.
t_after_silent_server() {
	start_server new && make_origin 2 server_timeout 10 || return
	ctl create 0 >/dev/null || fail "no snapshot" || return
	kill -STOP $server
	expect_error "a write was answered" put $org 5 a || return
	status_has origin state=silent || return
	# One that is lost before it answers was no better.
	kill_server
	start_server || return
	status_has origin state=active || return
	kill_server
	local start ms
	start=$(milliseconds)
	expect_error "a write was answered" put $org 5 a || return
	ms=$(($(milliseconds) - start))
	[ $ms -lt 7000 ] || fail "failed only after $ms ms" || return
	start_server || return
	status_has origin state=active || return
	ctl begin >/dev/null && ctl reached >/dev/null || fail "barrier" || return
	put $org 6 b &
	still $! && still $! && still $! || fail "a write had less than its time" || return
	ctl end >/dev/null || fail "end" || return
	wait $! || fail "the write failed" || return
	holds $org 6 b
}

# An answer that comes too late is that to nothing: no bit, no tracked read.
t_late_answers() {
	start_server new || return
	make_origin 2 server_timeout 2 || return
	make_snapshot 0 2 server_timeout 2 || return
	ctl silent on >/dev/null
	put $org 6 b 2>/dev/null &
	local write=$!
	get /dev/mapper/snap0 7 >"$tmp/read" 2>/dev/null &
	local read=$!
	within 5 has queued 2 || fail "no questions" || return
	within 10 ended $write && within 10 ended $read || fail "they do not end" || return
	[ "$(ctl rubbish id)" = "err EPROTO" ] || fail "an answer to nothing was taken" || return
	ctl silent off >/dev/null
	within 5 devices_are 2 || fail "the server did not survive" || return
	[ "$(stat queued)" = 0 ] || fail "$(stat queued) answers are withheld" || return
	[ "$(stat copies)" = 1 ] || fail "$(stat copies) copies, 1 wanted" || return
	holds $origin_loop 6 0 || return
	# No bit: it asks. No tracked read: the write does not wait.
	put $org 6 c && put $org 7 c || fail "write" || return
	[ "$(stat origin_write)" = 3 ] || fail "$(stat origin_write) questions, 3 wanted" || return
	holds /dev/mapper/snap0 6 0 && holds /dev/mapper/snap0 7 0 || return
	# All have been taken: one more is one too many.
	ctl silent on >/dev/null
	put $org 8 c &
	write=$!
	within 5 has queued 1 || fail "no question" || return
	[ "$(ctl rubbish other-op)" = "err EPROTO" ] || fail "a wrong answer was taken" || return
	log_has "is not in order: refused" || fail "no word about it" || return
	ctl silent off >/dev/null
	wait $write || fail "the write failed"
}

# A request of which each server dies started the clock anew each time.
t_poison() {
	start_server new || return
	make_origin 2 server_timeout 5 || return
	ctl create 0 >/dev/null || fail "no snapshot" || return
	ctl poison 7 >/dev/null
	put $org 7 a 2>/dev/null &
	local write=$! start deaths=0
	start=$(milliseconds)
	while ! ended $write; do
		if ended $server; then
			deaths=$((deaths + 1))
			"$here/fake-server" serve $key $store_loop $origin_loop "$tmp/state" \
				"$ctl_socket" $shift 2>>"$tmp/server.err" &
			server=$!
		fi
		[ $(($(milliseconds) - start)) -lt 20000 ] || fail "it waits for ever" || return
		sleep 0.1
	done
	if wait $write; then fail "the write succeeded" || return; fi
	[ $deaths -ge 2 ] || fail "only $deaths servers died" || return
	# The volume goes on.
	within 20 ctl ping || { kill_server; start_server || return; }
	put $org 8 b || fail "write" || return
	holds $org 8 b && holds $org 7 0
}

# The gate stayed shut though no server had read BARRIER_REACHED: no snapshot was made.
t_gate_opens_after_loss() {
	stoppable && start_server new && make_origin || return
	put $org 0 a && put $org 1 a || fail "write" || return
	local write
	stop || return
	put $org 0 b &
	write=$!
	within 20 counter_is released_at_once 1 || fail "not released at once" || return
	ctl begin >/dev/null || fail "begin" || return
	kill_server
	go || return
	wait $write || fail "the write failed" || return
	timeout 5 dd if=/dev/zero of=$org bs=$chunk seek=1 count=1 oflag=direct conv=notrunc status=none ||
		fail "a unique chunk waits for a server" || return
	holds $origin_loop 1 0
}

# Scripts that look for the server by its name found a thread of the kernel.
t_thread_names() {
	start_server new && make_origin || return
	put $org 1 a || fail "write" || return
	kill_server
	local found
	found=$(grep -l ddsnap /proc/[0-9]*/comm)
	[ -z "$found" ] || fail "$(cat $found) is found by its name"
}

t_server_lost_in_suspension() {
	start_server new || return
	make_origin || return
	ctl silent on >/dev/null
	put $org 2 b &
	local write=$!
	within 5 has queued 1 || fail "no question" || return
	dmsetup suspend --noflush --nolockfs origin &
	local suspend=$!
	sleep 0.5
	kill -0 $suspend || fail "suspended with a question under way" || return
	kill_server
	wait $suspend || fail "suspend" || return
	start_server || return
	timeout 20 dmsetup resume origin || fail "resume" || return
	wait $write || fail "the write failed" || return
	holds $org 2 b
}

t_suspend_and_reload_under_load() {
	start_server new || return
	make_origin || return
	load 100 || return
	bounded_snapshot 0 || return
	local i
	for i in 1 2 3; do
		timeout 60 dmsetup suspend origin || fail "suspend" || return
		timeout 60 dmsetup resume origin || fail "resume" || return
		timeout 60 dmsetup load origin --table "0 $sectors ddsnap $store $origin $key -1 2 server_timeout $((20 + i))" || fail "load" || return
		timeout 60 dmsetup suspend --noflush --nolockfs origin || fail "suspend --noflush" || return
		timeout 60 dmsetup resume origin || fail "resume" || return
		[ $i != 2 ] || bounded_snapshot 2 || return
	done
	end_of_load || return
	check_all 0 2 || return
	[ "$(stat devices)" = 3 ] || fail "$(stat devices) devices, 3 wanted"
}

t_gone() {
	start_server new || return
	make_origin || return
	make_snapshot 0 || return
	[ "$(stat devices)" = 2 ] || fail "$(stat devices) devices" || return
	dmsetup remove --retry snap0 || fail "remove" || return
	[ "$(stat devices)" = 1 ] || fail "the use count had not dropped" || return
	# A server that says nothing delays the removal, but does not prevent it.
	create_device snap0 0 || fail "create" || return
	ctl silent gone >/dev/null
	local start
	start=$(milliseconds)
	timeout 30 dmsetup remove --retry snap0 || fail "remove" || return
	[ $(($(milliseconds) - start)) -ge 4000 ] || fail "it did not wait" || return
	[ "$(stat devices)" = 2 ] || fail "answered all the same" || return
	ctl silent off >/dev/null
	within 5 devices_are 1 || fail "the late answer was not taken" || return
	put $org 1 a || fail "write"
}

devices_are() { [ "$(stat devices)" = "$1" ]; }

t_identified_too_late() {
	start_server new || return
	ctl silent on >/dev/null
	expect_error "created without an answer" create_device origin -1 2 server_timeout 1 || return
	log_has "did not answer in time" || fail "no word about it" || return
	ctl silent off >/dev/null
	within 5 has gone 1 || fail "GONE does not follow" || return
	within 5 devices_are 0 || fail "$(stat devices) devices"
}

t_refused_after_return() {
	start_server new || return
	make_origin || return
	ctl create 0 >/dev/null && create_device snap0 0 || return
	kill_server
	: >"$tmp/state"
	start_server || return
	# This store has no snapshot 0: its device is lost, the origin is not.
	expect_error "read of a lost snapshot" dd if=/dev/mapper/snap0 of=/dev/null bs=4k count=1 iflag=direct status=none || return
	within 5 log_has "refuses snapshot 0" || fail "no word about it" || return
	status_has snap0 state=refused && status_has origin state=active || return
	put $org 1 a || fail "write" || return
	holds $org 1 a
}

t_rubbish() {
	start_server new || return
	make_origin || return
	make_snapshot 0 || return
	local kind
	for kind in id op op-barrier-reached op-device-stopped all-unique-id all-unique-value end stop-id stop-status two fault-write:EFAULT short-write:EINVAL short-read:EINVAL; do
		[ "$(ctl rubbish ${kind%:*})" = "err $(echo "$kind:EPROTO" | cut -d: -f2)" ] ||
			fail "$kind: $(ctl rubbish ${kind%:*})" || return
	done
	ctl silent on >/dev/null
	put $org 1 a &
	local write=$!
	within 5 has queued 1 || fail "no question" || return
	for kind in other-op flags created reserved status value; do
		[ "$(ctl rubbish $kind)" = "err EPROTO" ] || fail "$kind was taken" || return
	done
	[ "$(ctl created-early)" = "err EPROTO" ] || fail "CREATED before REACHED was taken" || return
	# Nothing has changed: the true answer counts.
	ctl silent off >/dev/null
	wait $write || fail "the write failed" || return
	holds $org 1 a
}

# Replies are taken some at a time: those before one that is not in order count all the same.
t_half() {
	start_server new && make_origin && make_snapshot 0 || return
	ctl silent on >/dev/null
	put $org 1 a &
	local write=$!
	within 5 has queued 1 || fail "no question" || return
	# The kernel lets ten such lines through in five seconds, and `rubbish` uses them all.
	within 20 silent_for 6 "is not in order: refused" || fail "the kernel goes on to refuse" || return
	[ "$(ctl half)" = ok ] || fail "$(ctl half)" || return
	log_has "is not in order: refused" || fail "no word about it" || return
	wait $write || fail "the write failed" || return
	ctl silent off >/dev/null
	put $org 2 a && holds $org 1 a && holds /dev/mapper/snap0 1 0
}

t_fault_read() {
	start_server new || return
	make_origin || return
	ctl silent on >/dev/null
	# The server's own read comes first unless it is kept busy.
	ctl delay 300000 >/dev/null
	put $org 1 a &
	local one=$!
	within 5 has queued 1
	put $org 2 a &
	local two=$! answer
	answer=$(ctl rubbish fault-read)
	[ "$answer" = "err EFAULT" ] || [ "$answer" = "err EAGAIN" ] || fail "$answer" || return
	ctl delay 0 >/dev/null
	ctl silent off >/dev/null
	wait $one && wait $two || fail "a request was lost"
}

t_channel() {
	start_server new || return
	[ "$(ctl intrude $key)" = "err EBUSY" ] || fail "$(ctl intrude $key)" || return
	[ "$(ctl intrude /another/key)" = ok ] || fail "$(ctl intrude /another/key)" || return
	[ "$(command stat -c %a /dev/ddsnap)" = 600 ] || fail "mode of /dev/ddsnap" || return
	make_origin || return
	kill_server
	shift=$((shift - 1)) start_server 2>/dev/null && { fail "another chunk size was taken"; return; }
	why=
	grep -q EINVAL "$tmp/server.err" || fail "$(cat "$tmp/server.err")" || return
	server=
	start_server || return
	put $org 1 a || fail "write"
}

t_errors() {
	start_server new || return
	make_origin || return
	make_snapshot 0 || return
	ctl fail 3 28 >/dev/null
	expect_error "written" put $org 1 a || return
	grep -q 'No space left' "$tmp/error" || fail "$(cat "$tmp/error")" || return
	ctl fail 3 0 >/dev/null
	put $org 1 a || fail "write after the error" || return
	ctl fail 5 85 >/dev/null
	expect_error "written" put /dev/mapper/snap0 1 a || return
	grep -q 'Input/output error' "$tmp/error" || fail "$(cat "$tmp/error")" || return
	ctl fail 5 0 >/dev/null
	ctl beyond on >/dev/null
	expect_error "read" dd if=/dev/mapper/snap0 of=/dev/null bs=4k count=1 iflag=direct status=none || return
	log_has "beyond the store's end" || fail "no word about it" || return
	ctl beyond off >/dev/null
	holds /dev/mapper/snap0 1 0
}

# read_fails SECONDS: snapshot 0 cannot be read, and it does not take longer
read_fails() {
	local start
	start=$(milliseconds)
	expect_error "a stopped device was read" \
		dd if=/dev/mapper/snap0 of=/dev/null bs=4k count=1 iflag=direct status=none || return
	[ $(($(milliseconds) - start)) -lt $(($1 * 1000)) ] || fail "the error took too long"
}

t_stop() {
	start_server new && make_origin && make_snapshot 0 || return
	put $org 1 a || fail "write" || return
	holds /dev/mapper/snap0 1 0 || return
	local asked
	asked=$(stat snapshot_read)
	ctl stop >/dev/null || fail "not taken" || return
	within 5 has stopped 1 || fail "not said" || return
	read_fails 5 || return
	expect_error "a stopped device was written" put /dev/mapper/snap0 1 b || return
	expect_error "a stopped device was flushed" timeout 20 sync /dev/mapper/snap0 || return
	[ "$(stat snapshot_read)" = "$asked" ] || fail "questions of a stopped device" || return
	log_has "has stopped snapshot 0" || fail "no word about it" || return
	# Again: said again, logged once.
	ctl stop >/dev/null || fail "not taken twice" || return
	within 5 has stopped 2 || fail "not said twice" || return
	[ "$(log_count 'has stopped snapshot 0')" = 1 ] || fail "logged twice" || return
	# The others go on, and the device goes as ever.
	put $org 1 b && put $org 2 b || fail "write of the origin" || return
	make_snapshot 2 || return
	holds /dev/mapper/snap2 1 b || return
	timeout 20 dmsetup remove --retry snap0 || fail "remove" || return
	[ "$(stat gone)" = 1 ] || fail "GONE was not sent" || return
	# One that is not there is no mistake, the origin is.
	ctl stop 999 >/dev/null || fail "a stop of no device was refused" || return
	[ "$(stat stopped)" = 2 ] || fail "said of no device" || return
	[ "$(ctl stop 1)" = "err EPROTO" ] || fail "the origin was stopped: $(ctl stop 1)"
}

# DEVICE_STOPPED comes after the end of what is in flight to the store.
t_stop_drains() {
	stoppable_store && start_server new && make_origin && make_snapshot 0 || return
	put $org 6 a || fail "write" || return
	local read before
	before=$(stat snapshot_read)
	stop || return
	get /dev/mapper/snap0 6 >"$tmp/read" &
	read=$!
	within 20 has snapshot_read $((before + 1)) || fail "no question" || return
	within 20 snapshot_waits 0 || fail "not answered" || return
	ctl stop >/dev/null || fail "not taken" || return
	# New I/O fails at once, though the old is still in flight.
	read_fails 5 || return
	still $read || fail "the read ended" || return
	[ "$(stat stopped)" = 0 ] || fail "said with a read in flight" || return
	# The server is lost: the next one knows of no read, and has to ask.
	kill_server
	start_server || return
	[ "$(stat returning)" = 2 ] || fail "$(stat returning) devices return, 2 wanted" || return
	read_fails 5 || return
	ctl stop >/dev/null || fail "not taken" || return
	still $read || fail "the read ended" || return
	[ "$(stat stopped)" = 0 ] || fail "said with a read in flight" || return
	go || return
	within 20 has stopped 1 || fail "not said" || return
	wait $read
	[ "$(cat "$tmp/read")" = 00 ] || fail "the read saw $(cat "$tmp/read")" || return
	read_fails 5
}

snapshot_waits() { [ "$(sed -n 's/^waiting: //p' /proc/driver/ddsnap/snap0)" = "$1" ]; }

# So it does with a read from the origin.
t_stop_drains_origin() {
	stoppable && start_server new && make_origin && make_snapshot 0 || return
	local read before
	before=$(stat snapshot_read)
	stop || return
	get /dev/mapper/snap0 6 >"$tmp/read" &
	read=$!
	within 20 has snapshot_read $((before + 1)) || fail "no question" || return
	within 20 snapshot_waits 0 || fail "not answered" || return
	ctl stop >/dev/null || fail "not taken" || return
	still $read || fail "the read ended" || return
	[ "$(stat stopped)" = 0 ] || fail "said with a read in flight" || return
	go || return
	within 20 has stopped 1 || fail "not said"
	wait $read
}

# What the server has read and not answered fails, whatever it answers later;
# what waits for a server fails too.
t_stop_questions() {
	start_server new && make_origin && make_snapshot 0 || return
	put $org 6 a || fail "write" || return
	ctl silent on >/dev/null
	get /dev/mapper/snap0 6 >"$tmp/read" 2>/dev/null &
	local read=$!
	within 5 has queued 1 || fail "no question" || return
	ctl stop >/dev/null || fail "not taken" || return
	within 5 has stopped 1 || fail "a question counts as in flight" || return
	ctl silent off >/dev/null
	within 20 ended $read || fail "the read does not end" || return
	[ -z "$(cat "$tmp/read")" ] || fail "the read saw $(cat "$tmp/read")" || return
	# Without a server a stopped device does not wait for one.
	kill_server
	read_fails 5 || return
	start_server || return
	read_fails 5 || return
	timeout 20 dmsetup suspend snap0 && timeout 20 dmsetup resume snap0 || fail "suspend" || return
	read_fails 5
}

# Stopped and removed while it is read, again and again.
t_stop_under_load() {
	start_server new && make_origin || return
	load 100 || return
	bounded_snapshot 2 || return
	ctl create 0 >/dev/null || fail "no snapshot" || return
	local i reader before
	for i in 1 2 3 4 5 6; do
		create_device snap0 0 || fail "no device" || return
		(while dd if=/dev/mapper/snap0 of=/dev/null bs=64k iflag=direct status=none 2>/dev/null; do :; done) &
		reader=$!
		sleep 0.$((RANDOM % 9))
		before=$(stat stopped)
		ctl stop >/dev/null || fail "not taken" || return
		if [ $((i % 2)) = 0 ]; then
			kill_server
			start_server || return
			before=0
			ctl stop >/dev/null || fail "not taken" || return
		fi
		within 20 has stopped $((before + 1)) || fail "not said" || return
		within 20 ended $reader || fail "the reader goes on" || return
		timeout 20 dmsetup remove --retry snap0 || fail "remove" || return
	done
	end_of_load || return
	check_all 2
}

# Devices come and go while servers come and go.
t_churn() {
	start_server new || return
	ctl create 0 >/dev/null && ctl create 2 >/dev/null || return
	local tag i workers=
	for tag in 0 2; do
		(
			for i in $(seq 12); do
				create_device "snap$tag" $tag 2>/dev/null || exit 1
				dd if="/dev/mapper/snap$tag" of=/dev/null bs=64k count=8 iflag=direct status=none || exit 2
				timeout 60 dmsetup remove --retry "snap$tag" || exit 3
			done
		) &
		workers="$workers $!"
	done
	for i in 1 2 3 4 5 6; do
		sleep 0.$((RANDOM % 9))
		kill_server
		sleep 0.$((RANDOM % 5))
		start_server || return
	done
	for i in $workers; do
		wait $i || fail "a worker ended with $?" || return
	done
	within 5 devices_are 0 || fail "$(stat devices) devices are left"
}

#
# All of them
#

tests=$(sed -n 's/^t_\([a-z_]*\)() {$/\1/p' "$0")

[ "$(id -u)" = 0 ] || { echo "run.sh: has to run as root" >&2; exit 2; }
for program in fake-server stomp; do
	[ -x "$here/$program" ] || { echo "run.sh: no $program; run make in $here" >&2; exit 2; }
done
modprobe dm-ddsnap 2>/dev/null
dmsetup targets | grep -q '^ddsnap ' || { echo "run.sh: the kernel has no ddsnap target" >&2; exit 2; }

# After each write udev would read the device again. Stuck behind a stopped layer, its reads hold up
# direct writes to the same pages, before these come to the target.
rule=/run/udev/rules.d/99-ddsnap-run-sh.rules
if [ -d /run/udev ]; then
	mkdir -p "${rule%/*}" || exit 2
	echo 'ENV{DM_NAME}=="origin|snap*|layer|other", OPTIONS+="nowatch"' >$rule
	udevadm control --reload
fi

finish() {
	kill_server
	rm -f $rule
	losetup -d $origin_loop $store_loop 2>/dev/null
	rm -rf "$tmp"
}
trap finish EXIT
truncate -s ${origin_mib}M "$tmp/origin" && truncate -s ${store_mib}M "$tmp/store" &&
	origin_loop=$(losetup -f --show "$tmp/origin") &&
	store_loop=$(losetup -f --show "$tmp/store") || exit 2

for name in ${*:-$tests}; do
	set_up
	"t_${name//-/_}"
	result=$?
	clean_up || result=1
	[ -z "$why" ] || result=1
	if [ $result = 0 ]; then
		told "ok ${name//_/-}"
	else
		told "not ok ${name//_/-}: ${why:-status $result}"
		sed 's/^/# /' "$tmp/server.err"
		failed=1
	fi
done
exit $failed
