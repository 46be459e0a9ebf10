/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What differs between the kernels dm-ddsnap builds for.
 *
 * The code is written for 6.12 and keeps to interfaces that 6.1 and the kernels
 * after 6.12 share, so that little has to stand here. Whatever does need a
 * version check belongs here and nowhere else.
 */
#ifndef _DM_DDSNAP_COMPAT_H
#define _DM_DDSNAP_COMPAT_H

#include <linux/blkdev.h>
#include <linux/version.h>
#include <linux/workqueue.h>

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 1, 0)
#error "dm-ddsnap needs Linux 6.1 or newer"
#endif

/* From 6.17 on a workqueue says whether it is per CPU or unbound. */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 17, 0)
#define DDSNAP_WQ_PERCPU	WQ_PERCPU
#else
#define DDSNAP_WQ_PERCPU	0
#endif

/* From 6.17 on the two limits of write-zeroes are equal, or the second is 0. */
static inline void ddsnap_cap_write_zeroes(struct queue_limits *limits,
					   unsigned int sectors)
{
	if (limits->max_write_zeroes_sectors <= sectors)
		return;
	limits->max_write_zeroes_sectors = sectors;
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 17, 0)
	if (limits->max_hw_wzeroes_unmap_sectors)
		limits->max_hw_wzeroes_unmap_sectors = sectors;
#endif
}

#endif /* _DM_DDSNAP_COMPAT_H */
