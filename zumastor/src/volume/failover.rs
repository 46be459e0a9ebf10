// SPDX-License-Identifier: GPL-2.0-only
//! A replica becomes master, and an old master becomes a replica: each in one durable step.
//!
//! Before that step all is as it was, also after a crash, but for a snapshot more; behind it the volume comes up
//! in its new role.

use anyhow::{Context, Result, bail};

use super::replica::{WHY_KEPT, check_host, epoch, lineage_of, seconds};
use super::{DefineSource, Note, Out, Volume};
use crate::config::{MANUAL, Source, Superseded, WayBack};
use crate::human;
use crate::machine::Mount;
use crate::plan::Level;
use crate::replication::standing::Epoch;

impl Volume {
    /// Whether the volume can become master now. Says whether its origin must be given the content of its hold
    /// before, as it has a part of what was arriving.
    ///
    /// # Errors
    /// It is master already, or nothing has arrived, or it is stopped or in use.
    pub fn check_fail_over(&self) -> Result<bool> {
        let name = &self.name;
        if self.config.master.is_some() {
            if self.config.lineage.superseded.is_none() {
                bail!(
                    "volume '{name}' is master already: run `zumastor failover` where its replica is"
                );
            }
            self.check_up()?;
            return Ok(false);
        }
        let source = self.source()?;
        self.check_up()?;
        let restore = source.incoming.is_some() || source.origin.is_none();
        if restore && source.hold.is_none() {
            bail!(
                "no complete snapshot has arrived yet on volume '{name}', so there is nothing it could be master \
                 of: run `zumastor replicate {name}` while {} can be reached",
                source.host
            );
        }
        if let Some(dir) = self.origin_mounts()?.first().filter(|_| restore) {
            bail!(
                "/dev/mapper/{name} is mounted on {} and holds a part of what was arriving: unmount it",
                dir.display()
            );
        }
        Ok(restore)
    }

    /// Says what a failover would do, after its checks.
    ///
    /// # Errors
    /// As of [`check_fail_over`](Self::check_fail_over).
    pub fn would_fail_over(&self, out: Out) -> Result<()> {
        let restore = self.check_fail_over()?;
        let name = &self.name;
        let mut say = |text: String| out(Note::Line(text));
        if let Some(source) = &self.config.source {
            if let (true, Some(hold)) = (restore, source.hold) {
                say(format!(
                    "would take back what has arrived in part: /dev/mapper/{name} gets the content of snapshot {}",
                    hold.id
                ));
            }
            say(format!(
                "would make {} a target of the volume, which is no replica any more",
                source.host
            ));
        }
        say(format!(
            "would make volume '{name}' master, of epoch {}, and mount it",
            self.next_epoch()
        ));
        say("would take a snapshot".into());
        Ok(())
    }

    pub(super) fn check_up(&self) -> Result<()> {
        self.check_not_reverting()?;
        if self.level < Level::Devices {
            bail!(
                "volume '{0}' is stopped: run `zumastor start volume {0}`",
                self.name
            );
        }
        Ok(())
    }

    /// Whether this volume may be master in the epoch that it knows.
    pub(super) fn is_own_epoch(&self) -> bool {
        epoch(&self.config.lineage).owner == self.config.uuid
    }

    /// Above every one that is known.
    fn next_epoch(&self) -> u64 {
        let lineage = &self.config.lineage;
        let newer = lineage.superseded.as_ref().map_or(0, |s| s.epoch);
        lineage.epoch.max(newer).saturating_add(1)
    }

