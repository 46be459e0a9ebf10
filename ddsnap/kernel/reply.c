// SPDX-License-Identifier: GPL-2.0-only
/*
 * What the server writes: checked here, and acted upon.
 */
#include "ddsnap.h"

#include <linux/errno.h>

/*
 * Of a device that was stopped nothing may go down any more, whatever the
 * server has answered before it stopped it.
 */
static bool __may_go_on(const struct ddsnap_question *q, u32 status)
{
	lockdep_assert_held(&q->dev->volume->lock);

	return !status && !q->dev->stopped;
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
	q = __ddsnap_find_sent(v, id, op);
	if (!q) {
		spin_unlock_irq(&v->lock);
		return -EPROTO;
	}
	call = ddsnap_call_of(q);
	dev = q->dev;
	snapshot = call->snapshot;
	__ddsnap_unlist(v, q);

	if (!dev && op == DDSNAP_IDENTIFY && !status) {
		/* The device left before the server accepted it: say so. */
		__ddsnap_queue_call(v, call, DDSNAP_GONE, &v->unsent);
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
		__ddsnap_sweep(v, &ended);
	}
	complete(&call->done);
out:
	kref_put(&call->kref, ddsnap_call_free);
	spin_unlock_irq(&v->lock);

	ddsnap_end_bios(v, &ended);
	ddsnap_wake_server(v);
	if (refused)
		DMERR("%s: the new snapshot server refuses %s %lld (error %u): its I/O fails",
		      v->key,
		      snapshot == DDSNAP_ORIGIN ? "origin" : "snapshot",
		      (long long)snapshot, status);
	return 0;
}

/*
 * What is wrong with a mapping, or NULL. The origin's last chunk may be short;
 * the store's chunks are whole.
 */
static const char *__mapping_error(struct ddsnap_volume *v,
				   const struct ddsnap_question *q,
				   bool from_origin, u64 value)
{
	struct ddsnap_device *dev = q->dev;
	struct dm_dev *to = from_origin ? dev->origin : dev->store;
	sector_t sectors = bdev_nr_sectors(to->bdev);
	struct bio *bio;

	lockdep_assert_held(&v->lock);

	if (!from_origin)
		return value < ddsnap_sector_to_chunk(dev, sectors) ?
			NULL : "to a store chunk beyond the store's end";
	/* See "Snapshot reads from the origin" in target.c. */
	if (__ddsnap_is_unique(v, q->chunk, 1))
		return "to the origin, which may have been written since";
	bio_list_for_each(bio, &q->bios)
		if (bio_end_sector(bio) > sectors)
			return "to the origin beyond the origin's end";
	return NULL;
}

/* NULL, or why the mapping is refused and its bios are to end with an error. */
static const char *__snapshot_mapped(struct ddsnap_volume *v,
				     struct ddsnap_question *q,
				     bool from_origin, u64 value,
				     struct bio_list *ended)
{
	const char *wrong = __mapping_error(v, q, from_origin, value);
	struct ddsnap_device *dev = q->dev;
	struct dm_dev *to = from_origin ? dev->origin : dev->store;
	struct bio_list bios = BIO_EMPTY_LIST;
	u64 chunk = q->chunk;
	struct bio *bio;

	lockdep_assert_held(&v->lock);

	if (wrong) {
		__ddsnap_cancel(v, q, BLK_STS_IOERR, ended);
		return wrong;
	}

	/* The question lies in one of the bios: it is over before they go. */
	__ddsnap_end_question(v, q, &bios);
	while ((bio = bio_list_pop(&bios))) {
		struct ddsnap_io *io = ddsnap_io(bio);
		sector_t sector = bio->bi_iter.bi_sector;

		atomic_inc(&dev->in_flight);
		if (from_origin) {
			__ddsnap_read_track(v, io, chunk);
			__ddsnap_ready(v, bio, to, IO_TRACKED_READ);
		} else {
			sector -= ddsnap_chunk_to_sector(dev, chunk);
			sector += ddsnap_chunk_to_sector(dev, value);
			bio->bi_iter.bi_sector = sector;
			__ddsnap_ready(v, bio, to, IO_SNAPSHOT);
		}
	}
	return NULL;
}

/* Upper layers know what to do about these; all else is an I/O error. */
static blk_status_t status_to_blk(u32 status)
{
	return status == ENOSPC ? BLK_STS_NOSPC : BLK_STS_IOERR;
}

/*
 * Is it the answer to a question that has failed meanwhile for its age? Then it
 * is over, and means nothing any more: no bit is set, no read tracked.
 */
static bool __is_late(struct ddsnap_volume *v, u64 id)
{
	struct ddsnap_question *q;

	lockdep_assert_held(&v->lock);

	if (!v->late || !id || id > v->next_id)
		return false;
	hash_for_each_possible(v->by_id, q, hashed, id)
		if (q->id == id)
			return false;
	v->late--;
	return true;
}

/**
 * struct replied - what is left to do without the lock after some replies
 * @ended: bios that have failed
 * @wrong: what was wrong with the first mapping that was refused, or NULL
 * @chunk: the chunk it was for
 */
struct replied {
	struct bio_list ended;
	const char *wrong;
	u64 chunk;
};

