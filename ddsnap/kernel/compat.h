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

#include <linux/version.h>

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 1, 0)
#error "dm-ddsnap needs Linux 6.1 or newer"
#endif

#endif /* _DM_DDSNAP_COMPAT_H */