    /// Makes the volume master, of a new epoch, and takes a snapshot of what it starts from. What it was a replica
    /// of becomes a target: so the snapshot that both have is kept, for the way back. Gives the snapshot's number.
    ///
    /// # Errors
    /// As of [`check_fail_over`](Self::check_fail_over), or the document cannot be written: then it is what it
    /// was. Or not all comes up in the new role, which the error says.
    pub fn become_master(&mut self, now: i64, out: Out) -> Result<u32> {
        if self.check_fail_over()? {
            bail!("the origin has a part of what was arriving");
        }
        let before = self.level;
        self.down(Level::Devices.min(self.level), out)?;
        let (own, number) = (self.config.uuid, self.next_epoch());
        let changed = self.change(|config| {
            if let Some(source) = config.source.take() {
                let target = config.targets.entry(source.host).or_default();
                target.name = source.name;
                target.port = source.port;
                target.ssh_command = source.ssh_command;
                // Who began the cycles before still does.
                target.period = source.period;
                target.window = source.window;
                target.hold = source.hold.or(target.hold);
                target.sending = None;
                if let Some(way) = source.way_back {
                    target.ratelimit = way.ratelimit;
                    target.on_full = way.on_full;
                    target.uncompressed = way.uncompressed;
                    target.test_fullvolume = way.test_fullvolume;
                }
            }
            config.master.get_or_insert_default();
            config.lineage = lineage_of(
                config.lineage.uuid,
                Epoch {
                    number,
                    owner: own,
                    since: now.unsigned_abs(),
                },
            );
            Ok(())
        });
        self.back_up_unless(changed, before, out)?;
        self.log(&format!("is master, of epoch {number}"));
        let taken = self
            .start(Level::Mounted, out)
            .and_then(|()| self.take(&[MANUAL.to_owned()], out));
        taken.with_context(|| {
            format!(
                "volume '{}' is master now, of epoch {number}, but not all of it is up",
                self.name
            )
        })
    }

    /// Brings the volume back to where it was if a change failed.
    pub(super) fn back_up_unless<T>(
        &mut self,
        changed: Result<T>,
        level: Level,
        out: Out,
    ) -> Result<T> {
        changed.inspect_err(|_| {
            if let Err(again) = self.start(level, out) {
                let text = format!("and it could not be brought back: {again:#}");
                out(Note::Warning(text));
            }
        })
    }

    /// Whether the volume can become a replica of what `request` names. Gives the epoch that superseded its own, if
    /// it has met that.
    ///
    /// # Errors
    /// It is no master, or is stopped, or in use by others than its users at its mount point.
    pub fn check_fail_back(&self, request: &DefineSource) -> Result<Option<Epoch>> {
        check_host(&request.host)?;
        let name = &self.name;
        if self.config.master.is_none() {
            if let Some(source) = &self.config.source {
                bail!(
                    "volume '{name}' is a replica of what {} has already",
                    source.host
                );
            }
            bail!("volume '{name}' is no master: a failback is for one that was superseded");
        }
        self.check_up()?;
        if let Some(device) = self.host.dm_find(name)? {
            let (own, devices) = (self.mountpoint(None), self.host.stacked_on(device.dev));
            let mounts = self.host.mounts()?;
            let foreign = |m: &&Mount| devices.contains(&m.dev) && m.dir != own;
            if let Some(mount) = mounts.iter().find(foreign) {
                bail!(
                    "/dev/mapper/{name} is mounted on {} too: unmount it",
                    mount.dir.display()
                );
            }
            if let Some(holder) = self.host.holders(device.dev).first() {
                bail!("/dev/mapper/{name} is in use by {holder}: end that");
            }
        }
        let met = self.config.lineage.superseded.as_ref();
        let met = met.filter(|met| met.host.as_ref().is_none_or(|host| *host == request.host));
        Ok(met.map(|met| Epoch {
            number: met.epoch,
            owner: met.owner,
            since: met.since.unsigned_abs(),
        }))
    }

    /// Says what a failback would do, after its checks.
    ///
    /// # Errors
    /// As of [`check_fail_back`](Self::check_fail_back).
    pub fn would_fail_back(&self, request: &DefineSource, to: Epoch, out: Out) -> Result<()> {
        self.check_fail_back(request)?;
        let (name, host) = (&self.name, &request.host);
        for line in [
            format!(
                "{host} is master since {}, of epoch {}",
                human::utc(seconds(to.since)),
                to.number
            ),
            format!("would unmount volume '{name}' and its snapshots"),
            format!("would keep what volume '{name}' holds now as a snapshot"),
            format!("would make volume '{name}' a replica of what {host} has"),
            "would bring it what changed since the last snapshot that both have".to_string(),
        ] {
            out(Note::Line(line));
        }
        Ok(())
    }

