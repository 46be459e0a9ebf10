// SPDX-License-Identifier: GPL-2.0-only
/*
 * dm-ddsnap - snapshots whose metadata a server in user space keeps
 *
 * This file has the algorithm, the arguments for it, and the target's methods.
 *
 *	channel.c	/dev/ddsnap: records in and out
 *	question.c	what is asked of the server, and the bios that wait
 *	reply.c		what the server says
 *	gate.c		the barrier while a snapshot is created
 *	volume.c	servers that come and go
 *	device.c	devices that come and go
 *	stats.c		counters, /proc/driver/ddsnap
 *
 * What it does
 * ------------
 * A volume is an origin device, any number of snapshots of it, and a server
 * that knows where the chunks of each snapshot lie. They find each other by a
 * key, the agent's socket name in the table lines. The target asks, in records
 * of dm-ddsnap-protocol.h, and the server answers:
 *
 *   origin read	goes to the origin at once
 *   origin write	goes to the origin once the server says that the old data
 *			is durable wherever a snapshot needs it. The chunk is
 *			then unique: until the next snapshot is created nobody
 *			needs to ask about it. One bit a chunk remembers that,
 *			and a flag that all are, for want of any snapshot.
 *   snapshot read	goes to the store chunk the server names, or to the
 *			origin if the server says that the chunk is still there
 *   snapshot write	goes to the private store chunk the server names
 *
 * Write-zeroes change data and are writes. A bio of a snapshot lies within one
 * chunk, which is short at the end of a device whose length is no multiple of the
 * chunk. A write to the origin asks once for a run of neighbouring chunks, from
 * the first to the last that is not known to be unique, bounded by
 * DDSNAP_RUN_CHUNKS and DDSNAP_RUN_BYTES; it goes when all of them may be written,
 * and fails if one may not. The question is part of the first bio for its run, so
 * that asking needs no memory; others of the very same run join it. Runs that
 * overlap otherwise are questions of their own, each answered for itself: to the
 * server a chunk copied out already is one that needs nothing. What waits is
 * bounded, in chunks: too many, and the submitter waits.
 *
 * A discard is advice, and nothing is copied out for advice: it goes to the
 * origin where the chunks are known to be unique, and is over at once where
 * not. Devices of snapshots have none: a snapshot's copies come free only with
 * the snapshot, so that a discard could not give back any room.
 *
 * Why an origin write destroys nothing a snapshot needs
 * -----------------------------------------------------
 * It reaches the disk only after the server's ORIGIN_WRITE reply, which means
 * that the copies of all its chunks and the records of them are durable. A crash
 * before finds the origin as it was. A unique bit only repeats that reply for its
 * chunk. It must not outlive it: a new snapshot needs the present data, so its
 * creation goes through the gate. The flag that all chunks are unique lives and
 * ends as the bits do; it is not set while a read is tracked (below), which a
 * write may then not outrun.
 *
 * The gate
 * --------
 * BARRIER_BEGIN closes the gate. The server creates the snapshot after it has
 * read BARRIER_REACHED, and that must not be sent while an origin write is in
 * flight that was allowed before: it could reach the disk after the snapshot
 * came into being and change what the snapshot shows. Every write therefore is
 * either counted before the barrier looks or sees the gate closed:
 *
 *	a write				the barrier
 *	origin_writes++			gate = DRAINING
 *	full barrier			full barrier
 *	if gate is open: look at	if origin_writes is 0:
 *	  the bit, submit		  BARRIER_REACHED
 *	else origin_writes--, ask
 *
 * Of two such sequences at least one sees what the other has stored first. A
 * write that sees an open gate is in the count until its bio has ended; the
 * one that takes the count to zero looks at the gate afterwards and, if it is
 * DRAINING, looks whether BARRIER_REACHED is due. Writes released by a reply
 * are counted under volume->lock, under which the gate closes.
 *
 * A granted write that has not been started yet, because it waits for a
 * snapshot's read (below), has no effect so far. It is not drained but asked
 * again when the gate opens: the read could take long, and the answer for the
 * new snapshot is another. New questions about origin writes are held back
 * meanwhile, and an ORIGIN_WRITE reply that comes all the same counts for
 * nothing and is asked again.
 *
 * The bits are cleared while the gate is still closed; opening it is a release
 * and looking at it an acquire, so who sees it open sees the bits cleared. A
 * write that saw the gate open before it closed may look at its bit late, but
 * bits are cleared only after BARRIER_REACHED, which waits for that write, or
 * by attaching, where nothing but an optimisation is lost.
 *
 * Snapshot reads from the origin
 * ------------------------------
 * The server says FROM_ORIGIN and forgets about it; then an origin write of
 * that chunk is copied out and allowed, while the read has not reached the
 * disk. So reads from the origin are tracked by chunk, and an allowed write
 * waits until those of its chunks have ended. This is enough because of the
 * order of replies: the server gave FROM_ORIGIN for a chunk while no copy
 * existed, so before the ORIGIN_WRITE reply that follows the copy. Replies are
 * taken one at a time in the order written (the server has one write(2) under
 * way at a time), and a read is tracked when its reply is taken, before it is
 * submitted. So it is tracked when the write is released.
 * For a run this holds chunk by chunk: the reply means that each of its chunks has
 * its copy, so the reply follows every FROM_ORIGIN given for any of them before
 * its copy, and after it none is given. When the reply is taken all chunks of the
 * run are looked up. If one is being read, the question waits for that one, hashed
 * by it, and looks at all of them again when the last read of it ends. It is
 * released, and the bits of all its chunks are set, only in a look that finds none
 * of them read, under the lock under which reads are tracked.
 * And once the chunk is unique, the server has a copy for every snapshot there
 * is, so no read goes to the origin for it until the next snapshot clears the
 * bit, behind the gate. A FROM_ORIGIN that says otherwise is not believed.
 *
 * The order of replies in a batch
 * -------------------------------
 * A write(2) brings many replies. Those about I/O are taken some at a time, with
 * the lock once, each in its place in the order written and whole before the
 * next one: bits, tracked reads and questions are as they would be had the lock
 * been dropped in between and nobody come. Two effects leave the lock, and
 * neither is one that another reply's depends on. What goes down is queued in
 * order, and a worker has it submitted later anyway. What fails ends after the
 * lock: nothing of it reached a disk, so no order with it can be seen there. All
 * other replies and commands are taken one by one between such batches, and
 * the first that is not in order ends the write(2), what is behind it unread.
 *
 * Stopping a device
 * -----------------
 * When the store is full the server squashes a snapshot although a device shows
 * it: the snapshot's store chunks go to others. They must not go before the last
 * I/O to them has ended, or a snapshot's read would show another's data, and its
 * write would destroy them. So DEVICE_STOP closes the device for good, and
 * DEVICE_STOPPED says that nothing of it is in flight. in_flight counts a bio
 * from the moment a reply sends it on its way, under volume->lock and only while
 * the device is not stopped, to its end:
 *
 *	the end of a bio		DEVICE_STOP
 *	in_flight-- (full barrier)	stopped = true
 *	if stopped and it was the	full barrier
 *	  last: look			look: DEVICE_STOPPED if in_flight is 0
 *
 * As with the gate, at least one of the two sees what the other has stored, and
 * both look under volume->lock. What waits for an answer is not in flight: it
 * fails at once if no server has read it, and else with the reply, whatever that
 * says. So a location named before DEVICE_STOP is never used after it. Reads
 * from the origin are counted too: the device is quiet when all is over.
 *
 * A device that was stopped stays so. The next server learns from
 * DDSNAP_REQUEST_RETURNING that a device may have I/O in flight, stops those of
 * squashed snapshots (again) and waits for DEVICE_STOPPED; until then, and until
 * it knows all devices, it frees no chunk of a squashed snapshot. A device that
 * leaves has no I/O, dm core has seen to that: GONE says as much.
 *
 * The loss of the server
 * ----------------------
 * Closing the file is the loss. Nothing the server said is lost with it: an
 * ORIGIN_WRITE reply means durable; tracked reads stay tracked, whoever serves
 * next; what was read and not answered is asked again of the next server, in
 * order. A question the old server has half served is harmless: a copy it made
 * and recorded, the next one finds; a copy not recorded counts for nothing, as
 * the origin was not touched. Unique chunks may be written without a server: no
 * snapshot comes into being but through the gate, and for that a server has to
 * be attached. If the server is lost after it has read BARRIER_REACHED, the
 * snapshot may or may not have been committed. Then the gate stays closed until
 * another server is there; attaching clears the bits and opens it, and the held
 * writes are asked about, which is right in both cases. If it is lost before,
 * there is no snapshot, and the gate opens.
 *
 * How long anything waits
 * -----------------------
 * A question fails when it is older than its device's server_timeout, wherever
 * it is: with no server, with one that hangs or is stopped, behind a closed gate,
 * or when servers die of it one after the other. Its age counts from when it was
 * first asked; so nothing waits for ever for the sake of one request. Nor do
 * many requests wait one after the other, each for its whole time, as those of
 * a submitter would that waits for room: when a question has become too old and
 * no I/O was answered for as long, the server counts as silent, and until the
 * next answer every question fails after a second. They are asked all the same,
 * so that a server that goes on is heard. The next server has the whole time for
 * what it is asked, until the first question is too old once more or it is lost
 * without having answered, as when each dies of what it is asked. The answer
 * of a server that was only slow is taken and means nothing: a copy it has made
 * is found again when somebody asks again, no bit is set, and a FROM_ORIGIN sends
 * no read. Once no server has been there for that time, later I/O fails at once
 * until one attaches. So suspending and removing a device end in that time too.
 *
 * Who must not wait
 * -----------------
 * REQ_NOWAIT says that the submitter must not sleep. It need not: where nothing
 * is to be asked, the bio goes down as it is and the device below decides; to
 * ask does not sleep, and what waits then is the bio. It waits for the server's
 * work as for a disk's. Where it would wait for more, namely for room, for a
 * server that is not there, or for the gate, it ends with BLK_STS_AGAIN, as dm
 * core ends it on a suspended device, and comes again from where it may wait.
 * The flag ends with the answer: a worker submits then, and it may wait.
 * DM_MAPIO_KILL means an I/O error, whatever bi_status says, so such a bio is
 * ended in map. Its other parts may have been written by then, as on any device
 * that splits bios: all of it is written again.
 *
 * Never waiting on itself
 * -----------------------
 * The server may be what memory reclaim waits for. In the I/O path nothing is
 * allocated, and nothing blocks but submitters that do not free memory, when
 * very many bios wait: map remaps or queues, a worker of the volume's own
 * WQ_MEM_RECLAIM workqueue submits. Mutexes the server needs are held over no
 * allocation, and no volume waits for another's.
 *
 * Locks, outermost first
 * ----------------------
 *	channel->mutex		one attach or write(2) at a time
 *	volume->devices_mutex	changes to the volume's lists of devices, clearing
 *				of bits
 *	volume->lock		spinlock, irqs off: all the rest of the volume
 *
 *	volumes_mutex (list of volumes, their references) is taken inside
 *	channel->mutex, stats_mutex alone.
 */
