// SPDX-License-Identifier: GPL-2.0-only
/*
 * fake-server - a snapshot server for testing dm-ddsnap by itself
 *
 *	fake-server serve KEY STORE ORIGIN STATE CONTROL CHUNK_SHIFT [new]
 *	fake-server ctl CONTROL COMMAND...
 *
 * It keeps real copies of real chunks, but its metadata is a table in STATE,
 * a file mapped shared, so that it survives kill -9 (not a power cut) and the
 * next fake-server goes on where this one stopped. CONTROL is a unix socket
 * that takes one command a connection and answers one line, "ok ..." or
 * "err ...". See commands[] at the end for what can be asked of it: chiefly the
 * faults a real server must not have.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "dm-ddsnap-protocol.h"

#define SNAPSHOTS_MAX	64
#define COPIES_MAX	(1 << 18)
#define QUEUE_MAX	65536
#define BATCH		32
#define BARRIER_SECONDS	60

struct snapshot {
	uint64_t seq;
	uint32_t tag;
	uint32_t live;
};

/* A chunk in the store: an exception, or private to the snapshot seq. */
struct copy {
	uint64_t chunk;
	uint64_t seq;
	uint64_t store_chunk;
	uint64_t private;
};

struct state {
	uint64_t seq;
	uint64_t snapshots;
	uint64_t copies;
	uint64_t next_store_chunk;
	uint64_t poison;			/* plus 1; 0: none */
	struct snapshot snapshot[SNAPSHOTS_MAX];
	struct copy copy[COPIES_MAX];
};

static struct state *state;
static int32_t *first_copy;		/* per chunk, index or -1 */
static int32_t next_copy[COPIES_MAX];
static uint64_t origin_chunks, store_chunks;	/* the origin's last may be short */
static uint64_t origin_sectors;
static uint32_t chunk_shift;		/* log2 bytes */
static size_t chunk_size;
static int channel = -1, origin = -1, store = -1;
static char *buffer;

static uint64_t asked[8];		/* requests read, by op */
static uint64_t asked_chunks;		/* that ORIGIN_WRITEs were about */
static uint64_t longest_run;		/* of these */
static uint64_t longest_read;		/* chunks of ORIGIN_WRITEs in one read(2) */
static long identified;			/* IDENTIFY accepted less GONE */
static uint64_t returning;		/* IDENTIFY of devices that were up before */
static uint32_t newest_device;		/* of a snapshot, from IDENTIFY */

/* Faults asked for. */
static bool silent;			/* answer nothing */
static bool silent_gone;		/* answer no GONE */
static uint32_t fail_status[8];		/* by op */
static bool beyond;			/* name store chunks that do not exist */
static bool stale;			/* name the origin, whatever was copied out */
static long delay_us;			/* before each batch of answers */
static uint64_t poison = ~0ULL;		/* dies when asked about this chunk */
static uint64_t bad_chunk = ~0ULL;	/* of the origin, cannot be copied out */

/* A barrier under way. */
static uint64_t barrier;		/* id, 0: none */
static uint64_t last_barrier;
static bool reached;

static struct ddsnap_request queue[QUEUE_MAX];
static size_t queued;

