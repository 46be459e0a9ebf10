// SPDX-License-Identifier: GPL-2.0-only
//! The kernel's source tree: unpacking it, and putting our driver into it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::digest::files_below;
use crate::paths;
use crate::ui::run_logged;

/// The driver's directory in the kernel tree.
const PLACE: &str = "drivers/md/dm-ddsnap";

const MAKEFILE_LINE: &str = "obj-$(CONFIG_DM_DDSNAP) += dm-ddsnap/";
const KCONFIG_LINE: &str = "source \"drivers/md/dm-ddsnap/Kconfig\"";

/// Unpacks Debian's source tarball to `tree`; a directory of that name is complete.
pub fn unpack(tarball: &Path, tree: &Path, log: &Path) -> Result<()> {
    let partial = tree.with_extension("partial");
    paths::fresh_dir(&partial)?;
    run_logged(
        Command::new("tar")
            .arg("-xf")
            .arg(tarball)
            .args(["--strip-components=1", "-C"])
            .arg(&partial),
        log,
    )?;
    fs::rename(&partial, tree).with_context(|| format!("cannot make {}", tree.display()))
}

/// The driver's files that take part in a build, relative to its directory.
/// Tests and what a build out of the tree left behind do not.
pub fn driver_files(driver: &Path) -> Result<Vec<PathBuf>> {
    if !driver.is_dir() {
        return Ok(Vec::new());
    }
    let mut files = Vec::new();
    for entry in
        fs::read_dir(driver).with_context(|| format!("cannot list {}", driver.display()))?
    {
        let path = entry?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let source = name.ends_with(".c") && !name.ends_with(".mod.c");
        if path.is_file()
            && (source || name.ends_with(".h") || name == "Kbuild" || name == "Kconfig")
        {
            files.push(PathBuf::from(name));
        }
    }
    files.sort();
    Ok(files)
}

/// Puts the driver into the tree and names it in `drivers/md`. Only files that
/// differ are written, so that make compiles no more than it must.
pub fn install_driver(driver: &Path, tree: &Path) -> Result<()> {
    let files = driver_files(driver)?;
    for name in ["Kbuild", "Kconfig"] {
        if !files.contains(&PathBuf::from(name)) {
            bail!(
                "{} has no {name}: it cannot be built into a kernel",
                driver.display()
            );
        }
    }
    let place = tree.join(PLACE);
    paths::make_dir(&place)?;
    for file in &files {
        copy_if_different(&driver.join(file), &place.join(file))?;
    }
    for old in files_below(&place)? {
        let name = old.strip_prefix(&place).unwrap_or(&old).to_path_buf();
        let source = name.extension().is_some_and(|e| e == "c" || e == "h");
        if source && !name.to_string_lossy().ends_with(".mod.c") && !files.contains(&name) {
            fs::remove_file(&old)?;
        }
    }
    edit(&tree.join("drivers/md/Makefile"), |text| {
        (!text.contains(MAKEFILE_LINE)).then(|| format!("{text}\n{MAKEFILE_LINE}\n"))
    })?;
    edit(&tree.join("drivers/md/Kconfig"), |text| {
        (!text.contains(KCONFIG_LINE))
            .then(|| with_kconfig_line(text))
            .flatten()
    })?;
    if !fs::read_to_string(tree.join("drivers/md/Kconfig"))?.contains(KCONFIG_LINE) {
        bail!("drivers/md/Kconfig has no \"endif # MD\": the driver has no place in it");
    }
    Ok(())
}

/// Adds our line inside `if MD`, whose end Debian's source marks.
fn with_kconfig_line(text: &str) -> Option<String> {
    let at = text.rfind("endif # MD")?;
    Some(format!("{}{KCONFIG_LINE}\n\n{}", &text[..at], &text[at..]))
}

fn copy_if_different(from: &Path, to: &Path) -> Result<()> {
    let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    if fs::read(to).ok().as_ref() != Some(&content) {
        fs::write(to, content).with_context(|| format!("cannot write {}", to.display()))?;
    }
    Ok(())
}

fn edit(file: &Path, change: impl FnOnce(&str) -> Option<String>) -> Result<()> {
    let text =
        fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    if let Some(new) = change(&text) {
        fs::write(file, new).with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let md = dir.path().join("tree/drivers/md");
        fs::create_dir_all(&md).unwrap();
        fs::write(
            md.join("Makefile"),
            "obj-$(CONFIG_BLK_DEV_DM) += dm-mod.o\n",
        )
        .unwrap();
        fs::write(md.join("Kconfig"), "menuconfig MD\nif MD\nendif # MD\n").unwrap();
        let driver = dir.path().join("driver");
        fs::create_dir_all(driver.join("tests")).unwrap();
        for name in [
            "Kbuild",
            "Kconfig",
            "a.c",
            "a.h",
            "a.mod.c",
            "a.o",
            "tests/t.c",
        ] {
            fs::write(driver.join(name), name).unwrap();
        }
        dir
    }

    #[test]
    fn the_driver_is_installed_once_however_often_asked() {
        let dir = fixture();
        let (driver, tree) = (dir.path().join("driver"), dir.path().join("tree"));
        install_driver(&driver, &tree).unwrap();
        install_driver(&driver, &tree).unwrap();
        let kconfig = fs::read_to_string(tree.join("drivers/md/Kconfig")).unwrap();
        assert_eq!(kconfig.matches(KCONFIG_LINE).count(), 1);
        assert!(kconfig.find(KCONFIG_LINE) < kconfig.find("endif # MD"));
        let makefile = fs::read_to_string(tree.join("drivers/md/Makefile")).unwrap();
        assert_eq!(makefile.matches(MAKEFILE_LINE).count(), 1);
        assert!(tree.join(PLACE).join("a.c").exists());
        assert!(!tree.join(PLACE).join("a.mod.c").exists());
        assert!(!tree.join(PLACE).join("tests").exists());
    }

    #[test]
    fn a_source_file_that_went_away_goes_from_the_tree_too() {
        let dir = fixture();
        let (driver, tree) = (dir.path().join("driver"), dir.path().join("tree"));
        install_driver(&driver, &tree).unwrap();
        fs::remove_file(driver.join("a.h")).unwrap();
        install_driver(&driver, &tree).unwrap();
        assert!(!tree.join(PLACE).join("a.h").exists());
    }

    #[test]
    fn an_incomplete_driver_is_refused_before_the_tree_is_touched() {
        let dir = fixture();
        fs::remove_file(dir.path().join("driver/Kbuild")).unwrap();
        let error = install_driver(&dir.path().join("driver"), &dir.path().join("tree"));
        assert!(error.unwrap_err().to_string().contains("Kbuild"));
        assert!(!dir.path().join("tree").join(PLACE).exists());
    }
}
