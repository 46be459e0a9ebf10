// SPDX-License-Identifier: GPL-2.0-only
//! `zumastor authorize`: another machine's key may bring or fetch one volume, and do nothing else.
//!
//! What the key may do is one line of the user's ~/.ssh/authorized_keys, with a forced command: sshd runs that,
//! whatever is asked for. The file is replaced as a whole, as its user, so that nobody can lead root elsewhere.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use clap::{Arg, ArgMatches, Command};
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::{Group, User, getgrouplist, setegid, seteuid, setgroups};

use super::forget::dry_run;
use super::{Context, OK, string, verb, volume_of, volume_operand};
use crate::config;
use crate::replicate::ssh::quoted;
use crate::volume::check_host;

/// Longest key file: a public key has some hundred bytes.
const KEY_MAX_BYTES: u64 = 16 << 10;
/// Longest authorized_keys.
const KEYS_MAX_BYTES: u64 = 4 << 20;
/// Kinds of keys, as `ssh-keygen` writes them.
const KINDS: [&str; 7] = [
    "ssh-ed25519",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa-sha2-nistp256@openssh.com",
    "ssh-rsa",
];
/// The group that may use the daemon's socket for streams.
const GROUP: &str = "zumastor";

/// The arguments.
pub fn command() -> Command {
    verb(
        "authorize",
        "Let another machine's ssh key replicate into a volume, and do nothing else",
    )
    .arg(volume_operand())
    .arg(
        Arg::new("keyfile")
            .value_name("KEYFILE")
            .required(true)
            .help("A file with one public key, as ssh-keygen writes it"),
    )
    .arg(
        Arg::new("target")
            .long("target")
            .value_name("HOST")
            .help("The key may fetch the volume as this target instead"),
    )
    .arg(
        Arg::new("user")
            .long("user")
            .value_name("USER")
            .default_value("root")
            .help("Whom the key logs in as: root, or a member of the group zumastor"),
    )
    .arg(dry_run())
}

/// Runs it.
pub fn run(matches: &ArgMatches, context: &mut Context) -> u8 {
    let request = Request {
        volume: volume_of(matches),
        keyfile: string(matches, "keyfile").unwrap_or_default().into(),
        target: string(matches, "target"),
        user: string(matches, "user").unwrap_or_default(),
        dry_run: matches.get_flag("dry-run"),
    };
    match request.carry_out(context) {
        Ok(text) => {
            context.print(&format!("{text}\n"));
            OK
        }
        Err(error) => context.outcome(Err(error)),
    }
}

struct Request {
    volume: String,
    keyfile: PathBuf,
    target: Option<String>,
    user: String,
    dry_run: bool,
}

impl Request {
    fn carry_out(&self, context: &Context) -> Result<String> {
        let volume = &self.volume;
        if config::load(&context.layout, volume)?.is_none() {
            bail!("'{volume}' is not a managed volume");
        }
        if let Some(host) = &self.target {
            check_host(host)?;
        }
        let key = read_key(&self.keyfile)?;
        let user = User::from_name(&self.user)?;
        let user = user.with_context(|| format!("there is no user '{}'", self.user))?;
        if !user.uid.is_root() {
            check_member(&user)?;
        }
        let line = line(volume, self.target.as_deref(), &key);
        let dir = context.layout.at(&user.dir.to_string_lossy()).join(".ssh");
        if self.dry_run {
            return Ok(format!(
                "would add to {}: {line}",
                dir.join("authorized_keys").display()
            ));
        }
        if !user.uid.is_root() {
            become_user(&user)?;
        }
        let (path, added) = add(&dir, &line, &key)?;
        let what = match &self.target {
            Some(host) => format!("fetch volume '{volume}' as target {host}"),
            None => format!("replicate into volume '{volume}'"),
        };
        let may = if added { "may now" } else { "may already" };
        Ok(format!(
            "{} {may} {what}, and do nothing else: {}",
            key.name(),
            path.display()
        ))
    }
}

