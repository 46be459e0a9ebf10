// SPDX-License-Identifier: GPL-2.0-only
//! LVM thin's own list of changes on metadata of the same size: two thin devices of as many mapped
//! blocks, of which one in a hundred is mapped elsewhere in the second.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use super::Files;

/// Blocks that share one changed block.
const STRETCH: u64 = 100;

/// Milliseconds that `thin_delta` takes, its output thrown away.
pub fn delta_ms(files: &Files, blocks: u64) -> Result<f64> {
    let (text, metadata) = (files.path("thin.xml"), files.path("thin"));
    fs::write(&text, xml(blocks)?).with_context(|| format!("cannot write {}", text.display()))?;
    // 16 bytes a mapping and device, in leaves that may be half full, and a gigabyte to spare.
    let sparse =
        File::create(&metadata).with_context(|| format!("cannot make {}", metadata.display()))?;
    sparse.set_len((1 << 30) + blocks * 64)?;
    run(Command::new("/usr/sbin/thin_restore")
        .arg("-i")
        .arg(&text)
        .arg("-o")
        .arg(&metadata))?;
    File::open(&metadata)?.sync_all()?;
    let started = Instant::now();
    run(Command::new("/usr/sbin/thin_delta")
        .args(["--snap1", "1", "--snap2", "2"])
        .arg(&metadata))?;
    let elapsed = started.elapsed();
    files.remove("thin.xml")?;
    files.remove("thin")?;
    Ok(elapsed.as_secs_f64() * 1e3)
}

fn run(command: &mut Command) -> Result<()> {
    let name = Path::new(command.get_program()).display().to_string();
    let out = command
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .with_context(|| format!("cannot run {name}"))?;
    if !out.status.success() {
        bail!(
            "{name} failed: {}",
            String::from_utf8_lossy(&out.stderr).trim()
        );
    }
    Ok(())
}

/// What `thin_restore` makes the metadata from. One device maps each block to the one of its own
/// number; in the other, one block of each stretch lies behind all of these.
fn xml(blocks: u64) -> Result<String> {
    let data_blocks = blocks + blocks.div_ceil(STRETCH);
    let mut text = format!(
        "<superblock uuid=\"\" time=\"2\" transaction=\"2\" flags=\"0\" version=\"2\" \
         data_block_size=\"128\" nr_data_blocks=\"{data_blocks}\">\n"
    );
    device(&mut text, 1, blocks)?;
    range(&mut text, 0, blocks)?;
    text.push_str("</device>\n");
    device(&mut text, 2, blocks)?;
    for (stretch, first) in (0..blocks).step_by(STRETCH as usize).enumerate() {
        let end = blocks.min(first + STRETCH);
        let stretch = stretch as u64;
        let changed =
            first + stretch.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(17) % (end - first);
        range(&mut text, first, changed)?;
        let elsewhere = blocks + stretch;
        writeln!(
            text,
            "<single_mapping origin_block=\"{changed}\" data_block=\"{elsewhere}\" time=\"1\"/>"
        )?;
        range(&mut text, changed + 1, end)?;
    }
    text.push_str("</device>\n</superblock>\n");
    Ok(text)
}

fn device(text: &mut String, id: u32, blocks: u64) -> Result<()> {
    writeln!(
        text,
        "<device dev_id=\"{id}\" mapped_blocks=\"{blocks}\" transaction=\"0\" creation_time=\"0\" \
         snap_time=\"1\">"
    )?;
    Ok(())
}

/// Blocks that lie where their numbers say.
fn range(text: &mut String, first: u64, end: u64) -> Result<()> {
    if first < end {
        writeln!(
            text,
            "<range_mapping origin_begin=\"{first}\" data_begin=\"{first}\" length=\"{}\" time=\"0\"/>",
            end - first
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_device_maps_every_block_once() {
        let text = xml(250).unwrap();
        let attribute = |line: &str, name: &str| -> Option<u64> {
            let (_, rest) = line.split_once(&format!("{name}=\""))?;
            rest.split('"').next()?.parse().ok()
        };
        for device in text.split("<device ").skip(1) {
            let mut next = 0;
            for line in device.lines() {
                if let Some(first) = attribute(line, "origin_begin") {
                    assert_eq!(first, next);
                    next += attribute(line, "length").unwrap();
                } else if let Some(block) = attribute(line, "origin_block") {
                    assert_eq!(block, next);
                    next += 1;
                }
            }
            assert_eq!(next, 250);
        }
        assert_eq!(text.matches("<single_mapping").count(), 3);
    }
}
