/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */
/*
 * The channel between the dm-ddsnap target and the snapshot server, over the
 * character device /dev/ddsnap.
 *
 * ddsnap/PROTOCOL.md explains it; ddsnap/src/protocol/channel.rs mirrors it and
 * pins the same bytes in its tests. Everything is little-endian and of fixed
 * size. There is no checksum: the records never leave memory.
 *
 * The server opens /dev/ddsnap, issues DDSNAP_IOC_ATTACH once, then read(2)s
 * whole struct ddsnap_request and write(2)s whole struct ddsnap_reply. Closing
 * the file is the loss of the server: whatever it had not answered is asked
 * again of the next server that attaches under the same key.
 */
#ifndef _DM_DDSNAP_PROTOCOL_H
#define _DM_DDSNAP_PROTOCOL_H

#include <linux/ioctl.h>
#include <linux/types.h>

/*
 * History: 1 - first version.
 * 2 - DEVICE_STOP and DEVICE_STOPPED; IDENTIFY has flags.
 * 3 - devices of any length, whose last chunk may be short; ALL_UNIQUE; I/O
 *     fails when its question is too old, and the reply is taken all the same.
 * 4 - DDSNAP_IOC_ATTACH has a number that is not another driver's. The one
 *     it had, _IOW(0xdd, 1, struct ddsnap_attach), gives EPROTO.
 * 5 - ORIGIN_WRITE asks about a run of chunks, and is answered for all of it.
 */
#define DDSNAP_PROTOCOL_VERSION	5

/* Bytes of a volume's key (the agent socket's name), with its NUL. */
#define DDSNAP_KEY_SIZE		108

/* The chunk sizes a store may have: 512 bytes to 1 MiB. */
#define DDSNAP_CHUNK_SHIFT_MIN	9
#define DDSNAP_CHUNK_SHIFT_MAX	20

/*
 * The longest run that ORIGIN_WRITE asks about: so many chunks, and no more than
 * so many bytes unless it is a single chunk.
 */
#define DDSNAP_RUN_CHUNKS	256
#define DDSNAP_RUN_BYTES	(1024 * 1024)

/*
 * What the questions of one read(2) are about: no more chunks than this has,
 * unless it is a single question. The server serves them together.
 */
#define DDSNAP_READ_BYTES	(16 * 1024 * 1024)

/* In ddsnap_request.snapshot: the origin (ID -1 in the table line). */
#define DDSNAP_ORIGIN		(~0ULL)

/**
 * struct ddsnap_attach - argument of DDSNAP_IOC_ATTACH
 * @version: DDSNAP_PROTOCOL_VERSION
 * @chunk_shift: log2 of the chunk size in bytes
 * @key: NUL-terminated agent socket name, as in the table lines
 *
 * Errors: EPROTO version not known (a module older than version 4 says ENOTTY);
 * EINVAL bad key, bad chunk shift, or one
 * that differs from what this key's existing devices use; EBUSY another
 * server is attached under the key, or this file is attached already.
 *
 * After it succeeds the first requests read are one IDENTIFY for each device
 * that exists under the key, then every unanswered request of the last server.
 * The target forgets which chunks are unique (its bitmap is cleared) and any
 * barrier that was under way.
 */
struct ddsnap_attach {
	__le32 version;
	__le32 chunk_shift;
	char   key[DDSNAP_KEY_SIZE];
	__u8   reserved[12];		/* zero */
};

/* 0xde is nobody's in Documentation/userspace-api/ioctl/ioctl-number.rst. */
#define DDSNAP_IOC_ATTACH	_IOW(0xde, 1, struct ddsnap_attach)

/*
 * Requests, target to server. Each is answered by one reply with the same id
 * and op, but BARRIER_REACHED and DEVICE_STOPPED, which are answers themselves.
 */
enum ddsnap_request_op {
	/* A device came up: snapshot and sectors say which and how large.
	 * Status ENOENT: no such snapshot; EINVAL: wrong size, value has the
	 * right one in sectors; EIO: the snapshot is squashed. With
	 * DDSNAP_REQUEST_RETURNING an earlier server has accepted the device.
	 */
	DDSNAP_IDENTIFY		= 1,
	/* A device went away. The reply means its use count has dropped. */
	DDSNAP_GONE		= 2,
	/* May the chunks of the origin from chunk on, count of them, be
	 * written? The reply means: the old data of each is durable in the
	 * store wherever a snapshot needs it, and no further question about
	 * them is needed until the next snapshot. Or the status is about some
	 * of them, and none may be written for this question. Runs of several
	 * questions may overlap; each is answered for itself.
	 */
	DDSNAP_ORIGIN_WRITE	= 3,
	/* Where does snapshot's chunk lie? Reply: value is the store chunk, or
	 * DDSNAP_REPLY_FROM_ORIGIN is set and the origin still has it.
	 */
	DDSNAP_SNAPSHOT_READ	= 4,
	/* The same for writing: value is a store chunk private to the snapshot
	 * that durably holds the chunk's present data.
	 */
	DDSNAP_SNAPSHOT_WRITE	= 5,
	/* No origin write is in flight any more. id is the barrier's. */
	DDSNAP_BARRIER_REACHED	= 6,
	/* The device is stopped and none of its I/O is in flight. id is 0. */
	DDSNAP_DEVICE_STOPPED	= 7,
};

