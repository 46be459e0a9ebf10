// SPDX-License-Identifier: GPL-2.0-only
/*
 * Questions to the server: where each one is, what may join it, and how its
 * bios go on. target.c opens with the algorithm and the order of the locks.
 *
 * A function whose name starts with __ runs under volume->lock.
 */
#include "ddsnap.h"

#include <linux/poll.h>

/* Chunks submitted between two looks for somebody who waits for room. */
#define SUBMITTED_STEP	32

/* How long a question waits for a server that has let others become too old. */
#define SILENT_LIMIT	HZ

/* The server's read() and poll() look again. */
void ddsnap_wake_server(struct ddsnap_volume *v)
{
	wake_up_interruptible_poll(&v->wait, EPOLLIN | EPOLLRDNORM);
}

/*
 * Bios about so many chunks wait no longer, neither for an answer nor to be
 * submitted.
 */
static void chunks_go(struct ddsnap_volume *v, int chunks)
{
	int max = max_t(int, READ_ONCE(ddsnap_max_waiting), 1);

	/* Not at each: who is woken is to find room for some more. */
	if (atomic_sub_return(chunks, &v->pending) <= max - max / 8 - 1 &&
	    wq_has_sleeper(&v->throttle))
		wake_up_all(&v->throttle);
}

/* Ends bios whose bi_status is set. Not under a lock: dm core may call back. */
void ddsnap_end_bios(struct ddsnap_volume *v, struct bio_list *bios)
{
	struct bio *bio;
	int chunks = 0;

	if (bio_list_empty(bios))
		return;
	bio_list_for_each(bio, bios)
		chunks += ddsnap_io(bio)->chunks;
	chunks_go(v, chunks);
	while ((bio = bio_list_pop(bios)))
		bio_endio(bio);
}

bool ddsnap_is_io(u32 op)
{
	return op == DDSNAP_ORIGIN_WRITE || op == DDSNAP_SNAPSHOT_READ ||
	       op == DDSNAP_SNAPSHOT_WRITE;
}

/*----------------------------------------------------------------
 * Places of a question
 *----------------------------------------------------------------
 */

void __ddsnap_unlist(struct ddsnap_volume *v, struct ddsnap_question *q)
{
	lockdep_assert_held(&v->lock);

	if (q->place == PLACE_SENT || q->place == PLACE_GRANTED)
		hash_del(&q->hashed);
	list_del_init(&q->list);
	q->place = PLACE_NOWHERE;
}

void __ddsnap_make_unsent(struct ddsnap_volume *v, struct ddsnap_question *q,
			  struct list_head *list)
{
	lockdep_assert_held(&v->lock);

	q->place = PLACE_UNSENT;
	list_add_tail(&q->list, list);
}

/* An origin write is asked about now, or when the gate opens. */
void __ddsnap_ask_origin_write(struct ddsnap_volume *v,
			       struct ddsnap_question *q)
{
	lockdep_assert_held(&v->lock);

	q->id = ++v->next_id;
	if (v->gate == GATE_OPEN) {
		__ddsnap_make_unsent(v, q, &v->unsent);
	} else {
		q->place = PLACE_HELD;
		list_add_tail(&q->list, &v->held);
	}
}

struct ddsnap_question *__ddsnap_find_sent(struct ddsnap_volume *v, u64 id,
					   u32 op)
{
	struct ddsnap_question *q;

	lockdep_assert_held(&v->lock);

	hash_for_each_possible(v->by_id, q, hashed, id)
		if (q->id == id && q->op == op)
			return q;
	return NULL;
}

/*
 * A bio may join a question of its kind about the very same chunks: of a longer
 * run, others than the bio's own could make it fail, or wait for their reads. And
 * a read joins only one that is still unsent. The answer to one already sent may
 * be older than a write to the snapshot that has completed since, and would lead
 * the read to what the chunk held before. The answer to a write stays true.
 */
