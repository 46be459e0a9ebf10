// SPDX-License-Identifier: GPL-2.0-only
/*
 * Volumes, and the servers that attach to them and are lost. target.c opens
 * with the algorithm and the order of the locks.
 */
#include "ddsnap.h"

#include <linux/errno.h>
#include <linux/slab.h>

/* The list of volumes and their references. */
static DEFINE_MUTEX(volumes_mutex);
static LIST_HEAD(volumes);

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
		if (time_after_eq(now, deadline))
			dev->failing = true;
		else
			next = min_not_zero(next, deadline - now);
	}
	__ddsnap_sweep(v, ended);
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
		mod_delayed_work(v->wq, &v->lost_work, next);
	spin_unlock_irq(&v->lock);

	if (tell)
		log_failing(v, lost_at);
	ddsnap_end_bios(v, &ended);
}

/**
 * ddsnap_volume_detach - the server's file was closed
 * @v: the volume
 *
 * What the server had read and not answered goes back to the front of the
 * queue, in order. If the server has read BARRIER_REACHED, the barrier stays:
 * whether its snapshot was committed, only the next server knows. If not, none
 * was.
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
	v->late = 0;
	/* It has not answered either. */
	v->silent |= v->after_silent;

	if (v->gate == GATE_DRAINED)
		__ddsnap_unlist(v, &v->reached);
	if (v->gate == GATE_DRAINING || v->gate == GATE_DRAINED)
		__ddsnap_open_gate(v);
	else if (v->gate != GATE_OPEN)
		WRITE_ONCE(v->gate, GATE_LOST);

	list_for_each_entry_safe_reverse(q, tmp, &v->sent, list) {
		__ddsnap_unlist(v, q);
		q->place = PLACE_UNSENT;
		list_add(&q->list, &v->unsent);
	}
	/* The next one stops stopped devices again, to hear about them. */
	list_for_each_entry(dev, &v->devices, list)
		__ddsnap_forget_stop(dev);
	/*
	 * Calls concern this server alone: the next one gets an IDENTIFY for
	 * each device, and has never heard of those that are gone.
	 */
	list_for_each_entry_safe(q, tmp, &v->unsent, list)
		if (!ddsnap_is_io(q->op))
			__ddsnap_drop_call(v, ddsnap_call_of(q));

	list_for_each_entry(dev, &v->devices, list) {
		if (dev->identified)
			devices++;
		dev->connected = false;
		dev->refused = false;
	}
	next = __expire(v, &ended);
	tell = __tell_failing(v);
	if (next)
		mod_delayed_work(v->wq, &v->lost_work, next);
	spin_unlock_irq(&v->lock);

	if (devices)
		DMWARN("%s: the snapshot server is gone; %u devices wait for another",
		       v->key, devices);
	if (tell)
		log_failing(v, jiffies);
	ddsnap_end_bios(v, &ended);
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
	struct ddsnap_device *dev;
	unsigned int devices = 0;
	LIST_HEAD(identify);
	int r = 0;

	mutex_lock(&v->devices_mutex);
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
	__ddsnap_take_back_granted(v);
	spin_unlock_irq(&v->lock);
	ddsnap_clear_unique(v);
	spin_lock_irq(&v->lock);

	__ddsnap_open_gate(v);
	list_for_each_entry(dev, &v->devices, list) {
		if (dev->identified)
			devices++;
		dev->failing = false;
		__ddsnap_queue_call(v, dev->call, DDSNAP_IDENTIFY, &identify);
	}
	list_splice(&identify, &v->unsent);
	v->chunk_shift = chunk_shift;
	v->channel = channel;
	/* This one has not been silent yet. */
	v->after_silent = v->silent;
	v->silent = false;
	cancel_delayed_work(&v->lost_work);
