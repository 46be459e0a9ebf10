// SPDX-License-Identifier: GPL-2.0-only
//! Which snapshots to give up when the store is full.
//!
//! A chunk comes free when the last snapshot that needs it is gone. So what counts is not one
//! snapshot but a set: the users of a chunk. A pass of the sweep looks at each entry anyway, knows its
//! users, and notes each different set of them here. While the store goes on, the notes stay true:
//! - a snapshot that dies leaves the sets it was in: they are kept as ranges of sequences, and who of
//!   them lives is looked up when it matters;
//! - a snapshot that is created is in none of them, for exceptions serve only older ones;
//! - an entry that is made is noted too: a new exception's users reach back to the one before it, which
//!   is looked up in the background before anything is decided.
//!
//! Sets with a member that must stay (of priority 127, the target of a revert, or squashed while a
//! device may use it) free nothing whatever else is given up. They are not kept, but for one such
//! member of each: when it need not stay any more, a new pass must be made.

use std::collections::{BTreeSet, HashSet, VecDeque};

use super::Store;
use super::error::StoreError;
use super::snapshot::Snapshots;
use crate::format::node::Key;
use crate::format::snaptable::{Snapshot, State};
use crate::units::SnapSeq;

/// A snapshot of this priority is never given up.
pub(super) const NEVER: i8 = i8::MAX;
/// The most sets kept, of 24 bytes each.
const MOST_SETS: usize = 1 << 16;
/// The most new exceptions whose users are looked up later: a pass is as quick for more.
const MOST_NEW: usize = 1 << 16;

/// The users of a chunk: the live snapshots of a sequence from `first` to `last` with more than `floor`
/// chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Users {
    first: u64,
    last: u64,
    floor: u64,
}

/// Who needs what, as a pass of the sweep has found it.
#[derive(Debug, Default)]
pub(crate) struct Survey {
    sets: HashSet<Users>,
    /// Of each set that is not kept, a member that must stay.
    staying: BTreeSet<u64>,
    /// Exceptions made since the pass began.
    new: VecDeque<Key>,
    /// There was more than is kept.
    overflowed: bool,
}

/// Live snapshots, oldest first, and those that must stay: sequences and lengths in chunks.
pub(super) struct Living {
    live: Vec<(u64, u64)>,
    staying: Vec<(u64, u64)>,
    /// Length of the shortest live one.
    shortest: u64,
}

impl Survey {
    /// Notes an exception of sequence `seq` whose predecessor has `before`.
    pub fn note(&mut self, living: &Living, chunk: u64, before: u64, seq: u64) {
        if let Some(staying) = first_with(&living.staying, chunk, before, seq) {
            self.staying.insert(staying);
            return;
        }
        let from = living.live.partition_point(|&(live, _)| live <= before);
        let to = living.live.partition_point(|&(live, _)| live <= seq);
        let range = &living.live[from..to.max(from)];
        let users = if chunk < living.shortest {
            range.first().zip(range.last()).map(|(first, last)| Users {
                first: first.0,
                last: last.0,
                floor: 0,
            })
        } else {
            let has = |&&(_, chunks): &&(u64, u64)| chunks > chunk;
            let ends = range.iter().find(has).zip(range.iter().rev().find(has));
            ends.map(|(first, last)| {
                let between = range.iter().filter(|s| first.0 < s.0 && s.0 < last.0);
                let short = between.map(|&(_, chunks)| chunks).filter(|&c| c <= chunk);
                Users {
                    first: first.0,
                    last: last.0,
                    floor: short.max().unwrap_or(0),
                }
            })
        };
        if let Some(users) = users {
            self.keep(users);
        }
    }

    /// Notes an overlay of a live snapshot.
    pub fn note_overlay(&mut self, living: &Living, seq: u64) {
        if living.staying.iter().any(|&(staying, _)| staying == seq) {
            self.staying.insert(seq);
        } else {
            self.keep(Users {
                first: seq,
                last: seq,
                floor: 0,
            });
        }
    }