static struct ddsnap_question *__find_joinable(struct ddsnap_device *dev,
					       u32 op, u64 chunk,
					       unsigned int count)
{
	struct ddsnap_volume *v = dev->volume;
	struct ddsnap_question *q;

	lockdep_assert_held(&v->lock);

	hash_for_each_possible(v->questions, q, by_chunk, chunk)
		if (q->chunk == chunk && q->count == count && q->op == op &&
		    q->dev == dev &&
		    (op != DDSNAP_SNAPSHOT_READ || q->place == PLACE_UNSENT))
			return q;
	return NULL;
}

/* The question is over; its bios, the one that embeds it too, are in @bios. */
void __ddsnap_end_question(struct ddsnap_volume *v, struct ddsnap_question *q,
			   struct bio_list *bios)
{
	lockdep_assert_held(&v->lock);

	__ddsnap_unlist(v, q);
	hash_del(&q->by_chunk);
	list_del(&q->asked);
	atomic_sub(bio_list_size(&q->bios), &q->dev->stats->waiting);
	bio_list_merge(bios, &q->bios);
	bio_list_init(&q->bios);
}

/*----------------------------------------------------------------
 * Cancelling
 *----------------------------------------------------------------
 */

/* The question's bios are to end with @status, by ddsnap_end_bios(@ended). */
void __ddsnap_cancel(struct ddsnap_volume *v, struct ddsnap_question *q,
		     blk_status_t status, struct bio_list *ended)
{
	struct bio_list bios = BIO_EMPTY_LIST;
	struct bio *bio;

	__ddsnap_end_question(v, q, &bios);
	bio_list_for_each(bio, &bios)
		bio->bi_status = status;
	bio_list_merge(ended, &bios);
}

/* What becomes of a bio that has to ask: 0 (ask) or a DM_MAPIO_ code. */
static int __verdict(const struct ddsnap_device *dev)
{
	lockdep_assert_held(&dev->volume->lock);

	if (dev->refused || dev->stopped)
		return DM_MAPIO_KILL;
	if (dev->volume->channel)
		return 0;
	if (dev->pushing_back)
		return DM_MAPIO_REQUEUE;
	if (dev->failing)
		return DM_MAPIO_KILL;
	return 0;
}

/*
 * A verdict has changed: cancels what no server has read, where it may not be
 * asked any more. What a server has read, it answers.
 */
static void __sweep_list(struct ddsnap_volume *v, struct list_head *list,
			 struct bio_list *ended)
{
	struct ddsnap_question *q, *next;

	lockdep_assert_held(&v->lock);

	list_for_each_entry_safe(q, next, list, list) {
		switch (ddsnap_is_io(q->op) ? __verdict(q->dev) : 0) {
		case DM_MAPIO_KILL:
			__ddsnap_cancel(v, q, BLK_STS_IOERR, ended);
			break;
		case DM_MAPIO_REQUEUE:
			__ddsnap_cancel(v, q, BLK_STS_DM_REQUEUE, ended);
			break;
		}
	}
}

void __ddsnap_sweep(struct ddsnap_volume *v, struct bio_list *ended)
{
	__sweep_list(v, &v->unsent, ended);
	__sweep_list(v, &v->held, ended);
}

/* How old a question may become where @limit is what a device lets it be. */
static unsigned long __age_limit(const struct ddsnap_volume *v,
				 unsigned long limit)
{
	return v->silent ? min_t(unsigned long, limit, SILENT_LIMIT) : limit;
}

/* Ends what is older than its device lets it be. True: something is left. */
static bool __expire_old(struct ddsnap_volume *v, struct bio_list *ended)
{
	struct ddsnap_question *q, *next;
	unsigned long now = jiffies;

	lockdep_assert_held(&v->lock);

	list_for_each_entry_safe(q, next, &v->asked, asked) {
		unsigned long limit = ddsnap_answer_limit(q->dev);

		if (time_before(now, q->since + __age_limit(v, v->shortest)))
			break;
		if (time_before(now, q->since + __age_limit(v, limit)))
			continue;
		if (time_after_eq(now, v->answered + limit))
			v->silent = true;
		/* The server may answer yet: see io_reply(). */
		if (q->place == PLACE_SENT)
			v->late++;
		__ddsnap_cancel(v, q, BLK_STS_IOERR, ended);
	}
	return !list_empty(&v->asked);
}

