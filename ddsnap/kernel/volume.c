// SPDX-License-Identifier: GPL-2.0-only
/*
 * Questions and answers, the gate, the loss of the server. target.c
 * opens with the algorithm and the order of the locks.
 *
 * A function whose name starts with __ runs under volume->lock.
 */
#include "ddsnap.h"

#include <linux/errno.h>
#include <linux/poll.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>

/* How long a device that goes away waits for the server to say "noted". */
#define GONE_WAIT_SECONDS	5

/* The bits of a bitmap that are cleared between two chances to reschedule. */
#define CLEAR_STEP_BITS		(BITS_PER_BYTE << 20)

static DEFINE_MUTEX(volumes_mutex);
static LIST_HEAD(volumes);
static struct workqueue_struct *ddsnap_wq;

/*
 * A server that attaches needs volumes_mutex, and writeback may wait for that
 * very server. So nobody who holds the mutex may wait for writeback: memory is
 * allocated without I/O.
 */
static unsigned int volumes_lock(void)
{
	mutex_lock(&volumes_mutex);
	return memalloc_noio_save();
}

static void volumes_unlock(unsigned int noio)
{
	memalloc_noio_restore(noio);
	mutex_unlock(&volumes_mutex);
}

/* The server's read() and poll() look again. */
static void wake_server(struct ddsnap_volume *v)
{
	wake_up_interruptible_poll(&v->wait, EPOLLIN | EPOLLRDNORM);
}

/* Ends bios whose bi_status is set. Not under a lock: dm core may call back. */
static void end_bios(struct bio_list *bios)
{
	struct bio *bio;

	while ((bio = bio_list_pop(bios)))
		bio_endio(bio);
}

static bool is_io(const struct ddsnap_question *q)
{
	return q->op == DDSNAP_ORIGIN_WRITE || q->op == DDSNAP_SNAPSHOT_READ ||
	       q->op == DDSNAP_SNAPSHOT_WRITE;
}

/*----------------------------------------------------------------
 * Places of a question
 *----------------------------------------------------------------
 */

static void __unlist(struct ddsnap_volume *v, struct ddsnap_question *q)
{
	lockdep_assert_held(&v->lock);

	if (q->place == PLACE_SENT)
		hash_del(&q->by_id);
	list_del_init(&q->list);
	q->place = PLACE_NOWHERE;
}

static void __make_unsent(struct ddsnap_volume *v, struct ddsnap_question *q,
			  struct list_head *list)
{
	lockdep_assert_held(&v->lock);

	q->place = PLACE_UNSENT;
	list_add_tail(&q->list, list);
}

/* An origin write is asked about now, or when the gate opens. */
static void __ask_origin_write(struct ddsnap_volume *v,
			       struct ddsnap_question *q)
{
	lockdep_assert_held(&v->lock);

	q->id = ++v->next_id;
	if (v->gate == GATE_OPEN) {
		__make_unsent(v, q, &v->unsent);
	} else {
		q->place = PLACE_HELD;
		list_add_tail(&q->list, &v->held);
	}
}

static struct ddsnap_question *__find_sent(struct ddsnap_volume *v, u64 id,
					   u32 op)
{
	struct ddsnap_question *q;

	lockdep_assert_held(&v->lock);

	hash_for_each_possible(v->by_id, q, by_id, id)
		if (q->id == id && q->op == op)
			return q;
	return NULL;
}

/*
 * A bio may join a question of its kind about its chunk - but a read only one
 * that is still unsent. The answer to one already sent may be older than a
 * write to the snapshot that has completed since, and would lead the read to
 * what the chunk held before. The answer to a write stays true.
 */
static struct ddsnap_question *__find_joinable(struct ddsnap_device *dev,
					       u32 op, u64 chunk)
{
	struct ddsnap_volume *v = dev->volume;
	struct ddsnap_question *q;

	lockdep_assert_held(&v->lock);

	hash_for_each_possible(v->questions, q, by_chunk, chunk)
		if (q->chunk == chunk && q->op == op && q->dev == dev &&
		    (op != DDSNAP_SNAPSHOT_READ || q->place == PLACE_UNSENT))
			return q;
	return NULL;
}

/* The question is over; its bios, the one that embeds it too, are in @bios. */
static void __end_question(struct ddsnap_volume *v, struct ddsnap_question *q,
			   struct bio_list *bios)
{
	lockdep_assert_held(&v->lock);

	__unlist(v, q);
	hash_del(&q->by_chunk);
	atomic_sub(bio_list_size(&q->bios), &q->dev->stats->waiting);
	bio_list_merge(bios, &q->bios);
	bio_list_init(&q->bios);
}

/* The question's bios are to end with @status, by end_bios(@ended). */
static void __cancel(struct ddsnap_volume *v, struct ddsnap_question *q,
		     blk_status_t status, struct bio_list *ended)
{
	struct bio_list bios = BIO_EMPTY_LIST;
	struct bio *bio;

	__end_question(v, q, &bios);
	bio_list_for_each(bio, &bios)
		bio->bi_status = status;
	bio_list_merge(ended, &bios);
}

/* Cancels what @dev asks of no server, or of one that has not read it yet. */
static void __cancel_device(struct ddsnap_device *dev, blk_status_t status,
			    struct bio_list *ended)
{
	struct ddsnap_volume *v = dev->volume;
	struct ddsnap_question *q, *next;

	lockdep_assert_held(&v->lock);

