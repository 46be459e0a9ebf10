// SPDX-License-Identifier: GPL-2.0-only
//! Disks in memory with a volatile cache, whose power can be cut between any two writes.
//!
//! A [`Machine`] has several disks. Each remembers what is on its medium and which writes came since
//! its last flush. [`Machine::record`] notes every write and flush; from a [`Moment`] taken before, any
//! point between two of these events can be rebuilt, and the power cut there: of each disk the
//! medium stays, and of the sectors written since its last flush any subset ([`Moment::cut`]). A sector that
//! was being written may also be left so that it cannot be read, with its neighbours in one physical sector.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::rc::Rc;

use super::{BlockDevice, Read, Write};

const PAGE: u64 = 4096;
const SECTOR: u64 = 512;

/// A small, fast, repeatable generator of random numbers (SplitMix64).
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// The sequence of this seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Rng(seed)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next_u64() % end
    }

    /// True in `percent` of all cases.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// Pages of a group: copying an image copies one reference for each group.
const GROUP: u64 = 64;

type Page = Rc<[u8; PAGE as usize]>;

/// Bytes in pages that are shared between copies of an image; a page that is missing is zero.
#[derive(Clone, Default)]
struct Image(BTreeMap<u64, Rc<[Option<Page>; GROUP as usize]>>);

impl Image {
    fn page(&self, page: u64) -> Option<&Page> {
        self.0.get(&(page / GROUP))?[(page % GROUP) as usize].as_ref()
    }

    fn read(&self, offset: u64, into: &mut [u8]) {
        let mut at = 0;
        for (page, within) in pages(offset, into.len()) {
            let part = &mut into[at..at + within.len()];
            at += within.len();
            match self.page(page) {
                Some(bytes) => part.copy_from_slice(&bytes[within]),
                None => part.fill(0),
            }
        }
    }

    fn holds(&self, offset: u64, wanted: &[u8]) -> bool {
        let mut at = 0;
        pages(offset, wanted.len()).all(|(page, within)| {
            let part = &wanted[at..at + within.len()];
            at += within.len();
            match self.page(page) {
                Some(bytes) => bytes[within] == *part,
                None => part.iter().all(|&byte| byte == 0),
            }
        })
    }

    fn write(&mut self, offset: u64, from: &[u8]) {
        let mut at = 0;
        for (page, within) in pages(offset, from.len()) {
            let part = &from[at..at + within.len()];
            at += within.len();
            let group = self
                .0
                .entry(page / GROUP)
                .or_insert_with(|| Rc::new([const { None }; GROUP as usize]));
            let page = Rc::make_mut(group)[(page % GROUP) as usize]
                .get_or_insert_with(|| Rc::new([0; PAGE as usize]));
            Rc::make_mut(page)[within].copy_from_slice(part);
        }
    }

    /// Forgets everything from byte `len` on.
    fn cut_off(&mut self, len: u64) {
        let kept = len.div_ceil(PAGE);
        self.0.retain(|&group, _| group * GROUP < kept);
        if let Some(mut group) = self.0.last_entry() {
            let first = *group.key() * GROUP;
            let gone = (0..GROUP).filter(|index| first + index >= kept);
            let pages = Rc::make_mut(group.get_mut());
            gone.for_each(|index| pages[index as usize] = None);
        }
        let within = (len % PAGE) as usize;
        if within > 0 && self.page(kept - 1).is_some() {
            self.write(len, &[0; PAGE as usize][within..]);
        }
    }
}

/// The pages that `len` bytes at `offset` touch, and the part of each.
fn pages(offset: u64, len: usize) -> impl Iterator<Item = (u64, Range<usize>)> {
    let end = offset + len as u64;
    let mut at = offset;
    std::iter::from_fn(move || {
        let (page, within) = (at / PAGE, (at % PAGE) as usize);
        let take = (PAGE as usize - within).min((end - at) as usize);
        at += take as u64;
        (take > 0).then_some((page, within..within + take))
    })
}

