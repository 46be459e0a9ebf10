/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the files of dm-ddsnap share. target.c opens with the
 * algorithm and the order of the locks.
 */
#ifndef _DM_DDSNAP_H
#define _DM_DDSNAP_H

#define DM_MSG_PREFIX "ddsnap"

#include <linux/atomic.h>
#include <linux/bio.h>
#include <linux/cache.h>
#include <linux/completion.h>
#include <linux/device-mapper.h>
#include <linux/hashtable.h>
#include <linux/kref.h>
#include <linux/list.h>
#include <linux/mutex.h>
#include <linux/spinlock.h>
#include <linux/wait.h>
#include <linux/workqueue.h>

#include "compat.h"
#include "dm-ddsnap-protocol.h"

#define DDSNAP_VERSION		"0.11.0"
#define DDSNAP_HASH_BITS	10

struct ddsnap_channel;
struct ddsnap_volume;

/* Where a question to the server is. */
enum ddsnap_place {
	PLACE_NOWHERE,		/* not outstanding */
	PLACE_UNSENT,		/* volume->unsent: the server has yet to read it */
	PLACE_SENT,		/* volume->sent, volume->by_id: awaits its reply */
	PLACE_HELD,		/* volume->held: to be asked when the gate opens */
	PLACE_GRANTED,		/* volume->granted, volume->blocked: waits for reads */
};

/**
 * struct ddsnap_question - something to be told to the server
 * @id: the request's id while it is unsent or sent
 * @awaited: while it is granted: a chunk of it that a tracked read is about
 * @op: enum ddsnap_request_op
 * @place: enum ddsnap_place
 * @count: how many chunks it is about (I/O only; more than one: ORIGIN_WRITE)
 * @dev: the asking device, or the one that has stopped; NULL for
 *	BARRIER_REACHED
 * @chunk: the first chunk asked about (I/O only)
 * @since: when it was first asked, in jiffies (I/O only)
 * @list: on the list @place names
 * @hashed: in volume->by_id while sent, in volume->blocked by @awaited while
 *	granted
 * @by_chunk: in volume->questions by @chunk while outstanding (I/O only)
 * @asked: in volume->asked while outstanding (I/O only)
 * @bios: the bios that wait for the answer, in order (I/O only)
 *
 * All under volume->lock.
 */
struct ddsnap_question {
	union {
		u64 id;
		u64 awaited;
	};
	u16 op;
	u16 place;
	u16 count;
	struct ddsnap_device *dev;
	u64 chunk;
	unsigned long since;
	struct list_head list;
	struct list_head asked;
	struct hlist_node hashed;
	struct hlist_node by_chunk;
	struct bio_list bios;
};

/**
 * struct ddsnap_call - IDENTIFY or GONE: a question that may outlive its device
 * @q: the question; q.dev is NULL once the device has left
 * @kref: one for the device or the task that waits, one while outstanding
 * @done: completed when it has been answered or never will be
 * @status: the reply's status
 * @value: the reply's value
 * @device: device number
 * @snapshot: snapshot tag or DDSNAP_ORIGIN
 * @sectors: length of the device
 */
struct ddsnap_call {
	struct ddsnap_question q;
	struct kref kref;
	struct completion done;
	u32 status;
	u64 value;
	u32 device;
	u64 snapshot;
	u64 sectors;
};

/* ddsnap_io.state */
enum ddsnap_io_state {
	IO_PLAIN,		/* nothing to do at its end */
	IO_ORIGIN_WRITE,	/* counted in volume->origin_writes */
	IO_SNAPSHOT,		/* counted in device->in_flight */
	IO_TRACKED_READ,	/* the same, and in volume->tracked */
};

/**
 * struct ddsnap_io - the target's share of each bio
 * @state: enum ddsnap_io_state, owned by whoever owns the bio
 * @chunks: how many it asked about, and counts for in volume->pending
 * @to: where submit_work sends it
 * @question: used by the bio that came first for its run, so that asking
 *	allocates nothing; over before that bio is submitted or ended
 * @tracked: in volume->tracked, under volume->lock
 * @tracked_chunk: chunk of the origin being read
 */