out:
	spin_unlock_irq(&v->lock);
	mutex_unlock(&v->devices_mutex);

	if (r)
		return r;
	ddsnap_wake_server(v);
	if (devices)
		DMINFO("%s: a snapshot server is attached again; %u devices go on",
		       v->key, devices);
	return 0;
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
	/*
	 * Each volume has its own, with its own rescuer: one volume may lie on
	 * another. The name is none that a script takes for the server.
	 */
	v->wq = alloc_workqueue("dds_submit",
				WQ_MEM_RECLAIM | DDSNAP_WQ_PERCPU, 0);
	if (!v->wq) {
		kvfree(v);
		return NULL;
	}
	strscpy(v->key, key, sizeof(v->key));
	spin_lock_init(&v->lock);
	mutex_init(&v->devices_mutex);
	INIT_LIST_HEAD(&v->devices);
	INIT_LIST_HEAD(&v->origins);
	INIT_LIST_HEAD(&v->unsent);
	INIT_LIST_HEAD(&v->sent);
	INIT_LIST_HEAD(&v->held);
	INIT_LIST_HEAD(&v->granted);
	INIT_LIST_HEAD(&v->asked);
	v->shortest = MAX_JIFFY_OFFSET;
	v->answered = jiffies;
	hash_init(v->by_id);
	hash_init(v->questions);
	hash_init(v->blocked);
	hash_init(v->tracked);
	bio_list_init(&v->ready);
	v->reached.op = DDSNAP_BARRIER_REACHED;
	INIT_LIST_HEAD(&v->reached.list);
	init_waitqueue_head(&v->throttle);
	init_waitqueue_head(&v->wait);
	INIT_WORK(&v->submit_work, ddsnap_submit_ready);
	INIT_DELAYED_WORK(&v->lost_work, lost_too_long);
	INIT_DELAYED_WORK(&v->age_work, ddsnap_expire_old);
	return v;
}

static void volume_free(struct ddsnap_volume *v)
{
	destroy_workqueue(v->wq);
	mutex_destroy(&v->devices_mutex);
	kvfree(v);
}

static struct ddsnap_volume *find_volume(const char *key)
{
	struct ddsnap_volume *v;

	lockdep_assert_held(&volumes_mutex);

	list_for_each_entry(v, &volumes, list)
		if (!strcmp(v->key, key))
			return v;
	return NULL;
}

/**
 * ddsnap_volume_get - the volume of a key, made if there is none
 * @key: shorter than DDSNAP_KEY_SIZE
 *
 * Return: the volume, to be given to ddsnap_volume_put(); NULL: no memory.
 */
struct ddsnap_volume *ddsnap_volume_get(const char *key)
{
	struct ddsnap_volume *v, *new = NULL;

	for (;;) {
		mutex_lock(&volumes_mutex);
		v = find_volume(key);
		if (!v && new) {
			v = new;
			new = NULL;
			list_add_tail(&v->list, &volumes);
		}
		if (v)
			v->refs++;
		mutex_unlock(&volumes_mutex);
		if (v)
			break;
		/*
		 * Not under the mutex: memory may wait for writeback, and
		 * that for a server which needs the mutex to attach.
		 */
		new = volume_new(key);
		if (!new)
			return NULL;
	}
	if (new)
		volume_free(new);
	return v;
}

/**
 * ddsnap_volume_put - the counterpart of ddsnap_volume_get()
 * @v: the volume
 */
void ddsnap_volume_put(struct ddsnap_volume *v)
{
	bool last;

	mutex_lock(&volumes_mutex);
	last = !--v->refs;
	if (last)
		list_del(&v->list);
	mutex_unlock(&volumes_mutex);
	if (!last)
		return;

	cancel_delayed_work_sync(&v->lost_work);
	cancel_delayed_work_sync(&v->age_work);
	cancel_work_sync(&v->submit_work);
	WARN_ON_ONCE(!list_empty(&v->unsent) || !list_empty(&v->sent) ||
		     !list_empty(&v->held) || !list_empty(&v->granted) ||
		     !list_empty(&v->asked));
	volume_free(v);
}