	list_for_each_entry_safe(q, next, &v->unsent, list)
		if (q->dev == dev && is_io(q))
			__cancel(v, q, status, ended);
	list_for_each_entry_safe(q, next, &v->held, list)
		if (q->dev == dev)
			__cancel(v, q, status, ended);
}

/*----------------------------------------------------------------
 * Bios on their way down
 *----------------------------------------------------------------
 */

/* Submission may block on the device below, so it is left to a worker. */
static void submit_ready(struct work_struct *work)
{
	struct ddsnap_volume *v = container_of(work, struct ddsnap_volume,
					       submit_work);
	struct bio_list bios;
	struct blk_plug plug;
	struct bio *bio;

	spin_lock_irq(&v->lock);
	bios = v->ready;
	bio_list_init(&v->ready);
	spin_unlock_irq(&v->lock);

	blk_start_plug(&plug);
	while ((bio = bio_list_pop(&bios))) {
		bio_set_dev(bio, ddsnap_io(bio)->to->bdev);
		dm_submit_bio_remap(bio, NULL);
		cond_resched();
	}
	blk_finish_plug(&plug);
}

static void __ready(struct ddsnap_volume *v, struct bio *bio,
		    struct dm_dev *to, enum ddsnap_io_state state)
{
	struct ddsnap_io *io = ddsnap_io(bio);

	lockdep_assert_held(&v->lock);

	io->state = state;
	io->to = to;
	bio_list_add(&v->ready, bio);
	queue_work(ddsnap_wq, &v->submit_work);
}

static bool __is_tracked(struct ddsnap_volume *v, u64 chunk)
{
	struct ddsnap_io *io;

	lockdep_assert_held(&v->lock);

	hash_for_each_possible(v->tracked, io, tracked, chunk)
		if (io->tracked_chunk == chunk)
			return true;
	return false;
}

/* From here on, and until the next snapshot, the chunk is unique. */
static void __release_origin_write(struct ddsnap_volume *v,
				   struct ddsnap_question *q)
{
	struct bio_list bios = BIO_EMPTY_LIST;
	struct ddsnap_device *dev = q->dev;
	struct bio *bio;

	lockdep_assert_held(&v->lock);
	WARN_ON_ONCE(v->gate != GATE_OPEN);

	if (dev->unique && q->chunk < dev->unique_chunks)
		set_bit(q->chunk, dev->unique);

	__end_question(v, q, &bios);
	while ((bio = bio_list_pop(&bios))) {
		/* The gate is open and stays so while we hold the lock. */
		atomic_inc(&v->origin_writes);
		__ready(v, bio, dev->origin, IO_ORIGIN_WRITE);
	}
}

/**
 * ddsnap_read_untrack - a snapshot's read from the origin has ended
 * @v: the volume
 * @io: the bio's share, IO_TRACKED_READ
 *
 * Origin writes that waited for the last such read of the chunk go on.
 */
void ddsnap_read_untrack(struct ddsnap_volume *v, struct ddsnap_io *io)
{
	struct ddsnap_question *q, *next;
	u64 chunk = io->tracked_chunk;
	unsigned long flags;

	spin_lock_irqsave(&v->lock, flags);
	hash_del(&io->tracked);
	if (!list_empty(&v->granted) && !__is_tracked(v, chunk))
		list_for_each_entry_safe(q, next, &v->granted, list)
			if (q->chunk == chunk)
				__release_origin_write(v, q);
	spin_unlock_irqrestore(&v->lock, flags);
}

/*----------------------------------------------------------------
 * The gate: see target.c for why it holds
 *----------------------------------------------------------------
 */

/* True if BARRIER_REACHED was queued. */
static bool __check_drained(struct ddsnap_volume *v)
{
	lockdep_assert_held(&v->lock);

	if (v->gate != GATE_DRAINING || atomic_read(&v->origin_writes))
		return false;

	WRITE_ONCE(v->gate, GATE_DRAINED);
	v->reached.id = v->barrier_id;
	__make_unsent(v, &v->reached, &v->unsent);
	return true;
}

/**
 * ddsnap_origin_write_begin - may an origin write to unique chunks start?
 * @v: the volume
 *
 * Return: true if the gate is open: the caller looks for unique chunks and
 * calls ddsnap_origin_write_end() when the write has ended or did not take
 * place. False: it has to ask.
 */
bool ddsnap_origin_write_begin(struct ddsnap_volume *v)
{
	atomic_inc(&v->origin_writes);
	smp_mb__after_atomic(); /* pairs with smp_mb() in barrier_begin() */

	/* Acquire pairs with the release in __open_gate(). */
	if (likely(smp_load_acquire(&v->gate) == GATE_OPEN))
		return true;

	ddsnap_origin_write_end(v);
	return false;
}

/**
 * ddsnap_origin_write_end - the counterpart of ddsnap_origin_write_begin()
 * @v: the volume
 */
void ddsnap_origin_write_end(struct ddsnap_volume *v)
{
	unsigned long flags;
	bool drained;

	/* Fully ordered: the gate is looked at after the count has dropped. */
	if (!atomic_dec_and_test(&v->origin_writes) ||
	    READ_ONCE(v->gate) != GATE_DRAINING)
		return;

	spin_lock_irqsave(&v->lock, flags);
	drained = __check_drained(v);
	spin_unlock_irqrestore(&v->lock, flags);
	if (drained)
		wake_server(v);
}