/*
 * Nothing waits longer than its device's limit, whatever the server does: is
 * stopped, hangs, or is lost anew at each attempt to serve one request.
 */
void ddsnap_expire_old(struct work_struct *work)
{
	struct ddsnap_volume *v = container_of(to_delayed_work(work),
					       struct ddsnap_volume, age_work);
	struct bio_list ended = BIO_EMPTY_LIST;

	spin_lock_irq(&v->lock);
	if (__expire_old(v, &ended))
		queue_delayed_work(v->wq, &v->age_work, HZ);
	spin_unlock_irq(&v->lock);

	if (!bio_list_empty(&ended))
		DMERR_LIMIT("%s: the snapshot server has not answered in time: %u requests fail",
			    v->key, bio_list_size(&ended));
	ddsnap_end_bios(v, &ended);
}

/*----------------------------------------------------------------
 * Bios on their way down
 *----------------------------------------------------------------
 */

/* Submission may block on the device below, so it is left to a worker. */
void ddsnap_submit_ready(struct work_struct *work)
{
	struct ddsnap_volume *v = container_of(work, struct ddsnap_volume,
					       submit_work);
	struct bio_list bios;
	struct blk_plug plug;
	struct bio *bio;
	int chunks = 0;

	spin_lock_irq(&v->lock);
	bios = v->ready;
	bio_list_init(&v->ready);
	spin_unlock_irq(&v->lock);

	blk_start_plug(&plug);
	while ((bio = bio_list_pop(&bios))) {
		bio_set_dev(bio, ddsnap_io(bio)->to->bdev);
		/* We may wait for the disk, and nobody polls for us. */
		bio->bi_opf &= ~(REQ_NOWAIT | REQ_POLLED);
		chunks += ddsnap_io(bio)->chunks;
		/* From here on it is not ours: it may end at once. */
		dm_submit_bio_remap(bio, NULL);
		/* Now and then: the device below may hold up the rest. */
		if (chunks >= SUBMITTED_STEP) {
			chunks_go(v, chunks);
			chunks = 0;
		}
		cond_resched();
	}
	blk_finish_plug(&plug);
	if (chunks)
		chunks_go(v, chunks);
}

void __ddsnap_ready(struct ddsnap_volume *v, struct bio *bio,
		    struct dm_dev *to, enum ddsnap_io_state state)
{
	struct ddsnap_io *io = ddsnap_io(bio);

	lockdep_assert_held(&v->lock);

	io->state = state;
	io->to = to;
	bio_list_add(&v->ready, bio);
	queue_work(v->wq, &v->submit_work);
}

/* May all these chunks of the origin be written without asking? */
bool __ddsnap_is_unique(struct ddsnap_volume *v, u64 chunk, unsigned int count)
{
	struct ddsnap_device *dev;

	lockdep_assert_held(&v->lock);

	if (v->all_unique)
		return true;
	list_for_each_entry(dev, &v->origins, origins)
		if (dev->unique && chunk + count <= dev->unique_chunks &&
		    find_next_zero_bit(dev->unique, chunk + count, chunk) >=
		    chunk + count)
			return true;
	return false;
}

/*----------------------------------------------------------------
 * Origin writes and snapshots' reads from the origin
 *----------------------------------------------------------------
 */

static bool __is_tracked(struct ddsnap_volume *v, u64 chunk)
{
	struct ddsnap_io *io;

	lockdep_assert_held(&v->lock);

	hash_for_each_possible(v->tracked, io, tracked, chunk)
		if (io->tracked_chunk == chunk)
			return true;
	return false;
}

/* A chunk of the question's that a snapshot's read is on its way to. */
static bool __find_tracked(struct ddsnap_volume *v,
			   const struct ddsnap_question *q, u64 *chunk)
{
	unsigned int i;

	lockdep_assert_held(&v->lock);

	if (!v->tracked_reads)
		return false;
	for (i = 0; i < q->count; i++) {
		*chunk = q->chunk + i;
		if (__is_tracked(v, *chunk))
			return true;
	}
	return false;
}

