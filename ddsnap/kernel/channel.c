// SPDX-License-Identifier: GPL-2.0-only
/*
 * /dev/ddsnap, through which a snapshot server serves one volume.
 * It moves records and checks their frame; what they mean is volume.c's.
 */
#include "ddsnap.h"

#include <linux/capability.h>
#include <linux/compat.h>
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/poll.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/uio.h>

/* Records copied at once: bounds the stack and the hold of the lock. */
#define TAKE_MAX	8

/*
 * Until version 3 of the protocol the number was one of zfcp's. Such a server
 * says what is the matter if it hears of another version, and not if it hears
 * of an unknown ioctl.
 */
#define OLD_IOC_ATTACH	_IOW(0xdd, 1, struct ddsnap_attach)

/**
 * struct ddsnap_channel - an open file
 * @mutex: replies are taken one at a time and in order; attaching excludes them
 * @volume: set once, by attaching, for as long as the file is open
 */
struct ddsnap_channel {
	struct mutex mutex;	/* write(2) and DDSNAP_IOC_ATTACH */
	struct ddsnap_volume *volume;
};

/* Whoever sees a volume sees it whole. */
static struct ddsnap_volume *channel_volume(struct file *file)
{
	struct ddsnap_channel *channel = file->private_data;

	/* Pairs with the release in channel_attach(). */
	return smp_load_acquire(&channel->volume);
}

static bool may_not_wait(struct kiocb *iocb)
{
	return iocb->ki_flags & IOCB_NOWAIT ||
	       iocb->ki_filp->f_flags & O_NONBLOCK;
}

static int channel_open(struct inode *inode, struct file *file)
{
	struct ddsnap_channel *channel = kzalloc(sizeof(*channel), GFP_KERNEL);

	if (!channel)
		return -ENOMEM;
	mutex_init(&channel->mutex);
	file->private_data = channel;
	/* io_uring may try without waiting, then poll. */
	file->f_mode |= FMODE_NOWAIT;
	return stream_open(inode, file);
}

static int channel_release(struct inode *inode, struct file *file)
{
	struct ddsnap_channel *channel = file->private_data;

	/* Nobody else has the file any more: no read, write or ioctl runs. */
	if (channel->volume) {
		ddsnap_volume_detach(channel->volume);
		ddsnap_volume_put(channel->volume);
	}
	kfree(channel);
	return 0;
}

static ssize_t channel_read(struct kiocb *iocb, struct iov_iter *to)
{
	struct ddsnap_volume *v = channel_volume(iocb->ki_filp);
	struct ddsnap_request requests[TAKE_MAX];
	ssize_t done = 0;
	u64 taken = 0;

	if (!v)
		return -ENOTCONN;
	if (iov_iter_count(to) < sizeof(*requests))
		return -EINVAL;

	while (iov_iter_count(to) >= sizeof(*requests)) {
		size_t room = iov_iter_count(to) / sizeof(*requests);
		unsigned int count, i;

		count = ddsnap_volume_take(v, requests,
					   min_t(size_t, room, TAKE_MAX),
					   &taken);
		if (!count) {
			if (done)
				break;
			if (may_not_wait(iocb))
				return -EAGAIN;
			if (wait_event_interruptible(v->wait,
						     ddsnap_volume_has_unsent(v)))
				return -ERESTARTSYS;
			continue;
		}
		for (i = 0; i < count; i++) {
			const size_t size = sizeof(requests[i]);

			if (copy_to_iter(&requests[i], size, to) != size) {
				ddsnap_volume_untake(v, &requests[i],
						     count - i);
				return done ?: -EFAULT;
			}
			done += size;
		}
	}
	return done;
}

/* Copies whole records while there are any. Returns how many. */
static unsigned int copy_replies(struct ddsnap_reply *replies,
				 struct iov_iter *from)
{
	const size_t size = sizeof(*replies);
	unsigned int count = 0;

	while (count < TAKE_MAX && iov_iter_count(from) >= size &&
	       copy_from_iter_full(&replies[count], size, from))
		count++;
	return count;
}

static void log_refused(const struct ddsnap_volume *v,
			const struct ddsnap_reply *reply)
{
	DMERR_LIMIT("%s: the server's reply to %llu (operation %u) is not in order: refused",
		    v->key, le64_to_cpu(reply->id), le32_to_cpu(reply->op));
}

