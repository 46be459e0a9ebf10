// SPDX-License-Identifier: GPL-2.0-only
//! The sweep frees what serves no snapshot any more, in bounded steps. Of what serves bookmarks alone it frees the
//! chunk, and the key stays as a mark.
//!
//! A pass looks at every overlay and every exception once. It keeps its place in memory only: after
//! a restart a new pass begins, which finds nothing at what the last one had freed. A snapshot that
//! was deleted before the pass began is forgotten when the pass ends; one that died meanwhile waits
//! for the next pass. Of what it leaves it notes who needs it, for the day the store is full ([`Survey`]).
//!
//! A node of the index that cannot be read is tried twice and then passed by: the sweep goes on behind it, and
//! comes back at the end of the pass, again and again. The pass is not at its end before all was read, so
//! no deleted entry is forgotten that such a node may still lead to, and no snapshot is given up
//! for room that it may hold. When another snapshot dies meanwhile a new pass begins.

use std::collections::VecDeque;

use super::Store;
use super::error::StoreError;
use super::full::Need;
use super::index::tree::end_of_unreadable;
use super::victims::Survey;
use crate::format::journal::Entry;
use crate::format::node::Key;
use crate::format::snaptable::State;
use crate::units::{Chunk, SnapSeq, StoreChunk};

/// With fewer free chunks than this, and than one in [`SCARCE_PART`], it is found out who needs what
/// before the store is full.
const SCARCE_CHUNKS: u64 = 1 << 15;
const SCARCE_PART: u64 = 8;
/// New exceptions whose users are looked up in a step.
const NEW_IN_STEP: usize = 16;
/// Parts of the index that are passed by at most: with more it is not a sector that fails, but the disk.
const MOST_SKIPPED: usize = 64;

/// How far the sweep is.
#[derive(Debug, Default)]
pub(crate) struct Sweep {
    wanted: bool,
    pass: Option<Pass>,
    /// It cannot go on before a checkpoint.
    pub starved: bool,
    /// What the last pass has found.
    survey: Option<Survey>,
}

#[derive(Debug)]
struct Pass {
    /// Snapshots deleted before the pass began.
    deleted: Vec<SnapSeq>,
    place: Place,
    survey: Survey,
    /// The last step failed to read what lies at `place`.
    failed: bool,
    /// What could not be read.
    skipped: VecDeque<Skipped>,
}

#[derive(Clone, Copy, Debug)]
enum Place {
    /// The first overlay not looked at.
    Overlays(Key),
    /// The first exception not looked at, and the one before it.
    Exceptions(Key, Option<Key>),
    /// What was passed by.
    Skipped,
    Finished,
}

/// A part of an index that was passed by.
#[derive(Clone, Copy, Debug)]
struct Skipped {
    place: Place,
    /// The first key behind it, if any can be.
    end: Option<Key>,
}

impl Pass {
    fn new(deleted: Vec<SnapSeq>) -> Pass {
        Pass {
            deleted,
            place: Place::Overlays((0, 0)),
            survey: Survey::default(),
            failed: false,
            skipped: VecDeque::new(),
        }
    }

    /// Only what cannot be read is left.
    fn is_hindered(&self) -> bool {
        matches!(self.place, Place::Skipped) && !self.skipped.is_empty()
    }

    /// Where to go on, and the end of that part.
    fn at(&self) -> (Place, Option<Key>) {
        match (self.place, self.skipped.front()) {
            (Place::Skipped, Some(part)) => (part.place, part.end),
            (Place::Skipped, None) => (Place::Finished, None),
            (place, _) => (place, None),
        }
    }

    /// A step has come to `next`, or to the end of its part.
    fn advance(&mut self, next: Option<Place>) {
        self.failed = false;
        match (self.place, next) {
            (Place::Skipped, Some(next)) => {
                if let Some(part) = self.skipped.front_mut() {
                    part.place = next;
                }
            }
            (Place::Skipped, None) => drop(self.skipped.pop_front()),
            (_, Some(next)) => self.place = next,
            (Place::Overlays(_), None) => self.place = Place::Exceptions((0, 0), None),
            (_, None) => self.place = Place::Skipped,
        }
    }

