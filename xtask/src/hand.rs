// SPDX-License-Identifier: GPL-2.0-only
//! `cargo xtask vm`: the scenarios' guest, by hand.

use std::fs::{self, File};
use std::io::{IsTerminal, Read, Write};
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::flags::{Exec, ImageName, Link, LinkState, Pull, Push, Ssh, Up, Vm};
use crate::image::booted::{self, Booted, Place};
use crate::image::identity::Identities;
use crate::ui::run_logged;
use crate::vm::machine::{BOOT_DEADLINE, Lifetime, Machine, guest_env, poll_until};
use crate::vm::network::{Network, Seat};
use crate::{guest, lock, packages, paths};

/// Time for the small commands that prepare something in the guest.
const SOON: Duration = Duration::from_secs(120);

/// How long to wait for another command's turn: it may move a large file.
const LONGEST_TURN: Duration = Duration::from_secs(3600);
/// After so long it is said that there is one.
const QUIET: Duration = Duration::from_secs(2);

/// Runs one `vm` command; the exit code is the command's.
pub fn run(vm: Vm) -> Result<u8> {
    match vm {
        Vm::Up(up) => start(&up).map(|()| 0),
        Vm::Exec(exec) => execute(&exec),
        Vm::Push(push) => copy_in(&push).map(|()| 0),
        Vm::Pull(pull) => copy_out(&pull).map(|()| 0),
        Vm::Ssh(ssh) => log_in(&ssh),
        Vm::PowerCut(named) => power_cut(&named.name).map(|()| 0),
        Vm::Link(link) => set_link(&link).map(|()| 0),
        Vm::Down(down) => down
            .names
            .iter()
            .try_for_each(|name| stop(name))
            .map(|()| 0),
    }
}

fn dir_of(name: &str) -> Result<PathBuf> {
    if name.is_empty()
        || !name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-_".contains(c))
    {
        bail!("{name:?} is no name for a guest: use letters, digits, - and _");
    }
    Ok(paths::target().join("vm").join(name))
}

fn attach(name: &str) -> Result<Machine> {
    Machine::attach(&dir_of(name)?)
        .with_context(|| format!("no guest {name}; start one: cargo xtask vm up {name}"))
}

/// Does something with the agent of guest `name`, which has one connection: so whoever wants it too has his turn after
/// that.
fn in_turn<T>(
    name: &str,
    machine: &mut Machine,
    act: impl FnOnce(&mut Machine) -> Result<T>,
) -> Result<T> {
    let tell = || eprintln!("waiting for another command that has guest {name}");
    let path = dir_of(name)?.join("agent.lock");
    let _turn = lock::take_within(&path, LONGEST_TURN, (QUIET, &tell))?;
    machine.wait_for_agent(SOON)?;
    let done = act(machine);
    machine.agent().disconnect();
    done
}

fn image_of(up: &Up) -> guest::Wanted {
    let image = match (up.bare, up.image) {
        (true, _) => guest::Image::Bare,
        (false, ImageName::Ddsnap) => guest::Image::Ddsnap,
        (false, ImageName::Stock) => guest::Image::Stock,
    };
    guest::Wanted {
        distro: up.distro,
        image,
        kernel: up.kernel.clone(),
    }
}

fn start(up: &Up) -> Result<()> {
    let dirs = up.names.iter().map(|name| dir_of(name));
    let dirs = dirs.collect::<Result<Vec<_>>>()?;
    for (i, (name, dir)) in up.names.iter().zip(&dirs).enumerate() {
        if up.names[..i].contains(name) {
            bail!("guest {name} is named twice");
        }
        if Machine::attach(dir).is_ok() {
            bail!("guest {name} is up already; stop it first: cargo xtask vm down {name}");
        }
    }
    let image = guest::image(&image_of(up))?;
    let booted = booted::booted(&image, &up.disks, booted::MEMORY_MIB)?;
    dirs.iter().try_for_each(|dir| paths::fresh_dir(dir))?;
    let network = match (up.network, dirs.first()) {
        (true, Some(dir)) => {
            let network = Network::new(&up.names)?;
            let identities = Identities::make(&network, &dir.join("keys"))?;
            Some((network, identities))
        }
        _ => None,
    };
    let mut seats = network.iter().flat_map(|(network, _)| network.seats());
    for (name, dir) in up.names.iter().zip(&dirs) {
        let start = Start {
            booted: &booted,
            seat: seats.next(),
        };
        let mut machine = booted.resume(&place(dir, start.seat.as_ref()))?;
        if let (Some((_, identities)), Some(seat)) = (&network, &start.seat) {
            identities.apply(&mut machine, seat)?;
        }
        let file = dir.join(START);
        fs::write(&file, serde_json::to_vec(&start)?)
            .with_context(|| format!("cannot write {}", file.display()))?;
        eprintln!("up; try: cargo xtask vm exec {name} -- uname -a");
    }
    Ok(())
}

/// What a guest was started from, noted for later processes.
#[derive(Serialize)]
struct Start<'a> {
    booted: &'a Booted,
    seat: Option<Seat>,
}

/// Such a note, read.
#[derive(Deserialize)]
struct Started {
    booted: Booted,
    seat: Option<Seat>,
}

const START: &str = "started.json";

