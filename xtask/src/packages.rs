// SPDX-License-Identifier: GPL-2.0-only
//! Debian packages this tool needs: found, installed where we may, or named.
//!
//! Every command calls [`require`] with what it uses. As root, or where
//! `sudo -n` works, missing packages are installed; otherwise the one line to run
//! is printed and the process ends with exit code 2.
//!
//! One trap is handled: a machine whose packages come partly from backports
//! while that archive is no longer configured. apt then cannot install anything
//! that must match those packages in version (qemu-system-x86 beside a
//! backported qemu-utils). The retry reads the backports suite from the mirror
//! apt already uses, through private lists, and leaves apt's own setup alone.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context, Result, bail};

use crate::paths;

/// Ends the process: packages are missing and we may not install them.
#[derive(Debug)]
pub struct NotAllowed(pub String);

impl std::fmt::Display for NotAllowed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Debian packages are missing; as root, run:\n  {}",
            self.0
        )
    }
}

impl std::error::Error for NotAllowed {}

/// Makes sure the packages are installed.
pub fn require(packages: &[&str]) -> Result<()> {
    let mut missing = BTreeSet::new();
    for package in packages {
        if installed_version(package)?.is_none() {
            missing.insert((*package).to_string());
        }
    }
    let missing: Vec<String> = missing.into_iter().collect();
    if missing.is_empty() {
        Ok(())
    } else {
        install(&missing)
    }
}

/// Makes sure that what `debian/control` builds with is installed.
pub fn require_build_dependencies(root: &Path) -> Result<()> {
    let out = Command::new("dpkg-checkbuilddeps")
        .current_dir(root)
        .env("LC_ALL", "C")
        .output()
        .context("cannot run dpkg-checkbuilddeps")?;
    if out.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&out.stderr);
    let Some(missing) = unmet_build_dependencies(&said) else {
        bail!("dpkg-checkbuilddeps failed: {}", said.trim());
    };
    install(&missing)
}

/// Package names in "Unmet build dependencies: a (>= 1) b | c".
fn unmet_build_dependencies(said: &str) -> Option<Vec<String>> {
    let list = said
        .lines()
        .find_map(|l| l.split_once("nmet build dependencies: "))?
        .1;
    let mut names = Vec::new();
    let mut in_version = false;
    let mut after_bar = false;
    for word in list.split_whitespace() {
        if word.starts_with('(') {
            in_version = true;
        }
        if !in_version && word == "|" {
            after_bar = true;
        } else if !in_version && !std::mem::take(&mut after_bar) {
            names.push(word.split(':').next().unwrap_or(word).to_string());
        }
        if word.ends_with(')') {
            in_version = false;
        }
    }
    Some(names)
}

/// The installed version of a package, if it is installed.
pub fn installed_version(package: &str) -> Result<Option<String>> {
    let out = Command::new("dpkg-query")
        .args(["-W", "-f", "${db:Status-Status} ${Version}", package])
        .output()
        .context("cannot run dpkg-query; this tool needs a Debian system")?;
    let text = String::from_utf8_lossy(&out.stdout);
    Ok(text.strip_prefix("installed ").map(str::to_string))
}

/// Whether an installed package provides `package`, a virtual one such as dh-sequence-dkms.
fn is_provided(package: &str) -> Result<bool> {
    let out = Command::new("dpkg-query")
        .args(["-W", "-f", "${db:Status-Status} ${Provides}\n"])
        .output()
        .context("cannot run dpkg-query; this tool needs a Debian system")?;
    Ok(provides(&String::from_utf8_lossy(&out.stdout), package))
}

/// Whether a line of "STATUS a (= 1), b" of an installed package names `package`.
fn provides(lists: &str, package: &str) -> bool {
    lists
        .lines()
        .filter_map(|line| line.strip_prefix("installed "))
        .flat_map(|list| list.split(','))
        .any(|one| one.split_whitespace().next() == Some(package))
}

/// Who runs privileged commands.
enum Root {
    Myself,
    Sudo,
}

fn root() -> Option<Root> {
    if nix::unistd::geteuid().is_root() {
        return Some(Root::Myself);
    }
    let sudo = Command::new("sudo").args(["-n", "true"]).output();
    sudo.is_ok_and(|out| out.status.success())
        .then_some(Root::Sudo)
}

impl Root {
    fn apt_get(&self, args: &[String]) -> Result<Output> {
        let mut command = match self {
            Root::Myself => Command::new("env"),
            Root::Sudo => {
                let mut sudo = Command::new("sudo");
                sudo.args(["-n", "env"]);
                sudo
            }
        };
        command
            .args(["DEBIAN_FRONTEND=noninteractive", "LC_ALL=C", "apt-get"])
            .args(["-y", "-q", "-o", "DPkg::Lock::Timeout=600"])
            .args(args)
            .output()
            .context("cannot run apt-get")
    }
}