    /// What lies at the place cannot be read; passes by what ends at `end`.
    fn skip(&mut self, end: Option<Key>) {
        let (end, next) = match self.place {
            // The first exception behind would lack the one before it: go on with the next chunk.
            Place::Exceptions(..) => {
                let end = end.and_then(|(chunk, seq)| match seq {
                    0 => Some((chunk, 0)),
                    _ => chunk.checked_add(1).map(|chunk| (chunk, 0)),
                });
                (end, end.map(|end| Place::Exceptions(end, None)))
            }
            _ => (end, end.map(Place::Overlays)),
        };
        let place = self.place;
        self.skipped.push_back(Skipped { place, end });
        self.advance(next);
    }
}

impl Sweep {
    /// Something died: another pass is needed.
    pub fn want(&mut self) {
        self.wanted = true;
    }

    /// Whether there is anything to do.
    pub fn pending(&self) -> bool {
        self.wanted || self.pass.is_some()
    }

    /// What the last whole pass has found.
    pub fn survey_made(&self) -> Option<&Survey> {
        self.survey.as_ref()
    }

    pub fn survey(&mut self) -> Option<&mut Survey> {
        self.survey.as_mut()
    }

    /// Has a new pass find out who needs what.
    pub fn survey_again(&mut self) {
        self.survey = None;
        self.wanted = true;
    }

    /// A durable entry was applied.
    pub fn note(&mut self, entry: &Entry) {
        let passing = self.pass.iter_mut().map(|pass| &mut pass.survey);
        match *entry {
            // Its users are its snapshot, or that and older ones.
            Entry::Exception { chunk, seq, .. } => passing
                .chain(&mut self.survey)
                .for_each(|survey| survey.note_new((chunk.0, seq.0))),
            Entry::Overlay { seq, .. } => passing
                .chain(&mut self.survey)
                .for_each(|survey| survey.note_new_overlay(seq.0)),
            _ => {}
        }
    }
}

impl Store {
    /// Looks at up to `budget` entries and frees the dead ones among them, in one journal record. If a
    /// checkpoint has to come first it does nothing and says so in `starved`.
    fn sweep_step(&mut self, budget: usize) -> Result<(), StoreError> {
        let again = self.sweep.wanted;
        let under_way = self.sweep.pass.take();
        let mut pass = match under_way.filter(|pass| !(again && pass.is_hindered())) {
            Some(pass) => pass,
            None => {
                self.sweep.wanted = false;
                let snapshots = self.state.snapshots.iter();
                let deleted = snapshots.filter(|s| s.state == State::Deleted);
                Pass::new(deleted.map(|s| s.seq).collect())
            }
        };
        let (place, end) = pass.at();
        let swept = match place {
            Place::Overlays(from) => self.sweep_overlays(&mut pass.survey, (from, end), budget),
            Place::Exceptions(from, last) => {
                self.sweep_exceptions(&mut pass.survey, (from, end), last, budget)
            }
            Place::Skipped | Place::Finished => {
                self.sweep.survey = Some(pass.survey);
                return self.forget(&pass.deleted);
            }
        };
        let result = match swept {
            Ok(next) => {
                pass.advance(next);
                Ok(())
            }
            Err(error) => self.pass_by(&mut pass, error),
        };
        self.sweep.pass = Some(pass);
        result
    }