    /// Notes that an exception was made.
    pub fn note_new(&mut self, key: Key) {
        if self.new.len() < MOST_NEW {
            self.new.push_back(key);
        } else {
            self.overflowed = true;
        }
    }

    /// Notes that an overlay was made. Whether its snapshot must stay is found out when it matters.
    pub fn note_new_overlay(&mut self, seq: u64) {
        self.keep(Users {
            first: seq,
            last: seq,
            floor: 0,
        });
    }

    /// Whether all exceptions made since are noted.
    pub fn is_current(&self) -> bool {
        self.new.is_empty()
    }

    fn keep(&mut self, users: Users) {
        if self.sets.len() < MOST_SETS {
            self.sets.insert(users);
        } else if !self.sets.contains(&users) {
            self.overflowed = true;
        }
    }
}

/// The first snapshot of a sequence in (`before`, `upto`] that has a chunk.
fn first_with(snapshots: &[(u64, u64)], chunk: u64, before: u64, upto: u64) -> Option<u64> {
    let from = snapshots.partition_point(|&(seq, _)| seq <= before);
    let within = snapshots[from..].iter().take_while(|s| s.0 <= upto);
    within
        .filter(|&&(_, chunks)| chunks > chunk)
        .map(|&(seq, _)| seq)
        .next()
}

/// What a choice came to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// These free something together, and none of them can be left out.
    Victims(Vec<Snapshot>),
    /// Whatever is given up, nothing comes free.
    Nothing,
    /// Not enough is known.
    Unknown,
}

/// Chooses, by the notes of a survey, from all sets of snapshots whose loss frees something the one
/// whose most wanted member is wanted least; of several, the one with the fewest members.
pub(super) fn choose(
    survey: &Survey,
    snapshots: &Snapshots,
    stays: impl Fn(&Snapshot) -> bool,
) -> Choice {
    if !survey.new.is_empty() {
        return Choice::Unknown;
    }
    let stays = |seq: u64| snapshots.get(SnapSeq(seq)).is_some_and(&stays);
    if !survey.staying.iter().all(|&seq| stays(seq)) {
        return Choice::Unknown;
    }
    // Positions are by age; of each the rank by which it is given up, none if it must stay.
    let live: Vec<(u64, u64)> = snapshots.live().iter().map(|(&s, &c)| (s, c)).collect();
    let mut order: Vec<usize> = (0..live.len()).collect();
    order.sort_by_key(|&at| {
        let snapshot = snapshots.get(SnapSeq(live[at].0));
        snapshot.map(|s| (snapshots.in_use(s), s.priority, s.seq))
    });
    let mut ranks = vec![u32::MAX; live.len()];
    for (rank, &at) in order.iter().enumerate() {
        if !stays(live[at].0) {
            ranks[at] = rank as u32; // at most as many as there are snapshots
        }
    }
    let highest = Highest::new(ranks);
    let shortest = live.iter().map(|&(_, chunks)| chunks).min().unwrap_or(0);
    let range = |users: &Users| {
        let from = live.partition_point(|&(seq, _)| seq < users.first);
        from..live.partition_point(|&(seq, _)| seq <= users.last)
    };
    let mut best: Option<((u32, usize), Users)> = None;
    for users in &survey.sets {
        let range = range(users);
        let (highest, count) = if users.floor < shortest {
            (highest.of(range.clone()), range.len())
        } else {
            let mut members = range.filter(|&at| live[at].1 > users.floor).peekable();
            let none = members.peek().is_none();
            let (mut most, mut count) = (0, 0);
            members.for_each(|at| (most, count) = (most.max(highest.ranks[0][at]), count + 1));
            ((!none).then_some(most), count)
        };
        let Some(highest) = highest.filter(|&rank| rank != u32::MAX) else {
            continue; // All of its users are dead, or one must stay.
        };
        if best.is_none_or(|(least, _)| (highest, count) < least) {
            best = Some(((highest, count), *users));
        }
    }
    match best {
        Some((_, users)) => Choice::Victims(
            range(&users)
                .filter(|&at| live[at].1 > users.floor)
                .filter_map(|at| snapshots.get(SnapSeq(live[at].0)).copied())
                .collect(),
        ),
        None if survey.overflowed => Choice::Unknown,
        None => Choice::Nothing,
    }
}