struct ddsnap_io {
	u8 state;
	u16 chunks;
	struct dm_dev *to;
	union {
		struct ddsnap_question question;
		struct {
			struct hlist_node tracked;
			u64 tracked_chunk;
		};
	};
};

/* One CPU's counters for the status line and /proc/driver/ddsnap/NAME. */
struct ddsnap_counts {
	u64 reads;		/* bios */
	u64 writes;		/* bios; discards and write-zeroes included */
	u64 questions;		/* requests queued for the server */
	u64 at_once;		/* origin writes to unique chunks */
	u64 dropped;		/* discards of chunks not known to be unique */
};

/* A mapped device's counters, shared by its old and its new table. */
struct ddsnap_stats {
	struct list_head list;		/* stats_mutex */
	struct mapped_device *md;
	unsigned int refs;		/* stats_mutex */
	struct ddsnap_counts __percpu *counts;
	char name[DM_NAME_LEN];		/* so long that the next is on another cache line */
	atomic_t waiting;		/* bios that wait for an answer */
	struct proc_dir_entry *proc;	/* or NULL */
};

/**
 * struct ddsnap_device - one target
 */
struct ddsnap_device {
	struct dm_target *ti;
	struct mapped_device *md;
	struct ddsnap_volume *volume;
	struct dm_dev *store;		/* SNAPDEV */
	struct dm_dev *origin;		/* ORGDEV */
	struct ddsnap_stats *stats;
	u64 snapshot;			/* tag, or DDSNAP_ORIGIN */
	sector_t sectors;
	unsigned int server_timeout;	/* seconds */
	bool timeout_given;		/* in the table line */

	/* volume->lock, and volume->devices_mutex too for changing the lists */
	struct list_head list;
	struct list_head origins;	/* in volume->origins, if it is one */
	struct ddsnap_call *call;

	/* volume->lock */
	u8 chunk_shift;			/* log2 sectors; valid once identified */
	bool identified;		/* some server has accepted the device */
	bool connected;			/* the server attached now has */
	bool refused;			/* the server attached now has not */
	bool failing;			/* no server for too long */
	bool stopped;			/* for good; read without lock too */
	bool tell_stopped;		/* the server awaits DEVICE_STOPPED */
	bool pushing_back;		/* noflush suspension: I/O that has no server */
	struct ddsnap_question stop;	/* DEVICE_STOPPED */

	/* A snapshot's bios on their way down. Grows under volume->lock only. */
	atomic_t in_flight;

	/*
	 * One bit a chunk: set means that the chunk may be written without
	 * asking. NULL: ask always. Bits are set under volume->lock and read
	 * without it; see "The gate" in target.c.
	 */
	unsigned long *unique;
	unsigned long unique_chunks;
};

/* The gate through which origin writes pass; see "The gate" in target.c. */
enum ddsnap_gate {
	GATE_OPEN,
	GATE_DRAINING,		/* closed; writes are in flight */
	GATE_DRAINED,		/* closed; BARRIER_REACHED is queued */
	GATE_TOLD,		/* closed; the server has read BARRIER_REACHED */
	GATE_LOST,		/* closed; the server went away during a barrier */
	GATE_CLEARING,		/* closed; the unique bits are being cleared */
};

/**
 * struct ddsnap_volume - all that share one key
 *
 * Grouped by who writes, each group on cache lines of its own. A write to a
 * unique chunk reads the first group and counts itself in the second, and that
 * is all: so a processor that asks, answers or wakes the server, and writes to
 * the others all the time, takes no line away from those that need not ask.
 */
struct ddsnap_volume {
	/*
	 * Read by all, hardly ever written: when the volume is made, a snapshot
	 * is created, or a server comes or goes.
	 */
	char key[DDSNAP_KEY_SIZE];
	struct workqueue_struct *wq;	/* submits bios, watches the clock */
	u8 gate;			/* enum ddsnap_gate; read without lock */
	bool all_unique;		/* no snapshot needs the origin; as the unique bits */

	/*
	 * Written by every origin write, when it begins and when it ends: those
	 * in flight, plus those just looking.
	 */
	atomic_t origin_writes ____cacheline_aligned_in_smp;

