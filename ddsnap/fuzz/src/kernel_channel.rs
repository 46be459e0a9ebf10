// SPDX-License-Identifier: GPL-2.0-only
//! Records from the kernel, decoded and served by the server's core over a real store, between commands of
//! clients. Whatever is asked, in the end the store proves itself, before and after it is opened again.

use std::time::Duration;

use ddsnap::protocol::channel::{Ask, REQUEST_BYTES, RUN_CHUNKS, Request as Asked};
use ddsnap::protocol::codec::Frame;
use ddsnap::protocol::control::Request;
use ddsnap::server::core::{ClientId, Core, Now, Output};
use ddsnap::server::store_engine::StoreEngine;
use ddsnap::units::{Chunk, ChunkRun, SnapTag};

use super::input::Input;
use super::volume::with_base;

/// Steps of background work in one action.
const STEPS: usize = 8;

pub fn run(data: &[u8]) {
    let mut input = Input(data);
    with_base(input.u8(), |base| {
        let volume = base.volume();
        let mut core = Core::new(StoreEngine::new(volume.open().unwrap()));
        let mut seconds = 0;
        for _ in 0..200 {
            if input.is_empty() {
                break;
            }
            let mut out = Output::default();
            act(&mut core, &mut input, &mut seconds, &mut out);
            for reply in &out.channel {
                let _ = reply.encode();
            }
            for reply in out.clients.iter().flat_map(|(_, replies)| replies) {
                let _ = reply.to_frame();
            }
        }
        let (engine, fault) = core.into_engine();
        let mut store = engine.into_store();
        assert_eq!(fault, None, "no device failed");
        store.audit(true).expect("what was served is sound");
        store.close().expect("no device failed");
        volume
            .open()
            .unwrap()
            .audit(true)
            .expect("what was closed is sound");
    });
}

fn act(core: &mut Core<StoreEngine>, input: &mut Input<'_>, seconds: &mut u64, out: &mut Output) {
    let now = Now {
        monotonic: Duration::from_secs(*seconds),
        unix: 7,
    };
    match input.u8() % 16 {
        0 => core.attached(now, input.u8() % 2 == 0, out),
        1 => core.greeted(now, out),
        2 => core.lost(),
        3 => core.absent(now, out),
        4 => {
            *seconds += u64::from(input.u8());
            core.tick(now, out);
        }
        5 => core.client_gone(ClientId(u64::from(input.u8() % 4))),
        6 => {
            // Records as they come.
            let bytes = input.bytes(4 * REQUEST_BYTES);
            let whole = bytes.len() / REQUEST_BYTES * REQUEST_BYTES;
            let _ = Asked::decode_all(bytes);
            if let Ok(batch) = Asked::decode_all(&bytes[..whole]) {
                core.requests(now, &batch, out);
            }
        }
        7..=9 => {
            let (client, code) = (ClientId(u64::from(input.u8() % 4)), input.u8());
            let code = [0, 0x10, 0x20, 0x30, 0x40, 0x50][usize::from(code >> 4) % 6]
                + u16::from(code & 15);
            let length = usize::from(input.u8() % 32);
            let body = input.bytes(length).to_vec();
            if let Ok(request) = Request::from_frame(&Frame { code, body }) {
                core.command(now, client, request, out);
            }
        }
        10 => (0..STEPS).for_each(|_| core.background(now, out)),
        _ => {
            let count = 1 + input.u8() % 8;
            let batch: Vec<Asked> = (0..count).map(|_| asked(input)).collect();
            let bytes: Vec<u8> = batch.iter().flat_map(Asked::encode).collect();
            assert_eq!(Asked::decode_all(&bytes), Ok(batch.clone()));
            core.requests(now, &batch, out);
        }
    }
}

/// A run as long as it can be asked about.
fn run_at(first: Chunk, what: u32) -> ChunkRun {
    let most = u64::from([1, 2, 9, RUN_CHUNKS][what as usize % 4]);
    let chunks = most.min((u64::MAX - first.0).saturating_add(1));
    ChunkRun { first, chunks }
}

fn asked(input: &mut Input<'_>) -> Asked {
    let (id, what, chunk) = (
        u64::from(input.u8()),
        u32::from(input.u8()),
        Chunk(input.edge()),
    );
    let (tag, device) = (SnapTag(what % 6), id as u32 % 5);
    let ask = match what >> 4 {
        0..=4 => Ask::OriginWrite(run_at(chunk, what)),
        5..=7 => Ask::SnapshotRead(tag, chunk),
        8..=10 => Ask::SnapshotWrite(tag, chunk),
        11 => Ask::BarrierReached,
        12 => Ask::Gone { device },
        13 => Ask::DeviceStopped { device },
        _ => Ask::Identify {
            device,
            snapshot: (what % 3 > 0).then_some(tag),
            sectors: match chunk.0 {
                0 => 24 * 8,
                1 => 24,
                2 => 700,
                other => other,
            },
            returning: what % 2 == 0,
        },
    };
    Asked { id, ask }
}
