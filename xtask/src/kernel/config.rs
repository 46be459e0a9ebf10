// SPDX-License-Identifier: GPL-2.0-only
//! Configuration fragments: merged over `allnoconfig`, then checked line by line.
//!
//! Kconfig drops a request silently when a dependency is missing. A kernel that
//! lacks what was asked for must not be built, so the check names the option.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::ui::run_logged;

/// One fragment file.
#[derive(Debug)]
pub struct Fragment {
    /// File name, for messages.
    pub name: String,
    /// Content.
    pub text: String,
}

/// One line's wish: the option and the value it shall have (`n` for off).
#[derive(Debug, PartialEq, Eq)]
pub struct Wish<'a> {
    option: &'a str,
    value: &'a str,
}

impl Fragment {
    /// Reads a fragment.
    pub fn read(path: &Path) -> Result<Self> {
        let text =
            fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        Ok(Fragment { name, text })
    }

    /// What the fragment asks for.
    pub fn wishes(&self) -> Vec<Wish<'_>> {
        self.text.lines().filter_map(wish).collect()
    }
}

fn wish(line: &str) -> Option<Wish<'_>> {
    let line = line.trim();
    if let Some(off) = line
        .strip_prefix("# CONFIG_")
        .and_then(|l| l.strip_suffix(" is not set"))
    {
        return Some(Wish {
            option: off,
            value: "n",
        });
    }
    let (option, value) = line.strip_prefix("CONFIG_")?.split_once('=')?;
    Some(Wish { option, value })
}

/// Wishes that the final configuration does not grant, one sentence each. Later
/// fragments win over earlier ones.
pub fn unmet(fragments: &[Fragment], config: &str) -> Vec<String> {
    let granted: std::collections::BTreeMap<&str, &str> = config
        .lines()
        .filter_map(wish)
        .map(|w| (w.option, w.value))
        .collect();
    let mut wishes = std::collections::BTreeMap::new();
    for fragment in fragments {
        for w in fragment.wishes() {
            wishes.insert(w.option, (w.value, fragment.name.as_str()));
        }
    }
    wishes
        .into_iter()
        .filter_map(|(option, (wanted, file))| {
            let got = granted.get(option).copied().unwrap_or("n");
            (got != wanted).then(|| {
                format!("{file} asks for CONFIG_{option}={wanted}, but the result is {got}")
            })
        })
        .collect()
}

/// Writes `tree/.config`; leaves the file alone when nothing changed, so that
/// an incremental build stays one.
pub fn configure(tree: &Path, fragments: &[Fragment], driver: bool, log: &Path) -> Result<()> {
    let driver_fragment = driver.then(|| Fragment {
        name: "xtask".into(),
        text: "CONFIG_DM_DDSNAP=m\n".into(),
    });
    let merged: String = fragments
        .iter()
        .chain(&driver_fragment)
        .map(|f| f.text.as_str())
        .collect();
    let fragment_file = tree.join(".config.fragments");
    fs::write(&fragment_file, merged)?;
    let wanted = ".config.wanted";
    let make = |target: &str| {
        let mut command = Command::new("make");
        command
            .current_dir(tree)
            .args(["-s", target])
            .env("KCONFIG_CONFIG", wanted);
        run_logged(command.env_remove("MAKEFLAGS"), log)
    };
    make("allnoconfig")?;
    run_logged(
        Command::new("scripts/kconfig/merge_config.sh")
            .current_dir(tree)
            .args(["-m", wanted, ".config.fragments"])
            .env("KCONFIG_CONFIG", wanted),
        log,
    )?;
    make("olddefconfig")?;

    let config = fs::read_to_string(tree.join(wanted))?;
    let all: Vec<Fragment> = fragments
        .iter()
        .map(|f| Fragment {
            name: f.name.clone(),
            text: f.text.clone(),
        })
        .chain(driver_fragment)
        .collect();
    let unmet = unmet(&all, &config);
    if !unmet.is_empty() {
        bail!(
            "the kernel configuration does not hold:\n  {}",
            unmet.join("\n  ")
        );
    }
    let file = tree.join(".config");
    if fs::read_to_string(&file).ok().as_deref() != Some(config.as_str()) {
        fs::write(&file, config).with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fragment(name: &str, text: &str) -> Fragment {
        Fragment {
            name: name.into(),
            text: text.into(),
        }
    }

    #[test]
    fn comments_are_no_wishes() {
        let f = fragment(
            "f",
            "# CONFIG_A is not set\n# about CONFIG_B=y\nCONFIG_C=\"x\"\n\n",
        );
        let expected = [
            Wish {
                option: "A",
                value: "n",
            },
            Wish {
                option: "C",
                value: "\"x\"",
            },
        ];
        assert_eq!(f.wishes(), expected);
    }

    #[test]
    fn a_dropped_option_is_named_with_its_file() {
        let fragments = [fragment("base.config", "CONFIG_A=y\nCONFIG_B=m\n")];
        let unmet = unmet(&fragments, "CONFIG_A=y\n# CONFIG_B is not set\n");
        assert_eq!(
            unmet,
            ["base.config asks for CONFIG_B=m, but the result is n"]
        );
    }

    #[test]
    fn absence_is_checked_too_and_the_last_fragment_wins() {
        let fragments = [
            fragment("base.config", "# CONFIG_A is not set\nCONFIG_B=y\n"),
            fragment("own.config", "# CONFIG_B is not set\n"),
        ];
        assert_eq!(unmet(&fragments, ""), Vec::<String>::new());
        assert_eq!(unmet(&fragments, "CONFIG_A=m\n").len(), 1);
        assert_eq!(unmet(&fragments, "CONFIG_B=y\n").len(), 1);
    }
}
