// SPDX-License-Identifier: GPL-2.0-only
//! The daemons' log: lines `date command[pid]: text`, in a file that is opened again on request.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::registry::LookupSpan;

/// Where log lines go.
#[derive(Clone, Debug)]
pub struct Log {
    /// None: standard error.
    path: Option<PathBuf>,
    file: Arc<Mutex<Option<File>>>,
    /// Lines that could not be written since one could.
    lost: Arc<AtomicU64>,
}

impl Log {
    /// Opens the log and makes it the process's.
    ///
    /// `path`: a file, made if missing with mode 0600, or none for standard error. `command`: what
    /// the lines say after the date. `debug`: write down every request too.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn start(path: Option<&Path>, command: &'static str, debug: bool) -> io::Result<Log> {
        let path = path.map(std::path::absolute).transpose()?;
        let file = path.as_deref().map(open).transpose()?;
        let log = Log {
            path,
            file: Arc::new(Mutex::new(file)),
            lost: Arc::default(),
        };
        let level = if debug {
            LevelFilter::DEBUG
        } else {
            LevelFilter::INFO
        };
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(level)
            .with_ansi(false)
            .event_format(Line { command })
            .with_writer(log.clone())
            .finish();
        // Only a test can have set one before; then its own stays.
        let _ = tracing::subscriber::set_global_default(subscriber);
        Ok(log)
    }

    /// Whether lines go to standard error.
    #[must_use]
    pub fn is_stderr(&self) -> bool {
        self.path.is_none()
    }

    /// Opens the file again, as after it was renamed. If that fails the old one stays.
    pub fn reopen(&self) {
        let Some(path) = &self.path else { return };
        match open(path) {
            Ok(file) => *self.lock() = Some(file),
            Err(error) => tracing::error!("cannot open the log {} again: {error}", path.display()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<File>> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(nix::libc::O_NOCTTY)
        .open(path)
}

/// A line that cannot be written is lost, and the next one that can says so. It is no error: the subscriber
/// would complain on standard error, and panic if nobody reads that either.
impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut file = self.lock();
        let lost = self.lost.load(Ordering::Relaxed);
        let note = match lost {
            0 => String::new(),
            lost => format!("{lost} lines of the log could not be written\n"),
        };
        let line = [note.as_bytes(), bytes].concat();
        let written = match file.as_mut() {
            Some(file) => file.write_all(&line),
            None => io::stderr().write_all(&line),
        };
        let lost = if written.is_ok() { 0 } else { lost + 1 };
        self.lost.store(lost, Ordering::Relaxed);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Log {
    type Writer = Log;

    fn make_writer(&self) -> Log {
        self.clone()
    }
}

struct Line {
    command: &'static str,
}

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> std::fmt::Result {
        let date = jiff::Zoned::now().strftime("%a %b %e %H:%M:%S %Y");
        write!(writer, "{date} {}[{}]: ", self.command, std::process::id())?;
        match *event.metadata().level() {
            Level::ERROR => write!(writer, "error: ")?,
            Level::WARN => write!(writer, "warning: ")?,
            _ => {}
        }
        context.format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A full disk, or a standard error that nobody read any more, ended the daemon.
    #[test]
    fn a_line_that_cannot_be_written_is_counted_and_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let full = open(Path::new("/dev/full")).unwrap();
        let mut log = Log {
            path: None,
            file: Arc::new(Mutex::new(Some(full))),
            lost: Arc::default(),
        };
        log.write_all(b"one\n").unwrap();
        log.write_all(b"two\n").unwrap();
        let path = dir.path().join("log");
        *log.lock() = Some(open(&path).unwrap());
        log.write_all(b"three\n").unwrap();
        log.write_all(b"four\n").unwrap();
        let text = std::fs::read_to_string(path).unwrap();
        assert_eq!(
            text,
            "2 lines of the log could not be written\nthree\nfour\n"
        );
    }
}
