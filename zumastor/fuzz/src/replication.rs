// SPDX-License-Identifier: GPL-2.0-only
//! Replication streams: as they come, and the same bytes as frames behind right checksums, given to the
//! decoders and to both state machines.

use ddsnap::units::{ChunkShift, Sectors};
use uuid::Uuid;
use zumastor::replicate::again::Again;
use zumastor::replication::extent::{Digests, EXTENT_BYTES, Extent, Shape};
use zumastor::replication::frame::{FrameReader, FrameWriter, Kind};
use zumastor::replication::message::{Hello, Message, Wishes};
use zumastor::replication::progress::Progress;
use zumastor::replication::receiver::{self, Receiver};
use zumastor::replication::sender::{self, Sender};
use zumastor::replication::standing::{Epoch, Held, Role, Standing};
use zumastor::replication::verify::{Answer, Answers};

const KINDS: [Kind; 17] = [
    Kind::Hello,
    Kind::Refuse,
    Kind::Begin,
    Kind::Ready,
    Kind::Extent,
    Kind::Batch,
    Kind::Ack,
    Kind::End,
    Kind::Complete,
    Kind::Alive,
    Kind::Fail,
    Kind::Current,
    Kind::Compare,
    Kind::Region,
    Kind::Chunks,
    Kind::Compared,
    Kind::Verdict,
];

pub fn run(data: &[u8]) {
    read(data);
    let mut stream = Vec::new();
    let mut writer = FrameWriter::new(&mut stream);
    let mut rest = data;
    let mut number = 0;
    while let [kind, low, high, tail @ ..] = rest {
        let kind = if number == 0 {
            Kind::Hello
        } else {
            KINDS[usize::from(*kind) % KINDS.len()]
        };
        let length = usize::from(u16::from_le_bytes([*low, *high]) & 0x3ff);
        let (payload, tail) = tail.split_at(length.min(tail.len()));
        if writer.send(kind, &[payload]).is_err() {
            // Longer than the kind allows.
            break;
        }
        rest = tail;
        number += 1;
    }
    read(&stream);
    let mut record = data.to_vec();
    record.extend_from_slice(&crc32c::crc32c(data).to_le_bytes());
    if let Ok(progress) = Progress::decode(&record) {
        // Regions in another order are read too: what was read is what is compared.
        assert_eq!(Progress::decode(&progress.encode()).as_ref(), Ok(&progress));
    }
    if let Ok(again) = Again::decode(&record) {
        assert_eq!(again.encode(), record);
    }
}

/// Reads a stream as either side would.
fn read(stream: &[u8]) {
    let mut reader = FrameReader::new(stream);
    let mut payload = Vec::new();
    let mut sends = Sender::new(own(Role::Master));
    let mut receives = Receiver::new(own(Role::Replica));
    sends = sends.step(sender::Event::Start).0;
    receives = receives.step(receiver::Event::Start).0;
    // Two regions and a bit.
    let mut answers = Answers::new(ChunkShift::MAX, Sectors((2 << 17) + 1));
    while let Ok(kind) = reader.next(&mut payload) {
        if kind == Kind::Extent {
            extent(&payload);
            continue;
        }
        let Ok(message) = Message::decode(kind, &payload) else {
            return;
        };
        // Text loses its control characters, so the second reading counts.
        let again = Message::decode(kind, &message.encode()).unwrap();
        assert_eq!(Message::decode(kind, &again.encode()).unwrap(), again);
        while answers.ask().is_some() {}
        if let Some(Answer::Compare(first, hashes)) = answers.take(message.clone()) {
            assert!(!hashes.is_empty() && first + hashes.len() as u64 <= 129);
        }
        sends = sends.step(sender::Event::Received(message.clone())).0;
        receives = receives.step(receiver::Event::Received(message)).0;
    }
}

fn extent(payload: &[u8]) {
    let shape = Shape {
        chunk: ChunkShift::MIN,
        length: Sectors(1 << 16),
        base_length: Sectors(1 << 15),
    };
    let Ok(extent) = Extent::decode(payload, &shape, 0) else {
        return;
    };
    let mut end = 0;
    for run in &extent.runs {
        assert!(run.chunks > 0 && run.first.0 >= end);
        end = run.first.0 + run.chunks;
    }
    assert!(end <= 1 << 16);
    let old = vec![7; 4096];
    let mut digests = Digests::default();
    digests.fill(shape.chunk, shape.base_length, &extent.runs, &old);
    let (mut new, mut news) = (Vec::new(), Digests::default());
    if extent
        .unpack(&shape, (&old, &digests), (&mut new, &mut news))
        .is_ok()
    {
        assert!(new.len() as u64 == extent.bytes && new.len() <= EXTENT_BYTES);
    }
}

fn own(role: Role) -> Hello {
    let id = Uuid::from_u128(1);
    Hello {
        nonce: [0; 16],
        features: 0,
        wishes: Wishes::default(),
        standing: Standing {
            volume: id,
            lineage: Some(id),
            epoch: Epoch {
                number: 1,
                owner: id,
                since: 0,
            },
            role,
            chunk: ChunkShift::MIN,
            length: Sectors(1 << 16),
            held: vec![Held {
                id,
                number: 0,
                taken: 0,
                length: Sectors(1 << 16),
                data: true,
            }],
            hold: Some(id),
            old_hold: None,
            origin: Some(id),
            partial: None,
            written: false,
        },
    }
}
