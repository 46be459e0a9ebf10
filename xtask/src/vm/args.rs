// SPDX-License-Identifier: GPL-2.0-only
//! The QEMU command line of a guest.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::accel::Accel;
use super::network::{Seat, mac};

/// Name of the card in the private network, `eth1` in the guest.
pub const PRIVATE_CARD: &str = "card1";

/// What one guest is made of.
pub struct Spec {
    /// How the guest's instructions are run.
    pub accel: Accel,
    /// Kernel, taken out of the image's installed package.
    pub vmlinuz: PathBuf,
    /// Initial RAM disk; our own kernel needs none.
    pub initrd: Option<PathBuf>,
    /// Root disk, qcow2, `/dev/vda` in the guest.
    pub root: PathBuf,
    /// Blank disks, qcow2, `/dev/vdb` and on.
    pub disks: Vec<PathBuf>,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Name of the internal snapshot to resume instead of booting.
    pub resume: Option<String>,
    /// Do not run before QMP says `cont`.
    pub paused: bool,
    /// Its place in a private network.
    pub seat: Option<Seat>,
}

/// Paths QEMU writes to and listens on.
pub struct Endpoints {
    /// QMP socket.
    pub qmp: PathBuf,
    /// Guest agent socket.
    pub agent: PathBuf,
    /// The serial console's log; appended to.
    pub console: PathBuf,
}

/// The kernel's command line.
///
/// `panic=0` keeps a panicked guest in place, so that its report is complete on
/// the console; the watcher ends it.
pub fn kernel_command_line() -> String {
    [
        "console=ttyS0",
        "root=/dev/vda",
        "rootfstype=ext4",
        "rw",
        "net.ifnames=0",
        "mitigations=off",
        "oops=panic",
        "panic=0",
        // An emulated processor on a busy host stands still for seconds.
        "rcupdate.rcu_cpu_stall_timeout=180",
        // For the same reason its timer may seem not to work.
        "no_timer_check",
        "systemd.show_status=no",
        "systemd.mask=serial-getty@ttyS0.service",
    ]
    .join(" ")
}

/// All arguments of `qemu-system-x86_64` for `spec`.
pub fn qemu_args(spec: &Spec, ends: &Endpoints) -> Vec<OsString> {
    let mut args = Args(Vec::new());
    args.flag("-nodefaults").flag("-no-user-config");
    args.pair("-display", "none");
    args.pair("-machine", "q35");
    args.pair("-accel", spec.accel.accel_option());
    args.pair("-cpu", spec.accel.cpu_option());
    args.pair("-smp", "2");
    args.pair("-m", format!("{}", spec.memory_mib));
    args.pair("-rtc", "base=utc");

    args.pair("-kernel", &spec.vmlinuz);
    if let Some(initrd) = &spec.initrd {
        args.pair("-initrd", initrd);
    }
    args.pair("-append", kernel_command_line());

    args.pair("-object", "rng-random,id=rng0,filename=/dev/urandom");
    args.pair("-device", "virtio-rng-pci,rng=rng0");
    args.disk(0, &spec.root);
    for (i, disk) in spec.disks.iter().enumerate() {
        args.disk(i + 1, disk);
    }
    // No way out for the guest: a run must not depend on the network.
    args.pair("-netdev", "user,id=net0,restrict=on");
    args.pair("-device", "virtio-net-pci,netdev=net0,romfile=");
    // The card of the private network is there without one too: all guests resume from the same.
    let (wire, mac) = match &spec.seat {
        Some(seat) => (seat.netdev("net1"), seat.mac()),
        None => ("hubport,id=net1,hubid=1".to_string(), mac(0)),
    };
    args.pair("-netdev", wire);
    let card = format!("virtio-net-pci,id={PRIVATE_CARD},netdev=net1,romfile=,mac={mac}");
    args.pair("-device", card);

    args.pair("-device", "virtio-serial-pci");
    args.chardev_socket("qga", &ends.agent);
    args.pair(
        "-device",
        "virtserialport,chardev=qga,name=org.qemu.guest_agent.0",
    );
    args.chardev_socket("qmp", &ends.qmp);
    args.pair("-mon", "chardev=qmp,mode=control");
    args.pair(
        "-chardev",
        with_path("file,id=console,append=on,path=", &ends.console, ""),
    );
    args.pair("-serial", "chardev:console");
    if let Some(name) = &spec.resume {
        args.pair("-loadvm", name);
    }
    if spec.paused {
        args.flag("-S");
    }
    args.0
}