#[derive(Clone)]
struct Disk {
    name: Rc<str>,
    len: u64,
    /// What survives whatever happens.
    medium: Image,
    /// Writes since the last flush, in order.
    cached: Vec<(u64, Rc<[u8]>)>,
    /// What a read gives.
    visible: Image,
    /// Some of that was lost by a flush that failed, and no other flush writes it.
    lost: bool,
    /// Sectors, by number, whose reading fails until they are written; of the medium, and of what a read gives.
    torn: BTreeSet<u64>,
    unreadable: BTreeSet<u64>,
    /// Bytes of which everything has a checksum.
    checked: Vec<Range<u64>>,
}

impl Disk {
    fn write(&mut self, offset: u64, bytes: &Rc<[u8]>) {
        self.visible.write(offset, bytes);
        for sector in sectors(offset, bytes.len()) {
            self.unreadable.remove(&sector);
        }
        self.cached.push((offset, bytes.clone()));
    }

    fn flush(&mut self) {
        let cached = std::mem::take(&mut self.cached);
        if self.lost {
            for (offset, bytes) in &cached {
                self.medium.write(*offset, bytes);
                for sector in sectors(*offset, bytes.len()) {
                    self.torn.remove(&sector);
                }
            }
        } else {
            self.medium = self.visible.clone();
            self.torn.clone_from(&self.unreadable);
        }
    }

    fn lose_unflushed(&mut self) {
        self.lost |= !self.cached.is_empty();
        self.cached.clear();
    }
}

impl Disk {
    fn cut(&mut self, survival: Survival, rng: &mut Rng) {
        let cached = std::mem::take(&mut self.cached);
        for (offset, bytes) in &cached {
            let (whole, percent) = match survival {
                Survival::All => (true, 0),
                Survival::Writes(percent) => (rng.chance(percent), 0),
                Survival::Sectors(percent)
                | Survival::Torn { percent, .. }
                | Survival::Garbage { percent, .. } => (false, percent),
                Survival::None | Survival::ProcessKilled | Survival::FlushFailed => (false, 0),
            };
            if whole {
                self.medium.write(*offset, bytes);
                for sector in sectors(*offset, bytes.len()) {
                    self.torn.remove(&sector);
                }
            } else if percent > 0 {
                for (index, part) in (0..).zip(bytes.chunks(SECTOR as usize)) {
                    if rng.chance(percent) {
                        self.medium.write(offset + index * SECTOR, part);
                        self.torn.remove(&(offset / SECTOR + index));
                    }
                }
            }
        }
        match survival {
            Survival::Torn { physical, .. } if !cached.is_empty() => {
                let (offset, bytes) = &cached[rng.below(cached.len() as u64) as usize];
                let at = offset + rng.below(bytes.len() as u64);
                let unit = self.physical(at, physical);
                self.torn
                    .extend(sectors(unit.start, (unit.end - unit.start) as usize));
            }
            Survival::Garbage { physical, .. } => {
                for (offset, bytes) in &cached {
                    let first = offset / physical * physical;
                    for at in (first..offset + bytes.len() as u64).step_by(physical as usize) {
                        let unit = self.physical(at, physical);
                        let inside = |checked: &Range<u64>| {
                            checked.start <= unit.start && unit.end <= checked.end
                        };
                        if self.checked.iter().any(inside) && rng.chance(30) {
                            let len = (unit.end - unit.start) as usize;
                            let bytes: Vec<u8> = (0..len).map(|_| rng.next_u64() as u8).collect();
                            self.medium.write(unit.start, &bytes);
                        }
                    }
                }
            }
            _ => {}
        }
        self.visible = self.medium.clone();
        self.unreadable.clone_from(&self.torn);
        self.lost = false;
    }

    /// The physical sector of byte `at`.
    fn physical(&self, at: u64, physical: u64) -> Range<u64> {
        let start = at / physical * physical;
        start..(start + physical).min(self.len)
    }