/* Origin writes held back are asked about now. */
static void __open_gate(struct ddsnap_volume *v)
{
	struct ddsnap_question *q, *next;

	lockdep_assert_held(&v->lock);

	/* Release: who sees the gate open sees the unique bits cleared. */
	smp_store_release(&v->gate, GATE_OPEN);
	list_for_each_entry_safe(q, next, &v->held, list) {
		__unlist(v, q);
		__make_unsent(v, q, &v->unsent);
	}
}

/* What an earlier answer allowed but did not start is asked again. */
static void __take_back_granted(struct ddsnap_volume *v)
{
	struct ddsnap_question *q, *next;

	lockdep_assert_held(&v->lock);

	list_for_each_entry_safe(q, next, &v->granted, list) {
		__unlist(v, q);
		__ask_origin_write(v, q);
	}
}

/* The gate is closed, so that nobody relies on a bit while it is cleared. */
static void clear_unique(struct ddsnap_volume *v)
{
	struct ddsnap_device *dev;

	lockdep_assert_held(&volumes_mutex);

	list_for_each_entry(dev, &v->devices, list) {
		unsigned long from = 0;

		while (dev->unique && from < dev->unique_chunks) {
			unsigned long bits = min_t(unsigned long,
						   CLEAR_STEP_BITS,
						   dev->unique_chunks - from);

			bitmap_clear(dev->unique + BIT_WORD(from), 0, bits);
			from += bits;
			cond_resched();
		}
	}
}

static int barrier_begin(struct ddsnap_volume *v, u64 id)
{
	spin_lock_irq(&v->lock);
	if (v->gate != GATE_OPEN) {
		spin_unlock_irq(&v->lock);
		return -EPROTO;
	}
	v->barrier_id = id;
	WRITE_ONCE(v->gate, GATE_DRAINING);
	smp_mb(); /* pairs with the one in ddsnap_origin_write_begin() */
	__take_back_granted(v);
	__check_drained(v);
	spin_unlock_irq(&v->lock);
	wake_server(v);
	return 0;
}

static int barrier_end(struct ddsnap_volume *v, u64 id, bool created)
{
	unsigned int noio = volumes_lock();
	int r = 0;

	spin_lock_irq(&v->lock);
	if (v->gate == GATE_OPEN || v->barrier_id != id ||
	    (created && v->gate != GATE_TOLD)) {
		r = -EPROTO;
		goto out;
	}
	if (v->gate == GATE_DRAINED)
		__unlist(v, &v->reached);
	if (created) {
		WRITE_ONCE(v->gate, GATE_CLEARING);
		spin_unlock_irq(&v->lock);
		clear_unique(v);
		spin_lock_irq(&v->lock);
	}
	__open_gate(v);
out:
	spin_unlock_irq(&v->lock);
	volumes_unlock(noio);
	wake_server(v);
	return r;
}

/*----------------------------------------------------------------
 * Asking
 *----------------------------------------------------------------
 */

/* What becomes of a bio that has to ask: 0 (ask) or a DM_MAPIO_ code. */
static int __verdict(struct ddsnap_device *dev)
{
	lockdep_assert_held(&dev->volume->lock);

	if (dev->refused)
		return DM_MAPIO_KILL;
	if (dev->volume->channel)
		return 0;
	if (dev->suspending == SUSPENDING_NOFLUSH)
		return DM_MAPIO_REQUEUE;
	if (dev->suspending == SUSPENDING_FLUSH || dev->failing)
		return DM_MAPIO_KILL;
	return 0;
}

/**
 * ddsnap_ask - a bio needs the server's answer
 * @dev: the device
 * @bio: the bio, not longer than a chunk
 * @op: DDSNAP_ORIGIN_WRITE, DDSNAP_SNAPSHOT_READ or DDSNAP_SNAPSHOT_WRITE
 * @chunk: the chunk the bio lies in
 *
 * Return: what map returns: DM_MAPIO_SUBMITTED and the bio is ours; REMAPPED to
 * the origin if the chunk has become unique; KILL; REQUEUE.
 */
int ddsnap_ask(struct ddsnap_device *dev, struct bio *bio, unsigned int op,
	       u64 chunk)
{
	struct ddsnap_volume *v = dev->volume;
	struct ddsnap_io *io = ddsnap_io(bio);
	struct ddsnap_question *q;
	bool asked = false;
	int r;

	spin_lock_irq(&v->lock);

	if (op == DDSNAP_ORIGIN_WRITE && v->gate == GATE_OPEN && dev->unique &&
	    chunk < dev->unique_chunks && test_bit(chunk, dev->unique)) {
		/* It was granted between the look without the lock and now. */
		atomic_inc(&v->origin_writes);
		spin_unlock_irq(&v->lock);
		io->state = IO_ORIGIN_WRITE;
		bio_set_dev(bio, dev->origin->bdev);
		this_cpu_inc(dev->stats->counts->at_once);
		return DM_MAPIO_REMAPPED;
	}

	r = __verdict(dev);
	if (r) {
		spin_unlock_irq(&v->lock);
		return r;
	}

	q = __find_joinable(dev, op, chunk);
	if (!q) {
		q = &io->question;
		q->op = op;
		q->dev = dev;
		q->chunk = chunk;
		bio_list_init(&q->bios);
		hash_add(v->questions, &q->by_chunk, chunk);
		if (op == DDSNAP_ORIGIN_WRITE) {
			__ask_origin_write(v, q);
		} else {
			q->id = ++v->next_id;
			__make_unsent(v, q, &v->unsent);
		}
		asked = true;
	}
	bio_list_add(&q->bios, bio);
	atomic_inc(&dev->stats->waiting);
	spin_unlock_irq(&v->lock);

	if (asked) {
		this_cpu_inc(dev->stats->counts->questions);
		wake_server(v);
	}
	return DM_MAPIO_SUBMITTED;
}

