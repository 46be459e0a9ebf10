// SPDX-License-Identifier: GPL-2.0-only
//! Changing sizes, as far as it concerns a volume's devices. The server's part is a job ([`crate::work`]).

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use ddsnap::client::NewSizes;

use super::{Out, Volume};
use crate::human;
use crate::note::Note;

impl Volume {
    /// The server to ask for other sizes. Fails if that makes no sense now.
    pub fn begin_resize(&self, sizes: &NewSizes) -> Result<PathBuf> {
        self.check_up()?;
        for (what, path, wanted) in self.resized(sizes) {
            let there = self.host.size_bytes(path)?;
            if wanted > there {
                bail!(
                    "the {what} '{}' has {there} bytes, which is less than {wanted}: make the device larger first",
                    path.display()
                );
            }
        }
        Ok(self.layout.server_socket(&self.name))
    }

    /// Says what a resize would do. What the server would have to move, and whether it has room, it alone knows.
    ///
    /// # Errors
    /// As of [`begin_resize`](Self::begin_resize).
    pub fn would_resize(&self, sizes: &NewSizes, out: Out) -> Result<()> {
        self.begin_resize(sizes)?;
        for (what, path, wanted) in self.resized(sizes) {
            out(Note::Line(format!(
                "would use {} ({wanted} bytes) of the {what} '{}'",
                human::bytes(wanted),
                path.display()
            )));
        }
        Ok(())
    }

    /// Each device whose size is asked for: what it is, its path, and how many bytes of it are to be used.
    fn resized(&self, sizes: &NewSizes) -> Vec<(&'static str, &Path, u64)> {
        let devices = &self.config.device;
        // As the server has it: metadata without a device of its own is part of the store.
        let (store, meta) = match devices.meta {
            Some(_) => (sizes.store, sizes.meta),
            None => (sizes.store.or(sizes.meta), None),
        };
        let all = [
            ("origin", Some(&devices.origin), sizes.origin),
            ("snapshot store", Some(&devices.snapstore), store),
            ("metadata device", devices.meta.as_ref(), meta),
        ];
        all.into_iter()
            .filter_map(|(what, path, size)| Some((what, path?.as_path(), size?)))
            .collect()
    }

    /// Gives the origin's device the length that the server has for it, in use or not. Says whether it had
    /// another one.
    pub fn fit_origin(&mut self) -> Result<bool> {
        let server = self.layout.server_socket(&self.name);
        let sectors = self.host.size_sectors(&server, None)?;
        let found = self.host.dm_find(&self.name)?;
        let device =
            found.with_context(|| format!("device /dev/mapper/{} does not exist", self.name))?;
        if device.table.is_some_and(|t| t.sectors == sectors) {
            return Ok(false);
        }
        self.host
            .dm_reload(&self.name, &self.table(None, sectors)?)?;
        self.log(&format!("the origin's device has {sectors} sectors now"));
        Ok(true)
    }
}