struct Args(Vec<OsString>);

impl Args {
    fn flag(&mut self, flag: &str) -> &mut Self {
        self.0.push(flag.into());
        self
    }

    fn pair(&mut self, flag: &str, value: impl Into<OsString>) {
        self.0.push(flag.into());
        self.0.push(value.into());
    }

    fn disk(&mut self, index: usize, path: &Path) {
        // Write-back: killing QEMU keeps what the guest wrote, in the host's page
        // cache. Disks that lose what was not flushed take these disks' place (`lossy`).
        let options =
            format!("if=none,id=disk{index},format=qcow2,cache=writeback,discard=unmap,file=");
        self.pair("-drive", with_path(&options, path, ""));
        self.pair(
            "-device",
            format!("virtio-blk-pci,id=blk{index},drive=disk{index},serial=disk{index}"),
        );
    }

    fn chardev_socket(&mut self, id: &str, path: &Path) {
        self.pair(
            "-chardev",
            with_path(
                &format!("socket,id={id},server=on,wait=off,path="),
                path,
                "",
            ),
        );
    }
}

/// An option string with a path in it; QEMU wants commas in values doubled.
fn with_path(before: &str, path: &Path, after: &str) -> OsString {
    let path = path.to_string_lossy().replace(',', ",,");
    format!("{before}{path}{after}").into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::network::Network;

    fn spec() -> Spec {
        Spec {
            accel: Accel::tcg((10, 0)),
            vmlinuz: "/k/vmlinuz".into(),
            initrd: None,
            root: "/d/root.qcow2".into(),
            disks: vec!["/d/with,comma.qcow2".into()],
            memory_mib: 1024,
            resume: None,
            paused: false,
            seat: None,
        }
    }

    fn args(spec: &Spec) -> Vec<String> {
        let ends = Endpoints {
            qmp: "/s/qmp".into(),
            agent: "/s/qga".into(),
            console: "/c".into(),
        };
        qemu_args(spec, &ends)
            .into_iter()
            .map(|a| a.into_string().unwrap())
            .collect()
    }

    #[test]
    fn a_comma_in_a_path_is_doubled() {
        assert!(
            args(&spec())
                .iter()
                .any(|a| a.ends_with("file=/d/with,,comma.qcow2"))
        );
    }

    #[test]
    fn a_guest_without_a_network_has_the_card_and_no_wire() {
        let card = |args: &[String]| args.iter().any(|a| a.contains("id=card1,netdev=net1"));
        let alone = args(&spec());
        assert!(card(&alone) && !alone.iter().any(|a| a.contains("mcast=")));
        let network = Network::new(&["a".into(), "b".into()]).unwrap();
        let seated = args(&Spec {
            seat: network.seats().nth(1),
            ..spec()
        });
        assert!(card(&seated) && seated.iter().any(|a| a.contains("id=net1,mcast=239.255.")));
        assert!(seated.iter().any(|a| a.ends_with("mac=52:54:00:7a:75:02")));
    }

    #[test]
    fn resuming_and_the_initrd_are_asked_for_only_when_given() {
        let plain = args(&spec());
        assert!(!plain.iter().any(|a| a == "-loadvm" || a == "-initrd"));
        let full = Spec {
            initrd: Some("/k/initrd".into()),
            resume: Some("booted".into()),
            ..spec()
        };
        let full = args(&full);
        assert!(full.windows(2).any(|w| w == ["-loadvm", "booted"]));
        assert!(full.windows(2).any(|w| w == ["-initrd", "/k/initrd"]));
    }
}