    /// A step failed: it is tried again from the same place, or what cannot be read is left for later.
    fn pass_by(&mut self, pass: &mut Pass, error: StoreError) -> Result<(), StoreError> {
        let unreadable = matches!(error, StoreError::Read { .. } | StoreError::Damaged { .. });
        let (index, from) = match pass.place {
            Place::Overlays(from) => (&self.state.overlays, from),
            Place::Exceptions(from, _) => (&self.state.exceptions, from),
            Place::Skipped | Place::Finished => {
                // The others are tried before this one again.
                pass.skipped
                    .rotate_left(usize::from(pass.skipped.len() > 1));
                return Err(error);
            }
        };
        if !unreadable || !std::mem::replace(&mut pass.failed, true) {
            return Err(error);
        }
        let end = end_of_unreadable(&mut self.media, index.kind, &index.root, from);
        match end {
            Some(end) if end.is_none_or(|end| end > from) && pass.skipped.len() < MOST_SKIPPED => {
                pass.skip(end);
                let text = error.with_cause();
                self.troubles.push(format!(
                    "a part of the index cannot be read, and what is dead there is not freed until it can: {text}"
                ));
                Ok(())
            }
            _ => Err(error),
        }
    }

    fn forget(&mut self, deleted: &[SnapSeq]) -> Result<(), StoreError> {
        let forget: Vec<_> = deleted.iter().map(|&seq| Entry::Forget(seq)).collect();
        let mut parts = forget.chunks(self.ring.max_entries());
        parts.try_for_each(|part| self.record(part))
    }

    /// Sweeps a part of the overlays; gives where to go on in it.
    fn sweep_overlays(
        &mut self,
        survey: &mut Survey,
        (from, end): (Key, Option<Key>),
        budget: usize,
    ) -> Result<Option<Place>, StoreError> {
        let most = self.removals_possible(budget)?;
        if most == 0 {
            return Ok(Some(Place::Overlays(from)));
        }
        let living = self.living();
        let mut removals = Vec::new();
        let overlays = &self.state.overlays;
        let scan = overlays.scan_in_part(&mut self.media, from, budget)?;
        let mut next = scan.next;
        for ((seq, chunk), value) in scan.found {
            if end.is_some_and(|end| end <= (seq, chunk)) {
                break;
            }
            if self.state.snapshots.needs_data(seq) {
                survey.note_overlay(&living, seq);
                // All its overlays stay: go on behind them.
                next = seq.checked_add(1).map(|next| (next, 0));
                break;
            }
            if removals.len() == most {
                next = Some((seq, chunk));
                break;
            }
            let place = StoreChunk(value.place);
            let (snapshot, chunk) = (SnapSeq(seq), Chunk(chunk));
            let bookmarks = self.state.snapshots.bookmarks();
            let bookmark = bookmarks.get(&seq).is_some_and(|&end| end > chunk.0);
            match (bookmark, value.is_mark()) {
                (true, true) => {}
                (true, false) => removals.push(Entry::OverlayToMark {
                    seq: snapshot,
                    chunk,
                    place,
                }),
                (false, _) => removals.push(Entry::RemoveOverlay {
                    seq: snapshot,
                    chunk,
                    place,
                }),
            }
        }
        self.remove(&removals)?;
        let next = next.filter(|&next| end.is_none_or(|end| next < end));
        Ok(next.map(Place::Overlays))
    }

    /// Sweeps a part of the exceptions; gives where to go on in it.
    fn sweep_exceptions(
        &mut self,
        survey: &mut Survey,
        (from, end): (Key, Option<Key>),
        mut last: Option<Key>,
        budget: usize,
    ) -> Result<Option<Place>, StoreError> {
        let most = self.removals_possible(budget)?;
        if most == 0 {
            return Ok(Some(Place::Exceptions(from, last)));
        }
        let living = self.living();
        let mut removals = Vec::new();
        let exceptions = &self.state.exceptions;
        let scan = exceptions.scan_in_part(&mut self.media, from, budget)?;
        let mut next = scan.next;
        for ((chunk, seq), value) in scan.found {
            if end.is_some_and(|end| end <= (chunk, seq)) {
                break;
            }
            if removals.len() == most {
                next = Some((chunk, seq));
                break;
            }
            let before = last.filter(|last| last.0 == chunk).map_or(0, |last| last.1);
            let snapshots = &self.state.snapshots;
            let (origin_chunk, place) = (Chunk(chunk), StoreChunk(value.place));
            let needed = snapshots.any_needs(origin_chunk, before, seq);
            let marked = snapshots.any_bookmark(origin_chunk, before, seq);
            match (needed, marked, value.is_mark()) {
                (true, _, false) => survey.note(&living, chunk, before, seq),
                // What a snapshot needs is no mark, unless the index is damaged.
                (true, _, true) | (false, true, true) => {}
                (false, true, false) => removals.push(Entry::ExceptionToMark {
                    chunk: origin_chunk,
                    seq: SnapSeq(seq),
                    place,
                }),
                (false, false, _) => removals.push(Entry::RemoveException {
                    chunk: origin_chunk,
                    seq: SnapSeq(seq),
                    place,
                }),
            }
            last = Some((chunk, seq));
        }
        self.remove(&removals)?;
        let next = next.filter(|&next| end.is_none_or(|end| next < end));
        Ok(next.map(|next| Place::Exceptions(next, last)))
    }