/// Where nobody else can be: the daemon's socket is closed to others.
fn check_member(user: &User) -> Result<()> {
    let name = &user.name;
    let group = Group::from_name(GROUP)?.with_context(|| {
        format!(
            "there is no group {GROUP}, whose members may replicate without being root: run `addgroup --system \
             {GROUP}`, `adduser {name} {GROUP}` and restart zumastor"
        )
    })?;
    let c_name = std::ffi::CString::new(name.as_str())?;
    if !getgrouplist(&c_name, user.gid)?.contains(&group.gid) {
        bail!("user '{name}' is not in the group {GROUP}: run `adduser {name} {GROUP}`");
    }
    Ok(())
}

/// From here on this process may do what the user may. It does nothing but write his file.
fn become_user(user: &User) -> Result<()> {
    let became = setgroups(&[user.gid])
        .and_then(|()| setegid(user.gid))
        .and_then(|()| seteuid(user.uid));
    became.with_context(|| format!("could not write as user '{}'", user.name))
}

/// A public key.
#[derive(Debug, PartialEq, Eq)]
struct Key {
    kind: String,
    /// Itself, in base64.
    data: String,
    comment: String,
}

impl Key {
    fn name(&self) -> String {
        match self.comment.as_str() {
            "" => format!("this {} key", self.kind),
            comment => format!("the key of {comment}"),
        }
    }
}

/// Reads the one key of a file.
fn read_key(path: &Path) -> Result<Key> {
    let shown = path.display();
    let mut text = String::new();
    let file = File::open(path).with_context(|| format!("could not open {shown}"))?;
    match file.take(KEY_MAX_BYTES + 1).read_to_string(&mut text) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            bail!("{shown} is no public key: it is not text")
        }
        Err(error) => return Err(error).with_context(|| format!("could not read {shown}")),
    }
    if text.len() as u64 > KEY_MAX_BYTES {
        bail!("{shown} is no public key: it is longer than {KEY_MAX_BYTES} bytes");
    }
    if text.contains("PRIVATE KEY") {
        bail!(
            "{shown} is a private key, which stays where it is: give the public one, {shown}.pub"
        );
    }
    let lines = text.lines().map(str::trim);
    let lines: Vec<&str> = lines
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .collect();
    let [line] = lines[..] else {
        bail!(
            "{shown} has {} keys: give a file with one, as each is for one thing",
            lines.len()
        );
    };
    parse(line)
        .map_err(|why| anyhow::anyhow!("{shown} is no public key as ssh-keygen writes it: {why}"))
}

fn parse(line: &str) -> Result<Key, String> {
    let mut words = line.split_ascii_whitespace();
    let kind = words.next().unwrap_or_default();
    let data = words.next().unwrap_or_default();
    if !KINDS.contains(&kind) {
        if line.split_ascii_whitespace().any(|w| KINDS.contains(&w)) {
            return Err("it has options, and what the key may do is said here".into());
        }
        return Err("it does not begin with a kind of key".into());
    }
    let bytes = STANDARD
        .decode(data)
        .map_err(|_| "its second word is not base64".to_string())?;
    // It begins with its kind again: a length of 4 bytes, and so many bytes.
    let inner = bytes.split_first_chunk::<4>().and_then(|(length, rest)| {
        let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
        rest.split_at_checked(length)
    });
    match inner {
        Some((name, rest)) if name == kind.as_bytes() && rest.len() >= 32 => {}
        Some((name, _)) if name == kind.as_bytes() => return Err("it is cut off".into()),
        _ => return Err(format!("it is not {kind} inside")),
    }
    let comment = words.collect::<Vec<_>>().join(" ");
    Ok(Key {
        kind: kind.to_owned(),
        data: data.to_owned(),
        comment: comment.chars().filter(|c| !c.is_control()).collect(),
    })
}