    /// Makes a master the replica of the one that superseded it, `to`. What was written here meanwhile stays as a
    /// snapshot.
    ///
    /// # Errors
    /// As of [`check_fail_back`](Self::check_fail_back), or the snapshot cannot be taken, or the document cannot be
    /// written: then it is what it was.
    pub fn fail_back(&mut self, request: &DefineSource, to: Epoch, out: Out) -> Result<()> {
        self.check_fail_back(request)?;
        let before = self.level;
        // Unmounting writes: what is kept must be what the origin holds then.
        self.down(Level::Devices.min(self.level), out)?;
        let kept = self.keep_and_follow(request, to);
        let kept = self.back_up_unless(kept, before, out)?;
        let text = format!(
            "volume '{}' is a replica of what {} has; what was written here is in snapshot {kept}",
            self.name, request.host
        );
        self.tell(&text, out);
        let level = self.full_level();
        self.up(level, out).map(|_| ())
    }

    fn keep_and_follow(&mut self, request: &DefineSource, to: Epoch) -> Result<u32> {
        let kept = self.safety_snapshot(WHY_KEPT)?;
        let origin = self.config.snapshots.find(kept).map(|s| s.uuid);
        self.change(|config| {
            // Who began the cycles before still does.
            let target = config.targets.remove(&request.host);
            let way_back = target.as_ref().map(|target| WayBack {
                ratelimit: target.ratelimit,
                on_full: target.on_full,
                uncompressed: target.uncompressed,
                test_fullvolume: target.test_fullvolume,
            });
            let old = target.unwrap_or_default();
            config.master = None;
            config.lineage = lineage_of(config.lineage.uuid, to);
            config.source = Some(Source {
                name: request.name.clone(),
                port: request.port,
                ssh_command: old.ssh_command,
                period: request.period.or(old.period),
                window: request.window.or(old.window),
                mount: request.mount,
                // What was on its way may have arrived without this side having heard of it.
                hold: old.sending.or(old.hold),
                old_hold: old.hold.filter(|_| old.sending.is_some()),
                origin,
                way_back,
                ..Source::at(&request.host)
            });
            Ok(())
        })?;
        Ok(kept)
    }

    /// Durably knows that the volume was superseded by `newer`, met at the target `host` or come by itself.
    ///
    /// # Errors
    /// The document cannot be written.
    pub fn superseded(&mut self, newer: Epoch, host: Option<&str>) -> Result<()> {
        // A replica that sends on hears it from its own source.
        if self.config.master.is_none() || newer <= epoch(&self.config.lineage) {
            return Ok(());
        }
        let known = self.config.lineage.superseded.as_ref();
        let met = Superseded {
            epoch: newer.number,
            owner: newer.owner,
            since: seconds(newer.since),
            host: host
                .map(str::to_owned)
                .or_else(|| known.and_then(|known| known.host.clone())),
        };
        if known == Some(&met) {
            return Ok(());
        }
        self.change(|config| {
            config.lineage.superseded = Some(met);
            Ok(())
        })?;
        if let Some(line) = superseded_line(&self.name, &self.config.lineage) {
            self.log(&format!("WARNING: {line}"));
        }
        Ok(())
    }
}

/// What there is to say of a master that was superseded.
#[must_use]
pub fn superseded_line(volume: &str, lineage: &crate::config::Lineage) -> Option<String> {
    let met = lineage.superseded.as_ref()?;
    let (by, host) = match &met.host {
        Some(host) => (host.clone(), host.as_str()),
        None => (format!("volume {}", met.owner), "HOST"),
    };
    Some(format!(
        "it was superseded: {by} is master since {}, of epoch {}, and nothing is sent there any more; `zumastor \
         failback {volume} {host}` makes this volume a replica and keeps what was written here as a snapshot",
        human::utc(met.since),
        met.epoch
    ))
}
