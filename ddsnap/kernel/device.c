// SPDX-License-Identifier: GPL-2.0-only
/*
 * Devices come and go: IDENTIFY, GONE and the calls that carry them; and
 * devices are stopped and suspended.
 */
#include "ddsnap.h"

#include <linux/errno.h>
#include <linux/slab.h>

/* How long a device that goes away waits for the server to say "noted". */
#define GONE_WAIT_SECONDS	5

/*----------------------------------------------------------------
 * Calls
 *----------------------------------------------------------------
 */

void ddsnap_call_free(struct kref *kref)
{
	kfree(container_of(kref, struct ddsnap_call, kref));
}

struct ddsnap_call *ddsnap_call_of(struct ddsnap_question *q)
{
	return container_of(q, struct ddsnap_call, q);
}

void __ddsnap_queue_call(struct ddsnap_volume *v, struct ddsnap_call *call,
			 enum ddsnap_request_op op, struct list_head *list)
{
	lockdep_assert_held(&v->lock);

	kref_get(&call->kref);
	reinit_completion(&call->done);
	call->q.id = ++v->next_id;
	call->q.op = op;
	__ddsnap_make_unsent(v, &call->q, list);
}

/* Nobody will answer it any more. */
void __ddsnap_drop_call(struct ddsnap_volume *v, struct ddsnap_call *call)
{
	__ddsnap_unlist(v, &call->q);
	/* A device that is still there goes on waiting for another server. */
	if (!call->q.dev)
		complete(&call->done);
	kref_put(&call->kref, ddsnap_call_free);
}

/*----------------------------------------------------------------
 * Devices
 *----------------------------------------------------------------
 */

struct ddsnap_device *__ddsnap_find_device(struct ddsnap_volume *v, u64 number)
{
	struct ddsnap_device *dev;

	lockdep_assert_held(&v->lock);

	list_for_each_entry(dev, &v->devices, list)
		if (dev->call->device == number)
			return dev;
	return NULL;
}

/* Also in the ABI of /dev/ddsnap: unique among the devices of the volume. */
static u32 __new_device_number(struct ddsnap_volume *v)
{
	lockdep_assert_held(&v->lock);

	do {
		v->next_device++;
	} while (!v->next_device || __ddsnap_find_device(v, v->next_device));
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
	INIT_LIST_HEAD(&dev->origins);
	call->q.dev = dev;
	call->snapshot = dev->snapshot;
	call->sectors = dev->sectors;
	dev->call = call;
	INIT_LIST_HEAD(&dev->stop.list);
	dev->stop.op = DDSNAP_DEVICE_STOPPED;
	dev->stop.dev = dev;

	mutex_lock(&v->devices_mutex);
	spin_lock_irq(&v->lock);
	/* A new table of the same mapped device is loaded beside the old. */
	if (dev->snapshot == DDSNAP_ORIGIN)
		list_for_each_entry(other, &v->origins, origins)
			if (other->md != dev->md)
				r = -EBUSY;
	if (!r) {
		call->device = __new_device_number(v);
		list_add_tail(&dev->list, &v->devices);
		if (dev->snapshot == DDSNAP_ORIGIN)
			list_add_tail(&dev->origins, &v->origins);
		v->shortest = min(v->shortest, ddsnap_answer_limit(dev));
		if (v->channel) {
			__ddsnap_queue_call(v, call, DDSNAP_IDENTIFY, &v->unsent);
			timeout = max(timeout, GONE_WAIT_SECONDS * (unsigned long)HZ);
		}
	}
	spin_unlock_irq(&v->lock);
	mutex_unlock(&v->devices_mutex);
	if (r) {
		*error = "another origin device exists under this socket name";
		kref_put(&call->kref, ddsnap_call_free);
		return r;
	}

	ddsnap_wake_server(v);
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
	bool pending = false;

	mutex_lock(&v->devices_mutex);
	spin_lock_irq(&v->lock);
	list_del(&dev->list);
	list_del(&dev->origins);
	__ddsnap_forget_stop(dev);
	/* dm core has waited for its I/O: nothing should be found. */
	dev->refused = true;
	__ddsnap_sweep(v, &ended);
	call->q.dev = NULL;
	if (call->q.place == PLACE_UNSENT) {
		/* The server has not heard of it. */
		__ddsnap_drop_call(v, call);
	} else if (call->q.place == PLACE_SENT) {
		/* Accepted, it is followed by GONE: see call_reply(). */
		pending = true;
	} else if (dev->connected) {
		__ddsnap_queue_call(v, call, DDSNAP_GONE, &v->unsent);
		pending = true;
	}
	spin_unlock_irq(&v->lock);
	mutex_unlock(&v->devices_mutex);

	WARN_ON_ONCE(!bio_list_empty(&ended));
	ddsnap_end_bios(v, &ended);

	ddsnap_wake_server(v);
	if (pending && wait &&
	    !wait_for_completion_killable_timeout(&call->done,
						  GONE_WAIT_SECONDS * HZ))
		DMWARN("%s: the snapshot server has not noted within %u s that a device is gone",
		       v->key, GONE_WAIT_SECONDS);
	kref_put(&call->kref, ddsnap_call_free);
}

