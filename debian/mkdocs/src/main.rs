// SPDX-License-Identifier: GPL-2.0-only
//! `mkdocs DIR` writes the man pages and shell completions of `ddsnap` and `zumastor` below DIR, which stands
//! for /usr/share.
//!
//! Options are those of the commands' own clap definitions, so they cannot disagree with the programs. What no
//! definition has (concepts, files, exit codes, examples) is in `pages/` and stands at the end of each
//! command's first page. debian/rules runs this once at build time; it is not installed.
//!
//! ```text
//! DIR/man/man8/ddsnap.8, ddsnap-create.8, ...    one page for each command and subcommand, section 8
//! DIR/man/man5/zumastor-volume.5
//! DIR/bash-completion/completions/ddsnap
//! DIR/zsh/vendor-completions/_ddsnap
//! DIR/fish/vendor_completions.d/ddsnap.fish
//! ```

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Command;
use clap_complete::{Shell, generate_to};
use clap_mangen::Man;

/// Where each shell looks for completions that packages bring, below /usr/share.
const COMPLETIONS: [(Shell, &str); 3] = [
    (Shell::Bash, "bash-completion/completions"),
    (Shell::Zsh, "zsh/vendor-completions"),
    (Shell::Fish, "fish/vendor_completions.d"),
];

/// Written parts of the pages of a command and its file formats.
struct Written {
    /// Sections for the end of its first page.
    page: &'static str,
    /// Pages of section 5, with their names.
    formats: &'static [(&'static str, &'static str)],
}

const DDSNAP: Written = Written {
    page: include_str!("../pages/ddsnap.8"),
    formats: &[],
};

const ZUMASTOR: Written = Written {
    page: include_str!("../pages/zumastor.8"),
    formats: &[(
        "zumastor-volume",
        include_str!("../pages/zumastor-volume.5"),
    )],
};

fn main() -> Result<()> {
    let mut args = std::env::args_os().skip(1);
    let (Some(dir), None) = (args.next(), args.next()) else {
        bail!("usage: mkdocs DIR (DIR stands for /usr/share)");
    };
    let dir = PathBuf::from(dir);
    write_docs(ddsnap::cli::command(), "ddsnap", &DDSNAP, &dir)?;
    write_docs(zumastor::cli::command(), "zumastor", &ZUMASTOR, &dir)
}

/// Writes the man pages and completions of `command`, installed as `name`, below `share`.
fn write_docs(command: Command, name: &'static str, written: &Written, share: &Path) -> Result<()> {
    let command = command.name(name);
    let man8 = share.join("man/man8");
    create_dir(&man8)?;
    // `help` repeats the tree of commands, and would give every page a twin.
    let mut built = command.clone().disable_help_subcommand(true);
    built.build();
    write_pages(&built, &man8)?;
    append(&man8.join(format!("{name}.8")), written.page)?;
    let man5 = share.join("man/man5");
    for (page, text) in written.formats {
        create_dir(&man5)?;
        let page = man5.join(format!("{page}.5"));
        fs::write(&page, text).with_context(|| format!("cannot write {}", page.display()))?;
    }
    for (shell, place) in COMPLETIONS {
        let place = share.join(place);
        create_dir(&place)?;
        let written = generate_to(shell, &mut command.clone(), name, &place)
            .with_context(|| format!("cannot write {shell} completions in {}", place.display()))?;
        // clap_complete names the bash file `NAME.bash`; bash-completion looks for NAME alone.
        if shell == Shell::Bash {
            fs::rename(&written, place.join(name))
                .with_context(|| format!("cannot rename {}", written.display()))?;
        }
    }
    Ok(())
}

/// Writes a page for `command` and one for each of its visible subcommands, however deep. The command must have
/// been built, which gives subcommands their full names (`zumastor-define-volume`).
fn write_pages(command: &Command, man8: &Path) -> Result<()> {
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
        write_pages(sub, man8)?;
    }
    let name = command
        .get_display_name()
        .unwrap_or_else(|| command.get_name());
    let page = man8.join(format!("{name}.8"));
    let mut text = Vec::new();
    Man::new(command.clone())
        .section("8")
        .manual("System Administration")
        .render(&mut text)?;
    fs::write(&page, text).with_context(|| format!("cannot write {}", page.display()))
}

fn append(page: &Path, text: &str) -> Result<()> {
    let file = fs::File::options().append(true).open(page);
    file.and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("cannot write {}", page.display()))
}

fn create_dir(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Arg;

    /// Every level of commands must get its page, hidden ones must not, and bash must find its file by the bare name.
    #[test]
    fn pages_and_completions_land_where_they_are_looked_for() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let command = Command::new("other")
            .about("a tool")
            .subcommand(
                Command::new("define").about("makes").subcommand(
                    Command::new("volume")
                        .about("makes a volume")
                        .arg(Arg::new("size").long("size")),
                ),
            )
            .subcommand(Command::new("secret").hide(true));
        let written = Written {
            page: ".SH FILES\nmany\n",
            formats: &[("tool-file", ".TH tool-file 5\n")],
        };
        write_docs(command, "tool", &written, dir.path()).expect("documents");

        let man8 = dir.path().join("man/man8");
        let mut pages: Vec<_> = fs::read_dir(&man8)
            .expect("man8")
            .map(|entry| {
                entry
                    .expect("an entry")
                    .file_name()
                    .into_string()
                    .expect("UTF-8")
            })
            .collect();
        pages.sort();
        assert_eq!(pages, ["tool-define-volume.8", "tool-define.8", "tool.8"]);
        let page = fs::read_to_string(man8.join("tool-define-volume.8")).expect("a page");
        assert!(
            page.contains("size") && page.contains("makes a volume"),
            "{page}"
        );
        let first = fs::read_to_string(man8.join("tool.8")).expect("the first page");
        assert!(first.ends_with(".SH FILES\nmany\n"), "{first}");
        for file in [
            "man/man5/tool-file.5",
            "bash-completion/completions/tool",
            "zsh/vendor-completions/_tool",
            "fish/vendor_completions.d/tool.fish",
        ] {
            let text = fs::read_to_string(dir.path().join(file)).expect(file);
            let words = ["volume", "tool-file"];
            assert!(
                words.iter().any(|word| text.contains(word)),
                "{file}: {text}"
            );
        }
    }
}