    fn is_readable(&self, offset: u64, len: usize) -> bool {
        self.unreadable.range(sectors(offset, len)).next().is_none()
    }
}

/// The numbers of the sectors that `len` bytes at `offset` touch.
fn sectors(offset: u64, len: usize) -> Range<u64> {
    offset / SECTOR..(offset + len as u64).div_ceil(SECTOR)
}

/// A write or a flush of one of the disks.
#[derive(Clone)]
pub enum Event {
    /// A write of a batch.
    Write {
        /// Which disk.
        disk: usize,
        /// Byte offset.
        offset: u64,
        /// What was written.
        bytes: Rc<[u8]>,
        /// The number of the batch: writes of one batch are under way at the same time.
        batch: u64,
    },
    /// A flush.
    Flush {
        /// Which disk.
        disk: usize,
    },
}

/// How much of what was not flushed survives a power cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Survival {
    /// Nothing.
    None,
    /// Everything.
    All,
    /// Each sector with this chance in percent, whatever the order of the writes was.
    Sectors(u64),
    /// Whole writes, each with this chance in percent.
    Writes(u64),
    /// Nothing is lost and nothing becomes durable: only the process was killed.
    ProcessKilled,
    /// A flush failed and the process ended: what was not flushed can still be read, from a cache, but counts
    /// as clean there and never becomes durable.
    FlushFailed,
    /// As `Sectors`, and of each disk one physical sector that was being written cannot be read.
    Torn {
        /// The chance of each sector, in percent.
        percent: u64,
        /// Bytes of a physical sector: 512, or 4096 where neighbours are lost with what was written.
        physical: u64,
    },
    /// As `Sectors`, and physical sectors that were being written may hold anything, where everything has a
    /// checksum ([`Machine::set_checked`]).
    Garbage {
        /// The chance of each sector, in percent.
        percent: u64,
        /// Bytes of a physical sector.
        physical: u64,
    },
}

/// The disks of a machine at one moment.
#[derive(Clone)]
pub struct Moment(Vec<Disk>);

impl Moment {
    /// Goes on by one event.
    pub fn advance(&mut self, event: &Event) {
        match event {
            Event::Write {
                disk,
                offset,
                bytes,
                ..
            } => self.0[*disk].write(*offset, bytes),
            Event::Flush { disk } => self.0[*disk].flush(),
        }
    }

    /// What was under way when the process was killed lands, or not: any part of the batch that `later`
    /// begins with. Its lock is free only afterwards, so nobody sees the disks before.
    pub fn land(&mut self, later: &[Event], rng: &mut Rng) {
        let Some(Event::Write { batch: first, .. }) = later.first() else {
            return;
        };
        let of_batch =
            |event: &&Event| matches!(event, Event::Write { batch, .. } if batch == first);
        for event in later.iter().take_while(of_batch) {
            if rng.chance(50) {
                self.advance(event);
            }
        }
    }

    /// The machine after the power was cut at this moment and came back.
    #[must_use]
    pub fn cut(&self, survival: Survival, rng: &mut Rng) -> Machine {
        let mut disks = self.0.clone();
        if survival == Survival::ProcessKilled {
            return Machine::from_disks(disks);
        }
        if survival == Survival::FlushFailed {
            disks.iter_mut().for_each(Disk::lose_unflushed);
            return Machine::from_disks(disks);
        }
        for disk in &mut disks {
            disk.cut(survival, rng);
        }
        Machine::from_disks(disks)
    }
}

/// Disks that share one power supply.
#[derive(Clone)]
pub struct Machine(Rc<RefCell<Inner>>);

struct Inner {
    disks: Vec<Disk>,
    recorded: Option<Vec<Event>>,
    /// Batches written so far.
    batches: u64,
}

