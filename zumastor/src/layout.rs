// SPDX-License-Identifier: GPL-2.0-only
//! Every path the tool uses, below one root so that tests can use a directory of their own.

use std::path::{Path, PathBuf};

/// Where things are. The methods return absolute paths.
#[derive(Clone, Debug)]
pub struct Layout {
    root: PathBuf,
}

impl Layout {
    /// The layout of a running machine.
    #[must_use]
    pub fn system() -> Layout {
        Layout {
            root: PathBuf::from("/"),
        }
    }

    /// The same layout below `root`, for tests.
    #[must_use]
    pub fn below(root: &Path) -> Layout {
        Layout {
            root: root.to_path_buf(),
        }
    }

    /// `path`, which starts with `/`, below the root.
    #[must_use]
    pub fn at(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// The database: one directory per volume.
    #[must_use]
    pub fn volumes(&self) -> PathBuf {
        self.at("/var/lib/zumastor/volumes")
    }

    /// The durable state of `volume`.
    #[must_use]
    pub fn volume(&self, volume: &str) -> PathBuf {
        self.volumes().join(volume)
    }

    /// The one document of `volume`.
    #[must_use]
    pub fn config(&self, volume: &str) -> PathBuf {
        self.volume(volume).join("volume.yaml")
    }

    /// The document of `volume` as it was before it was upgraded from an earlier version.
    #[must_use]
    pub fn old_config(&self, volume: &str, version: u32) -> PathBuf {
        self.volume(volume).join(format!("volume.yaml.v{version}"))
    }

    /// Sums and positions of the replication of `volume`.
    #[must_use]
    pub fn replication(&self, volume: &str) -> PathBuf {
        self.at("var/lib/zumastor/replication").join(volume)
    }

    /// Where streams from other machines come in.
    #[must_use]
    pub fn replication_socket(&self) -> PathBuf {
        self.run().join("replication")
    }

    /// Boot records: on the root file system, whatever /var is.
    #[must_use]
    pub fn boot_records(&self) -> PathBuf {
        self.at("/etc/zumastor/boot")
    }

    /// The boot record of `volume`.
    #[must_use]
    pub fn boot_record(&self, volume: &str) -> PathBuf {
        self.boot_records().join(format!("{volume}.yaml"))
    }

    /// Locked by who brings `volume` up for the first time since boot.
    #[must_use]
    pub fn first_start(&self, volume: &str) -> PathBuf {
        self.run().join("starting").join(volume)
    }

    /// The runtime directory, `R` in the manual.
    #[must_use]
    pub fn run(&self) -> PathBuf {
        self.at("/var/run/zumastor")
    }

    /// Present while the daemon is up.
    #[must_use]
    pub fn running(&self) -> PathBuf {
        self.run().join("running")
    }

    /// Present while the daemon starts or stops.
    #[must_use]
    pub fn locking(&self) -> PathBuf {
        self.run().join("locking")
    }

    /// Which volumes the last daemon could not stop, and why, a line each; absent if there was none.
    #[must_use]
    pub fn busy(&self) -> PathBuf {
        self.run().join("busy")
    }

    /// The daemon's own lock (flock), which a killed daemon cannot leave behind.
    #[must_use]
    pub fn daemon_lock(&self) -> PathBuf {
        self.run().join("daemon.lock")
    }

    /// The daemon's socket.
    #[must_use]
    pub fn control(&self) -> PathBuf {
        self.run().join("control")
    }

    /// The agent's socket, which is also the key in the volume's device-mapper tables.
    #[must_use]
    pub fn agent_socket(&self, volume: &str) -> PathBuf {
        self.run().join("agents").join(volume)
    }

    /// The server's socket.
    #[must_use]
    pub fn server_socket(&self, volume: &str) -> PathBuf {
        self.run().join("servers").join(volume)
    }

    /// The agent's pid file.
    #[must_use]
    pub fn agent_pid(&self, volume: &str) -> PathBuf {
        self.run().join(format!("{volume}-agent.pid"))
    }

    /// The server's pid file.
    #[must_use]
    pub fn server_pid(&self, volume: &str) -> PathBuf {
        self.run().join(format!("{volume}-server.pid"))
    }

    /// Present while the master of `volume` is mounted: scripts of the original act on it.
    #[must_use]
    pub fn cron(&self, volume: &str) -> PathBuf {
        self.run().join("cron").join(volume)
    }

    /// The standard path to the origin's mount: a symlink.
    #[must_use]
    pub fn mount_link(&self, volume: &str) -> PathBuf {
        self.run().join("mount").join(volume)
    }

    /// The standard path to the directory of snapshot links.
    #[must_use]
    pub fn snapshot_links(&self, volume: &str) -> PathBuf {
        self.run().join("snapshot").join(volume)
    }

    /// Where the tool mounts origins and snapshots.
    #[must_use]
    pub fn mount_root(&self) -> PathBuf {
        self.at("/var/mount/zumastor")
    }

    /// The default mount point of device `name` (`VOL` or `VOL(N)`).
    #[must_use]
    pub fn mountpoint(&self, name: &str) -> PathBuf {
        self.mount_root().join(name)
    }

    /// Log directory of `volume`.
    #[must_use]
    pub fn logs(&self, volume: &str) -> PathBuf {
        self.at("/var/log/zumastor").join(volume)
    }

    /// Holds the version that `--version` prints.
    #[must_use]
    pub fn version(&self) -> PathBuf {
        self.at("/etc/zumastor/version")
    }
}
