// SPDX-License-Identifier: GPL-2.0-only
/*
 * stomp - write stamped blocks and check them
 *
 *	stomp write DEVICE LEDGER THREADS SECONDS SEED
 *	stomp check DEVICE LOW HIGH
 *	stomp nowait DEVICE OFFSET BYTES [LETTER]
 *
 * Every block of 4 KiB is filled with a stamp of its number and generation.
 * LEDGER, a file mapped shared, has two arrays of u32: what generation of each
 * block was issued last, and what was acknowledged last. A copy of the ledger
 * taken before a snapshot (LOW) and one taken after it (HIGH) bound what the
 * snapshot may show: not less than LOW's acknowledged, not more than HIGH's
 * issued. The writer waits for no one; a failed write ends it with 1.
 *
 * nowait reads, or writes LETTERs, with RWF_NOWAIT, and prints "ok" or the errno.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define BLOCK		4096UL
#define WORDS		(BLOCK / 8)
#define RUN_MAX		24	/* blocks a write */
#define CHECK_RUN	64	/* blocks a read when checking */

static int device;
static uint64_t blocks;
static uint32_t *issued, *acknowledged;
static volatile sig_atomic_t stop;
static int failed;

struct worker {
	pthread_t thread;
	uint64_t first, count, seed, writes;
};

static void die(const char *what)
{
	fprintf(stderr, "stomp: %s: %s\n", what, strerror(errno));
	exit(2);
}

static uint64_t mix(uint64_t x)
{
	x += 0x9e3779b97f4a7c15;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
	x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
	return x ^ (x >> 31);
}

/* Word 0 has the block, word 1 the generation; the rest follows from them. */
static void stamp(uint64_t *words, uint64_t block, uint32_t generation)
{
	words[0] = block;
	words[1] = generation;
	for (unsigned int i = 2; i < WORDS; i++)
		words[i] = mix(block << 32 ^ (uint64_t)generation << 8 ^ i);
}

static void on_signal(int signal)
{
	(void)signal;
	stop = 1;
}

static void *work(void *arg)
{
	struct worker *w = arg;
	uint64_t *buffer;

	if (posix_memalign((void **)&buffer, BLOCK, RUN_MAX * BLOCK))
		die("no memory");
	while (!stop) {
		uint64_t r = mix(w->seed++);
		uint64_t first = w->first + r % w->count;
		uint64_t run = 1 + (r >> 40) % RUN_MAX;

		/* Mostly small. */
		if (r >> 62)
			run = 1;
		if (first + run > w->first + w->count)
			run = w->first + w->count - first;
		for (uint64_t b = first; b < first + run; b++) {
			issued[b]++;
			stamp(buffer + (b - first) * WORDS, b, issued[b]);
		}
		__atomic_thread_fence(__ATOMIC_SEQ_CST);
		if (pwrite(device, buffer, run * BLOCK, first * BLOCK) !=
		    (ssize_t)(run * BLOCK)) {
			fprintf(stderr, "stomp: write of block %llu: %s\n",
				(unsigned long long)first, strerror(errno));
			failed = 1;
			stop = 1;
			break;
		}
		for (uint64_t b = first; b < first + run; b++)
			__atomic_store_n(&acknowledged[b], issued[b],
					 __ATOMIC_SEQ_CST);
		w->writes++;
	}
	return NULL;
}

static void map_ledger(const char *path, int create)
{
	size_t size = 2 * blocks * sizeof(uint32_t);
	int fd = open(path, create ? O_RDWR | O_CREAT : O_RDWR, 0600);

	if (fd < 0 || (create && ftruncate(fd, size)))
		die(path);
	issued = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (issued == MAP_FAILED)
		die(path);
	acknowledged = issued + blocks;
	close(fd);
}

