// SPDX-License-Identifier: GPL-2.0-only
//! A guest's disks that lose, tear and reorder what was not flushed when the power is cut.
//!
//! QEMU keeps what the guest has written when it is killed: it is in the host's page cache. So the disks
//! of a guest whose power will be cut are served by the harness, which outlives QEMU, over NBD: it knows
//! every write and every flush, and decides at the cut what was durable. (A log of QEMU's `blklogwrites`
//! could be replayed to the same effect, but the log ends with QEMU, perhaps in the middle of an entry,
//! and each cut would copy and replay whole disks.)

mod disk;
mod nbd;

use std::fs::{self, File};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use disk::{Disk, Whole};
pub use disk::{Loss, Rng};

/// Time for the threads to notice that QEMU has ended.
const QUIET_DEADLINE: Duration = Duration::from_secs(60);

/// The disks of one guest, served as long as this exists and the process lives.
pub struct Lossy {
    sockets: PathBuf,
    disks: Arc<Vec<Arc<Mutex<Disk>>>>,
    connections: Arc<Connections>,
}

/// Counts the connections that are open.
#[derive(Default)]
struct Connections {
    open: Mutex<usize>,
    ended: Condvar,
}

impl Connections {
    fn change(&self, by: isize) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        *open = open.saturating_add_signed(by);
        self.ended.notify_all();
    }

    /// Waits until none is open.
    fn wait(&self) -> Result<()> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self
            .ended
            .wait_timeout_while(open, QUIET_DEADLINE, |open| *open > 0);
        let (open, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if *open > 0 {
            bail!("{} connections to the guest's disks do not end", *open);
        }
        Ok(())
    }
}

/// Disks of a guest by their names in it, `vda` to `vdz`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Vec<String>")]
pub struct DiskSet(u32);

impl DiskSet {
    fn contains(self, index: usize) -> bool {
        u32::try_from(index).is_ok_and(|index| self.0.checked_shr(index).unwrap_or(0) & 1 != 0)
    }

    /// How many disks a guest must have to have all of these.
    pub fn end(self) -> usize {
        (u32::BITS - self.0.leading_zeros()) as usize
    }
}

impl TryFrom<Vec<String>> for DiskSet {
    type Error = String;

    fn try_from(names: Vec<String>) -> Result<Self, String> {
        let mut set = 0;
        for name in &names {
            let letter = match name.strip_prefix("vd").map(str::as_bytes) {
                Some([letter @ b'a'..=b'z']) => letter - b'a',
                _ => return Err(format!("{name:?} is no disk; they are vda, vdb and so on")),
            };
            set |= 1 << letter;
        }
        Ok(DiskSet(set))
    }
}

/// A disk to be served.
pub struct Plan {
    /// File for what is durable; it is made anew.
    pub medium: PathBuf,
    /// Length in bytes.
    pub bytes: u64,
    /// Raw image of what the disk holds at first; zeroes if absent.
    pub base: Option<PathBuf>,
}

impl Lossy {
    /// Serves new disks.
    pub fn serve(plans: &[Plan]) -> Result<Self> {
        let disks = plans.iter().map(open).collect::<Result<Vec<_>>>()?;
        // Socket paths have room for 107 bytes only, too few for a deep checkout.
        let sockets = tempfile::Builder::new()
            .prefix("zumastor-disks-")
            .tempdir()
            .context("cannot make a directory for the disks' socket")?
            .keep();
        let socket = sockets.join("nbd");
        let listener = UnixListener::bind(&socket)
            .with_context(|| format!("cannot listen at {}", socket.display()))?;
        let lossy = Lossy {
            sockets,
            disks: Arc::new(disks),
            connections: Arc::default(),
        };
        let (disks, connections) = (lossy.disks.clone(), lossy.connections.clone());
        std::thread::spawn(move || accept(&listener, &disks, &connections));
        Ok(lossy)
    }

    /// The socket; disk N is its export `diskN`.
    pub fn socket(&self) -> PathBuf {
        self.sockets.join("nbd")
    }

    /// Number of disks.
    pub fn count(&self) -> usize {
        self.disks.len()
    }

    /// Cuts the power of all disks; QEMU must have ended. What becomes of each follows from the seed and
    /// from what was written. Those of `whole_blocks` write blocks of 4 KiB whole or not at all.
    pub fn cut(&self, seed: u64, whole_blocks: DiskSet) -> Result<Vec<Loss>> {
        self.connections.wait()?;
        let mut rng = Rng::new(seed);
        let disks = self.disks.iter().enumerate();
        disks
            .map(|(index, disk)| {
                let mut disk = disk.lock().unwrap_or_else(PoisonError::into_inner);
                // A disk's losses must not depend on how much its neighbours had in their caches.
                let mut rng = Rng::new(rng.next_u64());
                let whole = match whole_blocks.contains(index) {
                    true => Whole::Blocks,
                    false => Whole::Sectors,
                };
                disk.cut(&mut rng, whole)
                    .context("cannot write a disk's file")
            })
            .collect()
    }