/* False if it is not in order; then nothing has changed. */
static bool __io_reply(struct ddsnap_volume *v,
		       const struct ddsnap_reply *reply,
		       struct replied *replied)
{
	u64 id = le64_to_cpu(reply->id), value = le64_to_cpu(reply->value);
	u32 op = le32_to_cpu(reply->op), status = le32_to_cpu(reply->status);
	bool from_origin = le32_to_cpu(reply->flags) & DDSNAP_REPLY_FROM_ORIGIN;
	struct ddsnap_question *q = __ddsnap_find_sent(v, id, op);
	const char *wrong;
	u64 chunk;

	lockdep_assert_held(&v->lock);

	if (!q && !__is_late(v, id))
		return false;
	v->answered = jiffies;
	v->silent = false;
	v->after_silent = false;
	if (!q)
		return true;

	chunk = q->chunk;
	if (!__may_go_on(q, status)) {
		__ddsnap_cancel(v, q, status_to_blk(status), &replied->ended);
	} else if (op != DDSNAP_ORIGIN_WRITE) {
		wrong = __snapshot_mapped(v, q, from_origin, value,
					  &replied->ended);
		if (wrong && !replied->wrong) {
			replied->wrong = wrong;
			replied->chunk = chunk;
		}
	} else if (v->gate != GATE_OPEN) {
		/* Does it hold after the snapshot too? Ask again then. */
		__ddsnap_unlist(v, q);
		__ddsnap_ask_origin_write(v, q);
	} else {
		__ddsnap_grant_origin_write(v, q);
	}
	return true;
}

/* Are the fields in order that need no look at the volume? */
static bool well_formed(const struct ddsnap_reply *reply)
{
	u32 op = le32_to_cpu(reply->op);
	u32 allowed = 0;

	if (op == DDSNAP_SNAPSHOT_READ && !reply->status)
		allowed = DDSNAP_REPLY_FROM_ORIGIN;
	else if (op == DDSNAP_BARRIER_END)
		allowed = DDSNAP_REPLY_CREATED;
	/* Room for an answer about more than was asked, one day. */
	if (op == DDSNAP_ORIGIN_WRITE && reply->value)
		return false;
	return !reply->reserved && !(le32_to_cpu(reply->flags) & ~allowed) &&
	       le32_to_cpu(reply->status) <= MAX_ERRNO;
}

/*
 * Takes the replies about I/O that come first, with the lock once. Returns how
 * many there were: the next one is about something else, or not in order.
 */
static unsigned int io_replies(struct ddsnap_volume *v,
			       const struct ddsnap_reply *replies,
			       unsigned int count)
{
	struct replied replied = { .ended = BIO_EMPTY_LIST };
	unsigned int done = 0;

	spin_lock_irq(&v->lock);
	while (done < count && ddsnap_is_io(le32_to_cpu(replies[done].op)) &&
	       well_formed(&replies[done]) &&
	       __io_reply(v, &replies[done], &replied))
		done++;
	spin_unlock_irq(&v->lock);

	ddsnap_end_bios(v, &replied.ended);
	if (replied.wrong)
		DMERR_LIMIT("%s: the snapshot server maps a snapshot's chunk %llu %s: I/O error",
			    v->key, replied.chunk, replied.wrong);
	return done;
}

/* Any other reply or command: 0, or -EPROTO and nothing has changed. */
static int other_reply(struct ddsnap_volume *v,
		       const struct ddsnap_reply *reply)
{
	u64 id = le64_to_cpu(reply->id), value = le64_to_cpu(reply->value);
	u32 op = le32_to_cpu(reply->op), status = le32_to_cpu(reply->status);
	u32 flags = le32_to_cpu(reply->flags);

	if (!well_formed(reply))
		return -EPROTO;

	switch (op) {
	case DDSNAP_IDENTIFY:
	case DDSNAP_GONE:
		return call_reply(v, id, op, status, value);
	case DDSNAP_BARRIER_BEGIN:
		return status ? -EPROTO : ddsnap_barrier_begin(v, id);
	case DDSNAP_BARRIER_END:
		return status ? -EPROTO :
		       ddsnap_barrier_end(v, id, flags & DDSNAP_REPLY_CREATED);
	case DDSNAP_DEVICE_STOP:
		return status || id ? -EPROTO : ddsnap_device_stop(v, value);
	case DDSNAP_ALL_UNIQUE:
		if (status || id || value)
			return -EPROTO;
		ddsnap_all_unique(v);
		return 0;
	default:
		return -EPROTO;
	}
}

/**
 * ddsnap_volume_replies - records from the server
 * @v: the volume; its channel's mutex is held
 * @replies: the records
 * @count: how many
 *
 * They are taken in order. See "The order of replies in a batch" in target.c.
 *
 * Return: how many were taken. If not all, the next one is not in order, and
 * neither it nor those behind it have changed anything.
 */
unsigned int ddsnap_volume_replies(struct ddsnap_volume *v,
				   const struct ddsnap_reply *replies,
				   unsigned int count)
{
	unsigned int done = 0;

	while (done < count) {
		done += io_replies(v, &replies[done], count - done);
		if (done == count || other_reply(v, &replies[done]))
			break;
		done++;
	}
	return done;
}