#include "ddsnap.h"

#include <linux/init.h>
#include <linux/kernel.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>

#define SERVER_TIMEOUT_DEFAULT	60
#define SERVER_TIMEOUT_MAX	86400
#define MAX_WAITING_DEFAULT	1024

/* Of the status line: another number if a word in it goes or changes its sense. */
#define STATUS_VERSION		1

/*
 * Write-zeroes at once: a larger bio would be cut into runs, and wait for all
 * their answers, in one system call that cannot be interrupted.
 */
#define WRITE_ZEROES_BYTES	(16U << 20)

unsigned int ddsnap_server_timeout = SERVER_TIMEOUT_DEFAULT;
module_param_named(server_timeout, ddsnap_server_timeout, uint, 0644);
MODULE_PARM_DESC(server_timeout,
		 "Seconds that I/O waits for the snapshot server's answer (0: not at all without a server, 60 with one)");

unsigned int ddsnap_max_waiting = MAX_WAITING_DEFAULT;
module_param_named(max_waiting, ddsnap_max_waiting, uint, 0644);
MODULE_PARM_DESC(max_waiting,
		 "Chunks of a volume that wait for the snapshot server before submitters wait");

/**
 * ddsnap_answer_limit - how long a device's I/O waits for an answer
 * @dev: the device
 *
 * A server needs some time to answer, also where I/O is not to wait for one that
 * is not there.
 *
 * Return: the limit, in jiffies.
 */
