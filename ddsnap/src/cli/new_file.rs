// SPDX-License-Identifier: GPL-2.0-only
//! A file that appears under its name whole or not at all.
//!
//! Until then it has no name, so that nothing is left of it however the command ends. Only on a file
//! system that has no such files is it under a name of its own beside the final one.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::libc;
use tempfile::TempPath;

use crate::device::identity;
use crate::device::lock::{LockError, share_store};

/// See the module.
#[derive(Debug)]
pub struct NewFile {
    file: File,
    /// Its name until it is complete, if it must have one.
    named: Option<TempPath>,
    path: PathBuf,
}

impl NewFile {
    /// Begins a file that is to get the name `path`. It must be none of `inputs`.
    ///
    /// # Errors
    /// The directory takes no file; or at `path` is something else than a plain file, one that is read,
    /// or a store or origin in use.
    pub fn create(path: &Path, inputs: &[&Path]) -> Result<NewFile> {
        // Of a link, what it leads to is meant.
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        refuse_input(&path, inputs)?;
        if let Ok(found) = fs::metadata(&path) {
            if !found.is_file() {
                bail!("{} is there and is no plain file", path.display());
            }
            if let Err(error @ LockError::Held(_)) = share_store(&path) {
                return Err(error).with_context(|| format!("cannot replace {}", path.display()));
            }
        }
        let name = path
            .file_name()
            .with_context(|| format!("{} is not a file's name", path.display()))?;
        let failed = || format!("cannot create {}", path.display());
        let (file, named) = match unnamed(directory_of(&path)).with_context(failed)? {
            Some(file) => (file, None),
            None => {
                let mut prefix = name.to_owned();
                prefix.push(".");
                let (file, named) = tempfile::Builder::new()
                    .prefix(&prefix)
                    .suffix(".partial")
                    .tempfile_in(directory_of(&path))
                    .map_err(|error| io::Error::from(error.kind()))
                    .with_context(failed)?
                    .into_parts();
                (file, Some(named))
            }
        };
        Ok(NewFile { file, named, path })
    }

    /// What to write to.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Makes it durable and gives it its name, in place of a file that has it only if `replace` is set.
    ///
    /// # Errors
    /// That failed; what was there before is there still.
    pub fn publish(self, replace: bool) -> Result<()> {
        let failed = || format!("cannot write {}", self.path.display());
        self.file.sync_all().with_context(failed)?;
        let directory = directory_of(&self.path);
        match (self.named, replace) {
            (None, false) => link(&self.file, &self.path).with_context(failed)?,
            (None, true) => {
                // A link replaces nothing; a name that has become one does.
                let named = tempfile::Builder::new()
                    .suffix(".partial")
                    .make_in(directory, |path| link(&self.file, path))
                    .with_context(failed)?;
                named
                    .persist(&self.path)
                    .map_err(|error| error.error)
                    .with_context(failed)?;
            }
            (Some(named), replace) => match replace {
                true => named.persist(&self.path),
                false => named.persist_noclobber(&self.path),
            }
            .map_err(|error| error.error)
            .with_context(failed)?,
        }
        File::open(directory)
            .and_then(|directory| directory.sync_all())
            .with_context(failed)
    }
}

/// What is read cannot be written to as well.
///
/// # Errors
/// `out` is one of `inputs`.
pub fn refuse_input(out: &Path, inputs: &[&Path]) -> Result<()> {
    if inputs.iter().any(|input| identity::same(input, out)) {
        bail!("{} is read and cannot be written to as well", out.display());
    }
    Ok(())
}

/// A file without a name; none where there is no such thing, or no way to give it one later.
fn unnamed(directory: &Path) -> io::Result<Option<File>> {
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .mode(0o600)
        .custom_flags(libc::O_TMPFILE)
        .open(directory);
    match opened {
        // Without /proc it would come to nothing in the end.
        Ok(file) => Ok(Some(file).filter(|file| proc_path(file).exists())),
        Err(error) => match error.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::EISDIR) => Ok(None),
            _ => Err(error),
        },
    }
}

fn proc_path(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Gives an unnamed file a name, as open(2) has it for O_TMPFILE.
fn link(file: &File, path: &Path) -> io::Result<()> {
    let follow = AtFlags::AT_SYMLINK_FOLLOW;
    nix::unistd::linkat(AT_FDCWD, &proc_path(file), AT_FDCWD, path, follow)?;
    Ok(())
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    /// After Ctrl-C a file of the snapshot's size was left, under another name each time.
    #[test]
    fn nothing_shows_before_it_is_complete() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let new = NewFile::create(&path, &[]).unwrap();
        new.file().write_all(b"one").unwrap();
        assert!(names(dir.path()).is_empty());
        new.publish(false).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"one");
        let again = NewFile::create(&path, &[]).unwrap();
        again.file().write_all(b"two").unwrap();
        assert!(again.publish(false).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"one");
        let again = NewFile::create(&path, &[]).unwrap();
        again.file().write_all(b"two").unwrap();
        again.publish(true).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(names(dir.path()), ["out"]);
    }

    /// A delta replaced the snapshot it was made of.
    #[test]
    fn what_is_read_or_held_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("a"), "a").unwrap();
        fs::hard_link(path("a"), path("b")).unwrap();
        assert!(NewFile::create(&path("b"), &[&path("a")]).is_err());
        let _held = crate::device::lock::lock_store(&path("a")).unwrap();
        let error = NewFile::create(&path("a"), &[]).unwrap_err();
        assert!(
            format!("{error:#}").contains("held by process"),
            "{error:#}"
        );
        let error = NewFile::create(&path("none/x"), &[]).unwrap_err();
        let text = format!("{error:#}");
        assert!(
            !text.contains("partial") && text.contains("none/x"),
            "{text}"
        );
    }
}
