// SPDX-License-Identifier: GPL-2.0-only
//! The loop with a fake engine, a fake kernel at the other end of a socket pair, and real clients.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use super::*;
use crate::client::{Client, ClientError};
use crate::protocol::channel::{Answer, REPLY_BYTES, Reply};
use crate::server::clients::MAX_CLIENTS;
use crate::server::fake::{Fake, ORIGIN_SECTORS};
use crate::units::{Chunk, SnapTag};

const PATIENCE: Duration = Duration::from_secs(20);

/// Gives out the channels that the test sends; absent while there is none.
struct FakeKernel(Receiver<OwnedFd>);

impl Connect for FakeKernel {
    fn connect(&mut self) -> Result<OwnedFd, LinkError> {
        self.0.try_recv().map_err(|_| LinkError::Absent)
    }
}

/// A running loop. Dropping it ends the loop as the agent's end does, and checks that it ended well.
struct Server {
    dir: tempfile::TempDir,
    agent: Option<UnixStream>,
    kernels: Sender<OwnedFd>,
    thread: Option<JoinHandle<(bool, &'static str)>>,
}

impl Server {
    /// With a channel from the start if `attached`; gives the kernel's end of it.
    fn start(tags: &'static [u32], faults: Faults) -> (Server, UnixStream) {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let (agent, far_agent) = UnixStream::pair().unwrap();
        let (signals, keep) = UnixStream::pair().unwrap();
        let (near, kernel) = UnixStream::pair().unwrap();
        let (kernels, receiver) = channel();
        let thread = std::thread::spawn(move || {
            let _keep = keep;
            let parts = Parts {
                listener: listener.into(),
                agent: far_agent.into(),
                signals: signals.into(),
                connect: FakeKernel(receiver),
                channel: Some(near.into()),
                faults,
                on_hangup: Box::new(|| {}),
            };
            let ring = Ring::new(Fake::with_snapshots(tags), parts).unwrap();
            let (_engine, _, reason, fault) = ring.run().unwrap();
            (fault.is_none(), reason)
        });
        kernel.set_read_timeout(Some(PATIENCE)).unwrap();
        (
            Server {
                dir,
                agent: Some(agent),
                kernels,
                thread: Some(thread),
            },
            kernel,
        )
    }

    fn socket(&self) -> String {
        self.dir.path().join("s").to_str().unwrap().to_owned()
    }

    fn client(&self) -> Client {
        Client::connect_within(&self.socket(), PATIENCE).unwrap()
    }

    fn new_kernel(&self) -> UnixStream {
        let (near, kernel) = UnixStream::pair().unwrap();
        kernel.set_read_timeout(Some(PATIENCE)).unwrap();
        self.kernels.send(near.into()).unwrap();
        kernel
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.agent = None;
        let ended = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            assert_eq!(ended.unwrap(), (true, "the agent is gone"));
        }
    }
}

fn ask(kernel: &mut UnixStream, id: u64, ask: Ask) {
    kernel.write_all(&Request { id, ask }.encode()).unwrap();
}

fn expect(kernel: &mut UnixStream, id: u64, answer: Answer) {
    let mut found = [0; REPLY_BYTES];
    kernel.read_exact(&mut found).unwrap();
    assert_eq!(
        found,
        Reply { id, answer }.encode(),
        "wanted {answer:?}, found {found:?}"
    );
}

const MAY_WRITE: Answer = Answer::OriginWrite { status: 0 };

#[test]
fn requests_are_answered_and_a_snapshot_is_made_in_a_barrier() {
    let (server, mut kernel) = Server::start(&[], Faults::default());
    let origin = Ask::Identify {
        device: 1,
        snapshot: None,
        sectors: ORIGIN_SECTORS,
        returning: false,
    };
    ask(&mut kernel, 1, origin);
    expect(
        &mut kernel,
        1,
        Answer::Identify {
            status: 0,
            sectors: 0,
        },
    );
    ask(&mut kernel, 2, Ask::OriginWrite(Chunk(3).into()));
    expect(&mut kernel, 2, MAY_WRITE);

    let mut client = server.client();
    let creating = std::thread::spawn(move || client.create(SnapTag(8)).map(|()| client));
    expect(&mut kernel, 1, Answer::BarrierBegin);
    ask(&mut kernel, 3, Ask::OriginWrite(Chunk(3).into()));
    // Other clients are served while the first waits.
    assert_eq!(server.client().size(None).unwrap(), ORIGIN_SECTORS);
    ask(&mut kernel, 1, Ask::BarrierReached);
    expect(&mut kernel, 1, Answer::BarrierEnd { created: true });
    expect(&mut kernel, 3, MAY_WRITE);
    let mut client = creating.join().unwrap().unwrap();
    assert_eq!(client.list().unwrap().len(), 1);
}