    /// Forgets all that disk `index` holds, and gives it another base.
    pub fn renew(&self, index: usize, plan: &Plan) -> Result<()> {
        self.connections.wait()?;
        let disk = self.disks.get(index).context("no such disk")?;
        let mut disk = disk.lock().unwrap_or_else(PoisonError::into_inner);
        *disk = new_disk(plan)?;
        Ok(())
    }
}

impl Drop for Lossy {
    fn drop(&mut self) {
        // The thread that accepts ends with the process; nobody can come to it any more.
        let _ = fs::remove_dir_all(&self.sockets);
    }
}

fn open(plan: &Plan) -> Result<Arc<Mutex<Disk>>> {
    Ok(Arc::new(Mutex::new(new_disk(plan)?)))
}

fn new_disk(plan: &Plan) -> Result<Disk> {
    let cannot = |path: &Path| format!("cannot open {}", path.display());
    let medium = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&plan.medium)
        .with_context(|| cannot(&plan.medium))?;
    let base = match &plan.base {
        Some(path) => Some(File::open(path).with_context(|| cannot(path))?),
        None => None,
    };
    Disk::new(medium, plan.bytes, base).with_context(|| cannot(&plan.medium))
}

fn accept(
    listener: &UnixListener,
    disks: &Arc<Vec<Arc<Mutex<Disk>>>>,
    connections: &Arc<Connections>,
) {
    for stream in listener.incoming() {
        let Ok(stream) = stream else {
            return;
        };
        let (disks, connections) = (disks.clone(), connections.clone());
        connections.change(1);
        std::thread::spawn(move || {
            // QEMU is killed in the middle of whatever it does: an end is no error.
            let _ = nbd::serve(&stream, &disks);
            connections.change(-1);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::process::Command;

    #[test]
    fn a_set_of_disks_has_those_it_names() {
        let set = |names: &[&str]| {
            DiskSet::try_from(names.iter().map(|n| n.to_string()).collect::<Vec<_>>())
        };
        let two = set(&["vdb", "vdz"]).unwrap();
        let found: Vec<usize> = (0..40).filter(|&index| two.contains(index)).collect();
        assert_eq!((found, two.end()), (vec![1, 25], 26));
        assert_eq!(set(&[]).unwrap().end(), 0);
        assert!(set(&["sda"]).is_err() && set(&["vd"]).is_err() && set(&["vdaa"]).is_err());
    }

    /// As QEMU's own client sees it: what was flushed is there after every cut, what was not flushed is
    /// lost with some seed and kept with others. Skipped where there is no qemu-io.
    #[test]
    fn a_cut_is_real_for_the_client_of_qemu() {
        if Command::new("qemu-io").arg("--version").output().is_err() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let plan = Plan {
            medium: dir.path().join("disk.raw"),
            bytes: 16 << 20,
            base: None,
        };
        let lossy = Lossy::serve(&[plan]).unwrap();
        let image = format!("nbd+unix:///disk0?socket={}", lossy.socket().display());
        let io = |commands: &str, end: &str| {
            let mut qemu = Command::new("qemu-io");
            // Without `quit` it would flush at its end.
            let script = format!("qemu-io -f raw -t writeback {image} <<'X'\n{commands}\n{end}\nX");
            qemu = {
                let mut sh = Command::new("sh");
                sh.args(["-c", &script]);
                drop(qemu);
                sh
            };
            String::from_utf8(qemu.output().unwrap().stdout).unwrap()
        };
        let holds = |pattern: u8, at: &str| {
            let said = io(&format!("read -P {pattern} {at} 4k"), "quit");
            !said.contains("verification failed")
        };
        let mut seen = BTreeSet::new();
        for seed in 0..12 {
            io("write -P 1 0 4k\nwrite -P 1 1M 4k\nflush", "quit");
            // `abort` ends it at once.
            io("write -P 2 0 4k", "abort");
            lossy.cut(seed, DiskSet::default()).unwrap();
            assert!(holds(1, "1M"), "seed {seed}: what was flushed is lost");
            seen.insert(holds(2, "0"));
        }
        assert_eq!(seen, [false, true].into());
    }
}