unsigned long ddsnap_answer_limit(const struct ddsnap_device *dev)
{
	return (dev->server_timeout ?: SERVER_TIMEOUT_DEFAULT) * HZ;
}

/*----------------------------------------------------------------
 * Mapping
 *----------------------------------------------------------------
 */

static bool is_origin(const struct ddsnap_device *dev)
{
	return dev->snapshot == DDSNAP_ORIGIN;
}

/* Only the part of @bio that lies in the chunk of its first sector stays. */
static void cut_to_chunk(struct ddsnap_device *dev, struct bio *bio)
{
	sector_t chunk_sectors = ddsnap_chunk_to_sector(dev, 1);
	sector_t left = chunk_sectors -
			(bio->bi_iter.bi_sector & (chunk_sectors - 1));

	if (bio_sectors(bio) > left)
		dm_accept_partial_bio(bio, left);
}

/* Only the part of @bio before chunk @end stays. */
static void cut_before(struct ddsnap_device *dev, struct bio *bio, u64 end)
{
	sector_t left = ddsnap_chunk_to_sector(dev, end) -
			bio->bi_iter.bi_sector;

	if (bio_sectors(bio) > left)
		dm_accept_partial_bio(bio, left);
}

static u64 first_chunk(struct ddsnap_device *dev, const struct bio *bio)
{
	return ddsnap_sector_to_chunk(dev, bio->bi_iter.bi_sector);
}