#[test]
fn a_broken_channel_is_attached_again_and_its_file_closed() {
    let (server, mut kernel) = Server::start(&[], Faults::default());
    ask(&mut kernel, 1, Ask::OriginWrite(Chunk(3).into()));
    expect(&mut kernel, 1, MAY_WRITE);
    // An operation nobody knows: the server must not guess.
    kernel.write_all(&[0xee; REQUEST_BYTES]).unwrap();
    assert_eq!(
        kernel.read(&mut [0; 1]).unwrap(),
        0,
        "the server closes its end"
    );
    let mut kernel = server.new_kernel();
    ask(&mut kernel, 2, Ask::OriginWrite(Chunk(4).into()));
    expect(&mut kernel, 2, MAY_WRITE);
}

#[test]
fn a_client_that_says_nothing_or_nonsense_holds_up_nobody() {
    let (server, _kernel) = Server::start(&[5], Faults::default());
    let _silent = UnixStream::connect(server.socket()).unwrap();
    let mut halfway = UnixStream::connect(server.socket()).unwrap();
    halfway.write_all(b"ddsC\x01").unwrap();
    let mut nonsense = UnixStream::connect(server.socket()).unwrap();
    nonsense.set_read_timeout(Some(PATIENCE)).unwrap();
    nonsense.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    let mut told = Vec::new();
    nonsense.read_to_end(&mut told).unwrap();
    assert!(
        told.starts_with(b"ddsC"),
        "an error, then the end: {told:?}"
    );
    assert_eq!(server.client().list().unwrap()[0].tag, SnapTag(5));
}

#[test]
fn a_client_may_send_its_requests_all_at_once() {
    use crate::protocol::codec::FrameReader;
    use crate::protocol::control::{Reply, Request};
    let (server, _kernel) = Server::start(&[5], Faults::default());
    let mut stream = UnixStream::connect(server.socket()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let one = Request::Sectors(None).to_frame().encode();
    stream.write_all(&one.repeat(1000)).unwrap();
    let mut reader = FrameReader::default();
    let mut answers = 0;
    while answers < 1000 {
        let mut bytes = [0; 4096];
        let count = stream.read(&mut bytes).unwrap();
        reader.extend(&bytes[..count]);
        while let Some(frame) = reader.next_frame().unwrap() {
            assert_eq!(
                Reply::from_frame(&frame),
                Ok(Reply::Sectors(ORIGIN_SECTORS))
            );
            answers += 1;
        }
    }
}

#[test]
fn one_client_too_many_replaces_the_idlest() {
    let (server, _kernel) = Server::start(&[5], Faults::default());
    let mut clients: Vec<Client> = (0..MAX_CLIENTS).map(|_| server.client()).collect();
    for client in &mut clients {
        client.size(None).unwrap();
    }
    let mut last = server.client();
    assert_eq!(last.size(None).unwrap(), ORIGIN_SECTORS);
    let error = clients[0].size(None).unwrap_err();
    assert!(matches!(error, ClientError::Lost { .. }), "{error}");
    assert_eq!(clients[1].size(None).unwrap(), ORIGIN_SECTORS);
}

static TAGS: [u32; 3000] = {
    let mut tags = [0; 3000];
    let mut n = 0;
    while n < tags.len() {
        tags[n] = n as u32;
        n += 1;
    }
    tags
};

/// Its answers fill the socket; the server must neither wait for it nor hold all of them.
#[test]
fn a_client_that_asks_and_never_listens_holds_up_nobody() {
    use crate::protocol::control::Request;
    let (server, mut kernel) = Server::start(&TAGS, Faults::default());
    let mut deaf = UnixStream::connect(server.socket()).unwrap();
    deaf.set_write_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    // Writes until nobody takes it any more, or for long enough.
    let all = Request::List.to_frame().encode().repeat(50_000);
    let _ = deaf.write_all(&all);
    ask(&mut kernel, 1, Ask::OriginWrite(Chunk(3).into()));
    expect(&mut kernel, 1, MAY_WRITE);
    assert_eq!(server.client().list().unwrap().len(), 3000);
}

#[test]
fn thousands_of_snapshots_are_listed() {
    let (server, _kernel) = Server::start(&TAGS, Faults::default());
    assert_eq!(server.client().list().unwrap().len(), 3000);
    assert_eq!(
        server.client().usage(&mut |_, _| {}).unwrap().rows.len(),
        3000
    );
}

#[test]
fn a_fault_closes_the_connection_it_is_for() {
    let faults = Faults::closing("USECOUNT");
    let (server, _kernel) = Server::start(&[5], faults);
    let mut client = server.client();
    assert!(client.size(None).is_ok());
    let error = client.adjust_usecount(SnapTag(5), 1).unwrap_err();
    assert!(matches!(error, ClientError::Lost { .. }), "{error}");
    assert_eq!(server.client().adjust_usecount(SnapTag(5), 0).unwrap(), 0);
}