/* From here on, and until the next snapshot, its chunks are unique. */
static void __release_origin_write(struct ddsnap_volume *v,
				   struct ddsnap_question *q)
{
	struct bio_list bios = BIO_EMPTY_LIST;
	struct ddsnap_device *dev = q->dev;
	struct bio *bio;
	u64 chunk, end;

	lockdep_assert_held(&v->lock);
	WARN_ON_ONCE(v->gate != GATE_OPEN);

	if (dev->unique) {
		end = min_t(u64, q->chunk + q->count, dev->unique_chunks);
		/* One by one and atomically: others look without the lock. */
		for (chunk = q->chunk; chunk < end; chunk++)
			set_bit(chunk, dev->unique);
	}

	__ddsnap_end_question(v, q, &bios);
	while ((bio = bio_list_pop(&bios))) {
		/* The gate is open and stays so while we hold the lock. */
		atomic_inc(&v->origin_writes);
		__ddsnap_ready(v, bio, dev->origin, IO_ORIGIN_WRITE);
	}
}

/*
 * The server allows an origin write, and the gate is open: it goes on its way, or
 * waits for one of the chunks that are still being read.
 */
void __ddsnap_grant_origin_write(struct ddsnap_volume *v,
				 struct ddsnap_question *q)
{
	u64 chunk;

	lockdep_assert_held(&v->lock);

	if (!__find_tracked(v, q, &chunk)) {
		__release_origin_write(v, q);
		return;
	}
	__ddsnap_unlist(v, q);
	q->place = PLACE_GRANTED;
	q->awaited = chunk;
	list_add_tail(&q->list, &v->granted);
	hash_add(v->blocked, &q->hashed, chunk);
}

/* A snapshot's read goes to the origin: until it ends its chunk is not written. */
void __ddsnap_read_track(struct ddsnap_volume *v, struct ddsnap_io *io,
			 u64 chunk)
{
	lockdep_assert_held(&v->lock);

	io->tracked_chunk = chunk;
	hash_add(v->tracked, &io->tracked, chunk);
	v->tracked_reads++;
}

/**
 * ddsnap_read_untrack - a snapshot's read from the origin has ended
 * @v: the volume
 * @io: the bio's share, IO_TRACKED_READ
 *
 * Origin writes that waited for the last such read of the chunk go on, or wait
 * for that of another chunk of theirs: they look at all of them again. They are
 * found by the chunk that each waits for, so that this takes what it has to.
 */
void ddsnap_read_untrack(struct ddsnap_volume *v, struct ddsnap_io *io)
{
	struct ddsnap_question *q;
	u64 chunk = io->tracked_chunk;
	struct hlist_node *next;
	unsigned long flags;

	spin_lock_irqsave(&v->lock, flags);
	hash_del(&io->tracked);
	v->tracked_reads--;
	if (!list_empty(&v->granted) && !__is_tracked(v, chunk))
		/* One that waits on is put before all that are yet to come. */
		hash_for_each_possible_safe(v->blocked, q, next, hashed, chunk)
			if (q->awaited == chunk)
				__ddsnap_grant_origin_write(v, q);
	spin_unlock_irqrestore(&v->lock, flags);
}

/*----------------------------------------------------------------
 * Asking, and the server reads
 *----------------------------------------------------------------
 */

static bool has_room(const struct ddsnap_volume *v)
{
	return atomic_read(&v->pending) <
	       max_t(int, READ_ONCE(ddsnap_max_waiting), 1);
}

/*
 * Bounds what waits: write-zeroes of a large device are cut into a bio for each
 * run of chunks, and each holds memory that cannot be reclaimed. Chunks are what
 * is counted, for they are the server's work: as many bios of long runs would wait
 * longer than they may. Who finds room for one may ask about a run of more. To
 * sleep in map is harmless. Nothing is counted or locked yet, and what the
 * submitter has sent down before is on its way: the block layer submits bios for
 * lower devices first, and the scheduler unplugs. What has been asked ends by
 * itself within its time, and what comes after it soon if the server is silent.
 * But who frees memory must not wait for room here; swap has a bound of its own in
 * dm core. False: the submitter would have to wait, and must not.
 */