static u64 end_chunk(struct ddsnap_device *dev, const struct bio *bio)
{
	return ddsnap_sector_to_chunk(dev, bio_end_sector(bio) - 1) + 1;
}

/*
 * Takes the part of @bio that starts with unique chunks. Only for a caller
 * between ddsnap_origin_write_begin() and _end(). False if there is none.
 */
static bool take_unique(struct ddsnap_device *dev, struct bio *bio)
{
	u64 first = first_chunk(dev, bio), end = end_chunk(dev, bio), shared;

	if (READ_ONCE(dev->volume->all_unique))
		return true;
	if (!dev->unique || end > dev->unique_chunks)
		return false;
	shared = find_next_zero_bit(dev->unique, end, first);
	if (shared == first)
		return false;
	cut_before(dev, bio, shared);
	return true;
}

/* Sends the unique part at the start of @bio on its way. False: there is none. */
static bool map_unique(struct ddsnap_device *dev, struct bio *bio)
{
	struct ddsnap_volume *v = dev->volume;

	if (!ddsnap_origin_write_begin(v))
		return false;
	if (!take_unique(dev, bio)) {
		ddsnap_origin_write_end(v);
		return false;
	}
	ddsnap_io(bio)->state = IO_ORIGIN_WRITE;
	bio_set_dev(bio, dev->origin->bdev);
	this_cpu_inc(dev->stats->counts->at_once);
	return true;
}

/* What is not known to be unique is left as it is: nothing is asked. */
static int map_origin_discard(struct ddsnap_device *dev, struct bio *bio)
{
	u64 end = end_chunk(dev, bio);

	if (map_unique(dev, bio))
		return DM_MAPIO_REMAPPED;

	/* The first chunk is not, whatever has become of it since. */
	if (dev->unique && end <= dev->unique_chunks)
		cut_before(dev, bio, find_next_bit(dev->unique, end,
						   first_chunk(dev, bio) + 1));
	this_cpu_inc(dev->stats->counts->dropped);
	bio_endio(bio);
	return DM_MAPIO_SUBMITTED;
}

/* How many chunks a question may be about. */
static u64 longest_run(const struct ddsnap_device *dev)
{
	u64 most = min(DDSNAP_RUN_CHUNKS, DDSNAP_RUN_BYTES >>
		       (dev->chunk_shift + SECTOR_SHIFT));

	/* No more than may wait at all. */
	most = min_t(u64, most, READ_ONCE(ddsnap_max_waiting));
	return max_t(u64, most, 1);
}

/*
 * Only the part of @bio that one question is about stays, from its first chunk to
 * the last that is not known to be unique. That is looked up without a lock and
 * may be wrong the next moment: then more is asked about than has to be, or less
 * than could be, and the rest of the bio has its own turn. Returns how many chunks
 * these are.
 */