/* ddsnap_request.flags */
#define DDSNAP_REQUEST_RETURNING	0x1	/* IDENTIFY */

/**
 * struct ddsnap_request - what the server reads
 * @id: unique among this volume's unanswered requests
 * @op: enum ddsnap_request_op
 * @device: number of the asking device, unique while it exists; 0 for BARRIER_REACHED
 * @snapshot: its snapshot tag (0 to 2^32-1), or DDSNAP_ORIGIN
 * @chunk: chunk number on the origin or snapshot, the first of several perhaps
 *	(the I/O operations)
 * @sectors: length of the device in 512-byte sectors (IDENTIFY)
 * @flags: DDSNAP_REQUEST_*
 * @count: how many chunks, at least 1 (ORIGIN_WRITE); else 0
 * @reserved: zero
 */
struct ddsnap_request {
	__le64 id;
	__le32 op;
	__le32 device;
	__le64 snapshot;
	__le64 chunk;
	__le64 sectors;
	__le32 flags;
	__le32 count;
	__u8   reserved[16];
};

/*
 * Commands, server to target, in the same records as replies.
 *
 * BARRIER_BEGIN: stop releasing origin writes (even to unique chunks), wait
 * for those in flight, then send BARRIER_REACHED with the same id. From
 * writing it until BARRIER_END the server answers no ORIGIN_WRITE.
 * BARRIER_END: go on; with DDSNAP_REPLY_CREATED a snapshot was made, so forget
 * which chunks are unique first. May be sent before BARRIER_REACHED to give up.
 * DEVICE_STOP: fail all further I/O of a snapshot's device, for as long as the
 * device exists, whichever server is attached; when none of its I/O is in flight
 * any more, send DEVICE_STOPPED. value is the device's number. Of a device that
 * has been stopped before it asks for another DEVICE_STOPPED; to a device that
 * is gone it does nothing. A question the server has read still wants a reply.
 * ALL_UNIQUE: there is no snapshot that needs anything of the origin, so that no
 * chunk needs to be asked about until the next one is created. id and value are
 * 0. While a barrier is under way it means nothing.
 */
enum ddsnap_command_op {
	DDSNAP_BARRIER_BEGIN	= 0x100,
	DDSNAP_BARRIER_END	= 0x101,
	DDSNAP_DEVICE_STOP	= 0x102,
	DDSNAP_ALL_UNIQUE	= 0x103,
};

/* ddsnap_reply.flags */
#define DDSNAP_REPLY_FROM_ORIGIN	0x1	/* SNAPSHOT_READ */
#define DDSNAP_REPLY_CREATED		0x2	/* BARRIER_END */

/**
 * struct ddsnap_reply - what the server writes
 * @id: the request's id, or a number the server gives a barrier; 0 for
 *      DEVICE_STOP and ALL_UNIQUE
 * @op: the request's op, or enum ddsnap_command_op
 * @status: 0, or a positive errno the I/O or the device's creation fails with
 * @flags: DDSNAP_REPLY_*
 * @reserved: zero
 * @value: store chunk, counted in chunks from sector 0 of the snapshot store
 *         device; or sectors, for IDENTIFY with EINVAL; or a device number, for
 *         DEVICE_STOP; 0 for ORIGIN_WRITE
 *
 * A write(2) takes whole records in order and returns the bytes taken. A
 * record for an id or op nobody waits for, or with unknown bits, fails the
 * write with EPROTO and changes nothing; the server must then close the file.
 * The reply to a question about I/O that has failed meanwhile, because it was
 * not answered in the device's time, is taken and means nothing.
 */
struct ddsnap_reply {
	__le64 id;
	__le32 op;
	__le32 status;
	__le32 flags;
	__le32 reserved;
	__le64 value;
};

#endif /* _DM_DDSNAP_PROTOCOL_H */