static void die(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	fprintf(stderr, "fake-server: ");
	vfprintf(stderr, format, args);
	fprintf(stderr, "\n");
	va_end(args);
	exit(1);
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

/*
 * The store
 */

static void index_copy(uint64_t i)
{
	uint64_t chunk = state->copy[i].chunk;

	next_copy[i] = first_copy[chunk];
	first_copy[chunk] = i;
}

static struct snapshot *find_snapshot(uint64_t tag)
{
	for (uint64_t i = 0; i < state->snapshots; i++)
		if (state->snapshot[i].live && state->snapshot[i].tag == tag)
			return &state->snapshot[i];
	return NULL;
}

static struct copy *find_private(uint64_t seq, uint64_t chunk)
{
	for (int32_t i = first_copy[chunk]; i >= 0; i = next_copy[i])
		if (state->copy[i].private && state->copy[i].seq == seq)
			return &state->copy[i];
	return NULL;
}

/* The exception of the smallest sequence number from seq on. */
static struct copy *find_exception(uint64_t seq, uint64_t chunk)
{
	struct copy *best = NULL;

	for (int32_t i = first_copy[chunk]; i >= 0; i = next_copy[i]) {
		struct copy *c = &state->copy[i];

		if (!c->private && c->seq >= seq && (!best || c->seq < best->seq))
			best = c;
	}
	return best;
}

static void move(int from, uint64_t from_chunk, uint64_t to_chunk)
{
	off_t in = from_chunk << chunk_shift, out = to_chunk << chunk_shift;
	size_t size = chunk_size;

	if (from == origin && from_chunk == origin_chunks - 1)
		size = (origin_sectors << 9) - in;
	memset(buffer, 0, chunk_size);
	if (pread(from, buffer, size, in) != (ssize_t)size)
		die("cannot read chunk %llu: %m", (long long)from_chunk);
	if (pwrite(store, buffer, chunk_size, out) != (ssize_t)chunk_size)
		die("cannot write store chunk %llu: %m", (long long)to_chunk);
}

static struct copy *add_copy(uint64_t chunk, uint64_t seq, bool private,
			     int from, uint64_t from_chunk)
{
	uint64_t i = state->copies;

	if (i == COPIES_MAX || state->next_store_chunk >= store_chunks)
		return NULL;
	move(from, from_chunk, state->next_store_chunk);
	state->copy[i] = (struct copy){
		.chunk = chunk, .seq = seq, .private = private,
		.store_chunk = state->next_store_chunk,
	};
	/* What is not counted does not exist for the next server. */
	__atomic_store_n(&state->next_store_chunk,
			 state->next_store_chunk + 1, __ATOMIC_SEQ_CST);
	__atomic_store_n(&state->copies, i + 1, __ATOMIC_SEQ_CST);
	index_copy(i);
	return &state->copy[i];
}

/*
 * Answers
 */

static int copy_out(uint64_t chunk)
{
	uint64_t newest = 0;

	for (uint64_t i = 0; i < state->snapshots; i++)
		if (state->snapshot[i].live && state->snapshot[i].seq > newest)
			newest = state->snapshot[i].seq;
	if (!newest || find_exception(newest, chunk))
		return 0;
	return add_copy(chunk, newest, false, origin, chunk) ? 0 : ENOSPC;
}

/* What was copied out before a chunk that fails stays so. */
static int origin_write(uint64_t chunk, uint64_t count)
{
	int status = 0;

	while (count-- && !status)
		status = copy_out(chunk++);
	return status;
}

static bool is_about(const struct ddsnap_request *q, uint64_t chunk)
{
	return chunk >= q->chunk && chunk - q->chunk < (q->count ?: 1);
}

static int snapshot_read(struct snapshot *s, uint64_t chunk, uint64_t *value)
{
	struct copy *c = find_private(s->seq, chunk);

	if (!c)
		c = find_exception(s->seq, chunk);
	if (!c)
		return -1;
	*value = c->store_chunk;
	return 0;
}

static int snapshot_write(struct snapshot *s, uint64_t chunk, uint64_t *value)
{
	struct copy *c = find_private(s->seq, chunk), *e;

	if (!c) {
		e = find_exception(s->seq, chunk);
		c = add_copy(chunk, s->seq, true, e ? store : origin,
			     e ? e->store_chunk : chunk);
	}
	if (!c)
		return ENOSPC;
	*value = c->store_chunk;
	return 0;
}

static int identify(uint64_t tag, uint64_t sectors, uint64_t *value)
{
	*value = origin_sectors;
	if (tag != DDSNAP_ORIGIN && !find_snapshot(tag))
		return ENOENT;
	if (sectors != *value)
		return EINVAL;
	identified++;
	return 0;
}

static struct ddsnap_reply answer(const struct ddsnap_request *q)
{
	struct ddsnap_reply r = { .id = q->id, .op = q->op };
	struct snapshot *s = NULL;
	uint64_t value = 0;
	int status = 0;

	if (q->op != DDSNAP_GONE && q->snapshot != DDSNAP_ORIGIN)
		s = find_snapshot(q->snapshot);
	if (fail_status[q->op]) {
		status = fail_status[q->op];
	} else if (q->op == DDSNAP_IDENTIFY) {
		status = identify(q->snapshot, q->sectors, &value);
	} else if (q->op == DDSNAP_GONE) {
		identified--;
	} else if (q->chunk >= origin_chunks ||
		   q->count > origin_chunks - q->chunk) {
		die("asked about %u chunks from %llu on, of %llu", q->count,
		    (long long)q->chunk, (long long)origin_chunks);
	} else if (is_about(q, poison)) {
		kill(getpid(), SIGKILL);
	} else if (q->op == DDSNAP_ORIGIN_WRITE && is_about(q, bad_chunk)) {
		/* Those before it are copied out all the same. */
		origin_write(q->chunk, bad_chunk - q->chunk);
		status = EIO;
	} else if (q->op == DDSNAP_ORIGIN_WRITE) {
		status = origin_write(q->chunk, q->count);
	} else if (!s) {
		status = ENOENT;
	} else if (q->op == DDSNAP_SNAPSHOT_WRITE) {
		status = snapshot_write(s, q->chunk, &value);
	} else if (snapshot_read(s, q->chunk, &value)) {
		r.flags = DDSNAP_REPLY_FROM_ORIGIN;
	}
	if (beyond && q->op == DDSNAP_SNAPSHOT_READ) {
		r.flags = 0;
		value = store_chunks;
	}
	if (stale && q->op == DDSNAP_SNAPSHOT_READ)
		r.flags = DDSNAP_REPLY_FROM_ORIGIN;
	r.status = status;
	r.value = value;
	return r;
}

static int tell(const void *records, size_t count)
{
	size_t size = count * sizeof(struct ddsnap_reply);
	ssize_t r = write(channel, records, size);

	if (r < 0)
		return errno;
	return r == (ssize_t)size ? 0 : EPROTO;
}

static int command(uint32_t op, uint64_t id, uint32_t flags)
{
	struct ddsnap_reply r = { .id = id, .op = op, .flags = flags };

	return tell(&r, 1);
}

static bool withheld(const struct ddsnap_request *q)
{
	return silent || (silent_gone && q->op == DDSNAP_GONE) ||
	       (barrier && q->op == DDSNAP_ORIGIN_WRITE);
}

/* Answers what may be answered, and keeps the rest in order. */
static void answer_queue(void)
{
	struct ddsnap_reply replies[BATCH];
	size_t kept = 0, count = 0;
	int r;

	if (queued && delay_us)
		usleep(delay_us);
	for (size_t i = 0; i < queued; i++) {
		if (withheld(&queue[i])) {
			queue[kept++] = queue[i];
			continue;
		}
		replies[count++] = answer(&queue[i]);
		if (count == BATCH) {
			r = tell(replies, count);
			if (r)
				die("reply refused: %s", strerror(r));
			count = 0;
		}
	}
	queued = kept;
	if (count) {
		r = tell(replies, count);
		if (r)
			die("reply refused: %s", strerror(r));
	}
}

static void count_run(const struct ddsnap_request *q, uint64_t *chunks)
{
	if (!q->count || q->count > DDSNAP_RUN_CHUNKS ||
	    (q->count > 1 && q->count << chunk_shift > DDSNAP_RUN_BYTES))
		die("a run of %u chunks", q->count);
	asked_chunks += q->count;
	*chunks += q->count;
	if (*chunks > q->count && *chunks << chunk_shift > DDSNAP_READ_BYTES)
		die("%llu chunks in one read", (long long)*chunks);
	if (longest_run < q->count)
		longest_run = q->count;
	if (longest_read < *chunks)
		longest_read = *chunks;
}

static void read_requests(void)
{
	struct ddsnap_request *q;
	uint64_t chunks = 0;
	ssize_t r;

	if (queued + BATCH > QUEUE_MAX)
		die("more than %d requests withheld", QUEUE_MAX);
	q = &queue[queued];
	r = read(channel, q, BATCH * sizeof(*q));
	if (r < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (r <= 0 || r % sizeof(*q))
		die("read of the channel gives %zd: %m", r);
	for (size_t n = r / sizeof(*q); n; n--, q++) {
		if (q->op < DDSNAP_IDENTIFY || q->op > DDSNAP_DEVICE_STOPPED)
			die("unknown request %u", q->op);
		asked[q->op]++;
		if (q->flags & ~(q->op == DDSNAP_IDENTIFY ?
				 DDSNAP_REQUEST_RETURNING : 0))
			die("flags %#x in request %u", q->flags, q->op);
		if (q->op == DDSNAP_ORIGIN_WRITE)
			count_run(q, &chunks);
		else if (q->count)
			die("a count of %u in request %u", q->count, q->op);
		if (q->op == DDSNAP_DEVICE_STOPPED) {
			if (q->id || !q->device || q->snapshot == DDSNAP_ORIGIN)
				die("DEVICE_STOPPED of no snapshot's device");
			continue;
		}
		if (q->op == DDSNAP_IDENTIFY) {
			returning += q->flags & DDSNAP_REQUEST_RETURNING;
			if (q->snapshot != DDSNAP_ORIGIN)
				newest_device = q->device;
		}
		if (q->op != DDSNAP_BARRIER_REACHED) {
			queue[queued++] = *q;
			continue;
		}
		if (!barrier || q->id != barrier)
			die("BARRIER_REACHED for no barrier");
		reached = true;
	}
}

/* One turn: requests read and answered; false when the deadline has passed. */
static bool turn(double deadline)
{
	struct pollfd p = { .fd = channel, .events = POLLIN };
	double left = deadline - now();

	if (left <= 0)
		return false;
	if (poll(&p, 1, left * 1000 + 1) > 0) {
		if (p.revents & POLLERR)
			die("poll of the channel says error");
		read_requests();
	}
	answer_queue();
	return true;
}

/*
 * Commands
 */

static int begin(void)
{
	int r = command(DDSNAP_BARRIER_BEGIN, ++last_barrier, 0);

	if (!r) {
		barrier = last_barrier;
		reached = false;
	}
	return r;
}

static bool wait_reached(void)
{
	double deadline = now() + BARRIER_SECONDS;

	while (!reached)
		if (!turn(deadline))
			return false;
	return true;
}

static int end(uint32_t flags)
{
	int r = command(DDSNAP_BARRIER_END, barrier, flags);

	if (!r)
		barrier = 0;
	return r;
}

static bool commit(uint32_t tag)
{
	struct snapshot *s = &state->snapshot[state->snapshots];

	if (state->snapshots == SNAPSHOTS_MAX || find_snapshot(tag))
		return false;
	*s = (struct snapshot){ .seq = ++state->seq, .tag = tag, .live = 1 };
	__atomic_store_n(&state->snapshots, state->snapshots + 1,
			 __ATOMIC_SEQ_CST);
	return true;
}

typedef const char *(*command_fn)(const char *arg, char *text, size_t size);

static const char *errno_text(int r, char *text, size_t size)
{
	if (!r)
		return "ok";
	snprintf(text, size, "err %s", strerrorname_np(r));
	return text;
}

static const char *do_ping(const char *arg, char *text, size_t size)
{
	(void)arg, (void)text, (void)size;
	return "ok";
}

static const char *do_create(const char *arg, char *text, size_t size)
{
	int r = begin();

	if (r)
		return errno_text(r, text, size);
	if (!wait_reached())
		return "err barrier not reached";
	if (!commit(atoi(arg)))
		return "err cannot create";
	r = end(DDSNAP_REPLY_CREATED);
	return errno_text(r, text, size);
}

static const char *do_begin(const char *arg, char *text, size_t size)
{
	(void)arg;
	return errno_text(begin(), text, size);
}

static const char *do_reached(const char *arg, char *text, size_t size)
{
	(void)arg, (void)text, (void)size;
	return wait_reached() ? "ok" : "err barrier not reached";
}

static const char *do_end(const char *arg, char *text, size_t size)
{
	(void)arg;
	return errno_text(end(0), text, size);
}

static const char *do_commit(const char *arg, char *text, size_t size)
{
	(void)text, (void)size;
	return commit(atoi(arg)) ? "ok" : "err cannot create";
}

static const char *do_stats(const char *arg, char *text, size_t size)
{
	(void)arg;
	snprintf(text, size,
		 "ok identify=%llu gone=%llu origin_write=%llu snapshot_read=%llu snapshot_write=%llu copies=%llu devices=%ld queued=%zu returning=%llu stopped=%llu asked_chunks=%llu longest_run=%llu longest_read=%llu",
		 (long long)asked[DDSNAP_IDENTIFY],
		 (long long)asked[DDSNAP_GONE],
		 (long long)asked[DDSNAP_ORIGIN_WRITE],
		 (long long)asked[DDSNAP_SNAPSHOT_READ],
		 (long long)asked[DDSNAP_SNAPSHOT_WRITE],
		 (long long)state->copies, identified, queued,
		 (long long)returning,
		 (long long)asked[DDSNAP_DEVICE_STOPPED],
		 (long long)asked_chunks, (long long)longest_run,
		 (long long)longest_read);
	return text;
}

/* A device, or the snapshot's that was identified last. */
static const char *do_stop(const char *arg, char *text, size_t size)
{
	struct ddsnap_reply r = {
		.op = DDSNAP_DEVICE_STOP,
		.value = *arg ? strtoull(arg, NULL, 0) : newest_device,
	};

	return errno_text(tell(&r, 1), text, size);
}

static const char *do_silent(const char *arg, char *text, size_t size)
{
	(void)text, (void)size;
	silent = !strcmp(arg, "on");
	silent_gone = !strcmp(arg, "gone");
	return "ok";
}

static const char *do_delay(const char *arg, char *text, size_t size)
{
	(void)text, (void)size;
	delay_us = atol(arg);
	return "ok";
}

static const char *do_beyond(const char *arg, char *text, size_t size)
{
	(void)text, (void)size;
	beyond = !strcmp(arg, "on");
	return "ok";
}

static const char *do_stale(const char *arg, char *text, size_t size)
{
	(void)text, (void)size;
	stale = !strcmp(arg, "on");
	return "ok";
}

/* A chunk whose question kills the server; kept for the next one. */
static const char *do_poison(const char *arg, char *text, size_t size)
{
	(void)text, (void)size;
	state->poison = strtoull(arg, NULL, 0) + 1;
	poison = state->poison - 1;
	return "ok";
}

/* A chunk of the origin that cannot be read, so that no run with it is answered; none: -1. */
static const char *do_bad_chunk(const char *arg, char *text, size_t size)
{
	(void)text, (void)size;
	bad_chunk = strtoull(arg, NULL, 0);
	return "ok";
}

/* No snapshot needs the origin, true or not. */
static const char *do_all_unique(const char *arg, char *text, size_t size)
{
	(void)arg;
	return errno_text(command(DDSNAP_ALL_UNIQUE, 0, 0), text, size);
}

static const char *do_fail(const char *arg, char *text, size_t size)
{
	unsigned int op, status;

	(void)text, (void)size;
	if (sscanf(arg, "%u %u", &op, &status) != 2 || op > 5)
		return "err fail OP STATUS";
	fail_status[op] = status;
	return "ok";
}

/* Each must be refused with EPROTO and change nothing. */
static const char *do_rubbish(const char *arg, char *text, size_t size)
{
	struct ddsnap_reply r = { .id = 1ULL << 60, .op = DDSNAP_ORIGIN_WRITE };
	struct ddsnap_reply two[2] = { r, r };
	struct ddsnap_request q;
	/* Not a constant, or the compiler complains about what is meant. */
	void *volatile nowhere = (void *)8;

	if (!strcmp(arg, "id"))
		;
	else if (!strcmp(arg, "op"))
		r.op = 77;
	else if (!strcmp(arg, "op-barrier-reached"))
		r.op = DDSNAP_BARRIER_REACHED;
	else if (!strcmp(arg, "end"))
		r.op = DDSNAP_BARRIER_END;
	else if (!strcmp(arg, "stop-id"))
		r = (struct ddsnap_reply){ .id = 1, .op = DDSNAP_DEVICE_STOP,
					   .value = 1U << 30 };
	else if (!strcmp(arg, "stop-status"))
		r = (struct ddsnap_reply){ .op = DDSNAP_DEVICE_STOP,
					   .status = EIO, .value = 1U << 30 };
	else if (!strcmp(arg, "all-unique-id"))
		r = (struct ddsnap_reply){ .id = 1, .op = DDSNAP_ALL_UNIQUE };
	else if (!strcmp(arg, "all-unique-value"))
		r = (struct ddsnap_reply){ .op = DDSNAP_ALL_UNIQUE, .value = 1 };
	else if (!strcmp(arg, "op-device-stopped"))
		r.op = DDSNAP_DEVICE_STOPPED;
	else if (!strcmp(arg, "two"))
		return errno_text(tell(two, 2), text, size);
	else if (!strcmp(arg, "short-write"))
		return errno_text(write(channel, &r, sizeof(r) - 1) < 0 ?
				  errno : 0, text, size);
	else if (!strcmp(arg, "short-read"))
		return errno_text(read(channel, &q, sizeof(q) - 1) < 0 ?
				  errno : 0, text, size);
	else if (!strcmp(arg, "fault-write"))
		return errno_text(write(channel, nowhere, sizeof(r)) < 0 ?
				  errno : 0, text, size);
	else if (!strcmp(arg, "fault-read"))
		return errno_text(read(channel, nowhere, sizeof(q)) < 0 ?
				  errno : 0, text, size);
	else if (!queued)
		return "err nothing queued";
	else {
		/* A request that waits for its reply, answered wrongly. */
		r.id = queue[0].id;
		r.op = queue[0].op;
		if (!strcmp(arg, "other-op"))
			r.op = DDSNAP_GONE;
		else if (!strcmp(arg, "flags"))
			r.flags = 1U << 31;
		else if (!strcmp(arg, "created"))
			r.flags = DDSNAP_REPLY_CREATED;
		else if (!strcmp(arg, "reserved"))
			r.reserved = 1;
		else if (!strcmp(arg, "status"))
			r.status = 4096;
		else if (!strcmp(arg, "value"))
			r.value = 2;
		else
			return "err what rubbish?";
	}
	return errno_text(tell(&r, 1), text, size);
}

/*
 * The true answer to the first request that waits, and behind it, in the same
 * write(2), one to nothing: only that may be refused.
 */
static const char *do_half(const char *arg, char *text, size_t size)
{
	struct ddsnap_reply two[2];
	ssize_t n;

	(void)arg;
	if (!queued)
		return "err nothing queued";
	two[0] = answer(&queue[0]);
	two[1] = (struct ddsnap_reply){ .id = 1ULL << 60, .op = queue[0].op };
	n = write(channel, two, sizeof(two));
	if (n != sizeof(*two)) {
		snprintf(text, size, "err %zd bytes taken", n);
		return text;
	}
	memmove(queue, &queue[1], --queued * sizeof(*queue));
	return "ok";
}

/* BARRIER_END with CREATED although BARRIER_REACHED was not read. */
static const char *do_created_early(const char *arg, char *text, size_t size)
{
	int r = begin();

	(void)arg;
	if (r)
		return errno_text(r, text, size);
	r = command(DDSNAP_BARRIER_END, barrier, DDSNAP_REPLY_CREATED);
	if (command(DDSNAP_BARRIER_BEGIN, barrier + 1, 0) != EPROTO)
		return "err a second barrier was taken";
	if (command(DDSNAP_BARRIER_END, barrier + 1, 0) != EPROTO)
		return "err the end of another barrier was taken";
	if (end(0))
		return "err barrier not ended";
	return errno_text(r, text, size);
}

/* A second file may not attach under the key; it stays useless. */
static const char *do_intrude(const char *arg, char *text, size_t size)
{
	struct ddsnap_attach attach = {
		.version = DDSNAP_PROTOCOL_VERSION, .chunk_shift = chunk_shift,
	};
	struct ddsnap_request q;
	int fd = open("/dev/ddsnap", O_RDWR), r;

	if (read(fd, &q, sizeof(q)) >= 0 || errno != ENOTCONN)
		return "err read before attach";
	if (write(fd, &q, sizeof(q)) >= 0 || errno != ENOTCONN)
		return "err write before attach";
	attach.version++;
	if (!ioctl(fd, DDSNAP_IOC_ATTACH, &attach) || errno != EPROTO)
		return "err version";
	/* A server of version 3, which knows what EPROTO means and no other. */
	if (!ioctl(fd, _IOW(0xdd, 1, struct ddsnap_attach), &attach) ||
	    errno != EPROTO)
		return "err version 3";
	if (!ioctl(fd, _IOW(0xde, 2, struct ddsnap_attach), &attach) ||
	    errno != ENOTTY)
		return "err unknown ioctl";
	attach.version--;
	if (!ioctl(fd, DDSNAP_IOC_ATTACH, &attach) || errno != EINVAL)
		return "err empty key";
	memset(attach.key, 'k', sizeof(attach.key));
	if (!ioctl(fd, DDSNAP_IOC_ATTACH, &attach) || errno != EINVAL)
		return "err key without end";
	strncpy(attach.key, arg, sizeof(attach.key) - 1);
	attach.key[sizeof(attach.key) - 1] = 0;
	attach.chunk_shift = 8;
	if (!ioctl(fd, DDSNAP_IOC_ATTACH, &attach) || errno != EINVAL)
		return "err chunk shift 8";
	attach.chunk_shift = chunk_shift;
	r = ioctl(fd, DDSNAP_IOC_ATTACH, &attach) ? errno : 0;
	close(fd);
	return errno_text(r, text, size);
}

static const struct {
	const char *name;
	command_fn fn;
} commands[] = {
	{ "ping", do_ping },
	{ "create", do_create },		/* TAG: a whole barrier */
	{ "begin", do_begin },			/* a barrier, step by step */
	{ "reached", do_reached },
	{ "commit", do_commit },		/* TAG: record only */
	{ "end", do_end },			/* nothing was created */
	{ "stop", do_stop },			/* [DEVICE]: DEVICE_STOP */
	{ "all-unique", do_all_unique },
	{ "poison", do_poison },		/* CHUNK */
	{ "bad-chunk", do_bad_chunk },		/* CHUNK */
	{ "stats", do_stats },
	{ "silent", do_silent },		/* on, gone, off */
	{ "delay", do_delay },			/* MICROSECONDS before answers */
	{ "beyond", do_beyond },		/* on, off */
	{ "stale", do_stale },			/* on, off */
	{ "fail", do_fail },			/* OP STATUS (0: no longer) */
	{ "rubbish", do_rubbish },		/* KIND */
	{ "half", do_half },
	{ "created-early", do_created_early },
	{ "intrude", do_intrude },		/* KEY */
};

static void serve_control(int listening)
{
	int fd = accept(listening, NULL, NULL);
	char line[256] = "", text[512];
	const char *result = "err no such command";
	char *arg;
	ssize_t n;

	if (fd < 0)
		return;
	n = read(fd, line, sizeof(line) - 1);
	if (n > 0) {
		line[n] = 0;
		arg = strchr(line, ' ');
		if (arg)
			*arg++ = 0;
		for (size_t i = 0; i < sizeof(commands) / sizeof(*commands); i++)
			if (!strcmp(line, commands[i].name))
				result = commands[i].fn(arg ? arg : "", text,
							sizeof(text));
		/* The asker may be gone; it was its own choice. */
		send(fd, result, strlen(result), MSG_NOSIGNAL);
	}
	close(fd);
}

static int unix_socket(const char *path, bool listening)
{
	struct sockaddr_un a = { .sun_family = AF_UNIX };
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);

	snprintf(a.sun_path, sizeof(a.sun_path), "%s", path);
	if (listening) {
		unlink(path);
		if (bind(fd, (void *)&a, sizeof(a)) || listen(fd, 8))
			die("cannot listen on %s: %m", path);
	} else if (connect(fd, (void *)&a, sizeof(a))) {
		die("cannot connect to %s: %m", path);
	}
	return fd;
}

static int control(int argc, char **argv)
{
	char line[512] = "";
	int fd = unix_socket(argv[0], false);
	ssize_t n;

	for (int i = 1; i < argc; i++) {
		strncat(line, argv[i], sizeof(line) - strlen(line) - 1);
		if (i + 1 < argc)
			strncat(line, " ", sizeof(line) - strlen(line) - 1);
	}
	if (write(fd, line, strlen(line)) < 0)
		die("cannot ask: %m");
	n = read(fd, line, sizeof(line) - 1);
	if (n <= 0)
		die("no answer");
	line[n] = 0;
	puts(line);
	return strncmp(line, "ok", 2) != 0;
}

static uint64_t device_sectors(const char *path, int *fd)
{
	uint64_t bytes;

	*fd = open(path, O_RDWR | O_DIRECT);
	if (*fd < 0)
		die("cannot open %s: %m", path);
	if (ioctl(*fd, BLKGETSIZE64, &bytes))
		die("%s is no block device", path);
	return bytes >> 9;
}

static void open_state(const char *path, bool new)
{
	int fd = open(path, O_RDWR | O_CREAT | (new ? O_TRUNC : 0), 0600);

	if (fd < 0 || ftruncate(fd, sizeof(*state)))
		die("cannot make %s: %m", path);
	state = mmap(NULL, sizeof(*state), PROT_READ | PROT_WRITE, MAP_SHARED,
		     fd, 0);
	first_copy = malloc(origin_chunks * sizeof(*first_copy));
	if (state == MAP_FAILED || !first_copy)
		die("no memory");
	memset(first_copy, -1, origin_chunks * sizeof(*first_copy));
	for (uint64_t i = 0; i < state->copies; i++)
		index_copy(i);
	poison = state->poison - 1;
}

static void __attribute__((noreturn)) serve(int argc, char **argv)
{
	struct ddsnap_attach attach = {
		.version = DDSNAP_PROTOCOL_VERSION,
	};
	struct pollfd p[2];
	int listening;

	chunk_shift = atoi(argv[5]);
	chunk_size = (size_t)1 << chunk_shift;
	store_chunks = device_sectors(argv[1], &store) >> (chunk_shift - 9);
	origin_sectors = device_sectors(argv[2], &origin);
	origin_chunks = (origin_sectors + (chunk_size >> 9) - 1) >>
			(chunk_shift - 9);
	open_state(argv[3], argc > 6 && !strcmp(argv[6], "new"));
	if (posix_memalign((void **)&buffer, 4096, chunk_size))
		die("no memory");

	channel = open("/dev/ddsnap", O_RDWR | O_NONBLOCK | O_CLOEXEC);
	if (channel < 0)
		die("cannot open /dev/ddsnap: %m");
	attach.chunk_shift = chunk_shift;
	strncpy(attach.key, argv[0], sizeof(attach.key) - 1);
	if (ioctl(channel, DDSNAP_IOC_ATTACH, &attach))
		die("cannot attach under %s: %s", argv[0],
		    strerrorname_np(errno));

	listening = unix_socket(argv[4], true);
	p[0] = (struct pollfd){ .fd = channel, .events = POLLIN };
	p[1] = (struct pollfd){ .fd = listening, .events = POLLIN };
	for (;;) {
		if (poll(p, 2, -1) < 0)
			continue;
		if (p[0].revents)
			read_requests();
		if (p[1].revents)
			serve_control(listening);
		answer_queue();
	}
}

int main(int argc, char **argv)
{
	if (argc >= 8 && !strcmp(argv[1], "serve"))
		serve(argc - 2, argv + 2);
	if (argc >= 4 && !strcmp(argv[1], "ctl"))
		return control(argc - 2, argv + 2);
	fprintf(stderr,
		"usage: fake-server serve KEY STORE ORIGIN STATE CONTROL CHUNK_SHIFT [new]\n"
		"       fake-server ctl CONTROL COMMAND...\n");
	return 2;
}
