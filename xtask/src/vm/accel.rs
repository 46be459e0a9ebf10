// SPDX-License-Identifier: GPL-2.0-only
//! KVM where a guest really runs under it, emulation everywhere else.
//!
//! `/dev/kvm` may be present and useless (nested virtualisation that is switched
//! off hangs the guest at its first instructions), so the decision is made by
//! running a kernel up to its "no root file system" panic with a deadline. The
//! answer holds until the machine is booted again.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::digest::Key;
use crate::paths;
use crate::ui::Step;

/// The QEMU binary.
pub const QEMU: &str = "qemu-system-x86_64";

/// Time for the probe guest; under KVM it needs about two seconds.
const PROBE_DEADLINE: Duration = Duration::from_secs(20);

/// How guest instructions are run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Accel {
    /// The processor runs them.
    Kvm,
    /// QEMU translates them. `cx16` is false where QEMU's emulation of
    /// `cmpxchg16b` breaks Debian 13's kernel (QEMU 7.2: double fault in udev).
    Tcg {
        /// Whether the guest may use `cmpxchg16b`.
        cx16: bool,
    },
}

impl Accel {
    /// Emulation as the given QEMU (major, minor) does it well.
    pub fn tcg(qemu: (u32, u32)) -> Self {
        Accel::Tcg {
            cx16: qemu >= (8, 0),
        }
    }

    /// The value of `-accel`.
    pub fn accel_option(self) -> &'static str {
        match self {
            Accel::Kvm => "kvm",
            Accel::Tcg { .. } => "tcg,thread=multi",
        }
    }

    /// The value of `-cpu`.
    pub fn cpu_option(self) -> &'static str {
        match self {
            Accel::Kvm => "host,migratable=on",
            Accel::Tcg { cx16: true } => "max",
            Accel::Tcg { cx16: false } => "max,cx16=off",
        }
    }
}

/// QEMU's (major, minor) version.
pub fn qemu_version() -> Result<(u32, u32)> {
    let out = Command::new(QEMU)
        .arg("--version")
        .output()
        .with_context(|| format!("cannot run {QEMU}"))?;
    let text = String::from_utf8_lossy(&out.stdout);
    parse_version(&text).with_context(|| format!("{QEMU} --version answered {text:?}"))
}

fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split("version ").nth(1)?.split(['.', ' ', '(']);
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Chooses for this machine, probing with `vmlinuz` if no answer is remembered.
pub fn choose(vmlinuz: &Path) -> Result<Accel> {
    let version = qemu_version()?;
    if !Path::new("/dev/kvm").exists() {
        return Ok(Accel::tcg(version));
    }
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let key = Key::new("kvm-probe-1")
        .text(&boot_id)
        .text(&format!("{version:?}"))
        .finish();
    let dir = paths::cache()?.join("kvm");
    paths::make_dir(&dir)?;
    let answer = dir.join(key);
    let usable = match fs::read_to_string(&answer).as_deref() {
        Ok("yes") => true,
        Ok("no") => false,
        _ => {
            let step = Step::start("probing whether a guest runs under KVM");
            let usable = kvm_works(vmlinuz)?;
            fs::write(&answer, if usable { "yes" } else { "no" })
                .with_context(|| format!("cannot write {}", answer.display()))?;
            step.done(if usable {
                "it does"
            } else {
                "it does not; emulating"
            });
            usable
        }
    };
    Ok(if usable {
        Accel::Kvm
    } else {
        Accel::tcg(version)
    })
}

/// Whether a kernel gets as far as looking for its root file system in time.
fn kvm_works(vmlinuz: &Path) -> Result<bool> {
    let dir = tempfile::tempdir().context("cannot make a directory for the KVM probe")?;
    let console = dir.path().join("console");
    let mut child = Command::new(QEMU)
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-machine",
            "q35",
        ])
        .args([
            "-accel",
            "kvm",
            "-cpu",
            "host",
            "-smp",
            "2",
            "-m",
            "256",
            "-no-reboot",
        ])
        .arg("-kernel")
        .arg(vmlinuz)
        .args(["-append", "console=ttyS0 panic=-1"])
        .arg("-serial")
        .arg(format!("file:{}", console.display()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot run {QEMU}"))?;
    let works = reached_root_panic(&mut child, &console);
    // The probe has told what it can; both fail only if it is gone already.
    let _gone = child.kill();
    let _reaped = child.wait();
    works
}

fn reached_root_panic(child: &mut Child, console: &Path) -> Result<bool> {
    let deadline = Instant::now() + PROBE_DEADLINE;
    loop {
        let exited = child
            .try_wait()
            .context("cannot wait for the KVM probe")?
            .is_some();
        let text = fs::read(console).unwrap_or_default();
        if String::from_utf8_lossy(&text).contains("VFS: Unable to mount root fs") {
            return Ok(true);
        }
        if exited || Instant::now() > deadline {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        let text = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright";
        assert_eq!(parse_version(text), Some((7, 2)));
        assert_eq!(parse_version("QEMU emulator version 10.0.2"), Some((10, 0)));
        assert_eq!(parse_version("nonsense"), None);
    }

    #[test]
    fn old_emulation_hides_cmpxchg16b() {
        assert_eq!(Accel::tcg((7, 2)).cpu_option(), "max,cx16=off");
        assert_eq!(Accel::tcg((10, 0)).cpu_option(), "max");
    }
}