/// The line that says what a key may do.
fn line(volume: &str, target: Option<&str>, key: &Key) -> String {
    let command = match target {
        None => format!("zumastor receive --only {}", quoted(volume)),
        // What the client asks for is not looked at.
        Some(host) => format!("zumastor send {} {}", quoted(volume), quoted(host)),
    };
    let Key {
        kind,
        data,
        comment,
    } = key;
    // Names of volumes and hosts have neither quotes nor backslashes.
    let line = format!("restrict,command=\"{command}\" {kind} {data} {comment}");
    line.trim_end().to_owned()
}

/// Adds the line to `dir`/authorized_keys, unless it is there. Gives the file, and whether it was added.
fn add(dir: &Path, line: &str, key: &Key) -> Result<(PathBuf, bool)> {
    if !dir.is_dir() {
        let made = DirBuilder::new().mode(0o700).create(dir);
        made.with_context(|| format!("could not create {}", dir.display()))?;
    }
    let path = dir.join("authorized_keys");
    // Where it is a link, what it leads to is replaced.
    let path = match path.canonicalize() {
        Ok(real) => real,
        Err(error) if error.kind() == io::ErrorKind::NotFound => path,
        Err(error) => {
            return Err(error).with_context(|| format!("could not find {}", path.display()));
        }
    };
    let parent = path.parent().context("a file without a directory")?;
    let opened =
        File::open(parent).with_context(|| format!("could not open {}", parent.display()))?;
    // Two at a time would each lose the other's line.
    let locked = Flock::lock(opened, FlockArg::LockExclusive)
        .map_err(|(_, error)| anyhow::anyhow!("could not lock {} ({error})", parent.display()))?;
    let mut text = Vec::new();
    match File::open(&path) {
        Ok(file) => {
            let read = file.take(KEYS_MAX_BYTES + 1).read_to_end(&mut text);
            read.with_context(|| format!("could not read {}", path.display()))?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => {
            return Err(error).with_context(|| format!("could not open {}", path.display()));
        }
    }
    if text.len() as u64 > KEYS_MAX_BYTES {
        bail!("{} is longer than {KEYS_MAX_BYTES} bytes", path.display());
    }
    if let Some((number, there)) = find(&text, key) {
        if rights(&there, key) == rights(line, key) {
            return Ok((path, false));
        }
        // The first line of a key counts: another one would be of no effect.
        bail!(
            "the key is in {} already, on line {number}, with other rights: take that line out, or use a key of its \
             own for each volume",
            path.display()
        );
    }
    if !text.is_empty() && !text.ends_with(b"\n") {
        text.push(b'\n');
    }
    text.extend_from_slice(line.as_bytes());
    text.push(b'\n');
    let temporary = parent.join("authorized_keys.zumastor");
    let write = || {
        // Left by one that was killed; we have the lock.
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut options = OpenOptions::new();
        let mut file = options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(&text)?;
        file.sync_all()?;
        fs::rename(&temporary, &path)?;
        locked.sync_all()
    };
    write().with_context(|| format!("could not write {}", path.display()))?;
    Ok((path, true))
}

/// The line that has the key, and its number from 1.
fn find(text: &[u8], key: &Key) -> Option<(usize, String)> {
    let text = String::from_utf8_lossy(text);
    let has = |line: &str| {
        let line = line.trim_start();
        !line.starts_with('#') && line.split_ascii_whitespace().any(|word| word == key.data)
    };
    let mut lines = text.lines().zip(1..);
    lines
        .find(|(line, _)| has(line))
        .map(|(line, number)| (number, line.trim().to_owned()))
}

/// What stands before the key.
fn rights<'a>(line: &'a str, key: &Key) -> &'a str {
    line.split(key.data.as_str()).next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const ED25519: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl root@alpha";

    fn key() -> Key {
        parse(ED25519).expect("a key")
    }

    fn refusal(text: &str) -> String {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("key");
        fs::write(&path, text).expect("written");
        let error = read_key(&path).expect_err(text);
        format!("{error:#}").replace(&path.display().to_string(), "F")
    }

    /// Options of the file itself would have stood behind ours, and a second key in it been let in with all rights.
    #[test]
    fn one_public_key_and_nothing_else_is_taken() {
        let spaced = format!("# mine\n\n  {ED25519}  \n");
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("key");
        fs::write(&path, spaced).expect("written");
        assert_eq!(read_key(&path).expect("a key"), key());
        assert_eq!(key().comment, "root@alpha");

        let two = format!("{ED25519}\n{ED25519}\n");
        assert!(refusal(&two).starts_with("F has 2 keys"));
        assert!(refusal("").starts_with("F has 0 keys"));
        let private =
            "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNz\n-----END OPENSSH PRIVATE KEY-----\n";
        assert!(refusal(private).contains("give the public one, F.pub"));
        let options = format!("command=\"sh\" {ED25519}");
        assert!(refusal(&options).contains("it has options"));
        assert!(refusal("ssh-dss AAAA").contains("does not begin with a kind of key"));
        assert!(refusal("ssh-ed25519 !!!!").contains("not base64"));
        let other = ED25519.replace("ssh-ed25519", "ssh-rsa");
        assert!(refusal(&other).contains("it is not ssh-rsa inside"));
        assert!(refusal("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMq").contains("cut off"));
        assert!(refusal(&"x".repeat(20_000)).contains("longer than"));
    }

    #[test]
    fn the_line_is_pinned() {
        let data = &key().data;
        assert_eq!(
            line("data", None, &key()),
            format!(
                "restrict,command=\"zumastor receive --only 'data'\" ssh-ed25519 {data} root@alpha"
            )
        );
        assert_eq!(
            line("a;b", Some("beta"), &key()),
            format!(
                "restrict,command=\"zumastor send 'a;b' 'beta'\" ssh-ed25519 {data} root@alpha"
            )
        );
    }

    /// The other lines were lost, or a key let in twice with other rights, of which sshd takes the first.
    #[test]
    fn a_line_is_added_once_and_the_others_stay() {
        let home = tempfile::tempdir().expect("a directory");
        let dir = home.path().join(".ssh");
        let path = dir.join("authorized_keys");
        let ours = line("data", None, &key());
        assert_eq!(
            add(&dir, &ours, &key()).expect("added"),
            (path.clone(), true)
        );
        assert_eq!(
            fs::read_to_string(&path).expect("read"),
            format!("{ours}\n")
        );
        let mode = |path: &Path| fs::metadata(path).expect("there").permissions().mode() & 0o777;
        assert_eq!((mode(&dir), mode(&path)), (0o700, 0o600));

        let mut before = b"# \xff not UTF-8\nssh-rsa AAAA somebody".to_vec();
        fs::write(&path, &before).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("set");
        assert!(add(&dir, &ours, &key()).expect("added").1);
        assert!(
            !add(&dir, &ours, &key()).expect("there").1,
            "once is enough"
        );
        before.extend_from_slice(format!("\n{ours}\n").as_bytes());
        assert_eq!(fs::read(&path).expect("read"), before);
        assert_eq!(mode(&path), 0o600);
        assert_eq!(fs::read_dir(&dir).expect("read").count(), 1);

        let other = line("other", None, &key());
        let refused = add(&dir, &other, &key()).expect_err("other rights");
        assert!(
            format!("{refused:#}").contains("on line 3, with other rights"),
            "{refused:#}"
        );
        assert_eq!(fs::read(&path).expect("read"), before);
    }

    /// A link in the user's directory was replaced by a file, and what it led to stayed as it was.
    #[test]
    fn a_link_stays_a_link() {
        let home = tempfile::tempdir().expect("a directory");
        let dir = home.path().join(".ssh");
        fs::create_dir(&dir).expect("made");
        let real = home.path().join("keys");
        fs::write(&real, "").expect("written");
        std::os::unix::fs::symlink(&real, dir.join("authorized_keys")).expect("linked");
        add(&dir, &line("data", None, &key()), &key()).expect("added");
        assert!(dir.join("authorized_keys").is_symlink());
        assert!(
            fs::read_to_string(&real)
                .expect("read")
                .starts_with("restrict,")
        );
    }
}