/*----------------------------------------------------------------
 * Calls: IDENTIFY and GONE
 *----------------------------------------------------------------
 */

static void call_free(struct kref *kref)
{
	kfree(container_of(kref, struct ddsnap_call, kref));
}

static struct ddsnap_call *call_of(struct ddsnap_question *q)
{
	return container_of(q, struct ddsnap_call, q);
}

static void __queue_call(struct ddsnap_volume *v, struct ddsnap_call *call,
			 enum ddsnap_request_op op, struct list_head *list)
{
	lockdep_assert_held(&v->lock);

	kref_get(&call->kref);
	reinit_completion(&call->done);
	call->q.id = ++v->next_id;
	call->q.op = op;
	__make_unsent(v, &call->q, list);
}

/* Nobody will answer it any more. */
static void __drop_call(struct ddsnap_volume *v, struct ddsnap_call *call)
{
	__unlist(v, &call->q);
	/* A device that is still there goes on waiting for another server. */
	if (!call->q.dev)
		complete(&call->done);
	kref_put(&call->kref, call_free);
}

static int call_reply(struct ddsnap_volume *v, u64 id, u32 op, u32 status,
		      u64 value)
{
	struct bio_list ended = BIO_EMPTY_LIST;
	struct ddsnap_question *q;
	struct ddsnap_device *dev;
	struct ddsnap_call *call;
	bool refused = false;
	u64 snapshot;

	spin_lock_irq(&v->lock);
	q = __find_sent(v, id, op);
	if (!q) {
		spin_unlock_irq(&v->lock);
		return -EPROTO;
	}
	call = call_of(q);
	dev = q->dev;
	snapshot = call->snapshot;
	__unlist(v, q);

	if (!dev && op == DDSNAP_IDENTIFY && !status) {
		/* The device left before the server accepted it: say so. */
		__queue_call(v, call, DDSNAP_GONE, &v->unsent);
		goto out;
	}

	call->status = status;
	call->value = value;
	if (dev && !status) {
		dev->chunk_shift = v->chunk_shift;
		dev->identified = true;
		dev->connected = true;
	} else if (dev && dev->identified) {
		dev->refused = true;
		refused = true;
		__cancel_device(dev, BLK_STS_IOERR, &ended);
	}
	complete(&call->done);
out:
	kref_put(&call->kref, call_free);
	spin_unlock_irq(&v->lock);

	end_bios(&ended);
	wake_server(v);
	if (refused)
		DMERR("%s: the new snapshot server refuses %s %lld (error %u): its I/O fails",
		      v->key,
		      snapshot == DDSNAP_ORIGIN ? "origin" : "snapshot",
		      (long long)snapshot, status);
	return 0;
}

/*----------------------------------------------------------------
 * Answers
 *----------------------------------------------------------------
 */

/* True if the mapping is good; false if its bios are to end with an error. */
static bool __snapshot_mapped(struct ddsnap_volume *v,
			      struct ddsnap_question *q, bool from_origin,
			      u64 value, struct bio_list *ended)
{
	struct ddsnap_device *dev = q->dev;
	struct dm_dev *to = from_origin ? dev->origin : dev->store;
	struct bio_list bios = BIO_EMPTY_LIST;
	u64 chunk = q->chunk;
	struct bio *bio;

	lockdep_assert_held(&v->lock);

	if (from_origin)
		value = chunk;
	if (value >= ddsnap_sector_to_chunk(dev, bdev_nr_sectors(to->bdev))) {
		__cancel(v, q, BLK_STS_IOERR, ended);
		return false;
	}

	/* The question lies in one of the bios: it is over before they go. */
	__end_question(v, q, &bios);
	while ((bio = bio_list_pop(&bios))) {
		struct ddsnap_io *io = ddsnap_io(bio);
		sector_t sector = bio->bi_iter.bi_sector;

		if (from_origin) {
			io->tracked_chunk = chunk;
			hash_add(v->tracked, &io->tracked, chunk);
			__ready(v, bio, to, IO_TRACKED_READ);
		} else {
			sector -= ddsnap_chunk_to_sector(dev, chunk);
			sector += ddsnap_chunk_to_sector(dev, value);
			bio->bi_iter.bi_sector = sector;
			__ready(v, bio, to, IO_PLAIN);
		}
	}
	return true;
}

/* Upper layers know what to do about these; all else is an I/O error. */
static blk_status_t status_to_blk(u32 status)
{
	return status == ENOSPC ? BLK_STS_NOSPC : BLK_STS_IOERR;
}