	/*
	 * Written by who asks and by who answers. Irqs are off: the lock is
	 * taken at the end of bios.
	 */
	spinlock_t lock ____cacheline_aligned_in_smp;

	/* lock */
	struct list_head unsent;
	struct list_head sent;
	struct list_head held;
	struct list_head granted;
	struct list_head asked;		/* all outstanding I/O, oldest first */
	u64 next_id;
	unsigned long answered;		/* jiffies: the last answer about I/O */
	bool silent;			/* I/O has failed since then, for its age */
	bool after_silent;		/* the server has followed a silent one */
	u32 late;			/* answers still to come that nobody awaits */
	struct bio_list ready;		/* for submit_work */

	/* lock, and devices_mutex too for changing them */
	struct list_head devices;
	struct list_head origins;	/* those of the origin: two while a table is reloaded */

	/* lock */
	struct ddsnap_channel *channel;	/* the attached server's, or NULL */
	u8 chunk_shift;			/* log2 sectors, from the last attach */
	u32 next_device;
	unsigned long lost_at;		/* jiffies */
	bool told_failing;		/* the log has it */
	unsigned long shortest;		/* jiffies: no device's server_timeout is less */
	u64 barrier_id;
	struct ddsnap_question reached;	/* BARRIER_REACHED */
	DECLARE_HASHTABLE(by_id, DDSNAP_HASH_BITS);
	DECLARE_HASHTABLE(questions, DDSNAP_HASH_BITS);
	DECLARE_HASHTABLE(blocked, DDSNAP_HASH_BITS);
	DECLARE_HASHTABLE(tracked, DDSNAP_HASH_BITS);
	unsigned int tracked_reads;	/* how many are in there */

	/*
	 * Written by who asks and by submit_work. pending counts the chunks of
	 * the bios that wait for an answer, or since then for submit_work: what
	 * the server has to copy out before the last of them goes on.
	 */
	atomic_t pending ____cacheline_aligned_in_smp;
	wait_queue_head_t throttle;	/* submitters, while those are too many */

	/* Written by the server's read and poll, and by who wakes it. */
	wait_queue_head_t wait ____cacheline_aligned_in_smp;

	/* Written by the workqueue, and by those that queue work. */
	struct work_struct submit_work ____cacheline_aligned_in_smp;
	struct delayed_work lost_work;
	struct delayed_work age_work;

	/* Devices and servers come and go, snapshots are created. */
	struct mutex devices_mutex;	/* changes to the lists of devices, clearing of bits */
	struct list_head list;		/* volumes_mutex */
	unsigned int refs;		/* volumes_mutex */
};

/*
 * Functions whose name starts with __ run under volume->lock.
 */

/* volume.c */
struct ddsnap_volume *ddsnap_volume_get(const char *key);
void ddsnap_volume_put(struct ddsnap_volume *v);
int __must_check ddsnap_volume_attach(struct ddsnap_volume *v,
				      struct ddsnap_channel *channel,
				      unsigned int chunk_shift);
void ddsnap_volume_detach(struct ddsnap_volume *v);

/* device.c */
struct ddsnap_call *ddsnap_call_of(struct ddsnap_question *q);
void ddsnap_call_free(struct kref *kref);
void __ddsnap_queue_call(struct ddsnap_volume *v, struct ddsnap_call *call,
			 enum ddsnap_request_op op, struct list_head *list);
void __ddsnap_drop_call(struct ddsnap_volume *v, struct ddsnap_call *call);
int __must_check ddsnap_device_join(struct ddsnap_device *dev, char **error);
void ddsnap_device_leave(struct ddsnap_device *dev, bool wait);
int __must_check ddsnap_device_stop(struct ddsnap_volume *v, u64 number);
void ddsnap_snapshot_io_end(struct ddsnap_device *dev);
void __ddsnap_forget_stop(struct ddsnap_device *dev);
struct ddsnap_device *__ddsnap_find_device(struct ddsnap_volume *v, u64 number);
void ddsnap_device_suspend(struct ddsnap_device *dev, bool noflush);
void ddsnap_device_resume(struct ddsnap_device *dev);

