// SPDX-License-Identifier: GPL-2.0-only
//! Whether two paths lead to one device or file.

use std::fs::{self, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

/// Whether `a` and `b` lead to the same file, or to nodes of the same block device. False if one of them
/// cannot be looked at: opening it says why.
#[must_use]
pub fn same(a: &Path, b: &Path) -> bool {
    match (fs::metadata(a), fs::metadata(b)) {
        (Ok(a), Ok(b)) => same_file(&a, &b),
        _ => false,
    }
}

fn same_file(a: &Metadata, b: &Metadata) -> bool {
    let devices = a.file_type().is_block_device() && b.file_type().is_block_device();
    (a.dev(), a.ino()) == (b.dev(), b.ino()) || devices && a.rdev() == b.rdev()
}

/// Store, origin and metadata device must be different ones.
///
/// # Errors
/// A sentence that names two that are not.
pub fn distinct(paths: &[&Path]) -> Result<(), String> {
    for (index, a) in paths.iter().enumerate() {
        if let Some(b) = paths[..index].iter().find(|b| same(a, b)) {
            return Err(format!(
                "{} and {} are the same device; snapshot store, origin and metadata device must be different",
                b.display(),
                a.display()
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_lead_to_the_same_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("a"), "").unwrap();
        fs::write(path("b"), "").unwrap();
        fs::hard_link(path("a"), path("hard")).unwrap();
        std::os::unix::fs::symlink(path("a"), path("soft")).unwrap();
        assert!(same(&path("a"), &path("hard")) && same(&path("soft"), &path("hard")));
        assert!(!same(&path("a"), &path("b")) && !same(&path("a"), &path("none")));
        assert!(distinct(&[&path("a"), &path("b"), &path("none")]).is_ok());
        let error = distinct(&[&path("a"), &path("b"), &path("soft")]).unwrap_err();
        assert!(
            error.contains("/a and ") && error.contains("/soft are the same"),
            "{error}"
        );
    }
}
