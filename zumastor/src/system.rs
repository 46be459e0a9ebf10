// SPDX-License-Identifier: GPL-2.0-only
//! The real machine: [`Host`] handed on to the module of each subject.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use ddsnap::client::{NewSizes, Resized};
use ddsnap::probe::contents::{self, Contents};
use jiff::Zoned;
use uuid::Uuid;

use crate::config::Devices;
use crate::host::{FreezeGuard, Host, Probe};
use crate::machine::{
    Dev, DmDevice, Geometry, Mount, ProcessSpec, StoreState, Stored, TableLine, Users,
};
use crate::{blockdev, dm, freeze, mount_table, mounts, process, server, thaw_guard};

/// The real machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct System;

impl Host for System {
    fn ensure_dm_target(&self) -> Result<()> {
        dm::ensure_dm_target()
    }
    fn block_device(&self, path: &Path) -> Result<Dev> {
        blockdev::number(path)
    }
    fn is_empty(&self, dev: Dev) -> bool {
        blockdev::is_empty(dev)
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
    fn size_bytes(&self, path: &Path) -> Result<u64> {
        blockdev::size_of(path)
    }
    fn zero(&self, path: &Path, progress: &mut dyn FnMut(u64, u64) -> Result<()>) -> Result<()> {
        blockdev::zero(path, progress)
    }
    fn holders(&self, dev: Dev) -> Vec<String> {
        blockdev::holders(dev)
    }
    fn users(&self, dev: Dev) -> Users {
        blockdev::users(dev)
    }
    fn stacked_on(&self, dev: Dev) -> Vec<Dev> {
        blockdev::stacked_on(dev)
    }
    fn overlap(&self, one: &Path, other: &Path) -> bool {
        blockdev::overlap(one, other)
    }
    fn sector_bytes(&self, path: &Path) -> Option<u32> {
        blockdev::sector_bytes(path)
    }
    fn contents(&self, node: &Path) -> Result<Contents> {
        Ok(contents::look(node)?)
    }
    fn flush(&self, node: &Path) -> Result<()> {
        blockdev::flush(node)
    }
    fn store_uuid(&self, path: &Path) -> Result<Option<Uuid>> {
        blockdev::store_uuid(path)
    }
    fn check_format(&self, devices: &Devices, chunksize: &str, force: bool) -> Result<()> {
        process::check_format(devices, chunksize, force)
    }
    fn format(&self, devices: &Devices, chunksize: &str, force: bool) -> Result<()> {
        process::format(devices, chunksize, force)
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
    fn kill_process(&self, spec: &ProcessSpec) -> Result<()> {
        process::kill(spec)
    }
    fn resume_process(&self, spec: &ProcessSpec) -> Result<Option<u32>> {
        process::resume(spec)
    }
    fn probe_server(&self, spec: &ProcessSpec, socket: &Path) -> Probe {
        server::probe(spec, socket)
    }
    fn exit_fd(&self, pid: u32) -> Result<OwnedFd> {
        process::exit_fd(pid)
    }
    fn create_snapshot(&self, server: &Path, tag: u32) -> Result<()> {
        server::create_snapshot(server, tag)
    }
    fn delete_snapshot(&self, server: &Path, tag: u32) -> Result<()> {
        server::delete_snapshot(server, tag)
    }
    fn snapshots(&self, server: &Path) -> Result<Vec<Stored>> {
        server::snapshots(server)
    }
    fn store_state(&self, server: &Path) -> Result<StoreState> {
        server::store_state(server)
    }
    fn set_priority(&self, server: &Path, tag: u32, priority: i8) -> Result<()> {
        server::set_priority(server, tag, priority)
    }
    fn set_to_bookmark(&self, server: &Path, tag: u32, to_bookmark: bool) -> Result<()> {
        server::set_to_bookmark(server, tag, to_bookmark)
    }
    fn reverting(&self, server: &Path) -> Result<Option<u32>> {
        server::reverting(server)
    }
    fn revert(&self, server: &Path, tag: u32, progress: &mut dyn FnMut(u64, u64)) -> Result<u64> {
        server::revert(server, tag, progress)
    }
    fn resize(
        &self,
        server: &Path,
        sizes: &NewSizes,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Resized> {
        server::resize(server, sizes, progress)
    }
    fn size_sectors(&self, server: &Path, tag: Option<u32>) -> Result<u64> {
        server::size_sectors(server, tag)
    }
    fn geometry(&self, server: &Path) -> Result<Geometry> {
        server::geometry(server)
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
    fn dm_reload(&self, name: &str, table: &TableLine) -> Result<()> {
        dm::reload(name, table)
    }
    fn dm_resume(&self, name: &str) -> Result<bool> {
        dm::resume(name)
    }
    fn dm_remove(&self, name: &str) -> Result<()> {
        dm::remove(name)
    }
    fn dm_node(&self, name: &str, dev: Dev) -> PathBuf {
        dm::node(name, dev)
    }
    fn mounts(&self) -> Result<Vec<Mount>> {
        mount_table::table()
    }
    fn claim(&self, node: &Path) -> Result<Option<File>> {
        blockdev::claim(node)
    }
    fn mount(&self, node: &Path, dir: &Path, fstype: &str, options: &[String]) -> Result<()> {
        mounts::mount(node, dir, fstype, options)
    }
    fn unmount(&self, dir: &Path) -> Result<()> {
        mounts::unmount(dir)
    }

    fn detach(&self, dir: &Path) -> Result<()> {
        mounts::detach(dir)
    }
    fn freeze_guard(&self, dirs: &[PathBuf]) -> Result<Box<dyn FreezeGuard>> {
        Ok(Box::new(thaw_guard::Guard::start(dirs)?))
    }
    fn freeze(&self, dir: &Path) -> Result<bool> {
        freeze::freeze(dir)
    }
    fn thaw(&self, dir: &Path) -> Result<()> {
        freeze::thaw(dir)
    }
    fn now(&self) -> Zoned {
        Zoned::now()
    }
    fn pause(&self, time: Duration) {
        std::thread::sleep(time);
    }
}