static int io_reply(struct ddsnap_volume *v, u64 id, u32 op, u32 status,
		    bool from_origin, u64 value)
{
	struct bio_list ended = BIO_EMPTY_LIST;
	struct ddsnap_question *q;
	bool in_range = true;
	u64 chunk;

	spin_lock_irq(&v->lock);
	q = __find_sent(v, id, op);
	if (!q) {
		spin_unlock_irq(&v->lock);
		return -EPROTO;
	}
	chunk = q->chunk;

	if (status) {
		__cancel(v, q, status_to_blk(status), &ended);
	} else if (op != DDSNAP_ORIGIN_WRITE) {
		in_range = __snapshot_mapped(v, q, from_origin, value, &ended);
	} else if (v->gate != GATE_OPEN) {
		/* Does it hold after the snapshot too? Ask again then. */
		__unlist(v, q);
		__ask_origin_write(v, q);
	} else if (__is_tracked(v, chunk)) {
		__unlist(v, q);
		q->place = PLACE_GRANTED;
		list_add_tail(&q->list, &v->granted);
	} else {
		__release_origin_write(v, q);
	}
	spin_unlock_irq(&v->lock);

	end_bios(&ended);
	if (!in_range)
		DMERR_LIMIT("%s: the server maps chunk %llu to %s %llu, beyond its end",
			    v->key, chunk,
			    from_origin ? "origin chunk" : "store chunk",
			    from_origin ? chunk : value);
	return 0;
}

/**
 * ddsnap_volume_reply - one record from the server
 * @v: the volume; its channel's mutex is held
 * @reply: the record
 *
 * Return: 0, or -EPROTO and nothing has changed.
 */
int ddsnap_volume_reply(struct ddsnap_volume *v,
			const struct ddsnap_reply *reply)
{
	u64 id = le64_to_cpu(reply->id);
	u32 op = le32_to_cpu(reply->op);
	u32 status = le32_to_cpu(reply->status);
	u32 flags = le32_to_cpu(reply->flags);
	u64 value = le64_to_cpu(reply->value);
	u32 allowed = 0;

	if (op == DDSNAP_SNAPSHOT_READ && !status)
		allowed = DDSNAP_REPLY_FROM_ORIGIN;
	else if (op == DDSNAP_BARRIER_END)
		allowed = DDSNAP_REPLY_CREATED;
	if (reply->reserved || flags & ~allowed || status > MAX_ERRNO)
		return -EPROTO;

	switch (op) {
	case DDSNAP_IDENTIFY:
	case DDSNAP_GONE:
		return call_reply(v, id, op, status, value);
	case DDSNAP_ORIGIN_WRITE:
	case DDSNAP_SNAPSHOT_READ:
	case DDSNAP_SNAPSHOT_WRITE:
		return io_reply(v, id, op, status,
				flags & DDSNAP_REPLY_FROM_ORIGIN, value);
	case DDSNAP_BARRIER_BEGIN:
		return status ? -EPROTO : barrier_begin(v, id);
	case DDSNAP_BARRIER_END:
		return status ? -EPROTO :
		       barrier_end(v, id, flags & DDSNAP_REPLY_CREATED);
	default:
		return -EPROTO;
	}
}

/*----------------------------------------------------------------
 * The server reads
 *----------------------------------------------------------------
 */

bool ddsnap_volume_has_unsent(struct ddsnap_volume *v)
{
	return !list_empty_careful(&v->unsent);
}

static void fill_request(const struct ddsnap_question *q,
			 struct ddsnap_request *request)
{
	memset(request, 0, sizeof(*request));
	request->id = cpu_to_le64(q->id);
	request->op = cpu_to_le32(q->op);

	if (is_io(q)) {
		request->device = cpu_to_le32(q->dev->call->device);
		request->snapshot = cpu_to_le64(q->dev->snapshot);
		request->chunk = cpu_to_le64(q->chunk);
	} else if (q->op == DDSNAP_BARRIER_REACHED) {
		request->snapshot = cpu_to_le64(DDSNAP_ORIGIN);
	} else {
		const struct ddsnap_call *call =
			container_of(q, const struct ddsnap_call, q);

		request->device = cpu_to_le32(call->device);
		request->snapshot = cpu_to_le64(call->snapshot);
		request->sectors = cpu_to_le64(call->sectors);
	}
}

/**
 * ddsnap_volume_take - the next requests for the server
 * @v: the volume
 * @requests: room for them
 * @max: records there is room for
 *
 * Return: how many there were. They count as sent.
 */
unsigned int ddsnap_volume_take(struct ddsnap_volume *v,
				struct ddsnap_request *requests,
				unsigned int max)
{
	struct ddsnap_question *q, *next;
	unsigned int count = 0;

	spin_lock_irq(&v->lock);
	list_for_each_entry_safe(q, next, &v->unsent, list) {
		if (count == max)
			break;
		fill_request(q, &requests[count++]);
		__unlist(v, q);
		if (q == &v->reached) {
			WRITE_ONCE(v->gate, GATE_TOLD);
			continue;
		}
		q->place = PLACE_SENT;
		list_add_tail(&q->list, &v->sent);
		hash_add(v->by_id, &q->by_id, q->id);
	}
	spin_unlock_irq(&v->lock);
	return count;
}

/**
 * ddsnap_volume_untake - the server's memory could not be written to
 * @v: the volume
 * @requests: what ddsnap_volume_take() gave and the server did not get
 * @count: how many
 *
 * Questions answered meanwhile, by a server that guesses, are left alone.
 */
void ddsnap_volume_untake(struct ddsnap_volume *v,
			  const struct ddsnap_request *requests,
			  unsigned int count)
{
	spin_lock_irq(&v->lock);
	while (count--) {
		u64 id = le64_to_cpu(requests[count].id);
		u32 op = le32_to_cpu(requests[count].op);
		struct ddsnap_question *q;

		if (op == DDSNAP_BARRIER_REACHED) {
			if (v->gate != GATE_TOLD || v->barrier_id != id)
				continue;
			WRITE_ONCE(v->gate, GATE_DRAINED);
			q = &v->reached;
		} else {
			q = __find_sent(v, id, op);
			if (!q)
				continue;
			__unlist(v, q);
		}
		q->place = PLACE_UNSENT;
		list_add(&q->list, &v->unsent);
	}
	spin_unlock_irq(&v->lock);
}