impl Machine {
    /// Empty disks of these names and lengths in bytes.
    #[must_use]
    pub fn new(disks: &[(&str, u64)]) -> Self {
        let empty = |&(name, len): &(&str, u64)| Disk {
            name: name.into(),
            len,
            medium: Image::default(),
            cached: Vec::new(),
            visible: Image::default(),
            lost: false,
            torn: BTreeSet::new(),
            unreadable: BTreeSet::new(),
            checked: Vec::new(),
        };
        Self::from_disks(disks.iter().map(empty).collect())
    }

    fn from_disks(disks: Vec<Disk>) -> Self {
        Machine(Rc::new(RefCell::new(Inner {
            disks,
            recorded: None,
            batches: 0,
        })))
    }

    /// One of the disks, to be used as a device; any number of devices may share a disk.
    #[must_use]
    pub fn device(&self, disk: usize) -> MemoryDevice {
        let inner = self.0.borrow();
        let (name, len) = (inner.disks[disk].name.clone(), inner.disks[disk].len);
        MemoryDevice {
            machine: self.clone(),
            disk,
            name,
            len,
        }
    }

    /// The disks as they are now.
    #[must_use]
    pub fn moment(&self) -> Moment {
        Moment(self.0.borrow().disks.clone())
    }

    /// Begins to note events.
    pub fn record(&self) {
        self.0.borrow_mut().recorded = Some(Vec::new());
    }

    /// Ends noting and gives the events since [`record`](Self::record).
    #[must_use]
    pub fn recorded(&self) -> Vec<Event> {
        self.0.borrow_mut().recorded.take().unwrap_or_default()
    }

    /// Makes a disk longer or shorter; devices see it when they are measured anew. What is cut off is
    /// gone.
    pub fn set_len(&self, disk: usize, len: u64) {
        let disk = &mut self.0.borrow_mut().disks[disk];
        disk.len = len;
        disk.torn.split_off(&len.div_ceil(SECTOR));
        disk.unreadable.split_off(&len.div_ceil(SECTOR));
        disk.medium.cut_off(len);
        disk.visible.cut_off(len);
        disk.cached.retain(|(offset, _)| *offset < len);
        for (offset, bytes) in &mut disk.cached {
            let left = (len - *offset) as usize;
            if bytes.len() > left {
                *bytes = bytes[..left].into();
            }
        }
    }

    /// Whether reading at `offset` gives these bytes.
    #[must_use]
    pub fn holds(&self, disk: usize, offset: u64, bytes: &[u8]) -> bool {
        let disk = &self.0.borrow().disks[disk];
        disk.is_readable(offset, bytes.len()) && disk.visible.holds(offset, bytes)
    }

    /// A flush of a disk failed: what it was to write can still be read, but counts as clean and never becomes
    /// durable unless it is written again.
    pub fn lose_unflushed(&self, disk: usize) {
        self.0.borrow_mut().disks[disk].lose_unflushed();
    }

    /// Says that everything in these bytes has a checksum, so that it need not be what was ever written there.
    pub fn set_checked(&self, disk: usize, bytes: Range<u64>) {
        self.0.borrow_mut().disks[disk].checked.push(bytes);
    }

    /// Makes bytes unreadable until they are written, as a fault of the disk would.
    pub fn make_unreadable(&self, disk: usize, bytes: Range<u64>) {
        let disk = &mut self.0.borrow_mut().disks[disk];
        let bad = sectors(bytes.start, (bytes.end - bytes.start) as usize);
        disk.torn.extend(bad.clone());
        disk.unreadable.extend(bad);
    }

    /// Overwrites bytes of the medium, as a fault of the disk would.
    pub fn corrupt(&self, disk: usize, offset: u64, bytes: &[u8]) {
        let disk = &mut self.0.borrow_mut().disks[disk];
        disk.medium.write(offset, bytes);
        disk.visible.write(offset, bytes);
    }
}

/// A device on one of a machine's disks.
pub struct MemoryDevice {
    machine: Machine,
    disk: usize,
    name: Rc<str>,
    len: u64,
}