static unsigned int cut_to_run(struct ddsnap_device *dev, struct bio *bio)
{
	u64 first = first_chunk(dev, bio);
	u64 end = min(end_chunk(dev, bio), first + longest_run(dev));

	if (dev->unique && end <= dev->unique_chunks)
		while (end - first > 1 && test_bit(end - 1, dev->unique))
			end--;
	cut_before(dev, bio, end);
	return end - first;
}

static int map_origin_write(struct ddsnap_device *dev, struct bio *bio)
{
	u64 first = first_chunk(dev, bio);

	if (map_unique(dev, bio))
		return DM_MAPIO_REMAPPED;
	return ddsnap_ask(dev, bio, DDSNAP_ORIGIN_WRITE, first,
			  cut_to_run(dev, bio));
}

static int ddsnap_map(struct dm_target *ti, struct bio *bio)
{
	struct ddsnap_device *dev = ti->private;
	bool write = op_is_write(bio_op(bio));

	ddsnap_io(bio)->state = IO_PLAIN;

	/* dm core sends flushes without data: what is cached is below us. */
	if (!bio_sectors(bio)) {
		if (READ_ONCE(dev->stopped))
			return DM_MAPIO_KILL;
		bio_set_dev(bio, is_origin(dev) ? dev->origin->bdev :
						  dev->store->bdev);
		return DM_MAPIO_REMAPPED;
	}

	if (write)
		this_cpu_inc(dev->stats->counts->writes);
	else
		this_cpu_inc(dev->stats->counts->reads);

	if (!is_origin(dev)) {
		cut_to_chunk(dev, bio);
		return ddsnap_ask(dev, bio,
				  write ? DDSNAP_SNAPSHOT_WRITE :
					  DDSNAP_SNAPSHOT_READ,
				  first_chunk(dev, bio), 1);
	}
	if (bio_op(bio) == REQ_OP_DISCARD)
		return map_origin_discard(dev, bio);
	if (write)
		return map_origin_write(dev, bio);

	bio_set_dev(bio, dev->origin->bdev);
	return DM_MAPIO_REMAPPED;
}

static int ddsnap_end_io(struct dm_target *ti, struct bio *bio,
			 blk_status_t *error)
{
	struct ddsnap_device *dev = ti->private;
	struct ddsnap_io *io = ddsnap_io(bio);

	switch (io->state) {
	case IO_ORIGIN_WRITE:
		ddsnap_origin_write_end(dev->volume);
		break;
	case IO_TRACKED_READ:
		ddsnap_read_untrack(dev->volume, io);
		fallthrough;
	case IO_SNAPSHOT:
		ddsnap_snapshot_io_end(dev);
		break;
	}
	return DM_ENDIO_DONE;
}

/*----------------------------------------------------------------
 * Construction
 *----------------------------------------------------------------
 */

static int parse_id(struct dm_target *ti, const char *arg, u64 *snapshot)
{
	u32 tag;

	if (!strcmp(arg, "-1")) {
		*snapshot = DDSNAP_ORIGIN;
		return 0;
	}
	if (kstrtou32(arg, 10, &tag)) {
		ti->error = "ID must be -1 for the origin, or a snapshot tag from 0 to 4294967295";
		return -EINVAL;
	}
	*snapshot = tag;
	return 0;
}

static int parse_features(struct ddsnap_device *dev, struct dm_arg_set *as)
{
	static const struct dm_arg group = {
		0, 2, "feature arguments: 0, or 2 server_timeout SECONDS"
	};
	static const struct dm_arg seconds = {
		0, SERVER_TIMEOUT_MAX, "server_timeout must be 0 to 86400 seconds"
	};
	struct dm_target *ti = dev->ti;
	unsigned int count;
	int r;

	dev->server_timeout = min_t(unsigned int,
				    READ_ONCE(ddsnap_server_timeout),
				    SERVER_TIMEOUT_MAX);
	if (!as->argc)
		return 0;
	r = dm_read_arg_group(&group, as, &count, &ti->error);
	if (r)
		return r;
	if (count) {
		if (count != 2 || strcmp(dm_shift_arg(as), "server_timeout")) {
			ti->error = group.error;
			return -EINVAL;
		}
		r = dm_read_arg(&seconds, as, &dev->server_timeout, &ti->error);
		if (r)
			return r;
		dev->timeout_given = true;
	}
	if (as->argc) {
		ti->error = "more arguments than the features' count says";
		return -EINVAL;
	}
	return 0;
}

