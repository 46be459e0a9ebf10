// SPDX-License-Identifier: GPL-2.0-only
//! The real machine: [`Host`] handed on to the module of each subject.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::config::Devices;
use crate::host::Host;
use crate::machine::{Dev, DmDevice, Mount, ProcessSpec, TableLine};
use crate::{blockdev, dm, freeze, mounts, process};

/// The real machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct System;

impl Host for System {
    fn ensure_target(&self) -> Result<()> {
        dm::ensure_target()
    }
    fn block_device(&self, path: &Path) -> Result<Dev> {
        blockdev::number(path)
    }
    fn settle(&self) {
        blockdev::settle();
    }
    fn announce(&self, path: &Path) {
        blockdev::announce(path);
    }
    fn stable_path(&self, path: &Path) -> Result<PathBuf> {
        blockdev::stable_path(path)
    }
    fn check_unused(&self, path: &Path) -> Result<()> {
        blockdev::check_unused(path)
    }
    fn zero(&self, path: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
        blockdev::zero(path, progress)
    }
    fn filesystem(&self, node: &Path) -> Result<Option<String>> {
        blockdev::filesystem(node)
    }
    fn flush(&self, node: &Path) -> Result<()> {
        blockdev::flush(node)
    }
    fn format(&self, devices: &Devices, chunksize: &str) -> Result<()> {
        process::format(devices, chunksize)
    }
    fn find_process(&self, spec: &ProcessSpec) -> Result<Option<u32>> {
        process::find(spec)
    }
    fn start_process(&self, spec: &ProcessSpec) -> Result<u32> {
        process::start(spec)
    }
    fn reopen_log(&self, spec: &ProcessSpec) -> Result<()> {
        process::reopen_log(spec)
    }
    fn stop_process(&self, spec: &ProcessSpec) -> Result<()> {
        process::stop(spec)
    }
    fn exit_fd(&self, pid: u32) -> Result<OwnedFd> {
        process::exit_fd(pid)
    }
    fn create_snapshot(&self, server: &Path, tag: u32) -> Result<()> {
        process::create_snapshot(server, tag)
    }
    fn delete_snapshot(&self, server: &Path, tag: u32) -> Result<()> {
        process::delete_snapshot(server, tag)
    }
    fn snapshots(&self, server: &Path) -> Result<Vec<u32>> {
        process::snapshots(server)
    }
    fn size_sectors(&self, server: &Path, tag: Option<u32>) -> Result<u64> {
        process::size_sectors(server, tag)
    }
    fn dm_find(&self, name: &str) -> Result<Option<DmDevice>> {
        dm::find(name)
    }
    fn dm_names(&self) -> Result<Vec<String>> {
        dm::names()
    }
    fn dm_create(&self, name: &str, uuid: &str, table: &TableLine) -> Result<Dev> {
        dm::create(name, uuid, table)
    }
    fn dm_remove(&self, name: &str) -> Result<()> {
        dm::remove(name)
    }
    fn dm_node(&self, name: &str, dev: Dev) -> PathBuf {
        dm::node(name, dev)
    }
    fn mounts(&self) -> Result<Vec<Mount>> {
        mounts::table()
    }
    fn mount(&self, node: &Path, dir: &Path, fstype: &str, options: &[String]) -> Result<()> {
        mounts::mount(node, dir, fstype, options)
    }
    fn unmount(&self, dir: &Path) -> Result<()> {
        mounts::unmount(dir)
    }
    fn freeze(&self, dir: &Path) -> Result<bool> {
        freeze::freeze(dir)
    }
    fn thaw(&self, dir: &Path) -> Result<()> {
        freeze::thaw(dir)
    }
    fn now(&self) -> String {
        jiff::Zoned::now().strftime("%Y.%m.%d-%H.%M.%S").to_string()
    }
}