    fn remove(&mut self, removals: &[Entry]) -> Result<(), StoreError> {
        if removals.is_empty() {
            Ok(())
        } else {
            self.record(removals)
        }
    }

    /// How many removals fit into a record and into memory and leave the next checkpoint enough blocks;
    /// none if a checkpoint has to come first.
    fn removals_possible(&mut self, budget: usize) -> Result<usize, StoreError> {
        let mut count = budget.clamp(1, self.ring.max_entries()).min(self.memory());
        let fits = |store: &Store, count| {
            store.checkpoint_cost(count, count) <= store.free_meta_blocks()
                && store.ring.has_room(count, store.ring_kept())
        };
        while count > 0 && !fits(self, count) {
            count /= 2;
        }
        self.sweep.starved = count == 0;
        if count == 0 && !self.has_recent() {
            return Err(StoreError::MetaExhausted {
                device: self.media.meta_name(),
            });
        }
        Ok(count)
    }

    /// Does a bounded part of the work that waits in the background: a step of a checkpoint, of the
    /// sweep, or of what else a request waits for. `budget` is the number of index entries to look at.
    ///
    /// True if there is more to do.
    ///
    /// # Errors
    /// The store cannot go on; or something could not be read: then it is tried again from the same
    /// place by the next call, which had better come later.
    pub fn background_step(&mut self, budget: usize) -> Result<bool, StoreError> {
        self.check_latch()?;
        if self.need == Some(Need::Search) {
            // First: it has an end, and a request waits for it and for nothing that a checkpoint gives.
            if self.state.space.free() == 0
                || self.state.space.seek_free(&mut self.media, self.budget)?
            {
                self.need = None;
            }
        } else if self.checkpoint_wanted() {
            self.checkpoint_step()?;
        } else if self.sweep.pending() {
            self.sweep_step(budget.max(1))?;
        } else {
            self.prepare_choice()?;
        }
        self.look_at_need();
        let scarce = self.is_scarce();
        let sweep = &mut self.sweep;
        let to_survey = scarce && sweep.survey.as_ref().is_none_or(|s| !s.is_current());
        Ok(self.sweep.pending() || self.checkpoint_wanted() || self.need.is_some() || to_survey)
    }

    /// Few chunks are free: soon it must be known who needs what.
    fn is_scarce(&self) -> bool {
        let (free, total) = (self.state.space.free(), self.state.space.total());
        free < SCARCE_CHUNKS
            && free < total / SCARCE_PART
            && !self.state.snapshots.live().is_empty()
    }

    /// Finds out who needs what, if that is about to matter.
    fn prepare_choice(&mut self) -> Result<(), StoreError> {
        let wanted = self.need == Some(Need::Survey) || self.is_scarce();
        match &self.sweep.survey {
            Some(survey) if wanted && !survey.is_current() => {
                self.note_new_exceptions(NEW_IN_STEP)?;
            }
            None if wanted => self.sweep.want(),
            _ => {}
        }
        Ok(())
    }
}