static int open_devices(struct ddsnap_device *dev, const char *store,
			const char *origin)
{
	struct dm_target *ti = dev->ti;
	int r;

	r = dm_get_device(ti, store, dm_table_get_mode(ti->table), &dev->store);
	if (r) {
		DMERR("cannot open snapshot store device %s: error %d", store, r);
		ti->error = "cannot open the snapshot store device";
		return r;
	}
	r = dm_get_device(ti, origin, dm_table_get_mode(ti->table),
			  &dev->origin);
	if (r) {
		DMERR("cannot open origin device %s: error %d", origin, r);
		ti->error = "cannot open the origin device";
		return r;
	}
	if (dev->origin->bdev == dev->store->bdev) {
		ti->error = "the snapshot store and the origin are the same device";
		return -EINVAL;
	}
	return 0;
}

/*
 * A file system knows its sector size: a snapshot has to have the origin's. With
 * larger ones of the store it could not: they cannot be written in part.
 */
static int check_sector_sizes(struct ddsnap_device *dev)
{
	unsigned int origin = bdev_logical_block_size(dev->origin->bdev);
	unsigned int store = bdev_logical_block_size(dev->store->bdev);

	if (store <= origin)
		return 0;
	DMERR("%s has logical sectors of %u bytes, the origin %s of %u: snapshots would not mount",
	      dev->store->name, store, dev->origin->name, origin);
	dev->ti->error =
		"the store's logical sectors are larger than the origin's: use another store";
	return -EINVAL;
}

/* What can be told only now that the server has given the chunk size. */
static int check_chunk_size(struct ddsnap_device *dev)
{
	sector_t chunk_sectors = ddsnap_chunk_to_sector(dev, 1);
	struct dm_target *ti = dev->ti;

	if (bdev_logical_block_size(dev->origin->bdev) >> SECTOR_SHIFT >
			chunk_sectors ||
	    bdev_logical_block_size(dev->store->bdev) >> SECTOR_SHIFT >
			chunk_sectors) {
		ti->error = "the chunk size is smaller than the devices' logical block size";
		return -EINVAL;
	}
	return 0;
}

/* Without it every write to the origin asks: slower, nothing else. */
static void make_unique_bits(struct ddsnap_device *dev)
{
	/* The last one may be short. */
	u64 chunks = ddsnap_sector_to_chunk(dev, dev->sectors - 1) + 1;
	unsigned long *bits = NULL;

	if (chunks <= ULONG_MAX - BITS_PER_LONG)
		bits = __vmalloc(BITS_TO_LONGS(chunks) * sizeof(*bits),
				 GFP_KERNEL | __GFP_ZERO | __GFP_NOWARN);
	if (!bits) {
		DMWARN("%s: no memory for %llu unique bits: every write asks the server",
		       dev->volume->key, chunks);
		return;
	}
	spin_lock_irq(&dev->volume->lock);
	dev->unique_chunks = chunks;
	dev->unique = bits;
	spin_unlock_irq(&dev->volume->lock);
}

static void device_free(struct ddsnap_device *dev)
{
	if (dev->volume)
		ddsnap_volume_put(dev->volume);
	if (dev->stats)
		ddsnap_stats_put(dev->stats);
	if (dev->origin)
		dm_put_device(dev->ti, dev->origin);
	if (dev->store)
		dm_put_device(dev->ti, dev->store);
	vfree(dev->unique);
	kfree(dev);
}

/*
 * Construct an origin or a snapshot:
 * <snapshot store> <origin> <agent socket> <id> [<#features> <features>]
 *
 * id: -1 for the origin, or the snapshot's tag
 * features: server_timeout <seconds>
 */