static ssize_t channel_write(struct kiocb *iocb, struct iov_iter *from)
{
	struct ddsnap_channel *channel = iocb->ki_filp->private_data;
	struct ddsnap_volume *v = channel_volume(iocb->ki_filp);
	struct ddsnap_reply replies[TAKE_MAX];
	unsigned int count, taken;
	ssize_t done = 0;
	int r = 0;

	if (!v)
		return -ENOTCONN;
	if (iov_iter_count(from) < sizeof(*replies))
		return -EINVAL;

	if (!mutex_trylock(&channel->mutex)) {
		if (may_not_wait(iocb))
			return -EAGAIN;
		if (mutex_lock_interruptible(&channel->mutex))
			return -ERESTARTSYS;
	}
	while (!r && iov_iter_count(from) >= sizeof(*replies)) {
		count = copy_replies(replies, from);
		if (!count) {
			r = -EFAULT;
			break;
		}
		taken = ddsnap_volume_replies(v, replies, count);
		done += taken * sizeof(*replies);
		if (taken < count) {
			r = -EPROTO;
			log_refused(v, &replies[taken]);
		}
	}
	mutex_unlock(&channel->mutex);
	return done ?: r;
}

static __poll_t channel_poll(struct file *file, poll_table *wait)
{
	struct ddsnap_volume *v = channel_volume(file);
	__poll_t mask = EPOLLOUT | EPOLLWRNORM;

	if (!v)
		return EPOLLERR;
	poll_wait(file, &v->wait, wait);
	if (ddsnap_volume_has_unsent(v))
		mask |= EPOLLIN | EPOLLRDNORM;
	return mask;
}

static int channel_attach(struct ddsnap_channel *channel,
			  const struct ddsnap_attach *attach)
{
	unsigned int shift = le32_to_cpu(attach->chunk_shift);
	struct ddsnap_volume *v;
	int r;

	lockdep_assert_held(&channel->mutex);

	if (le32_to_cpu(attach->version) != DDSNAP_PROTOCOL_VERSION)
		return -EPROTO;
	if (shift < DDSNAP_CHUNK_SHIFT_MIN || shift > DDSNAP_CHUNK_SHIFT_MAX ||
	    !attach->key[0] ||
	    strnlen(attach->key, sizeof(attach->key)) == sizeof(attach->key) ||
	    memchr_inv(attach->reserved, 0, sizeof(attach->reserved)))
		return -EINVAL;
	if (channel->volume)
		return -EBUSY;

	v = ddsnap_volume_get(attach->key);
	if (!v)
		return -ENOMEM;
	r = ddsnap_volume_attach(v, channel, shift - SECTOR_SHIFT);
	if (r) {
		ddsnap_volume_put(v);
		return r;
	}
	/* Pairs with the acquire in channel_volume(). */
	smp_store_release(&channel->volume, v);
	return 0;
}

static long channel_ioctl(struct file *file, unsigned int cmd,
			  unsigned long arg)
{
	struct ddsnap_channel *channel = file->private_data;
	struct ddsnap_attach attach;
	int r;

	if (cmd == OLD_IOC_ATTACH)
		return -EPROTO;
	if (cmd != DDSNAP_IOC_ATTACH)
		return -ENOTTY;
	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	if (copy_from_user(&attach, (void __user *)arg, sizeof(attach)))
		return -EFAULT;

	if (mutex_lock_interruptible(&channel->mutex))
		return -ERESTARTSYS;
	r = channel_attach(channel, &attach);
	mutex_unlock(&channel->mutex);
	return r;
}

static const struct file_operations channel_fops = {
	.owner		= THIS_MODULE,
	.open		= channel_open,
	.release	= channel_release,
	.read_iter	= channel_read,
	.write_iter	= channel_write,
	.poll		= channel_poll,
	.unlocked_ioctl	= channel_ioctl,
	.compat_ioctl	= compat_ptr_ioctl,
};

static struct miscdevice channel_misc = {
	.minor	= MISC_DYNAMIC_MINOR,
	.name	= "ddsnap",
	.fops	= &channel_fops,
	.mode	= 0600,
};

int __init ddsnap_channel_init(void)
{
	/* The server is built from the same header: no size may drift. */
	BUILD_BUG_ON(sizeof(struct ddsnap_attach) != 128);
	BUILD_BUG_ON(sizeof(struct ddsnap_request) != 64);
	BUILD_BUG_ON(sizeof(struct ddsnap_reply) != 32);
	BUILD_BUG_ON(DDSNAP_CHUNK_SHIFT_MIN < SECTOR_SHIFT);

	return misc_register(&channel_misc);
}

void ddsnap_channel_exit(void)
{
	misc_deregister(&channel_misc);
}
