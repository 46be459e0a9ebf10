// SPDX-License-Identifier: GPL-2.0-only
//! The guest agent: running commands in the guest and moving files.

use std::io::{BufReader, BufWriter, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use qapi::{Command, qga};

type Socket = qapi::Stream<BufReader<UnixStream>, BufWriter<UnixStream>>;

/// Time for one answer of a healthy agent; commands themselves run in the
/// background of the agent and are polled.
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);

/// Bytes moved per request, well below the agent's limit for one message.
const BLOCK_BYTES: usize = 512 * 1024;

/// What a finished command left behind.
#[derive(Clone, Debug, Default)]
pub struct Output {
    /// Exit code; 128 + N when signal N ended the command, as a shell reports it.
    pub code: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

/// The agent's number for a command it started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pid(i64);

/// A connection to the agent, made anew when the guest restarts.
pub struct Agent {
    path: PathBuf,
    socket: Option<qapi::Qga<Socket>>,
}

impl Agent {
    /// An agent that will be reached through `path`; nothing is connected yet.
    pub fn at(path: &Path) -> Self {
        Agent {
            path: path.to_path_buf(),
            socket: None,
        }
    }

    /// Tries once to reach the agent within `wait`.
    ///
    /// The agent's answers to an earlier, abandoned connection may still be in
    /// the pipe; a number of our own tells ours from those.
    pub fn try_connect(&mut self, wait: Duration) -> Result<()> {
        self.socket = None;
        let stream = UnixStream::connect(&self.path)
            .with_context(|| format!("cannot connect to {}", self.path.display()))?;
        stream.set_read_timeout(Some(wait))?;
        stream.set_write_timeout(Some(wait))?;
        let control = stream.try_clone()?;
        let reader = BufReader::new(stream.try_clone()?);
        let mut socket = qapi::Qga::new(qapi::Stream::new(reader, BufWriter::new(stream)));
        let id = sync_number();
        socket.write_command(&qga::guest_sync { id })?;
        for _ in 0..64 {
            match socket.read_response::<qga::guest_sync>() {
                Ok(answer) if answer == id => {
                    control.set_read_timeout(Some(ANSWER_DEADLINE))?;
                    control.set_write_timeout(Some(ANSWER_DEADLINE))?;
                    self.socket = Some(socket);
                    return Ok(());
                }
                // An answer meant for an earlier connection: read on.
                Ok(_) | Err(qapi::ExecuteError::Qapi(_)) => {}
                Err(qapi::ExecuteError::Io(e)) if e.kind() == std::io::ErrorKind::InvalidData => {}
                Err(e) => return Err(e).context("the guest agent does not answer"),
            }
        }
        bail!("the guest agent answers with numbers that are not ours")
    }

    /// Forgets the connection; the guest is about to go away.
    pub fn disconnect(&mut self) {
        self.socket = None;
    }

    /// Starts a program in the guest; `input` is its standard input.
    pub fn start(&mut self, argv: &[String], env: &[String], input: &[u8]) -> Result<Pid> {
        let (path, arg) = argv
            .split_first()
            .context("no command to run in the guest")?;
        let command = qga::guest_exec {
            path: path.clone(),
            arg: Some(arg.to_vec()),
            env: Some(env.to_vec()),
            input_data: (!input.is_empty()).then(|| input.to_vec()),
            capture_output: Some(qga::GuestExecCaptureOutput::flag(true)),
        };
        Ok(Pid(self.call(&command)?.pid))
    }

    /// The command's output once it has ended; `None` while it runs.
    pub fn poll(&mut self, pid: Pid) -> Result<Option<Output>> {
        let status = self.call(&qga::guest_exec_status { pid: pid.0 })?;
        if !status.exited {
            return Ok(None);
        }
        let code = match (status.exitcode, status.signal) {
            (Some(code), _) => code,
            (None, Some(signal)) => 128 + signal,
            (None, None) => -1,
        };
        if status.out_truncated == Some(true) || status.err_truncated == Some(true) {
            bail!("the command printed more than the guest agent keeps (16 MiB)");
        }
        Ok(Some(Output {
            code: i32::try_from(code).unwrap_or(-1),
            stdout: status.out_data.unwrap_or_default(),
            stderr: status.err_data.unwrap_or_default(),
        }))
    }

    /// Sets the guest's clock to the host's: a resumed guest lives in the past.
    pub fn set_clock(&mut self) -> Result<()> {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let nanos = i64::try_from(now.as_nanos()).context("this machine's clock is beyond 2262")?;
        self.call(&qga::guest_set_time { time: Some(nanos) })?;
        Ok(())
    }

    /// Copies everything from `source` into a file in the guest.
    pub fn push(&mut self, source: &mut dyn Read, path: &str) -> Result<()> {
        let handle = self.open(path, "w")?;
        let mut block = vec![0; BLOCK_BYTES];
        loop {
            let got = source
                .read(&mut block)
                .context("cannot read what to copy to the guest")?;
            if got == 0 {
                break;
            }
            let buf_b64 = block[..got].to_vec();
            let wrote = self
                .call(&qga::guest_file_write {
                    handle,
                    count: None,
                    buf_b64,
                })?
                .count;
            if wrote != got as i64 {
                bail!("the guest wrote {wrote} of {got} bytes to {path}; is its disk full?");
            }
        }
        self.call(&qga::guest_file_close { handle })?;
        Ok(())
    }

    /// Copies a file of the guest into `sink`.
    pub fn pull(&mut self, path: &str, sink: &mut dyn Write) -> Result<()> {
        let handle = self.open(path, "r")?;
        loop {
            let count = Some(BLOCK_BYTES as i64);
            let part = self.call(&qga::guest_file_read { handle, count })?;
            sink.write_all(&part.buf_b64)
                .context("cannot write what came from the guest")?;
            if part.eof {
                break;
            }
        }
        self.call(&qga::guest_file_close { handle })?;
        Ok(())
    }

    fn open(&mut self, path: &str, mode: &str) -> Result<i64> {
        let open = qga::guest_file_open {
            path: path.into(),
            mode: Some(mode.into()),
        };
        self.call(&open)
            .with_context(|| format!("in the guest: {path}"))
    }

    fn call<C: Command>(&mut self, command: &C) -> Result<C::Ok> {
        let socket = self
            .socket
            .as_mut()
            .context("the guest agent is not connected")?;
        let result = socket.execute(command);
        if matches!(result, Err(qapi::ExecuteError::Io(_))) {
            // The stream may now hold half an answer.
            self.socket = None;
        }
        result.with_context(|| format!("guest agent: {}", C::NAME))
    }
}

/// A number no other connection is likely to use.
fn sync_number() -> i64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    (now.as_nanos() as i64) & 0x7fff_ffff
}
