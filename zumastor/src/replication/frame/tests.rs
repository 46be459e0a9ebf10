// SPDX-License-Identifier: GPL-2.0-only
use super::*;

fn stream(frames: &[(Kind, &[u8])]) -> Vec<u8> {
    let mut writer = FrameWriter::new(Vec::new());
    for (kind, payload) in frames {
        writer.send(*kind, &[payload]).unwrap();
    }
    writer.writer
}

fn read(bytes: &[u8]) -> (Vec<(Kind, Vec<u8>)>, FrameError) {
    let mut reader = FrameReader::new(bytes);
    let (mut frames, mut payload) = (Vec::new(), Vec::new());
    loop {
        match reader.next(&mut payload) {
            Ok(kind) => frames.push((kind, payload.clone())),
            Err(error) => return (frames, error),
        }
    }
}

const FRAMES: [(Kind, &[u8]); 5] = [
    (Kind::Hello, b"who"),
    (Kind::Begin, b""),
    (Kind::Extent, b"some data"),
    (Kind::Batch, b"up to here"),
    (Kind::End, b""),
];

/// A change of one byte anywhere would make two versions that call themselves 1.
#[test]
fn the_bytes_of_a_stream_are_pinned() {
    let bytes = stream(&FRAMES[..2]);
    let mut expected = Vec::new();
    expected.extend_from_slice(&[1, 0, 0, 0, 13, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let payload = b"zumaRepl\x01\x00who";
    expected.extend_from_slice(&crc32c::crc32c(payload).to_le_bytes());
    let crc = crc32c::crc32c(&expected);
    expected.extend_from_slice(&crc.to_le_bytes());
    expected.extend_from_slice(payload);
    let second = [3, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    expected.extend_from_slice(&second);
    expected.extend_from_slice(&crc32c::crc32c(&second).to_le_bytes());
    assert_eq!(bytes, expected);
    let whole = blake3::hash(&stream(&FRAMES)).to_hex();
    assert_eq!(&whole[..16], "acdd19517df09347");
}

#[test]
fn what_is_sent_is_read() {
    let (frames, end) = read(&stream(&FRAMES));
    let read: Vec<_> = frames.iter().map(|(k, p)| (*k, p.as_slice())).collect();
    assert_eq!(read, FRAMES);
    assert!(matches!(end, FrameError::Ended));
}

/// A bit that flips on the way must not become a message or data.
#[test]
fn no_flipped_bit_passes() {
    let good = stream(&FRAMES);
    let (whole, _) = read(&good);
    for at in 0..good.len() {
        for bit in [0, 3, 7] {
            let mut bad = good.clone();
            bad[at] ^= 1 << bit;
            let (frames, error) = read(&bad);
            assert!(frames.len() < FRAMES.len(), "byte {at} bit {bit}");
            assert_eq!(frames, whole[..frames.len()], "byte {at} bit {bit}");
            assert!(!matches!(error, FrameError::Ended), "byte {at} bit {bit}");
        }
    }
}

/// Who changes a payload and mends the checksums gets to the next seal and no further.
#[test]
fn a_forged_payload_does_not_pass_the_next_seal() {
    let mut forged = stream(&FRAMES);
    let at = forged.windows(9).position(|w| w == b"some data").unwrap();
    forged[at..at + 9].copy_from_slice(b"fake data");
    let head = at - HEADER_BYTES;
    let crc = crc32c::crc32c(b"fake data");
    forged[head + 16..head + 20].copy_from_slice(&crc.to_le_bytes());
    let crc = crc32c::crc32c(&forged[head..head + 20]);
    forged[head + 20..head + 24].copy_from_slice(&crc.to_le_bytes());
    let (frames, error) = read(&forged);
    assert_eq!(frames.last().unwrap().0, Kind::Extent);
    assert!(error.to_string().contains("the hash of all before it"));
}

/// A frame left out, doubled or moved would write old data over new.
#[test]
fn frames_are_in_order_and_all_there() {
    let bytes = stream(&FRAMES);
    let hello = HEADER_BYTES + 13;
    let begin = hello + HEADER_BYTES;
    let extent = begin + HEADER_BYTES + 9;
    let mut missing = bytes[..begin].to_vec();
    missing.extend_from_slice(&bytes[extent..]);
    let mut doubled = bytes[..extent].to_vec();
    doubled.extend_from_slice(&bytes[begin..]);
    let mut moved = bytes[..hello].to_vec();
    moved.extend_from_slice(&bytes[begin..extent]);
    moved.extend_from_slice(&bytes[hello..begin]);
    for bad in [missing, doubled, moved] {
        let (frames, error) = read(&bad);
        assert!(frames.len() <= 3);
        assert!(error.to_string().contains("missing, doubled or moved"));
    }
}

/// Memory is not taken because a stranger asks for it.
#[test]
fn lengths_are_bounded_before_memory_is_taken() {
    for kind in Kind::ALL {
        let mut head = Vec::new();
        head.extend_from_slice(&(kind as u16).to_le_bytes());
        head.extend_from_slice(&[0; 2]);
        head.extend_from_slice(&(kind.longest() as u32 + 1).to_le_bytes());
        head.extend_from_slice(&[0; 12]);
        let crc = crc32c::crc32c(&head);
        head.extend_from_slice(&crc.to_le_bytes());
        let (_, error) = read(&head);
        assert!(error.to_string().contains("its length"), "{kind:?}");
        let too_long = vec![0; kind.longest() + 1];
        let refused = FrameWriter::new(Vec::new()).send(kind, &[&too_long]);
        assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}

#[test]
fn a_newer_version_and_noise_are_told_apart() {
    let mut newer = stream(&FRAMES[..1]);
    newer[HEADER_BYTES + 8] = 2;
    let crc = crc32c::crc32c(&newer[HEADER_BYTES..]);
    newer[16..20].copy_from_slice(&crc.to_le_bytes());
    let crc = crc32c::crc32c(&newer[..20]);
    newer[20..24].copy_from_slice(&crc.to_le_bytes());
    let (_, error) = read(&newer);
    assert!(matches!(error, FrameError::Version { found: 2 }), "{error}");
    let (_, error) = read(b"Last login: Fri Nov 27 from somewhere else\n");
    assert!(matches!(error, FrameError::Foreign), "{error}");
    let (_, error) = read(&stream(&[(Kind::Hello, b""), (Kind::Hello, b"")]));
    assert!(error.to_string().contains("second greeting"), "{error}");
}

/// Whatever looks at its origin for minutes before it knows how to greet was silent until then, and given up.
#[test]
fn who_has_not_greeted_yet_may_say_that_he_is_there_or_failed_and_nothing_else() {
    let waits = [(Kind::Alive, b"".as_slice()), (Kind::Alive, b"")];
    let bytes = stream(&waits);
    // The first frame says what this is a stream of, whatever its kind.
    assert_eq!(bytes[HEADER_BYTES..HEADER_BYTES + 10], *b"zumaRepl\x01\x00");
    assert_eq!(bytes.len(), 2 * HEADER_BYTES + 10);
    for then in [(Kind::Hello, b"who".as_slice()), (Kind::Fail, b"why")] {
        let all = [waits[0], waits[1], then];
        let (frames, end) = read(&stream(&all));
        let read: Vec<_> = frames.iter().map(|(k, p)| (*k, p.as_slice())).collect();
        assert_eq!(read, all);
        assert!(matches!(end, FrameError::Ended), "{end}");
    }
    for kind in Kind::ALL {
        if matches!(kind, Kind::Hello | Kind::Alive | Kind::Fail) {
            continue;
        }
        for before in 0..2 {
            let mut all = waits[..before].to_vec();
            all.push((kind, b""));
            let (_, error) = read(&stream(&all));
            assert!(error.to_string().contains("before the greeting"), "{error}");
        }
    }
}

#[test]
fn a_cut_stream_is_told_from_one_that_ended() {
    let bytes = stream(&FRAMES);
    for length in 0..bytes.len() {
        let (frames, error) = read(&bytes[..length]);
        let boundary = stream(&FRAMES[..frames.len()]).len() == length || length == 0;
        assert_eq!(matches!(error, FrameError::Ended), boundary, "{length}");
        assert_eq!(matches!(error, FrameError::Cut), !boundary, "{length}");
    }
}
