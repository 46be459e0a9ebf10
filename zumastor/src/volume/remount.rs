// SPDX-License-Identifier: GPL-2.0-only
//! `remount`: another mount point, other options.

use std::path::PathBuf;

use anyhow::{Result, bail};

use super::{Note, Out, Volume};
use crate::plan::{Action, Level};

impl Volume {
    /// Changes the mount point (`None`: it stays) and, if given, the options (`Some(None)`: none). What is
    /// mounted is mounted anew, or all stays as it was.
    pub fn remount(
        &mut self,
        mountpoint: Option<PathBuf>,
        mountopts: Option<Option<String>>,
        out: Out,
    ) -> Result<()> {
        if let Some(dir) = mountpoint.as_ref().filter(|d| !d.is_absolute()) {
            bail!("the mount point '{}' must start with '/'", dir.display());
        }
        self.check_not_reverting()?;
        let before = self.config.clone();
        let mut after = self.config.clone();
        let filesystem = &mut after.filesystem;
        filesystem.mountpoint = mountpoint.or(filesystem.mountpoint.take());
        filesystem.mountopts = mountopts.unwrap_or(filesystem.mountopts.take());
        // A replica shows its newest snapshot there.
        let shown = self.twin();
        let was_mounted = self.level == Level::Mounted && self.observe()?.mounts.contains(&shown);
        if was_mounted {
            // By the old settings: it fails while the mount is used, and nothing has been changed.
            self.perform(Action::Unmount(shown), out)?;
        }
        self.config = after;
        let changed = self.save().and_then(|()| {
            if was_mounted {
                self.perform(Action::Mount(shown), out)?;
                self.perform(Action::WriteLinks, out)?;
            }
            Ok(())
        });
        if let Err(error) = changed {
            self.config = before;
            let back = self.save().and_then(|()| match was_mounted {
                true => self.start(self.level, out),
                false => Ok(()),
            });
            if let Err(again) = back {
                let text = format!("and it could not be brought back: {again:#}");
                out(Note::Warning(text));
            }
            return Err(error);
        }
        let dir = self.mountpoint(None);
        let options = self.config.filesystem.mountopts.as_deref();
        let line = format!(
            "mount point {}, {}{}",
            dir.display(),
            options.map_or_else(|| "no options".to_string(), |o| format!("options {o}")),
            if was_mounted { ", mounted anew" } else { "" }
        );
        self.log(&line);
        out(Note::Line(line));
        Ok(())
    }
}