fn install(missing: &[String]) -> Result<()> {
    let Some(root) = root() else {
        return Err(NotAllowed(format!("apt-get install -y {}", missing.join(" "))).into());
    };
    let step = crate::ui::Step::start(format!("installing {}", missing.join(" ")));
    if !lists_present() {
        checked(root.apt_get(&["update".into()])?)?;
    }
    let plain = install_args(missing);
    let mut out = root.apt_get(&plain)?;
    if !out.status.success() && said(&out).contains("Unable to") {
        // The lists are older than the archive's present content.
        checked(root.apt_get(&["update".into()])?)?;
        out = root.apt_get(&plain)?;
    }
    if !out.status.success() && conflict(&said(&out)) {
        out = install_one_by_one(&root, missing)?;
    }
    checked(out)?;
    for package in missing {
        if installed_version(package)?.is_none() && !is_provided(package)? {
            bail!("apt-get succeeded, but {package} is not installed");
        }
    }
    step.done("done");
    Ok(())
}

/// Nothing that is installed may go in exchange: it may be what we need next, and
/// it is not ours to remove.
fn install_args(packages: &[String]) -> Vec<String> {
    let mut args = ["install", "--no-install-recommends", "--no-remove"]
        .map(String::from)
        .to_vec();
    args.extend(packages.iter().cloned());
    args
}

/// Packages apt refuses together, each for itself; those it still refuses, from backports.
fn install_one_by_one(root: &Root, missing: &[String]) -> Result<Output> {
    let mut last = None;
    for package in missing {
        let args = install_args(std::slice::from_ref(package));
        let mut out = root.apt_get(&args)?;
        if !out.status.success() && conflict(&said(&out)) {
            out = match Backports::here()? {
                Some(backports) => backports.install(root, &args)?,
                None => out,
            };
        }
        if !out.status.success() {
            return Ok(out);
        }
        last = Some(out);
    }
    last.context("no package to install")
}

fn checked(out: Output) -> Result<()> {
    if !out.status.success() {
        bail!("apt-get failed ({}):\n{}", out.status, said(&out));
    }
    Ok(())
}

fn said(out: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    )
}

/// Whether apt's solver, not the network or dpkg, refused.
fn conflict(said: &str) -> bool {
    [
        "held broken packages",
        "unmet dependencies",
        "remove is disabled",
    ]
    .iter()
    .any(|refusal| said.contains(refusal))
}

/// Whether apt has any package index yet; a fresh machine or container has none.
fn lists_present() -> bool {
    fs::read_dir("/var/lib/apt/lists").is_ok_and(|entries| {
        entries
            .flatten()
            .any(|e| e.file_name().to_string_lossy().contains("_Packages"))
    })
}

/// A suite apt is configured to read, and from where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Base URI of the archive, with a slash at its end.
    pub uri: String,
    /// Suite, as `bookworm` or `bookworm-updates`.
    pub suite: String,
}

/// Every suite in apt's configuration, whatever the syntax of its source files.
pub fn configured_sources() -> Result<Vec<Source>> {
    let out = Command::new("apt-get")
        .args([
            "indextargets",
            "--format",
            "$(REPO_URI) $(RELEASE)",
            "Identifier: Packages",
        ])
        .output()
        .context("cannot run apt-get")?;
    if !out.status.success() {
        bail!(
            "apt-get indextargets failed: {}",
            String::from_utf8_lossy(&out.stderr).trim()
        );
    }
    Ok(parse_sources(&String::from_utf8_lossy(&out.stdout)))
}

fn parse_sources(text: &str) -> Vec<Source> {
    let mut sources: Vec<Source> = Vec::new();
    for line in text.lines() {
        if let Some((uri, suite)) = line.split_once(' ') {
            let source = Source {
                uri: uri.into(),
                suite: suite.into(),
            };
            if !sources.contains(&source) {
                sources.push(source);
            }
        }
    }
    sources
}

/// The mirror of Debian's main archive: where the running release comes from.
pub fn mirror() -> Result<String> {
    let codename = codename()?;
    configured_sources()?
        .into_iter()
        .find(|s| s.suite == codename)
        .map(|s| s.uri)
        .with_context(|| format!("apt's configuration names no mirror for {codename}"))
}

/// The running Debian release's name, as `bookworm`.
fn codename() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    os_release_codename(&text).context("/etc/os-release has no VERSION_CODENAME")
}

fn os_release_codename(text: &str) -> Option<String> {
    let value = text
        .lines()
        .find_map(|l| l.strip_prefix("VERSION_CODENAME="))?;
    Some(value.trim_matches('"').to_string())
}

/// The backports suite of this machine's release, read through private lists.
struct Backports {
    suite: String,
    options: Vec<String>,
}