impl MemoryDevice {
    fn check(&self, offset: u64, len: usize) -> io::Result<()> {
        if offset % SECTOR != 0 || len as u64 % SECTOR != 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not aligned to sectors",
            ));
        }
        if offset
            .checked_add(len as u64)
            .is_none_or(|end| end > self.len)
        {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "beyond the end",
            ));
        }
        Ok(())
    }

    fn event(&self, event: Event) {
        let mut inner = self.machine.0.borrow_mut();
        let inner = &mut *inner;
        match &event {
            Event::Write {
                disk,
                offset,
                bytes,
                ..
            } => inner.disks[*disk].write(*offset, bytes),
            Event::Flush { disk } => inner.disks[*disk].flush(),
        }
        if let Some(recorded) = &mut inner.recorded {
            recorded.push(event);
        }
    }
}

impl BlockDevice for MemoryDevice {
    fn len_bytes(&self) -> u64 {
        self.len
    }

    fn measure(&mut self) -> io::Result<u64> {
        self.len = self.machine.0.borrow().disks[self.disk].len;
        Ok(self.len)
    }

    fn alignment(&self) -> usize {
        SECTOR as usize
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn read(&mut self, batch: &mut [Read<'_>]) -> io::Result<()> {
        for read in batch {
            self.check(read.offset, read.into.len())?;
            let disk = &self.machine.0.borrow().disks[self.disk];
            if !disk.is_readable(read.offset, read.into.len()) {
                return Err(io::Error::from_raw_os_error(nix::libc::EIO));
            }
            disk.visible.read(read.offset, read.into);
        }
        Ok(())
    }

    fn write(&mut self, batch: &[Write<'_>]) -> io::Result<()> {
        let number = {
            let mut inner = self.machine.0.borrow_mut();
            inner.batches += 1;
            inner.batches
        };
        for write in batch {
            self.check(write.offset, write.from.len())?;
            self.event(Event::Write {
                disk: self.disk,
                offset: write.offset,
                bytes: write.from.into(),
                batch: number,
            });
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.event(Event::Flush { disk: self.disk });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The next flush made durable what a failed one had lost, so the tests never met a cache that lies.
    #[test]
    fn what_a_failed_flush_lost_is_read_and_never_durable() {
        let machine = Machine::new(&[("disk", 1 << 20)]);
        let mut device = machine.device(0);
        let write = |device: &mut MemoryDevice, offset, byte| {
            let from = &[byte; 512];
            device.write(&[Write { offset, from }]).unwrap();
        };
        write(&mut device, 0, 1);
        machine.lose_unflushed(0);
        write(&mut device, 512, 2);
        device.flush().unwrap();
        assert!(machine.holds(0, 0, &[1; 512]) && machine.holds(0, 512, &[2; 512]));
        let cut = machine.moment().cut(Survival::All, &mut Rng::new(1));
        assert!(cut.holds(0, 0, &[0; 512]) && cut.holds(0, 512, &[2; 512]));
        write(&mut device, 0, 1);
        device.flush().unwrap();
        let cut = machine.moment().cut(Survival::None, &mut Rng::new(1));
        assert!(cut.holds(0, 0, &[1; 512]));
    }

    #[test]
    fn a_cut_keeps_what_was_flushed_and_any_subset_of_the_rest() {
        let machine = Machine::new(&[("disk", 1 << 20)]);
        let mut device = machine.device(0);
        device
            .write(&[Write {
                offset: 0,
                from: &[1; 1024],
            }])
            .unwrap();
        device.flush().unwrap();
        let before = machine.moment();
        machine.record();
        device
            .write(&[
                Write {
                    offset: 0,
                    from: &[2; 1024],
                },
                Write {
                    offset: 4096,
                    from: &[3; 512],
                },
            ])
            .unwrap();
        let events = machine.recorded();
        assert_eq!(events.len(), 2);
        let content = |machine: &Machine, offset| {
            let mut sector = [0; 512];
            machine
                .device(0)
                .read(&mut [Read {
                    offset,
                    into: &mut sector,
                }])
                .unwrap();
            sector[0]
        };
        let mut rng = Rng::new(1);
        let mut moment = before;
        moment.advance(&events[0]);
        assert_eq!(content(&moment.cut(Survival::None, &mut rng), 0), 1);
        assert_eq!(content(&moment.cut(Survival::All, &mut rng), 512), 2);
        assert_eq!(content(&moment.cut(Survival::All, &mut rng), 4096), 0);
        let torn = |rng: &mut Rng| {
            let machine = moment.cut(Survival::Sectors(50), rng);
            (content(&machine, 0), content(&machine, 512))
        };
        let seen: std::collections::HashSet<_> = (0..100).map(|_| torn(&mut rng)).collect();
        assert_eq!(seen, [(1, 1), (1, 2), (2, 1), (2, 2)].into());
        // A killed process loses nothing, and a power cut afterwards still can.
        let killed = moment.cut(Survival::ProcessKilled, &mut rng);
        assert_eq!(content(&killed, 0), 2);
        assert!(killed.holds(0, 512, &[2; 512]) && !killed.holds(0, 512, &[2; 1024]));
        assert!(killed.holds(0, 8192, &[0; 9000]) && !killed.holds(0, 0, &[0; 9000]));
        assert_eq!(
            content(&killed.moment().cut(Survival::None, &mut rng), 0),
            1
        );
    }

    #[test]
    fn what_was_being_written_may_be_unreadable_or_garbage() {
        let machine = Machine::new(&[("disk", 1 << 20)]);
        let mut device = machine.device(0);
        let whole = [1; 8192];
        let batch = |offset, from| Write { offset, from };
        device.write(&[batch(0, &whole[..])]).unwrap();
        device.flush().unwrap();
        device.write(&[batch(512, &[2; 512][..])]).unwrap();
        let moment = machine.moment();
        let mut rng = Rng::new(1);
        let unreadable = |machine: &Machine| {
            let readable = |sector: u64| {
                let into = &mut [0; 512][..];
                let offset = sector * 512;
                machine.device(0).read(&mut [Read { offset, into }]).is_ok()
            };
            (0..16).filter(|&sector| !readable(sector)).count()
        };
        for (physical, wanted) in [(512, 1), (4096, 8)] {
            let percent = 50;
            let cut = moment.cut(Survival::Torn { percent, physical }, &mut rng);
            assert_eq!(unreadable(&cut), wanted);
            // What is written can be read again, durably once it was flushed.
            let mut device = cut.device(0);
            device.write(&[batch(0, &whole[..])]).unwrap();
            assert_eq!(unreadable(&cut), 0);
            let lost = cut.moment().cut(Survival::None, &mut rng);
            assert_eq!(unreadable(&lost), wanted);
            device.flush().unwrap();
            assert_eq!(unreadable(&cut.moment().cut(Survival::None, &mut rng)), 0);
        }
        let garbage = Survival::Garbage {
            percent: 50,
            physical: 512,
        };
        let strange = |machine: &Machine| {
            let known = |byte| machine.holds(0, 512, &[byte; 512]);
            !known(1) && !known(2)
        };
        assert!(!(0..50).any(|_| strange(&moment.cut(garbage, &mut rng))));
        machine.set_checked(0, 0..4096);
        let moment = machine.moment();
        assert!((0..50).any(|_| strange(&moment.cut(garbage, &mut rng))));
        // What a failed flush lost is read until the power goes.
        let killed = moment.cut(Survival::FlushFailed, &mut rng);
        assert!(killed.holds(0, 512, &[2; 512]));
        killed.device(0).flush().unwrap();
        let cut = moment.cut(Survival::FlushFailed, &mut rng).moment();
        assert!(cut.cut(Survival::All, &mut rng).holds(0, 512, &[1; 512]));
        // The next flush of such a crash made durable what it had lost.
        let cut = killed.moment();
        assert!(cut.cut(Survival::All, &mut rng).holds(0, 512, &[1; 512]));
    }
}