/// The highest rank of any range, in constant time: level n has it of the 2^n from each place on.
struct Highest {
    ranks: Vec<Vec<u32>>,
}

impl Highest {
    fn new(ranks: Vec<u32>) -> Self {
        let mut levels = vec![ranks];
        let mut width = 1;
        while let Some(last) = levels.last().filter(|last| last.len() > width) {
            let pairs = last.iter().zip(&last[width..]);
            let next = pairs.map(|(&a, &b)| a.max(b)).collect();
            levels.push(next);
            width *= 2;
        }
        Highest { ranks: levels }
    }

    fn of(&self, range: std::ops::Range<usize>) -> Option<u32> {
        let level = range.len().checked_ilog2()? as usize;
        let level_ranks = &self.ranks[level];
        Some(level_ranks[range.start].max(level_ranks[range.end - (1 << level)]))
    }
}

impl Store {
    /// Whether a snapshot must not be given up.
    pub(super) fn must_stay(&self, snapshot: &Snapshot) -> bool {
        let live = snapshot.state == State::Live;
        live && (snapshot.priority == NEVER || self.is_reverting_to(snapshot.seq))
            || self.state.snapshots.is_draining(snapshot.seq)
    }

    /// What notes are made by.
    pub(super) fn living(&self) -> Living {
        let snapshots = &self.state.snapshots;
        let live: Vec<(u64, u64)> = snapshots.live().iter().map(|(&s, &c)| (s, c)).collect();
        let staying = snapshots.iter().filter(|s| self.must_stay(s));
        Living {
            shortest: live.iter().map(|&(_, chunks)| chunks).min().unwrap_or(0),
            staying: staying
                .map(|s| (s.seq.0, s.length.to_chunks(self.superblock.chunk)))
                .collect(),
            live,
        }
    }