static bool throttle(struct ddsnap_volume *v, const struct bio *bio)
{
	if (likely(has_room(v)) || bio->bi_opf & REQ_SWAP ||
	    current->flags & PF_MEMALLOC)
		return true;
	if (bio->bi_opf & REQ_NOWAIT)
		return false;
	io_wait_event(v->throttle, has_room(v));
	return true;
}

/* Would a question wait for more than the server's answer? See target.c. */
static bool __must_wait(const struct ddsnap_volume *v, unsigned int op)
{
	lockdep_assert_held(&v->lock);

	return !v->channel ||
	       (op == DDSNAP_ORIGIN_WRITE && v->gate != GATE_OPEN);
}

/* DM_MAPIO_KILL would make an I/O error of it. */
static int would_block(struct bio *bio)
{
	bio_wouldblock_error(bio);
	return DM_MAPIO_SUBMITTED;
}

/**
 * ddsnap_ask - a bio needs the server's answer
 * @dev: the device
 * @bio: the bio
 * @op: DDSNAP_ORIGIN_WRITE, DDSNAP_SNAPSHOT_READ or DDSNAP_SNAPSHOT_WRITE
 * @chunk: the first chunk the bio lies in
 * @count: how many it lies in, 1 but for DDSNAP_ORIGIN_WRITE
 *
 * Return: what map returns: DM_MAPIO_SUBMITTED and the bio is ours, or has ended
 * because it would have to wait; REMAPPED to the origin if the chunks have become
 * unique; KILL; REQUEUE.
 */
int ddsnap_ask(struct ddsnap_device *dev, struct bio *bio, unsigned int op,
	       u64 chunk, unsigned int count)
{
	struct ddsnap_volume *v = dev->volume;
	struct ddsnap_io *io = ddsnap_io(bio);
	struct ddsnap_question *q;
	bool asked = false, wake = false;
	int r;

	if (!throttle(v, bio))
		return would_block(bio);
	spin_lock_irq(&v->lock);

	if (op == DDSNAP_ORIGIN_WRITE && v->gate == GATE_OPEN &&
	    __ddsnap_is_unique(v, chunk, count)) {
		/* They were granted between the look without the lock and now. */
		atomic_inc(&v->origin_writes);
		spin_unlock_irq(&v->lock);
		io->state = IO_ORIGIN_WRITE;
		bio_set_dev(bio, dev->origin->bdev);
		this_cpu_inc(dev->stats->counts->at_once);
		return DM_MAPIO_REMAPPED;
	}

	r = __verdict(dev);
	if (bio->bi_opf & REQ_NOWAIT && r != DM_MAPIO_KILL &&
	    __must_wait(v, op)) {
		spin_unlock_irq(&v->lock);
		return would_block(bio);
	}
	if (r) {
		spin_unlock_irq(&v->lock);
		return r;
	}

	io->chunks = count;
	q = __find_joinable(dev, op, chunk, count);
	if (!q) {
		q = &io->question;
		q->op = op;
		q->dev = dev;
		q->chunk = chunk;
		q->count = count;
		q->since = jiffies;
		bio_list_init(&q->bios);
		list_add_tail(&q->asked, &v->asked);
		hash_add(v->questions, &q->by_chunk, chunk);
		if (op == DDSNAP_ORIGIN_WRITE) {
			__ddsnap_ask_origin_write(v, q);
		} else {
			q->id = ++v->next_id;
			__ddsnap_make_unsent(v, q, &v->unsent);
		}
		asked = true;
		wake = q->place == PLACE_UNSENT && list_is_singular(&v->unsent);
	}
	bio_list_add(&q->bios, bio);
	atomic_inc(&dev->stats->waiting);
	atomic_add(count, &v->pending);
	spin_unlock_irq(&v->lock);

	if (asked) {
		/* Looks once a second until nothing is left. */
		if (!delayed_work_pending(&v->age_work))
			queue_delayed_work(v->wq, &v->age_work, HZ);
		this_cpu_inc(dev->stats->counts->questions);
	}
	/*
	 * A list that was not empty has a first question, whose asker wakes the
	 * server, or has woken it: then it reads on, for it sleeps only where it
	 * finds the list empty.
	 */
	if (wake)
		ddsnap_wake_server(v);
	return DM_MAPIO_SUBMITTED;
}

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

	if (ddsnap_is_io(q->op)) {
		request->device = cpu_to_le32(q->dev->call->device);
		request->snapshot = cpu_to_le64(q->dev->snapshot);
		request->chunk = cpu_to_le64(q->chunk);
		if (q->op == DDSNAP_ORIGIN_WRITE)
			request->count = cpu_to_le32(q->count);
	} else if (q->op == DDSNAP_BARRIER_REACHED) {
		request->snapshot = cpu_to_le64(DDSNAP_ORIGIN);
	} else if (q->op == DDSNAP_DEVICE_STOPPED) {
		request->device = cpu_to_le32(q->dev->call->device);
		request->snapshot = cpu_to_le64(q->dev->snapshot);
	} else {
		const struct ddsnap_call *call =
			container_of(q, const struct ddsnap_call, q);

		request->device = cpu_to_le32(call->device);
		request->snapshot = cpu_to_le64(call->snapshot);
		request->sectors = cpu_to_le64(call->sectors);
		if (q->op == DDSNAP_IDENTIFY && q->dev && q->dev->identified)
			request->flags = cpu_to_le32(DDSNAP_REQUEST_RETURNING);
	}
}