/*----------------------------------------------------------------
 * Servers come and go
 *----------------------------------------------------------------
 */

/*
 * Fails the I/O of the devices whose time without a server is up. Returns the
 * jiffies until the next one's is, 0 if there is none.
 */
static unsigned long __expire(struct ddsnap_volume *v, struct bio_list *ended)
{
	unsigned long now = jiffies, next = 0;
	struct ddsnap_device *dev;

	lockdep_assert_held(&v->lock);

	list_for_each_entry(dev, &v->devices, list) {
		unsigned long deadline = v->lost_at + dev->server_timeout * HZ;

		if (dev->failing || !dev->identified)
			continue;
		if (time_after_eq(now, deadline)) {
			dev->failing = true;
			__cancel_device(dev, BLK_STS_IOERR, ended);
		} else {
			next = min_not_zero(next, deadline - now);
		}
	}
	return next;
}

/* Is this the first device whose I/O fails since the server went away? */
static bool __tell_failing(struct ddsnap_volume *v)
{
	struct ddsnap_device *dev;

	lockdep_assert_held(&v->lock);

	if (v->told_failing)
		return false;
	list_for_each_entry(dev, &v->devices, list)
		if (dev->failing)
			v->told_failing = true;
	return v->told_failing;
}

static void log_failing(struct ddsnap_volume *v, unsigned long lost_at)
{
	DMERR("%s: no snapshot server for %lu s: I/O that needs one fails until one attaches",
	      v->key, (jiffies - lost_at) / HZ);
}

static void lost_too_long(struct work_struct *work)
{
	struct ddsnap_volume *v = container_of(to_delayed_work(work),
					       struct ddsnap_volume, lost_work);
	struct bio_list ended = BIO_EMPTY_LIST;
	unsigned long lost_at, next;
	bool tell;

	spin_lock_irq(&v->lock);
	if (v->channel) {
		spin_unlock_irq(&v->lock);
		return;
	}
	next = __expire(v, &ended);
	tell = __tell_failing(v);
	lost_at = v->lost_at;
	if (next)
		mod_delayed_work(ddsnap_wq, &v->lost_work, next);
	spin_unlock_irq(&v->lock);

	if (tell)
		log_failing(v, lost_at);
	end_bios(&ended);
}

/**
 * ddsnap_volume_detach - the server's file was closed
 * @v: the volume
 *
 * What the server had read and not answered goes back to the front of the
 * queue, in order. A barrier stays: whether its snapshot was committed, only
 * the next server knows.
 */
void ddsnap_volume_detach(struct ddsnap_volume *v)
{
	struct bio_list ended = BIO_EMPTY_LIST;
	struct ddsnap_question *q, *tmp;
	struct ddsnap_device *dev;
	unsigned int devices = 0;
	unsigned long next;
	bool tell;

	spin_lock_irq(&v->lock);
	v->channel = NULL;
	v->lost_at = jiffies;
	v->told_failing = false;

	if (v->gate == GATE_DRAINED)
		__unlist(v, &v->reached);
	if (v->gate != GATE_OPEN)
		WRITE_ONCE(v->gate, GATE_LOST);

	list_for_each_entry_safe_reverse(q, tmp, &v->sent, list) {
		__unlist(v, q);
		q->place = PLACE_UNSENT;
		list_add(&q->list, &v->unsent);
	}
	/*
	 * Calls concern this server alone: the next one gets an IDENTIFY for
	 * each device, and has never heard of those that are gone.
	 */
	list_for_each_entry_safe(q, tmp, &v->unsent, list)
		if (!is_io(q))
			__drop_call(v, call_of(q));

	list_for_each_entry(dev, &v->devices, list) {
		if (dev->identified)
			devices++;
		dev->connected = false;
		dev->refused = false;
		if (dev->suspending == SUSPENDING_NOFLUSH)
			__cancel_device(dev, BLK_STS_DM_REQUEUE, &ended);
		else if (dev->suspending == SUSPENDING_FLUSH)
			__cancel_device(dev, BLK_STS_IOERR, &ended);
	}
	next = __expire(v, &ended);
	tell = __tell_failing(v);
	if (next)
		mod_delayed_work(ddsnap_wq, &v->lost_work, next);
	spin_unlock_irq(&v->lock);

	if (devices)
		DMWARN("%s: the snapshot server is gone; %u devices wait for another",
		       v->key, devices);
	if (tell)
		log_failing(v, jiffies);
	end_bios(&ended);
}

/**
 * ddsnap_volume_attach - a server is there
 * @v: the volume
 * @channel: its open file
 * @chunk_shift: log2 of its chunk size in sectors
 *
 * Return: 0; -EBUSY if another server is attached; -EINVAL if the chunk size
 * is not that of the devices.
 */