fn place<'a>(dir: &'a Path, seat: Option<&'a Seat>) -> Place<'a> {
    Place {
        dir,
        lifetime: Lifetime::Own,
        lossy: None,
        seat,
    }
}

fn power_cut(name: &str) -> Result<()> {
    let dir = dir_of(name)?;
    let mut machine = attach(name)?;
    let file = dir.join(START);
    let text = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let started: Started =
        serde_json::from_slice(&text).with_context(|| format!("{} is damaged", file.display()))?;
    machine.cut_power()?;
    started
        .booted
        .boot_again(&place(&dir, started.seat.as_ref()))?;
    Ok(())
}

fn set_link(link: &Link) -> Result<()> {
    let machine = Machine::attach(&dir_of(&link.name)?)?;
    machine.qmp()?.set_link(link.state == LinkState::Up)
}

fn stop(name: &str) -> Result<()> {
    let dir = dir_of(name)?;
    if let Ok(machine) = Machine::attach(&dir) {
        machine.stop()?;
    } else if !dir.exists() {
        bail!("no guest {name}");
    }
    paths::remove_dir(&dir)
}

fn execute(exec: &Exec) -> Result<u8> {
    let mut machine = attach(&exec.name)?;
    let mut input = Vec::new();
    let mut stdin = std::io::stdin();
    if !stdin.is_terminal() {
        stdin
            .read_to_end(&mut input)
            .context("cannot read standard input")?;
    }
    // The agent wants a full path; env finds the program as a shell would.
    let mut argv = vec!["/usr/bin/env".to_string(), "--".into()];
    argv.extend(exec.command.iter().cloned());
    let start = |machine: &mut Machine| machine.agent().start(&argv, &guest_env(), &input);
    let pid = in_turn(&exec.name, &mut machine, start)?;
    // While it runs others have their turns.
    let out = poll_until(Duration::from_secs(exec.timeout), || {
        in_turn(&exec.name, &mut machine, |machine| machine.poll(pid))
    })?;
    std::io::stdout()
        .write_all(&out.stdout)
        .context("cannot write standard output")?;
    std::io::stderr()
        .write_all(&out.stderr)
        .context("cannot write standard error")?;
    Ok(u8::try_from(out.code).unwrap_or(255))
}

fn copy_in(push: &Push) -> Result<()> {
    let mut file =
        File::open(&push.from).with_context(|| format!("cannot open {}", push.from.display()))?;
    let mut machine = attach(&push.name)?;
    // The agent creates files without the execute bits of the original.
    let mode = std::os::unix::fs::PermissionsExt::mode(&file.metadata()?.permissions()) & 0o7777;
    let argv = [
        "/bin/chmod".to_string(),
        format!("{mode:o}"),
        "--".into(),
        push.to.clone(),
    ];
    in_turn(&push.name, &mut machine, |machine| {
        machine.agent().push(&mut file, &push.to)?;
        let pid = machine.agent().start(&argv, &guest_env(), b"")?;
        machine.finish(pid, SOON).map(|_| ())
    })
}

fn copy_out(pull: &Pull) -> Result<()> {
    let mut machine = attach(&pull.name)?;
    let mut file =
        File::create(&pull.to).with_context(|| format!("cannot create {}", pull.to.display()))?;
    in_turn(&pull.name, &mut machine, |machine| {
        machine.agent().pull(&pull.from, &mut file)
    })
}

/// The guest's network card and ssh server are idle until now.
fn log_in(ssh: &Ssh) -> Result<u8> {
    packages::require(&["openssh-client"])?;
    let dir = dir_of(&ssh.name)?;
    let mut machine = attach(&ssh.name)?;
    let key = dir.join("ssh-key");
    if !key.exists() {
        let mut keygen = Command::new("ssh-keygen");
        keygen
            .args(["-q", "-t", "ed25519", "-N", "", "-C", "vm", "-f"])
            .arg(&key);
        run_logged(&mut keygen, &dir.join("ssh.log"))?;
    }
    let public = fs::read_to_string(key.with_extension("pub"))?;
    let line = public.trim();
    let script = format!(
        "set -e; umask 077; mkdir -p /root/.ssh /run/sshd; \
         touch /root/.ssh/authorized_keys; \
         grep -qxF '{line}' /root/.ssh/authorized_keys || echo '{line}' >>/root/.ssh/authorized_keys; \
         ip link set lo up; ip link set eth0 up; ip addr replace 10.0.2.15/24 dev eth0; \
         systemctl start ssh.service"
    );
    let out = in_turn(&ssh.name, &mut machine, |machine| {
        machine.shell(&script, BOOT_DEADLINE)
    })?;
    if out.code != 0 {
        bail!(
            "the guest's ssh did not start: {}",
            String::from_utf8_lossy(&out.stderr).trim()
        );
    }
    let port = free_port()?;
    machine.qmp()?.forward_port(port, 22)?;
    let error = Command::new("ssh")
        .arg("-i")
        .arg(&key)
        .args(["-p", &port.to_string()])
        .args([
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "UserKnownHostsFile=/dev/null",
        ])
        .args([
            "-o",
            "IdentitiesOnly=yes",
            "-o",
            "LogLevel=ERROR",
            "root@127.0.0.1",
        ])
        .args(&ssh.command)
        .exec();
    Err(error).context("cannot run ssh")
}

fn free_port() -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").context("no free port on this machine")?;
    Ok(listener.local_addr()?.port())
}