/*----------------------------------------------------------------
 * Stopping
 *----------------------------------------------------------------
 */

/* True if DEVICE_STOPPED was queued. */
static bool __check_stopped(struct ddsnap_device *dev)
{
	lockdep_assert_held(&dev->volume->lock);

	if (!dev->tell_stopped || atomic_read(&dev->in_flight))
		return false;

	dev->tell_stopped = false;
	if (dev->stop.place == PLACE_NOWHERE)
		__ddsnap_make_unsent(dev->volume, &dev->stop,
				     &dev->volume->unsent);
	return true;
}

/* Nobody waits for DEVICE_STOPPED any more. The device stays stopped. */
void __ddsnap_forget_stop(struct ddsnap_device *dev)
{
	lockdep_assert_held(&dev->volume->lock);

	dev->tell_stopped = false;
	if (dev->stop.place != PLACE_NOWHERE)
		__ddsnap_unlist(dev->volume, &dev->stop);
}

/**
 * ddsnap_snapshot_io_end - a bio counted in device->in_flight has ended
 * @dev: the device
 */
void ddsnap_snapshot_io_end(struct ddsnap_device *dev)
{
	struct ddsnap_volume *v = dev->volume;
	unsigned long flags;
	bool told;

	/* Fully ordered; pairs with smp_mb() in ddsnap_device_stop(). */
	if (!atomic_dec_and_test(&dev->in_flight) || !READ_ONCE(dev->stopped))
		return;

	spin_lock_irqsave(&v->lock, flags);
	told = __check_stopped(dev);
	spin_unlock_irqrestore(&v->lock, flags);
	if (told)
		ddsnap_wake_server(v);
}

/**
 * ddsnap_device_stop - the server wants no more I/O of a snapshot's device
 * @v: the volume
 * @number: the device's
 *
 * A device that is not there has left, or is just leaving: GONE tells.
 *
 * Return: 0; -EPROTO for the origin.
 */
int ddsnap_device_stop(struct ddsnap_volume *v, u64 number)
{
	struct bio_list ended = BIO_EMPTY_LIST;
	struct ddsnap_device *dev;
	u64 snapshot = DDSNAP_ORIGIN;
	bool first = false;

	spin_lock_irq(&v->lock);
	dev = __ddsnap_find_device(v, number);
	if (dev && dev->snapshot == DDSNAP_ORIGIN) {
		spin_unlock_irq(&v->lock);
		return -EPROTO;
	}
	if (dev) {
		snapshot = dev->snapshot;
		first = !dev->stopped;
		WRITE_ONCE(dev->stopped, true);
		dev->tell_stopped = true;
		smp_mb(); /* pairs with the end of ddsnap_snapshot_io_end() */
		__ddsnap_sweep(v, &ended);
		__check_stopped(dev);
	}
	spin_unlock_irq(&v->lock);

	ddsnap_end_bios(v, &ended);
	ddsnap_wake_server(v);
	if (first)
		DMWARN("%s: the snapshot server has stopped snapshot %llu: its I/O fails",
		       v->key, snapshot);
	return 0;
}

/*----------------------------------------------------------------
 * Suspending
 *----------------------------------------------------------------
 */

/**
 * ddsnap_device_suspend - presuspend
 * @dev: the device
 * @noflush: I/O may be pushed back to dm core
 *
 * The suspension waits for the server's answers, or for those of the next one,
 * but no longer than the I/O does: then that fails. Without a server I/O is
 * pushed back where dm core allows it, as dm-mpath does without a path.
 */
void ddsnap_device_suspend(struct ddsnap_device *dev, bool noflush)
{
	struct bio_list ended = BIO_EMPTY_LIST;
	struct ddsnap_volume *v = dev->volume;

	spin_lock_irq(&v->lock);
	dev->pushing_back = noflush;
	__ddsnap_sweep(v, &ended);
	spin_unlock_irq(&v->lock);
	ddsnap_end_bios(v, &ended);
}

/**
 * ddsnap_device_resume - resume, or the suspension was given up
 * @dev: the device
 */
void ddsnap_device_resume(struct ddsnap_device *dev)
{
	spin_lock_irq(&dev->volume->lock);
	dev->pushing_back = false;
	spin_unlock_irq(&dev->volume->lock);
}
