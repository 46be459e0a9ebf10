// SPDX-License-Identifier: GPL-2.0-only
/*
 * /proc/driver/ddsnap/NAME: what a device has done. The counters
 * belong to the mapped device, so that they survive a new table.
 */
#include "ddsnap.h"

#include <linux/dm-ioctl.h>
#include <linux/percpu.h>
#include <linux/proc_fs.h>
#include <linux/seq_file.h>
#include <linux/slab.h>

/* Taken while none of the other locks of target.c is held. */
static DEFINE_MUTEX(stats_mutex);
static LIST_HEAD(all_stats);
static struct proc_dir_entry *stats_dir;

/**
 * ddsnap_stats_sum - the counters of all processors together
 * @stats: the mapped device's counters
 * @sum: the sums
 */
void ddsnap_stats_sum(const struct ddsnap_stats *stats,
		      struct ddsnap_counts *sum)
{
	int cpu;

	memset(sum, 0, sizeof(*sum));
	for_each_possible_cpu(cpu) {
		const struct ddsnap_counts *c = per_cpu_ptr(stats->counts, cpu);

		sum->reads += c->reads;
		sum->writes += c->writes;
		sum->questions += c->questions;
		sum->at_once += c->at_once;
		sum->dropped += c->dropped;
	}
}

static int stats_show(struct seq_file *m, void *unused)
{
	struct ddsnap_stats *stats = m->private;
	struct ddsnap_counts sum;

	ddsnap_stats_sum(stats, &sum);
	seq_printf(m, "reads: %llu\n", sum.reads);
	seq_printf(m, "writes: %llu\n", sum.writes);
	seq_printf(m, "questions: %llu\n", sum.questions);
	seq_printf(m, "released_at_once: %llu\n", sum.at_once);
	seq_printf(m, "discards_dropped: %llu\n", sum.dropped);
	seq_printf(m, "waiting: %d\n", atomic_read(&stats->waiting));
	return 0;
}

/*
 * The file has the name of the mapped device when its first table was loaded.
 * If a device renamed since still holds that name, there is no file: counters
 * are not worth an error.
 */
static void stats_publish(struct ddsnap_stats *stats)
{
	char uuid[DM_UUID_LEN];
	struct ddsnap_stats *other;

	lockdep_assert_held(&stats_mutex);

	if (!stats_dir ||
	    dm_copy_name_and_uuid(stats->md, stats->name, uuid) ||
	    !strcmp(stats->name, ".") || !strcmp(stats->name, ".."))
		return;
	list_for_each_entry(other, &all_stats, list)
		if (other->proc && !strcmp(other->name, stats->name))
			return;
	stats->proc = proc_create_single_data(stats->name, 0444, stats_dir,
					      stats_show, stats);
}

/**
 * ddsnap_stats_get - the counters of a mapped device, made if there are none
 * @md: the mapped device
 *
 * Return: the counters, to be given to ddsnap_stats_put(); NULL: no memory.
 */
struct ddsnap_stats *ddsnap_stats_get(struct mapped_device *md)
{
	struct ddsnap_stats *stats;

	mutex_lock(&stats_mutex);
	list_for_each_entry(stats, &all_stats, list)
		if (stats->md == md)
			goto found;

	stats = kzalloc(sizeof(*stats), GFP_KERNEL);
	if (!stats)
		goto out;
	stats->counts = alloc_percpu(struct ddsnap_counts);
	if (!stats->counts) {
		kfree(stats);
		stats = NULL;
		goto out;
	}
	stats->md = md;
	stats_publish(stats);
	list_add_tail(&stats->list, &all_stats);
found:
	stats->refs++;
out:
	mutex_unlock(&stats_mutex);
	return stats;
}

/**
 * ddsnap_stats_put - the counterpart of ddsnap_stats_get()
 * @stats: the counters
 */
void ddsnap_stats_put(struct ddsnap_stats *stats)
{
	mutex_lock(&stats_mutex);
	if (!--stats->refs) {
		list_del(&stats->list);
		proc_remove(stats->proc);
		free_percpu(stats->counts);
		kfree(stats);
	}
	mutex_unlock(&stats_mutex);
}

void __init ddsnap_stats_init(void)
{
	stats_dir = proc_mkdir("driver/ddsnap", NULL);
}

void ddsnap_stats_exit(void)
{
	proc_remove(stats_dir);
}
