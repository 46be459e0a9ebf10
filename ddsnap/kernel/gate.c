// SPDX-License-Identifier: GPL-2.0-only
/*
 * The gate that origin writes pass, and the barrier that closes it while a
 * snapshot is created. target.c says why it holds.
 */
#include "ddsnap.h"

/* The bits of a bitmap that are cleared between two chances to reschedule. */
#define CLEAR_STEP_BITS		(BITS_PER_BYTE << 20)

/* True if BARRIER_REACHED was queued. */
static bool __check_drained(struct ddsnap_volume *v)
{
	lockdep_assert_held(&v->lock);

	if (v->gate != GATE_DRAINING || atomic_read(&v->origin_writes))
		return false;

	WRITE_ONCE(v->gate, GATE_DRAINED);
	v->reached.id = v->barrier_id;
	__ddsnap_make_unsent(v, &v->reached, &v->unsent);
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
	/* Pairs with smp_mb() in ddsnap_barrier_begin(). */
	smp_mb__after_atomic();

	/* Acquire pairs with the release in __ddsnap_open_gate(). */
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
		ddsnap_wake_server(v);
}

/* Origin writes held back are asked about now. */
void __ddsnap_open_gate(struct ddsnap_volume *v)
{
	struct ddsnap_question *q, *next;

	lockdep_assert_held(&v->lock);

	/* Release: who sees the gate open sees the unique bits cleared. */
	smp_store_release(&v->gate, GATE_OPEN);
	list_for_each_entry_safe(q, next, &v->held, list) {
		__ddsnap_unlist(v, q);
		__ddsnap_make_unsent(v, q, &v->unsent);
	}
}

/* What an earlier answer allowed but did not start is asked again. */
void __ddsnap_take_back_granted(struct ddsnap_volume *v)
{
	struct ddsnap_question *q, *next;

	lockdep_assert_held(&v->lock);

	list_for_each_entry_safe(q, next, &v->granted, list) {
		__ddsnap_unlist(v, q);
		__ddsnap_ask_origin_write(v, q);
	}
}

/**
 * ddsnap_all_unique - the server says that no snapshot needs the origin
 * @v: the volume
 *
 * It counts for nothing while a snapshot may be about to be created, as the
 * answer about one chunk does, or while a read of a snapshot that has gone is
 * still on its way to the origin. The server says it again when it is asked.
 */
void ddsnap_all_unique(struct ddsnap_volume *v)
{
	spin_lock_irq(&v->lock);
	if (v->gate == GATE_OPEN && !v->tracked_reads)
		WRITE_ONCE(v->all_unique, true);
	spin_unlock_irq(&v->lock);
}

/* The gate is closed, so that nobody relies on a bit while it is cleared. */
void ddsnap_clear_unique(struct ddsnap_volume *v)
{
	struct ddsnap_device *dev;

	lockdep_assert_held(&v->devices_mutex);

	WRITE_ONCE(v->all_unique, false);
	list_for_each_entry(dev, &v->origins, origins) {
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

/**
 * ddsnap_barrier_begin - the server wants to create a snapshot
 * @v: the volume
 * @id: of the barrier, for BARRIER_REACHED
 *
 * Return: 0; -EPROTO if a barrier is under way.
 */
int ddsnap_barrier_begin(struct ddsnap_volume *v, u64 id)
{
	spin_lock_irq(&v->lock);
	if (v->gate != GATE_OPEN) {
		spin_unlock_irq(&v->lock);
		return -EPROTO;
	}
	v->barrier_id = id;
	WRITE_ONCE(v->gate, GATE_DRAINING);
	smp_mb(); /* pairs with that in ddsnap_origin_write_begin() */
	__ddsnap_take_back_granted(v);
	__check_drained(v);
	spin_unlock_irq(&v->lock);
	ddsnap_wake_server(v);
	return 0;
}

/**
 * ddsnap_barrier_end - the snapshot was created, or will not be
 * @v: the volume
 * @id: of the barrier
 * @created: a snapshot was created: no chunk is unique any more
 *
 * Return: 0; -EPROTO if there is no such barrier, or it was not reached.
 */
int ddsnap_barrier_end(struct ddsnap_volume *v, u64 id, bool created)
{
	int r = 0;

	mutex_lock(&v->devices_mutex);
	spin_lock_irq(&v->lock);
	if (v->gate == GATE_OPEN || v->barrier_id != id ||
	    (created && v->gate != GATE_TOLD)) {
		r = -EPROTO;
		goto out;
	}
	if (v->gate == GATE_DRAINED)
		__ddsnap_unlist(v, &v->reached);
	if (created) {
		WRITE_ONCE(v->gate, GATE_CLEARING);
		spin_unlock_irq(&v->lock);
		ddsnap_clear_unique(v);
		spin_lock_irq(&v->lock);
	}
	__ddsnap_open_gate(v);
out:
	spin_unlock_irq(&v->lock);
	mutex_unlock(&v->devices_mutex);
	ddsnap_wake_server(v);
	return r;
}