/* gate.c */
bool ddsnap_origin_write_begin(struct ddsnap_volume *v);
void ddsnap_origin_write_end(struct ddsnap_volume *v);
void __ddsnap_open_gate(struct ddsnap_volume *v);
void __ddsnap_take_back_granted(struct ddsnap_volume *v);
void ddsnap_all_unique(struct ddsnap_volume *v);
void ddsnap_clear_unique(struct ddsnap_volume *v);
int __must_check ddsnap_barrier_begin(struct ddsnap_volume *v, u64 id);
int __must_check ddsnap_barrier_end(struct ddsnap_volume *v, u64 id,
				    bool created);

/* question.c */
void ddsnap_wake_server(struct ddsnap_volume *v);
void ddsnap_end_bios(struct ddsnap_volume *v, struct bio_list *bios);
bool ddsnap_is_io(u32 op);
void __ddsnap_unlist(struct ddsnap_volume *v, struct ddsnap_question *q);
void __ddsnap_make_unsent(struct ddsnap_volume *v, struct ddsnap_question *q,
			  struct list_head *list);
void __ddsnap_ask_origin_write(struct ddsnap_volume *v,
			       struct ddsnap_question *q);
struct ddsnap_question *__ddsnap_find_sent(struct ddsnap_volume *v, u64 id,
					   u32 op);
void __ddsnap_end_question(struct ddsnap_volume *v, struct ddsnap_question *q,
			   struct bio_list *bios);
void __ddsnap_cancel(struct ddsnap_volume *v, struct ddsnap_question *q,
		     blk_status_t status, struct bio_list *ended);
void __ddsnap_sweep(struct ddsnap_volume *v, struct bio_list *ended);
void ddsnap_submit_ready(struct work_struct *work);
void ddsnap_expire_old(struct work_struct *work);
void __ddsnap_ready(struct ddsnap_volume *v, struct bio *bio,
		    struct dm_dev *to, enum ddsnap_io_state state);
bool __ddsnap_is_unique(struct ddsnap_volume *v, u64 chunk,
			unsigned int count);
void __ddsnap_grant_origin_write(struct ddsnap_volume *v,
				 struct ddsnap_question *q);
void __ddsnap_read_track(struct ddsnap_volume *v, struct ddsnap_io *io,
			 u64 chunk);
void ddsnap_read_untrack(struct ddsnap_volume *v, struct ddsnap_io *io);
int ddsnap_ask(struct ddsnap_device *dev, struct bio *bio, unsigned int op,
	       u64 chunk, unsigned int count);
bool ddsnap_volume_has_unsent(struct ddsnap_volume *v);
unsigned int ddsnap_volume_take(struct ddsnap_volume *v,
				struct ddsnap_request *requests,
				unsigned int max, u64 *taken);
void ddsnap_volume_untake(struct ddsnap_volume *v,
			  const struct ddsnap_request *requests,
			  unsigned int count);

/* reply.c */
unsigned int __must_check
ddsnap_volume_replies(struct ddsnap_volume *v,
		      const struct ddsnap_reply *replies, unsigned int count);

/* channel.c */
int ddsnap_channel_init(void);
void ddsnap_channel_exit(void);

/* stats.c */
struct ddsnap_stats *ddsnap_stats_get(struct mapped_device *md);
void ddsnap_stats_put(struct ddsnap_stats *stats);
void ddsnap_stats_sum(const struct ddsnap_stats *stats,
		      struct ddsnap_counts *sum);
void ddsnap_stats_init(void);
void ddsnap_stats_exit(void);

/* target.c */
extern unsigned int ddsnap_server_timeout;
extern unsigned int ddsnap_max_waiting;
unsigned long ddsnap_answer_limit(const struct ddsnap_device *dev);

static inline struct ddsnap_io *ddsnap_io(struct bio *bio)
{
	return dm_per_bio_data(bio, sizeof(struct ddsnap_io));
}

static inline sector_t ddsnap_chunk_to_sector(struct ddsnap_device *dev,
					      u64 chunk)
{
	return chunk << dev->chunk_shift;
}

static inline u64 ddsnap_sector_to_chunk(struct ddsnap_device *dev,
					 sector_t sector)
{
	return sector >> dev->chunk_shift;
}

#endif /* _DM_DDSNAP_H */