/**
 * ddsnap_volume_take - the next requests for the server
 * @v: the volume
 * @requests: room for them
 * @max: records there is room for
 * @taken: sectors of the chunks that the requests taken before are about, in the
 *	same read(2); those of these are added
 *
 * Return: how many there were. They count as sent. 0 too if DDSNAP_READ_BYTES
 * leaves no room for another, but not if @taken was 0.
 */
unsigned int ddsnap_volume_take(struct ddsnap_volume *v,
				struct ddsnap_request *requests,
				unsigned int max, u64 *taken)
{
	struct ddsnap_question *q, *next;
	unsigned int count = 0;

	spin_lock_irq(&v->lock);
	list_for_each_entry_safe(q, next, &v->unsent, list) {
		u64 sectors = ddsnap_is_io(q->op) ?
			(u64)q->count << v->chunk_shift : 0;

		if (count == max ||
		    (*taken && sectors &&
		     *taken + sectors > DDSNAP_READ_BYTES >> SECTOR_SHIFT))
			break;
		*taken += sectors;
		fill_request(q, &requests[count++]);
		__ddsnap_unlist(v, q);
		if (q == &v->reached) {
			WRITE_ONCE(v->gate, GATE_TOLD);
			continue;
		}
		if (q->op == DDSNAP_DEVICE_STOPPED)
			continue;
		q->place = PLACE_SENT;
		list_add_tail(&q->list, &v->sent);
		hash_add(v->by_id, &q->hashed, q->id);
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
		struct ddsnap_device *dev;
		struct ddsnap_question *q;

		if (op == DDSNAP_BARRIER_REACHED) {
			if (v->gate != GATE_TOLD || v->barrier_id != id)
				continue;
			WRITE_ONCE(v->gate, GATE_DRAINED);
			q = &v->reached;
		} else if (op == DDSNAP_DEVICE_STOPPED) {
			dev = __ddsnap_find_device(v,
						   le32_to_cpu(requests[count].device));
			if (!dev || dev->stop.place != PLACE_NOWHERE)
				continue;
			q = &dev->stop;
		} else {
			q = __ddsnap_find_sent(v, id, op);
			if (!q)
				continue;
			__ddsnap_unlist(v, q);
		}
		q->place = PLACE_UNSENT;
		list_add(&q->list, &v->unsent);
	}
	spin_unlock_irq(&v->lock);
	/* Another of the server's threads may sleep. */
	ddsnap_wake_server(v);
}
