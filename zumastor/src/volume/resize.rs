// SPDX-License-Identifier: GPL-2.0-only
//! Changing sizes, as far as it concerns a volume's devices. The server's part is a job ([`crate::work`]).

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use ddsnap::client::NewSizes;

use super::Volume;
use crate::plan::Level;

impl Volume {
    /// The server to ask for other sizes. Fails if that makes no sense now.
    pub fn begin_resize(&self, sizes: &NewSizes) -> Result<PathBuf> {
        self.check_not_reverting()?;
        if self.level < Level::Devices {
            bail!(
                "volume '{0}' is stopped: run `zumastor start volume {0}`",
                self.name
            );
        }
        let devices = &self.config.device;
        let wanted = [
            ("origin", Some(&devices.origin), sizes.origin),
            ("snapshot store", Some(&devices.snapstore), sizes.store),
            ("metadata device", devices.meta.as_ref(), sizes.meta),
        ];
        for (what, path, wanted) in wanted {
            let (Some(path), Some(wanted)) = (path, wanted) else {
                continue;
            };
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
