// SPDX-License-Identifier: GPL-2.0-only
//! The exact bytes, and clients that do not keep to the protocol.

use super::*;

/// 3 KiB of which the third sector cannot be read.
struct Disk;

impl Export for Disk {
    fn name(&self) -> &str {
        "7"
    }

    fn len_bytes(&self) -> u64 {
        3072
    }

    fn preferred_bytes(&self) -> u32 {
        4096
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        for (byte, at) in into.iter_mut().zip(offset..) {
            if (1024..1536).contains(&at) {
                return Err(io::ErrorKind::Other.into());
            }
            *byte = at as u8;
        }
        Ok(())
    }
}

/// What the server sends to a client that sends `input` and leaves, behind its greeting.
fn answers(input: &[&[u8]]) -> (io::Result<()>, Vec<u8>) {
    let mut output = Vec::new();
    let input = [&3u32.to_be_bytes()[..], &input.concat()].concat();
    let result = serve(&mut &input[..], &mut output, &Disk, &mut || Ok(()));
    let greeting = [&b"NBDMAGICIHAVEOPT"[..], &[0, 3]].concat();
    assert_eq!(output[..18], greeting);
    (result, output.split_off(18))
}

fn option(option: u32, data: &[u8]) -> Vec<u8> {
    [
        &b"IHAVEOPT"[..],
        &option.to_be_bytes(),
        &(data.len() as u32).to_be_bytes(),
        data,
    ]
    .concat()
}

fn go(name: &str) -> Vec<u8> {
    let data = [
        &(name.len() as u32).to_be_bytes()[..],
        name.as_bytes(),
        &[0, 0],
    ];
    option(OPTION_GO, &data.concat())
}

fn request(command: u16, offset: u64, len: u32) -> Vec<u8> {
    [
        &[0x25, 0x60, 0x95, 0x13, 0, 0][..],
        &command.to_be_bytes(),
        b"a cookie",
        &offset.to_be_bytes(),
        &len.to_be_bytes(),
    ]
    .concat()
}

/// An answer to [`request`].
fn answer(error: u32, data: &[u8]) -> Vec<u8> {
    [
        &[0x67, 0x44, 0x66, 0x98][..],
        &error.to_be_bytes(),
        b"a cookie",
        data,
    ]
    .concat()
}

/// An answer to an option.
fn said(option: u32, reply: u32, data: &[u8]) -> Vec<u8> {
    [
        &[0, 3, 0xe8, 0x89, 4, 0x55, 0x65, 0xa9][..],
        &option.to_be_bytes(),
        &reply.to_be_bytes(),
        &(data.len() as u32).to_be_bytes(),
        data,
    ]
    .concat()
}

/// All that GO is answered.
fn gone_in() -> Vec<u8> {
    let export = [&[0, 0][..], &3072u64.to_be_bytes(), &[1, 3]].concat();
    let sizes = [0, 3, 0, 0, 0, 1, 0, 0, 16, 0, 2, 0, 0, 0];
    [
        said(OPTION_GO, REPLY_INFO, &export),
        said(OPTION_GO, REPLY_INFO, &sizes),
        said(OPTION_GO, REPLY_ACK, &[]),
    ]
    .concat()
}

#[test]
fn a_client_reads_by_name_and_without_one() {
    let data: Vec<u8> = (0..512u32).map(|at| (at + 2560) as u8).collect();
    for name in ["", "7"] {
        let (result, output) = answers(&[&go(name), &request(COMMAND_READ, 2560, 512)]);
        assert!(result.is_ok());
        assert_eq!(output, [gone_in(), answer(0, &data)].concat());
    }
    // The old way in, which QEMU falls back to.
    let (result, output) = answers(&[
        &option(OPTION_EXPORT_NAME, b"7"),
        &request(COMMAND_READ, 2560, 512),
        &request(COMMAND_DISCONNECT, 0, 0),
    ]);
    assert!(result.is_ok());
    let description = [&3072u64.to_be_bytes()[..], &[1, 3]].concat();
    assert_eq!(output, [description, answer(0, &data)].concat());
}

#[test]
fn what_cannot_be_read_and_what_would_write_is_an_error_and_no_end() {
    let (result, output) = answers(&[
        &go(""),
        &request(COMMAND_READ, 1000, 512),
        &request(COMMAND_READ, 2561, 512),
        &request(COMMAND_READ, u64::MAX, 512),
        &request(COMMAND_READ, 0, u32::MAX),
        &request(COMMAND_READ, 0, 0),
        &request(COMMAND_WRITE, 0, 4),
        b"data",
        &request(COMMAND_TRIM, 0, 512),
        &request(COMMAND_WRITE_ZEROES, 0, 512),
        &request(99, 0, 512),
        &request(COMMAND_READ, 0, 1),
    ]);
    assert!(result.is_ok());
    let codes = [
        EIO, EINVAL, EINVAL, EINVAL, EINVAL, EPERM, EPERM, EPERM, EINVAL,
    ];
    let mut expected = gone_in();
    expected.extend(codes.iter().flat_map(|&code| answer(code, &[])));
    expected.extend(answer(0, &[0]));
    assert_eq!(output, expected);
}

#[test]
fn options_are_answered_and_others_refused() {
    let unknown = go("8");
    let cut = option(OPTION_INFO, &[0, 0, 0, 9, b'7']);
    let (result, output) = answers(&[
        &unknown,
        &cut,
        &option(OPTION_LIST, &[]),
        &option(OPTION_LIST, &[1]),
        &option(8, &[]),
        &option(OPTION_ABORT, &[]),
    ]);
    assert!(result.is_ok());
    let expected = [
        said(OPTION_GO, REPLY_UNKNOWN, &[]),
        said(OPTION_INFO, REPLY_INVALID, &[]),
        said(OPTION_LIST, REPLY_SERVER, &[0, 0, 0, 1, b'7']),
        said(OPTION_LIST, REPLY_ACK, &[]),
        said(OPTION_LIST, REPLY_INVALID, &[]),
        said(8, REPLY_UNSUPPORTED, &[]),
        said(OPTION_ABORT, REPLY_ACK, &[]),
    ];
    assert_eq!(output, expected.concat());
}

#[test]
fn who_does_not_keep_to_the_protocol_is_left() {
    let long = [&b"IHAVEOPT"[..], &[0, 0, 0, 7], &[0xff; 4]].concat();
    let bad: [&[&[u8]]; 5] = [
        &[b"no option at all"],
        &[&long],
        &[&option(OPTION_EXPORT_NAME, b"8")],
        &[&go(""), b"no request, but many bytes"],
        &[&go(""), &request(COMMAND_WRITE, 0, 100), b"cut"],
    ];
    for input in bad {
        assert!(answers(input).0.is_err(), "{input:?}");
    }
    // Who leaves in the middle of a request too.
    assert!(
        answers(&[&go(""), &request(COMMAND_READ, 0, 1)[..9]])
            .0
            .is_err()
    );
}