int ddsnap_volume_attach(struct ddsnap_volume *v,
			 struct ddsnap_channel *channel,
			 unsigned int chunk_shift)
{
	unsigned int devices = 0, noio = volumes_lock();
	struct ddsnap_device *dev;
	LIST_HEAD(identify);
	int r = 0;

	spin_lock_irq(&v->lock);
	if (v->channel)
		r = -EBUSY;
	list_for_each_entry(dev, &v->devices, list)
		if (!r && dev->identified && dev->chunk_shift != chunk_shift)
			r = -EINVAL;
	if (r)
		goto out;

	/*
	 * Until the channel is set, nobody can answer, so no unique bit is
	 * set; and while the gate is closed, nobody relies on one.
	 */
	WRITE_ONCE(v->gate, GATE_CLEARING);
	__take_back_granted(v);
	spin_unlock_irq(&v->lock);
	clear_unique(v);
	spin_lock_irq(&v->lock);

	__open_gate(v);
	list_for_each_entry(dev, &v->devices, list) {
		if (dev->identified)
			devices++;
		dev->failing = false;
		__queue_call(v, dev->call, DDSNAP_IDENTIFY, &identify);
	}
	list_splice(&identify, &v->unsent);
	v->chunk_shift = chunk_shift;
	v->channel = channel;
	cancel_delayed_work(&v->lost_work);
out:
	spin_unlock_irq(&v->lock);
	volumes_unlock(noio);

	if (r)
		return r;
	wake_server(v);
	if (devices)
		DMINFO("%s: a snapshot server is attached again; %u devices go on",
		       v->key, devices);
	return 0;
}

/*----------------------------------------------------------------
 * Devices come and go
 *----------------------------------------------------------------
 */

/* Also in the ABI of /dev/ddsnap: unique among the devices of the volume. */
static u32 __new_device_number(struct ddsnap_volume *v)
{
	struct ddsnap_device *dev;
	bool taken;

	lockdep_assert_held(&v->lock);

	do {
		taken = !++v->next_device;
		list_for_each_entry(dev, &v->devices, list)
			taken |= dev->call->device == v->next_device;
	} while (taken);
	return v->next_device;
}

/* How the wait for the answer to IDENTIFY ended, in an errno and words. */
static int identify_result(struct ddsnap_device *dev, long left, char **error)
{
	struct ddsnap_volume *v = dev->volume;
	struct ddsnap_call *call = dev->call;
	bool attached;

	if (left < 0) {
		*error = "interrupted while waiting for the snapshot server";
		return -EINTR;
	}
	if (!left && !try_wait_for_completion(&call->done)) {
		spin_lock_irq(&v->lock);
		attached = v->channel;
		spin_unlock_irq(&v->lock);
		*error = attached ?
			"the snapshot server did not answer in time" :
			"no snapshot server is attached under this socket name";
		return -ETIMEDOUT;
	}

	switch (call->status) {
	case 0:
		return 0;
	case ENOENT:
		*error = "the snapshot server knows no snapshot of this ID";
		return -ENOENT;
	case EINVAL:
		DMERR("%s: the table has %llu sectors, the snapshot server %llu",
		      v->key, (u64)dev->sectors, call->value);
		*error = "the length differs from what the snapshot server has";
		return -EINVAL;
	case EIO:
		*error = "the snapshot is squashed: the store was too small to keep it";
		return -EIO;
	default:
		DMERR("%s: the snapshot server refused the device, error %u",
		      v->key, call->status);
		*error = "the snapshot server refused the device";
		return -(int)call->status;
	}
}

/**
 * ddsnap_device_join - a device comes up
 * @dev: the device; its volume is set and this reference is the device's
 * @error: an explanation, if it fails
 *
 * Waits, interruptibly, until a server has identified it.
 *
 * Return: 0, and ddsnap_device_leave() is due; or a negative errno.
 */
int ddsnap_device_join(struct ddsnap_device *dev, char **error)
{
	unsigned long timeout = dev->server_timeout * HZ;
	struct ddsnap_volume *v = dev->volume;
	struct ddsnap_device *other;
	struct ddsnap_call *call;
	unsigned int noio;
	long left = 0;
	int r = 0;

	call = kzalloc(sizeof(*call), GFP_KERNEL);
	if (!call) {
		*error = "out of memory";
		return -ENOMEM;
	}
	kref_init(&call->kref);
	init_completion(&call->done);
	INIT_LIST_HEAD(&call->q.list);
	call->q.dev = dev;
	call->snapshot = dev->snapshot;
	call->sectors = dev->sectors;
	dev->call = call;

	noio = volumes_lock();
	spin_lock_irq(&v->lock);
	/* A new table of the same mapped device is loaded beside the old. */
	if (dev->snapshot == DDSNAP_ORIGIN)
		list_for_each_entry(other, &v->devices, list)
			if (other->snapshot == DDSNAP_ORIGIN &&
			    other->md != dev->md)
				r = -EBUSY;
	if (!r) {
		call->device = __new_device_number(v);
		list_add_tail(&dev->list, &v->devices);
		if (v->channel) {
			__queue_call(v, call, DDSNAP_IDENTIFY, &v->unsent);
			timeout = max(timeout, GONE_WAIT_SECONDS * (unsigned long)HZ);
		}
	}
	spin_unlock_irq(&v->lock);
	volumes_unlock(noio);
	if (r) {
		*error = "another origin device exists under this socket name";
		kref_put(&call->kref, call_free);
		return r;
	}

	wake_server(v);
	if (timeout)
		left = wait_for_completion_interruptible_timeout(&call->done,
								 timeout);
	r = identify_result(dev, left, error);
	if (r)
		ddsnap_device_leave(dev, false);
	return r;
}

/**
 * ddsnap_device_leave - a device goes away; it has no I/O any more
 * @dev: the device, of which nothing is used by the volume afterwards
 * @wait: until the server has noted it, if there is one, for a bounded time
 */