static int ddsnap_ctr(struct dm_target *ti, unsigned int argc, char **argv)
{
	struct dm_arg_set as = { .argc = argc, .argv = argv };
	const char *store, *origin, *key;
	struct ddsnap_device *dev;
	int r;

	if (argc < 4) {
		ti->error = "wanted: SNAPDEV ORGDEV AGENTSOCK ID [2 server_timeout SECONDS]";
		return -EINVAL;
	}
	if (ti->begin) {
		ti->error = "a ddsnap device starts at sector 0 and has one target";
		return -EINVAL;
	}
	store = dm_shift_arg(&as);
	origin = dm_shift_arg(&as);
	key = dm_shift_arg(&as);
	if (!*key || strlen(key) >= DDSNAP_KEY_SIZE) {
		ti->error = "the agent socket name must have 1 to 107 bytes";
		return -EINVAL;
	}

	dev = kzalloc(sizeof(*dev), GFP_KERNEL);
	if (!dev) {
		ti->error = "out of memory";
		return -ENOMEM;
	}
	dev->ti = ti;
	dev->md = dm_table_get_md(ti->table);
	dev->sectors = ti->len;

	r = parse_id(ti, dm_shift_arg(&as), &dev->snapshot);
	if (r)
		goto bad;
	r = parse_features(dev, &as);
	if (r)
		goto bad;
	r = open_devices(dev, store, origin);
	if (r)
		goto bad;
	r = check_sector_sizes(dev);
	if (r)
		goto bad;

	dev->stats = ddsnap_stats_get(dev->md);
	dev->volume = ddsnap_volume_get(key);
	if (!dev->stats || !dev->volume) {
		ti->error = "out of memory";
		r = -ENOMEM;
		goto bad;
	}
	r = ddsnap_device_join(dev, &ti->error);
	if (r)
		goto bad;
	r = check_chunk_size(dev);
	if (r)
		goto bad_joined;
	if (is_origin(dev))
		make_unique_bits(dev);

	/* Origin reads, and writes to unique chunks, need not be split. */
	if (!is_origin(dev)) {
		r = dm_set_target_max_io_len(ti, ddsnap_chunk_to_sector(dev, 1));
		if (r)
			goto bad_joined;
	}
	ti->num_flush_bios = 1;
	ti->num_write_zeroes_bios = 1;
	if (is_origin(dev))
		ti->num_discard_bios = 1;
	/* Swap is bounded by dm core, which the bound of questions leaves out. */
	ti->limit_swap_bios = true;
	ti->per_io_data_size = sizeof(struct ddsnap_io);
	ti->accounts_remapped_io = true;
	ti->private = dev;
	return 0;

bad_joined:
	ddsnap_device_leave(dev, true);
bad:
	device_free(dev);
	return r;
}

static void ddsnap_dtr(struct dm_target *ti)
{
	struct ddsnap_device *dev = ti->private;

	ddsnap_device_leave(dev, true);
	device_free(dev);
}

/*----------------------------------------------------------------
 * The other methods
 *----------------------------------------------------------------
 */

static void ddsnap_presuspend(struct dm_target *ti)
{
	ddsnap_device_suspend(ti->private, dm_noflush_suspending(ti));
}

static void ddsnap_presuspend_undo(struct dm_target *ti)
{
	ddsnap_device_resume(ti->private);
}

static void ddsnap_resume(struct dm_target *ti)
{
	ddsnap_device_resume(ti->private);
}

/* What becomes of I/O that needs the server. */
static const char *__state(const struct ddsnap_device *dev)
{
	const struct ddsnap_volume *v = dev->volume;

	lockdep_assert_held(&v->lock);

	if (dev->stopped)
		return "stopped";
	if (dev->refused)
		return "refused";
	if (dev->failing)
		return "failing";
	if (!v->channel)
		return "waiting";
	return v->silent ? "silent" : "active";
}

