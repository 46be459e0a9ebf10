// SPDX-License-Identifier: GPL-2.0-only
//! A daemon that mounted file systems need must outlive them at shutdown.
//!
//! When all services have been stopped, systemd-shutdown ends every process that is left, and only then
//! unmounts what is still mounted. A server that ends there takes its volume's I/O with it: the unmounting
//! waits in vain, and what was not written yet is lost. systemd leaves root's processes alone whose name
//! begins with '@' (https://systemd.io/ROOT_STORAGE_DAEMONS/), so that is what the daemons are called:
//! `@/usr/sbin/ddsnap server ...`.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::unistd::geteuid;

/// Sees to it that this process's name begins with '@': executes the program once more, in the same process
/// and with the same arguments. Call it first of all, before there is anything to lose by that.
///
/// Returns if the name is right, if systemd would not respect it (it is root's privilege), or if the program
/// cannot be executed again; the daemon works as well without, but for the end.
pub fn mark() {
    let mut args = env::args_os();
    let Some(name) = args.next() else { return };
    if name.as_bytes().starts_with(b"@") || !geteuid().is_root() {
        return;
    }
    // By its path and not as /proc/self/exe, from which the kernel would take the process's short name.
    let Ok(program) = fs::read_link("/proc/self/exe") else {
        return;
    };
    // With a whole path, whose last part is what pidof(8) compares.
    let mut marked = OsString::from("@");
    marked.push(&program);
    // An error is all that can come back: the file was replaced since we started, for instance.
    let _ = Command::new(program).arg0(marked).args(args).exec();
}