    /// Looks up the users of up to `most` exceptions made since the survey.
    pub(super) fn note_new_exceptions(&mut self, most: usize) -> Result<(), StoreError> {
        let living = self.living();
        let Some(survey) = self.sweep.survey() else {
            return Ok(());
        };
        for _ in 0..most {
            let Some(&key) = survey.new.front() else {
                return Ok(());
            };
            let (exceptions, media) = (&self.state.exceptions, &mut self.media);
            // It may have been swept, or be a mark by now.
            let value = exceptions.get(media, key)?;
            if value.is_some_and(|value| !value.is_mark()) {
                let mut before = 0;
                if let Some(last) = key.1.checked_sub(1) {
                    let mut entries = exceptions.entries(media, (key.0, 0), (key.0, last))?;
                    while let Some(((_, seq), _)) = entries.next(media)? {
                        before = seq;
                    }
                }
                survey.note(&living, key.0, before, key.1);
            }
            survey.new.pop_front();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{Chunk, ChunkShift, Sectors, SnapTag};

    const SHIFT: ChunkShift = ChunkShift::MIN;

    fn table(priorities: &[(i8, u64)]) -> Snapshots {
        let mut table = Snapshots::new(SHIFT);
        for (at, &(priority, chunks)) in priorities.iter().enumerate() {
            table.insert(Snapshot {
                seq: SnapSeq(at as u64 + 1),
                tag: SnapTag(at as u32 + 1),
                state: State::Live,
                priority,
                usecount: 0,
                created: 0,
                length: Sectors::of_chunks(chunks, SHIFT).unwrap(),
                doubtful: false,
                to_bookmark: false,
            });
        }
        table
    }

    fn living(table: &Snapshots) -> Living {
        let live: Vec<(u64, u64)> = table.live().iter().map(|(&s, &c)| (s, c)).collect();
        let staying = table.iter().filter(|s| s.priority == NEVER);
        Living {
            shortest: live.iter().map(|&(_, chunks)| chunks).min().unwrap(),
            staying: staying
                .map(|s| (s.seq.0, s.length.to_chunks(SHIFT)))
                .collect(),
            live,
        }
    }

    fn chosen(survey: &Survey, table: &Snapshots) -> Option<Vec<u64>> {
        match choose(survey, table, |s| s.priority == NEVER) {
            Choice::Victims(victims) => Some(victims.iter().map(|s| s.seq.0).collect()),
            Choice::Nothing => None,
            Choice::Unknown => panic!("all is known"),
        }
    }

    #[test]
    fn what_frees_nothing_is_not_given_up() {
        let table = table(&[(0, 10), (NEVER, 10), (0, 10)]);
        let mut survey = Survey::default();
        survey.note(&living(&table), 1, 0, 2);
        survey.note(&living(&table), 2, 1, 3);
        assert_eq!(chosen(&survey, &table), None);
        // The youngest alone has something of its own.
        survey.note(&living(&table), 3, 2, 3);
        assert_eq!(chosen(&survey, &table), Some(vec![3]));
    }

    #[test]
    fn two_that_share_all_go_together() {
        let mut table = table(&[(0, 10), (0, 10), (5, 10)]);
        let mut survey = Survey::default();
        survey.note(&living(&table), 1, 0, 2);
        survey.note(&living(&table), 2, 1, 3);
        assert_eq!(chosen(&survey, &table), Some(vec![1, 2]));
        table.set_state(SnapSeq(1), State::Deleted);
        assert_eq!(chosen(&survey, &table), Some(vec![2]));
    }

    /// Snapshots of several lengths and priorities, against looking at all sets that free something.
    #[test]
    fn the_choice_is_that_of_looking_at_all_sets() {
        let mut seed = 5_u64;
        let mut random = |below: u64| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1);
            (seed >> 33) % below
        };
        let (mut none, mut several) = (0, 0);
        for round in 0..2000 {
            let lengths = if round % 2 == 0 { 1 } else { 12 };
            let count = 1 + random(9);
            let priorities: Vec<(i8, u64)> = (0..count)
                .map(|_| {
                    (
                        [0, 0, 1, 2, NEVER][random(5) as usize],
                        12 - random(lengths),
                    )
                })
                .collect();
            let mut table = table(&priorities);
            let mut survey = Survey::default();
            let mut entries = Vec::new();
            for chunk in 0..random(12) {
                let mut before = 0;
                while before < count {
                    let seq = before + 1 + random(count);
                    survey.note(&living(&table), chunk, before, seq);
                    entries.push((chunk, before, seq));
                    before = seq;
                }
            }
            if random(3) == 0 {
                table.set_state(SnapSeq(1 + random(count)), State::Deleted);
            }
            let rank = |s: &Snapshot| (s.priority, s.seq);
            let stays = |s: &Snapshot| s.state == State::Live && s.priority == NEVER;
            let sets = entries.iter().map(|&(chunk, before, seq)| {
                let live = table.iter().filter(|s| s.state == State::Live);
                let has = live.filter(|s| before < s.seq.0 && s.seq.0 <= seq);
                has.filter(|s| table.has(s, Chunk(chunk)))
                    .collect::<Vec<_>>()
            });
            let free = sets
                .filter(|set| !set.is_empty() && set.iter().all(|s| s.priority < NEVER))
                .map(|set| (set.iter().map(|s| rank(s)).max(), set.len()));
            let best = free.min();
            let victims = match choose(&survey, &table, stays) {
                Choice::Victims(victims) => victims,
                Choice::Nothing => {
                    assert_eq!(best, None, "{priorities:?} {entries:?}");
                    none += 1;
                    continue;
                }
                // The one that had to stay is gone: what it kept may come free now.
                Choice::Unknown => continue,
            };
            several += usize::from(victims.len() > 1);
            let found = (victims.iter().map(rank).max(), victims.len());
            assert_eq!(Some(found), best, "{priorities:?} {entries:?}");
        }
        assert!(none > 50 && several > 50, "{none} {several}");
    }
}