static void ddsnap_status(struct dm_target *ti, status_type_t type,
			  unsigned int status_flags, char *result,
			  unsigned int maxlen)
{
	struct ddsnap_device *dev = ti->private;
	struct ddsnap_volume *v = dev->volume;
	const char *state, *gate, *unique;
	struct ddsnap_counts sum;
	unsigned int sz = 0;

	switch (type) {
	case STATUSTYPE_INFO:
		/* PROTOCOL.md explains it. */
		ddsnap_stats_sum(dev->stats, &sum);
		spin_lock_irq(&v->lock);
		state = __state(dev);
		gate = v->gate == GATE_OPEN ? "open" : "closed";
		unique = v->all_unique ? "all" : dev->unique ? "bits" : "none";
		spin_unlock_irq(&v->lock);

		DMEMIT("%u state=%s", STATUS_VERSION, state);
		if (is_origin(dev))
			DMEMIT(" gate=%s unique=%s", gate, unique);
		DMEMIT(" reads=%llu writes=%llu", sum.reads, sum.writes);
		DMEMIT(" questions=%llu released_at_once=%llu", sum.questions,
		       sum.at_once);
		DMEMIT(" discards_dropped=%llu waiting=%d", sum.dropped,
		       atomic_read(&dev->stats->waiting));
		break;

	case STATUSTYPE_TABLE:
		DMEMIT("%s %s %s ", dev->store->name, dev->origin->name,
		       dev->volume->key);
		if (is_origin(dev))
			DMEMIT("-1");
		else
			DMEMIT("%llu", dev->snapshot);
		if (dev->timeout_given)
			DMEMIT(" 2 server_timeout %u", dev->server_timeout);
		break;

	case STATUSTYPE_IMA:
		DMEMIT_TARGET_NAME_VERSION(ti->type);
		DMEMIT(",store_name=%s,origin_name=%s", dev->store->name,
		       dev->origin->name);
		DMEMIT(",agent_socket=%s,id=%lld;", dev->volume->key,
		       (long long)dev->snapshot);
		break;
	}
}

static int ddsnap_iterate_devices(struct dm_target *ti,
				  iterate_devices_callout_fn fn, void *data)
{
	struct ddsnap_device *dev = ti->private;
	sector_t origin = bdev_nr_sectors(dev->origin->bdev);
	int r;

	if (is_origin(dev))
		return fn(ti, dev->origin, 0, ti->len, data);

	/* The origin may have been shrunk since the snapshot was created. */
	r = fn(ti, dev->origin, 0, min(ti->len, origin), data);
	if (!r)
		r = fn(ti, dev->store, 0, bdev_nr_sectors(dev->store->bdev),
		       data);
	return r;
}

/*
 * A file system on the volume, or in a snapshot, is to see the origin's device:
 * it was there before the volume and is there after it.
 */
static void ddsnap_io_hints(struct dm_target *ti, struct queue_limits *limits)
{
	struct ddsnap_device *dev = ti->private;
	struct block_device *origin = dev->origin->bdev;

	ddsnap_cap_write_zeroes(limits, WRITE_ZEROES_BYTES >> SECTOR_SHIFT);
	if (is_origin(dev))
		return;
	limits->logical_block_size = bdev_logical_block_size(origin);
	limits->physical_block_size = bdev_physical_block_size(origin);
	limits->io_min = bdev_io_min(origin);
	limits->io_opt = bdev_io_opt(origin);
}

/*
 * No DM_TARGET_ flag but these: neither DAX nor zoned devices nor integrity
 * data, all of which would bypass or outwit the copying of chunks.
 */
static struct target_type ddsnap_target = {
	.name			= "ddsnap",
	.version		= { 0, 11, 0 },
	.features		= DM_TARGET_SINGLETON | DM_TARGET_NOWAIT,
	.module			= THIS_MODULE,
	.ctr			= ddsnap_ctr,
	.dtr			= ddsnap_dtr,
	.map			= ddsnap_map,
	.end_io			= ddsnap_end_io,
	.presuspend		= ddsnap_presuspend,
	.presuspend_undo	= ddsnap_presuspend_undo,
	.resume			= ddsnap_resume,
	.status			= ddsnap_status,
	.iterate_devices	= ddsnap_iterate_devices,
	.io_hints		= ddsnap_io_hints,
};

static int __init dm_ddsnap_init(void)
{
	int r;

	ddsnap_stats_init();
	r = ddsnap_channel_init();
	if (r) {
		DMERR("cannot register /dev/ddsnap: error %d", r);
		goto bad_channel;
	}
	r = dm_register_target(&ddsnap_target);
	if (r)
		goto bad_target;
	return 0;

bad_target:
	ddsnap_channel_exit();
bad_channel:
	ddsnap_stats_exit();
	return r;
}

static void __exit dm_ddsnap_exit(void)
{
	dm_unregister_target(&ddsnap_target);
	ddsnap_channel_exit();
	ddsnap_stats_exit();
}

module_init(dm_ddsnap_init);
module_exit(dm_ddsnap_exit);

MODULE_DESCRIPTION(DM_NAME " snapshot target, served from user space");
MODULE_AUTHOR("The Zumastor authors");
MODULE_VERSION(DDSNAP_VERSION);
MODULE_LICENSE("GPL");