impl Backports {
    /// `None` unless packages from backports are installed and their suite is
    /// not configured: then it is not what stands in apt's way.
    fn here() -> Result<Option<Self>> {
        let sources = configured_sources()?;
        let codename = codename()?;
        let suite = format!("{codename}-backports");
        let out = Command::new("dpkg-query")
            .args(["-W", "-f", "${Version}\\n"])
            .output()?;
        let versions = String::from_utf8_lossy(&out.stdout);
        let used = versions.lines().any(|version| version.contains("~bpo"));
        if !used || sources.iter().any(|s| s.suite == suite) {
            return Ok(None);
        }
        let mirror = mirror()?;
        let dir = paths::cache()?.join("apt");
        paths::make_dir(&dir.join("lists/partial"))?;
        let list = dir.join("backports.list");
        fs::write(&list, private_list(&sources, &codename, &mirror))
            .with_context(|| format!("cannot write {}", list.display()))?;
        Ok(Some(Backports {
            suite,
            options: private_options(&list, &dir.join("lists")),
        }))
    }

    fn install(&self, root: &Root, install: &[String]) -> Result<Output> {
        let mut update = self.options.clone();
        update.push("update".into());
        checked(root.apt_get(&update)?)?;
        let mut args = self.options.clone();
        args.extend(["-t".to_string(), self.suite.clone()]);
        args.extend(install.iter().cloned());
        root.apt_get(&args)
    }
}

/// Source lines: what apt reads of this release now, and its backports.
fn private_list(sources: &[Source], codename: &str, mirror: &str) -> String {
    let mut text = String::new();
    for source in sources {
        if source.suite.split('-').next() == Some(codename) {
            text.push_str(&format!("deb {} {} main\n", source.uri, source.suite));
        }
    }
    text.push_str(&format!("deb {mirror} {codename}-backports main\n"));
    text
}

fn private_options(list: &Path, lists: &Path) -> Vec<String> {
    [
        format!("Dir::Etc::SourceList={}", list.display()),
        "Dir::Etc::SourceParts=-".to_string(),
        format!("Dir::State::Lists={}", lists.display()),
    ]
    .into_iter()
    .flat_map(|option| ["-o".to_string(), option])
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(uri: &str, suite: &str) -> Source {
        Source {
            uri: uri.into(),
            suite: suite.into(),
        }
    }

    #[test]
    fn index_targets_become_sources_without_repeats() {
        let text = "http://mirror.example/debian/ bookworm\n\
                    http://mirror.example/debian/ bookworm\n\
                    http://mirror.example/debian-security/ bookworm-security\n";
        let expected = [
            source("http://mirror.example/debian/", "bookworm"),
            source(
                "http://mirror.example/debian-security/",
                "bookworm-security",
            ),
        ];
        assert_eq!(parse_sources(text), expected);
    }

    #[test]
    fn the_private_list_adds_backports_and_drops_foreign_archives() {
        let sources = [
            source("http://mirror.example/debian/", "bookworm"),
            source(
                "http://mirror.example/debian-security/",
                "bookworm-security",
            ),
            source("http://tools.example/", "stable"),
        ];
        let list = private_list(&sources, "bookworm", "http://mirror.example/debian/");
        assert!(list.contains("debian/ bookworm-backports main\n"), "{list}");
        assert!(
            list.contains("debian-security/ bookworm-security main\n"),
            "{list}"
        );
        assert!(!list.contains("tools.example"), "{list}");
    }

    // On a machine without dh-dkms the first `cargo xtask vmtest` ended after installing it: "apt-get
    // succeeded, but dh-sequence-dkms is not installed".
    #[test]
    fn a_virtual_package_is_there_if_an_installed_one_provides_it() {
        let lists =
            "installed \nnot-installed dh-sequence-dkms\ninstalled a (= 1), dh-sequence-dkms\n";
        assert!(provides(lists, "dh-sequence-dkms"));
        assert!(provides(lists, "a"));
        let gone = "not-installed dh-sequence-dkms\ninstalled dh-sequence-dkms-doc\n";
        assert!(!provides(gone, "dh-sequence-dkms"));
    }

    #[test]
    fn only_the_solver_s_refusal_leads_to_backports() {
        assert!(conflict(
            "E: Unable to correct problems, you have held broken packages."
        ));
        assert!(!conflict(
            "E: Failed to fetch http://mirror.example/x  404  Not Found"
        ));
    }

    #[test]
    fn unmet_build_dependencies_lose_versions_and_alternatives() {
        let said = "dpkg-checkbuilddeps: error: Unmet build dependencies: debhelper-compat (= 13) \
                    a:native (>= 1) | b libx-dev\n";
        let names = unmet_build_dependencies(said).unwrap();
        assert_eq!(names, ["debhelper-compat", "a", "libx-dev"]);
        assert_eq!(unmet_build_dependencies("no such file"), None);
    }

    #[test]
    fn the_codename_is_read_with_and_without_quotes() {
        assert_eq!(
            os_release_codename("ID=debian\nVERSION_CODENAME=trixie\n").unwrap(),
            "trixie"
        );
        assert_eq!(
            os_release_codename("VERSION_CODENAME=\"sid\"\n").unwrap(),
            "sid"
        );
        assert_eq!(os_release_codename("ID=debian\n"), None);
    }

    #[test]
    fn the_line_to_run_is_one_apt_get() {
        let text = NotAllowed("apt-get install -y a b".into()).to_string();
        assert!(text.ends_with("\n  apt-get install -y a b"), "{text}");
    }
}
