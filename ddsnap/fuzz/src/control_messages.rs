// SPDX-License-Identifier: GPL-2.0-only
//! Messages of the control connection and of the agent's, both directions: a stream as it comes, and the
//! same bytes as bodies behind right frames. What is understood must be said again in the same bytes.

use ddsnap::protocol::codec::{Frame, FrameReader, MAX_BODY_BYTES};
use ddsnap::protocol::control::{Reply, Request};
use ddsnap::protocol::line::{FromAgent, ToAgent};

use super::input::Input;

pub fn run(data: &[u8]) {
    let mut reader = FrameReader::default();
    'stream: for part in data.chunks(97) {
        reader.extend(part);
        loop {
            match reader.next_frame() {
                Ok(Some(frame)) => understand(&frame),
                Ok(None) => break,
                Err(_) => break 'stream,
            }
        }
    }
    let mut input = Input(data);
    while !input.is_empty() {
        let (code, length) = (input.u16(), usize::from(input.u16()));
        let body = input.bytes(length.min(MAX_BODY_BYTES)).to_vec();
        let frame = Frame { code, body };
        let mut reader = FrameReader::default();
        reader.extend(&frame.encode());
        assert_eq!(reader.next_frame(), Ok(Some(frame.clone())));
        assert!(!reader.is_midway());
        understand(&frame);
    }
}

fn understand(frame: &Frame) {
    if let Ok(request) = Request::from_frame(frame) {
        // A field that means nothing may hold anything: what is said again is understood the same.
        assert_eq!(Request::from_frame(&request.to_frame()), Ok(request));
    }
    if let Ok(reply) = Reply::from_frame(frame) {
        let again = reply.to_frame();
        assert_eq!(
            (again.code, again.body.len()),
            (frame.code, frame.body.len())
        );
        assert_eq!(Reply::from_frame(&again), Ok(reply));
    }
    if let Ok(message) = ToAgent::from_frame(frame) {
        assert_eq!(&message.to_frame(), frame);
    }
    if let Ok(message) = FromAgent::from_frame(frame) {
        assert_eq!(&message.to_frame(), frame);
    }
}