void ddsnap_device_leave(struct ddsnap_device *dev, bool wait)
{
	struct ddsnap_volume *v = dev->volume;
	struct bio_list ended = BIO_EMPTY_LIST;
	struct ddsnap_call *call = dev->call;
	unsigned int noio = volumes_lock();
	bool pending = false;

	spin_lock_irq(&v->lock);
	list_del(&dev->list);
	__cancel_device(dev, BLK_STS_IOERR, &ended);
	call->q.dev = NULL;
	if (call->q.place == PLACE_UNSENT) {
		/* The server has not heard of it. */
		__drop_call(v, call);
	} else if (call->q.place == PLACE_SENT) {
		/* Accepted, it is followed by GONE: see call_reply(). */
		pending = true;
	} else if (dev->connected) {
		__queue_call(v, call, DDSNAP_GONE, &v->unsent);
		pending = true;
	}
	spin_unlock_irq(&v->lock);
	volumes_unlock(noio);

	WARN_ON_ONCE(!bio_list_empty(&ended));
	end_bios(&ended);

	wake_server(v);
	if (pending && wait &&
	    !wait_for_completion_killable_timeout(&call->done,
						  GONE_WAIT_SECONDS * HZ))
		DMWARN("%s: the snapshot server has not noted within %u s that a device is gone",
		       v->key, GONE_WAIT_SECONDS);
	kref_put(&call->kref, call_free);
}

/**
 * ddsnap_device_suspend - presuspend
 * @dev: the device
 * @noflush: I/O may be pushed back to dm core
 *
 * With a server there, the suspension waits for its answers. Without one it
 * must not: as dm-mpath does without a path, I/O is pushed back where dm core
 * allows it and fails where not.
 */
void ddsnap_device_suspend(struct ddsnap_device *dev, bool noflush)
{
	struct bio_list ended = BIO_EMPTY_LIST;
	struct ddsnap_volume *v = dev->volume;

	spin_lock_irq(&v->lock);
	dev->suspending = noflush ? SUSPENDING_NOFLUSH : SUSPENDING_FLUSH;
	if (!v->channel)
		__cancel_device(dev, noflush ? BLK_STS_DM_REQUEUE :
				BLK_STS_IOERR, &ended);
	spin_unlock_irq(&v->lock);
	end_bios(&ended);
}

/**
 * ddsnap_device_resume - resume, or the suspension was given up
 * @dev: the device
 */
void ddsnap_device_resume(struct ddsnap_device *dev)
{
	spin_lock_irq(&dev->volume->lock);
	dev->suspending = SUSPENDING_NOT;
	spin_unlock_irq(&dev->volume->lock);
}

/*----------------------------------------------------------------
 * Volumes come and go
 *----------------------------------------------------------------
 */

static struct ddsnap_volume *volume_new(const char *key)
{
	struct ddsnap_volume *v = kvzalloc(sizeof(*v), GFP_KERNEL);

	if (!v)
		return NULL;
	strscpy(v->key, key, sizeof(v->key));
	spin_lock_init(&v->lock);
	INIT_LIST_HEAD(&v->devices);
	INIT_LIST_HEAD(&v->unsent);
	INIT_LIST_HEAD(&v->sent);
	INIT_LIST_HEAD(&v->held);
	INIT_LIST_HEAD(&v->granted);
	hash_init(v->by_id);
	hash_init(v->questions);
	hash_init(v->tracked);
	bio_list_init(&v->ready);
	v->reached.op = DDSNAP_BARRIER_REACHED;
	INIT_LIST_HEAD(&v->reached.list);
	init_waitqueue_head(&v->wait);
	INIT_WORK(&v->submit_work, submit_ready);
	INIT_DELAYED_WORK(&v->lost_work, lost_too_long);
	list_add_tail(&v->list, &volumes);
	return v;
}

/**
 * ddsnap_volume_get - the volume of a key, made if there is none
 * @key: shorter than DDSNAP_KEY_SIZE
 *
 * Return: the volume, to be given to ddsnap_volume_put(); NULL: no memory.
 */
struct ddsnap_volume *ddsnap_volume_get(const char *key)
{
	unsigned int noio = volumes_lock();
	struct ddsnap_volume *v;

	list_for_each_entry(v, &volumes, list)
		if (!strcmp(v->key, key))
			goto found;
	v = volume_new(key);
found:
	if (v)
		v->refs++;
	volumes_unlock(noio);
	return v;
}

/**
 * ddsnap_volume_put - the counterpart of ddsnap_volume_get()
 * @v: the volume
 */
void ddsnap_volume_put(struct ddsnap_volume *v)
{
	unsigned int noio = volumes_lock();
	bool last = !--v->refs;

	if (last)
		list_del(&v->list);
	volumes_unlock(noio);
	if (!last)
		return;

	cancel_delayed_work_sync(&v->lost_work);
	cancel_work_sync(&v->submit_work);
	WARN_ON_ONCE(!list_empty(&v->unsent) || !list_empty(&v->sent) ||
		     !list_empty(&v->held) || !list_empty(&v->granted));
	kvfree(v);
}

int __init ddsnap_volume_init(void)
{
	ddsnap_wq = alloc_workqueue("ddsnap", WQ_MEM_RECLAIM, 0);
	return ddsnap_wq ? 0 : -ENOMEM;
}

void ddsnap_volume_exit(void)
{
	destroy_workqueue(ddsnap_wq);
}