static int write_blocks(char **argv)
{
	unsigned int threads = atoi(argv[2]), seconds = atoi(argv[3]);
	struct worker *w = calloc(threads, sizeof(*w));
	uint64_t writes = 0;

	map_ledger(argv[1], 1);
	signal(SIGTERM, on_signal);
	signal(SIGALRM, on_signal);
	alarm(seconds);
	for (unsigned int i = 0; i < threads; i++) {
		w[i].count = blocks / threads;
		w[i].first = i * w[i].count;
		w[i].seed = mix(atoll(argv[4]) * 1000 + i);
		if (pthread_create(&w[i].thread, NULL, work, &w[i]))
			die("thread");
	}
	for (unsigned int i = 0; i < threads; i++) {
		pthread_join(w[i].thread, NULL);
		writes += w[i].writes;
	}
	printf("%llu writes\n", (unsigned long long)writes);
	return failed;
}

static int check_blocks(char **argv)
{
	uint32_t *low, *high;
	uint64_t *buffer, want[WORDS], bad = 0;

	map_ledger(argv[1], 0);
	low = acknowledged;
	map_ledger(argv[2], 0);
	high = issued;
	if (posix_memalign((void **)&buffer, BLOCK, CHECK_RUN * BLOCK))
		die("no memory");
	for (uint64_t b = 0; b < blocks; b++) {
		uint64_t *words = buffer + b % CHECK_RUN * WORDS;

		if (b % CHECK_RUN == 0 &&
		    pread(device, buffer, CHECK_RUN * BLOCK, b * BLOCK) !=
		    (ssize_t)(CHECK_RUN * BLOCK)) {
			fprintf(stderr, "stomp: read of block %llu: %s\n",
				(unsigned long long)b, strerror(errno));
			return 1;
		}
		if (words[1] == 0)
			memset(want, 0, BLOCK);
		else
			stamp(want, b, words[1]);
		if (words[1] < low[b] || words[1] > high[b] ||
		    memcmp(words, want, BLOCK)) {
			if (bad++ < 5)
				fprintf(stderr,
					"stomp: block %llu: stamp %llu of block %llu, wanted generation %u to %u\n",
					(unsigned long long)b,
					(unsigned long long)words[1],
					(unsigned long long)words[0], low[b],
					high[b]);
		}
	}
	if (bad)
		fprintf(stderr, "stomp: %llu of %llu blocks are wrong\n",
			(unsigned long long)bad, (unsigned long long)blocks);
	return bad != 0;
}

static int nowait(int argc, char **argv)
{
	struct iovec iov = { .iov_len = strtoull(argv[2], NULL, 0) };
	off_t offset = strtoull(argv[1], NULL, 0);
	ssize_t n;

	device = open(argv[0], O_DIRECT | (argc > 3 ? O_RDWR : O_RDONLY));
	if (device < 0)
		die(argv[0]);
	if (posix_memalign(&iov.iov_base, BLOCK, iov.iov_len))
		die("no memory");
	memset(iov.iov_base, argc > 3 ? *argv[3] : 0, iov.iov_len);
	n = argc > 3 ? pwritev2(device, &iov, 1, offset, RWF_NOWAIT) :
		       preadv2(device, &iov, 1, offset, RWF_NOWAIT);
	if (n < 0)
		puts(strerrorname_np(errno));
	else
		puts((size_t)n == iov.iov_len ? "ok" : "short");
	return 0;
}

int main(int argc, char **argv)
{
	uint64_t bytes;

	if ((argc == 5 || argc == 6) && !strcmp(argv[1], "nowait"))
		return nowait(argc - 2, argv + 2);
	if (!(argc == 7 && !strcmp(argv[1], "write")) &&
	    !(argc == 5 && !strcmp(argv[1], "check"))) {
		fprintf(stderr,
			"usage: stomp write DEVICE LEDGER THREADS SECONDS SEED\n"
			"       stomp check DEVICE LOW HIGH\n"
			"       stomp nowait DEVICE OFFSET BYTES [LETTER]\n");
		return 2;
	}
	device = open(argv[2], O_DIRECT | (argc == 7 ? O_RDWR : O_RDONLY));
	if (device < 0 || ioctl(device, BLKGETSIZE64, &bytes))
		die(argv[2]);
	blocks = bytes / BLOCK / CHECK_RUN * CHECK_RUN;
	return argc == 7 ? write_blocks(argv + 2) : check_blocks(argv + 2);
}
