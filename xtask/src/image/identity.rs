// SPDX-License-Identifier: GPL-2.0-only
//! What makes guests that were resumed from one saved image different from each other: host name, machine-id,
//! ssh keys, hardware and network addresses, and random numbers.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::packages;
use crate::ui::run_logged;
use crate::vm::machine::Machine;
use crate::vm::network::{Network, Seat};

/// Time for a guest to become who it is.
const DEADLINE: Duration = Duration::from_secs(300);

/// The identities of a network's guests.
pub struct Identities(Vec<Identity>);

struct Identity {
    /// Of the guest's ssh server.
    host: Pair,
    /// Of its root, who may log in to every guest of the network.
    root: Pair,
    machine_id: String,
}

/// An ssh key, as OpenSSH writes it.
struct Pair {
    private: String,
    public: String,
}

impl Identities {
    /// New ones; the keys are made in `dir`.
    pub fn make(network: &Network, dir: &Path) -> Result<Self> {
        packages::require(&["openssh-client"])?;
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let made = network.members().iter().map(|name| {
            Ok(Identity {
                host: Pair::make(dir, &format!("{name}.host"))?,
                root: Pair::make(dir, &format!("{name}.root"))?,
                machine_id: uuid()?,
            })
        });
        Ok(Identities(made.collect::<Result<_>>()?))
    }

    /// Makes a guest that was just resumed the one of this seat. It stays so over reboots.
    pub fn apply(&self, machine: &mut Machine, seat: &Seat) -> Result<()> {
        let out = machine.shell(&self.script(seat)?, DEADLINE)?;
        if out.code != 0 {
            bail!(
                "the guest did not become {}: {}",
                seat.name(),
                String::from_utf8_lossy(&out.stderr).trim()
            );
        }
        Ok(())
    }

    fn script(&self, seat: &Seat) -> Result<String> {
        let own = self.0.get(seat.index()).context("no identity")?;
        let (mut hosts, mut known, mut allowed) = (String::new(), String::new(), String::new());
        for (i, (identity, name)) in self.0.iter().zip(seat.network().members()).enumerate() {
            let address = seat.network().address(i);
            writeln!(hosts, "{address} {name}")?;
            writeln!(known, "{name},{address} {}", identity.host.public)?;
            writeln!(allowed, "{}", identity.root.public)?;
        }
        let random = uuid()?;
        let (name, mac, address) = (seat.name(), seat.mac(), seat.address());
        let machine_id = &own.machine_id;
        let (host, root) = (&own.host, &own.root);
        // A private key ends with a line end.
        Ok(format!(
            r#"set -e
# All guests have the random numbers of the one that was saved: UUIDs made here would be equal. The second
# call, RNDRESEEDCRNG, has the kernel use what was written at once.
perl -e 'open(my $r, "+<", "/dev/urandom") or die $!; syswrite($r, "{random}"); ioctl($r, 0x5207, 0) or die $!'
echo {name} >/etc/hostname
echo {name} >/proc/sys/kernel/hostname
cat >/etc/hosts <<'END'
127.0.0.1 localhost
{hosts}END
echo {machine_id} >/etc/machine-id
if test -e /var/lib/dbus/machine-id; then ln -sf /etc/machine-id /var/lib/dbus/machine-id; fi
# It keeps its files under that id.
systemctl restart systemd-journald
umask 077
mkdir -p /root/.ssh
rm -f /etc/ssh/ssh_host_*
cat >/etc/ssh/ssh_host_ed25519_key <<'END'
{host_private}END
echo '{host_public}' >/etc/ssh/ssh_host_ed25519_key.pub
cat >/root/.ssh/id_ed25519 <<'END'
{root_private}END
echo '{root_public}' >/root/.ssh/id_ed25519.pub
cat >/root/.ssh/authorized_keys <<'END'
{allowed}END
cat >/root/.ssh/known_hosts <<'END'
{known}END
umask 022
# Plain commands: nothing takes the address away when the cable is pulled.
cat >/etc/systemd/system/private-network.service <<'END'
[Unit]
Description=Network of the test's guests
Before=network.target
Wants=network.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/sbin/ip link set dev eth1 address {mac}
ExecStart=/usr/sbin/ip link set dev eth1 up
ExecStart=/usr/sbin/ip address replace {address}/24 dev eth1
END
cd /etc/systemd/system/multi-user.target.wants
ln -sf ../private-network.service private-network.service
ln -sf /usr/lib/systemd/system/ssh.service ssh.service
systemctl daemon-reload
systemctl start private-network.service ssh.service
"#,
            host_private = host.private,
            host_public = host.public,
            root_private = root.private,
            root_public = root.public,
        ))
    }
}

impl Pair {
    fn make(dir: &Path, name: &str) -> Result<Self> {
        let file = dir.join(name);
        let mut keygen = Command::new("ssh-keygen");
        keygen
            .args(["-q", "-t", "ed25519", "-N", "", "-C", name, "-f"])
            .arg(&file);
        run_logged(&mut keygen, &dir.join("ssh-keygen.log"))?;
        let read = |path: &Path| {
            fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
        };
        Ok(Pair {
            private: read(&file)?,
            public: read(&dir.join(format!("{name}.pub")))?
                .trim_end()
                .to_string(),
        })
    }
}

/// A random UUID of the kernel's, without its dashes: 32 hexadecimal digits, as a machine-id has.
fn uuid() -> Result<String> {
    let file = "/proc/sys/kernel/random/uuid";
    let text = fs::read_to_string(file).with_context(|| format!("cannot read {file}"))?;
    Ok(text.trim().replace('-', ""))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pair that nobody could log in with.
    fn pair(name: &str) -> Pair {
        Pair {
            private: format!("private {name}\n"),
            public: format!("public {name}"),
        }
    }

    #[test]
    fn each_guest_is_itself_and_knows_the_others() {
        let network = Network::new(&["one".into(), "two".into()]).unwrap();
        let identity = |name: &str| Identity {
            host: pair(&format!("host {name}")),
            root: pair(&format!("root {name}")),
            machine_id: uuid().unwrap(),
        };
        let identities = Identities(vec![identity("one"), identity("two")]);
        let seats: Vec<Seat> = network.seats().collect();
        let scripts: Vec<String> = seats
            .iter()
            .map(|seat| identities.script(seat).unwrap())
            .collect();
        assert!(scripts[1].contains("echo two >/etc/hostname\n"));
        assert!(scripts[1].contains("\nprivate host two\nEND\n"));
        assert!(
            !scripts[1].contains("private host one") && !scripts[1].contains("private root one")
        );
        assert!(scripts[1].contains("\npublic root one\npublic root two\nEND\n"));
        assert!(scripts[0].contains("two,10.77.0.2 public host two\n"));
        assert!(scripts[0].contains("10.77.0.1 one\n10.77.0.2 two\nEND\n"));
        let random = |script: &str| {
            script
                .split("syswrite($r, ")
                .nth(1)
                .map(|s| s[..34].to_string())
        };
        assert!(random(&scripts[0]).is_some() && random(&scripts[0]) != random(&scripts[1]));
    }
}
