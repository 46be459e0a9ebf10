// SPDX-License-Identifier: GPL-2.0-only
//! Sums of snapshots and positions of copies, one file each, replaced as a whole.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use ddsnap::delta::listen::{Told, progress_line, read_progress};
use ddsnap::delta::stream;
use uuid::Uuid;

use super::again::Again;
use crate::config::{self, Incoming};
use crate::layout::Layout;
use crate::replication::progress::Progress;
use crate::replication::sums::Sums;

/// The name of the file with the position of what scripts send.
pub const BY_HAND: &str = "apply";

/// The files of one volume.
#[derive(Clone, Debug)]
pub struct Files {
    dir: PathBuf,
}

impl Files {
    /// Those of `volume`.
    #[must_use]
    pub fn of(layout: &Layout, volume: &str) -> Files {
        Files {
            dir: layout.replication(volume),
        }
    }

    /// What is noted of a copy that `name` names; none if nothing usable is.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn load(&self, name: &str) -> Result<Option<Progress>> {
        // What is damaged or of another version is made anew.
        let bytes = self.read(name)?;
        Ok(bytes.and_then(|bytes| Progress::decode(&bytes).ok()))
    }

    /// What a copy by scripts has come to; none if nothing usable is noted.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn told(&self) -> Result<Option<Told>> {
        let bytes = self.read(BY_HAND)?;
        let text = bytes.and_then(|bytes| String::from_utf8(bytes).ok());
        Ok(text.and_then(|text| read_progress(&text)))
    }

    /// Notes what a copy by scripts has come to, durably.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn tell(&self, now: &stream::Progress) -> Result<()> {
        self.write(BY_HAND, progress_line(now).as_bytes())
    }

    fn read(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let path = self.dir.join(name);
        match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            read => read
                .map(Some)
                .with_context(|| format!("could not read {}", path.display())),
        }
    }

    /// Notes it, durably.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn save(&self, name: &str, progress: &Progress) -> Result<()> {
        self.write(name, &progress.encode())
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.dir.join(name);
        let temporary = self.dir.join(format!("{name}.new"));
        config::make_private_dir(&self.dir)?;
        let write = || {
            let mut file = File::create(&temporary)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)?;
            File::open(&self.dir)?.sync_all()
        };
        write().with_context(|| format!("could not write {}", path.display()))
    }

    /// Forgets it, durably.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn drop(&self, name: &str) -> Result<()> {
        let path = self.dir.join(name);
        let remove = || match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed.and_then(|()| File::open(&self.dir)?.sync_all()),
        };
        remove().with_context(|| format!("could not remove {}", path.display()))
    }

    /// The sums of a complete snapshot, if they are known.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn sums(&self, snapshot: Uuid) -> Result<Option<Sums>> {
        let found = self.load(&snapshot.to_string())?;
        Ok(found
            .filter(|found| found.snapshot == snapshot && found.position == u64::MAX)
            .and_then(|found| found.sums))
    }

    /// Notes them.
    ///
    /// # Errors
    /// They cannot be written.
    pub fn save_sums(&self, snapshot: Uuid, sums: &Sums) -> Result<()> {
        self.save(&snapshot.to_string(), &complete(snapshot, sums))
    }

    /// Notes the sums of a snapshot of which `host` has been sent all, durably, if they are known.
    ///
    /// # Errors
    /// They cannot be written.
    pub fn note_end(&self, host: &str, snapshot: Uuid, sums: Option<&Sums>) -> Result<()> {
        match sums {
            Some(sums) => self.save(&end_name(host), &complete(snapshot, sums)),
            None => self.drop(&end_name(host)),
        }
    }

    /// `host` has completed `snapshot`: what was noted at its end are its sums.
    ///
    /// # Errors
    /// They cannot be read or written.
    pub fn keep_end(&self, host: &str, snapshot: Uuid) -> Result<()> {
        let noted = self.load(&end_name(host))?;
        let noted = noted.filter(|noted| noted.snapshot == snapshot);
        match noted.and_then(|noted| noted.sums) {
            Some(sums) => self.save_sums(snapshot, &sums),
            None => Ok(()),
        }
    }

    /// What `host` is to get again with the next increment.
    ///
    /// # Errors
    /// It cannot be read. What is damaged is gone: the next comparison finds it again.
    pub fn again(&self, host: &str) -> Result<Option<Again>> {
        let bytes = self.read(&again_name(host))?;
        Ok(bytes.and_then(|bytes| Again::decode(&bytes).ok()))
    }

    /// Notes it, durably. With the volume locked, or the end of a copy might forget it.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn save_again(&self, host: &str, again: &Again) -> Result<()> {
        self.write(&again_name(host), &again.encode())
    }

    /// Forgets what was noted as `sent`; something else stays. With the volume locked.
    ///
    /// # Errors
    /// It cannot be read or removed.
    pub fn forget_again(&self, host: &str, sent: Option<&Again>) -> Result<()> {
        match self.again(host)? {
            Some(now) if Some(&now) != sent => Ok(()),
            _ => self.drop(&again_name(host)),
        }
    }

    /// Forgets all that is noted of a target.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn forget_target(&self, host: &str) -> Result<()> {
        for name in [again_name(host), end_name(host), sending_name(host)] {
            self.drop(&name)?;
        }
        Ok(())
    }

    /// Removes the sums of snapshots that are not in `known` any more.
    pub fn tidy(&self, known: &[Uuid]) {
        let Ok(entries) = fs::read_dir(&self.dir) else {
            return;
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let of = name.to_str().and_then(|name| name.parse::<Uuid>().ok());
            if of.is_some_and(|uuid| !known.contains(&uuid)) {
                // What stays does no harm.
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    /// Removes all of them.
    pub fn remove(&self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// What is noted of a snapshot that is complete.
fn complete(snapshot: Uuid, sums: &Sums) -> Progress {
    Progress {
        snapshot,
        base: None,
        position: u64::MAX,
        plain: false,
        sums: Some(sums.clone()),
    }
}

/// The name of the file with the sums of what a target has been sent all of.
fn end_name(host: &str) -> String {
    format!("end-{host}")
}

/// The name of the file with what a target is to get again.
fn again_name(host: &str) -> String {
    format!("again-{host}")
}

/// The name of the file with the position of what is sent to a target.
#[must_use]
pub fn sending_name(host: &str) -> String {
    format!("to-{host}")
}

/// How far a copy is, in chunks, by what is noted of it; at its beginning if that is of another one.
#[must_use]
pub fn position_of(incoming: &Incoming, noted: Option<&Progress>) -> u64 {
    let same = |noted: &&Progress| noted.snapshot == incoming.uuid && noted.base == incoming.base;
    noted.filter(same).map_or(0, |noted| noted.position)
}

#[cfg(test)]
mod tests {
    use ddsnap::units::ChunkShift;

    use super::*;

    /// Sums of a damaged file would prove what is not so.
    #[test]
    fn what_is_damaged_or_of_another_snapshot_is_not_used() {
        let root = tempfile::tempdir().expect("a directory");
        let files = Files::of(&Layout::below(root.path()), "v");
        let (one, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let mut sums = Sums::new(ChunkShift::MIN);
        sums.replace(5, &[], &[1; 512]);
        assert_eq!(files.sums(one).expect("none"), None);
        files.save_sums(one, &sums).expect("written");
        assert_eq!(files.sums(one).expect("read"), Some(sums));
        let path = |id: Uuid| files.dir.join(id.to_string());
        fs::copy(path(one), path(other)).expect("copied");
        assert_eq!(files.sums(other).expect("read"), None);
        let mut bytes = fs::read(path(one)).expect("read");
        bytes[40] ^= 1;
        fs::write(path(one), bytes).expect("written");
        assert_eq!(files.sums(one).expect("read"), None);
        files.tidy(&[one]);
        assert!(path(one).exists() && !path(other).exists());
    }
}
