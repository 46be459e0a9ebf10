// SPDX-License-Identifier: GPL-2.0-only
//! Disks in memory with a volatile cache, whose power can be cut between any two writes.
//!
//! A [`Machine`] has several disks. Each remembers what is on its medium and which writes came since
//! its last flush. [`Machine::record`] notes every write and flush; from a [`Moment`] taken before, any
//! point between two of these events can be rebuilt, and the power cut there: of each disk the
//! medium stays, and of the sectors written since its last flush any subset ([`Moment::cut`]).

use std::cell::RefCell;
use std::collections::BTreeMap;
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
}

impl Disk {
    fn write(&mut self, offset: u64, bytes: &Rc<[u8]>) {
        self.visible.write(offset, bytes);
        self.cached.push((offset, bytes.clone()));
    }

    fn flush(&mut self) {
        self.medium = self.visible.clone();
        self.cached.clear();
    }
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
            } => self.0[*disk].write(*offset, bytes),
            Event::Flush { disk } => self.0[*disk].flush(),
        }
    }

    /// The machine after the power was cut at this moment and came back.
    #[must_use]
    pub fn cut(&self, survival: Survival, rng: &mut Rng) -> Machine {
        let mut disks = self.0.clone();
        if survival == Survival::ProcessKilled {
            return Machine::from_disks(disks);
        }
        for disk in &mut disks {
            for (offset, bytes) in std::mem::take(&mut disk.cached) {
                let whole = match survival {
                    Survival::All => true,
                    Survival::Writes(percent) => rng.chance(percent),
                    Survival::None | Survival::Sectors(_) | Survival::ProcessKilled => false,
                };
                if whole {
                    disk.medium.write(offset, &bytes);
                } else if let Survival::Sectors(percent) = survival {
                    for (index, sector) in bytes.chunks(SECTOR as usize).enumerate() {
                        if rng.chance(percent) {
                            disk.medium.write(offset + index as u64 * SECTOR, sector);
                        }
                    }
                }
            }
            disk.visible = disk.medium.clone();
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
        };
        Self::from_disks(disks.iter().map(empty).collect())
    }

    fn from_disks(disks: Vec<Disk>) -> Self {
        Machine(Rc::new(RefCell::new(Inner {
            disks,
            recorded: None,
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
        disk.medium.cut_off(len);
        disk.visible.cut_off(len);
        disk.cached
            .retain(|(offset, bytes)| offset + bytes.len() as u64 <= len);
    }

    /// Whether reading at `offset` gives these bytes.
    #[must_use]
    pub fn holds(&self, disk: usize, offset: u64, bytes: &[u8]) -> bool {
        self.0.borrow().disks[disk].visible.holds(offset, bytes)
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
            self.machine.0.borrow().disks[self.disk]
                .visible
                .read(read.offset, read.into);
        }
        Ok(())
    }

    fn write(&mut self, batch: &[Write<'_>]) -> io::Result<()> {
        for write in batch {
            self.check(write.offset, write.from.len())?;
            self.event(Event::Write {
                disk: self.disk,
                offset: write.offset,
                bytes: write.from.into(),
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
}
