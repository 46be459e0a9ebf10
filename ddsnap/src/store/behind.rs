// SPDX-License-Identifier: GPL-2.0-only
//! What the journal says behind records that are lost, for who mends a store.
//!
//! Opening refuses such a journal. A repair goes on: a record behind the gap was acknowledged, and what it
//! says counts. The lost ones may have been anything: a copy-out for any snapshot that was live then, so those
//! have to go; a snapshot created or deleted; a chunk freed. One that was created *behind* the gap lacks
//! nothing: whatever was saved for it was saved later.
//!
//! So records behind a gap are not held against the state as those before it are. What they contradict is
//! what the lost ones have changed: a tag that is given anew was free, so the snapshot that had it is
//! deleted; a chunk that is taken or freed had no other owner, so who seems to own it does not any more.

use std::collections::BTreeMap;

use super::error::StoreError;
use super::media::Media;
use super::state::State;
use crate::format::block::Kind;
use crate::format::journal::Entry;
use crate::format::node::{Key, Value};
use crate::format::snaptable::{MAX_ENTRIES, State as SnapshotState};
use crate::promise::kept;
use crate::units::{SnapSeq, StoreChunk};

/// Records that are lost, with others behind them.
pub(crate) struct Gap {
    /// Which, and what is there.
    pub what: StoreError,
    /// Sequences of the live snapshots and bookmarks there were when the first of them was written.
    pub keepers: Vec<u64>,
}

/// All gaps of a journal, and what the records behind them say of store chunks.
#[derive(Default)]
pub(crate) struct Behind {
    pub gaps: Vec<Gap>,
    /// Chunks that were taken or freed behind a gap, and the entry that owns each now.
    claimed: BTreeMap<u64, Option<(Kind, Key)>>,
}

impl Behind {
    /// Records are lost here.
    pub fn note(&mut self, what: StoreError, state: &mut State) {
        let hurts = kept!(
            "gap-hurts-who-lived",
            "a snapshot whose copy-out was in the lost record would show what the origin holds now"
        );
        let keepers = match hurts {
            true => state.snapshots.keepers().map(|(seq, _)| seq).collect(),
            false => Vec::new(),
        };
        self.gaps.push(Gap { what, keepers });
        // Whether the origin was written by others cannot be told from what was noted before.
        state.origin_record.areas.clear();
        state.origin_record.guards.clear();
    }

    /// Whether no record was lost so far.
    pub fn is_empty(&self) -> bool {
        self.gaps.is_empty()
    }

    /// Whether an entry that leads to `place` is what the journal says behind the gaps.
    pub fn owns(&self, kind: Kind, key: Key, place: StoreChunk) -> bool {
        let trusts_all = !kept!(
            "one-owner-behind-gap",
            "an entry that was removed in the lost record would take the chunk from who owns it now"
        );
        match self.claimed.get(&place.0) {
            Some(owner) => trusts_all || *owner == Some((kind, key)),
            None => true,
        }
    }

    /// Whether any chunk has an owner that may contradict the index.
    pub fn claims_any(&self) -> bool {
        !self.claimed.is_empty()
    }

    /// Applies an entry of a record behind a gap.
    ///
    /// # Errors
    /// It says what no lost record can explain.
    pub fn apply(
        &mut self,
        media: &mut Media,
        state: &mut State,
        entry: &Entry,
    ) -> Result<(), StoreError> {
        let device = media.meta_name();
        let wrong = |problem: &str| {
            let problem = format!("{problem} ({entry:?})");
            Err(StoreError::Journal { device, problem })
        };
        let known = |state: &State, seq: SnapSeq| state.snapshots.get(seq).map(|s| s.state);
        match *entry {
            // A mark: no chunk comes free.
            Entry::RemoveException { place, .. } | Entry::RemoveOverlay { place, .. }
                if place.0 == Value::MARK.place => {}
            Entry::Exception { place, .. }
            | Entry::Overlay { place, .. }
            | Entry::RemoveException { place, .. }
            | Entry::RemoveOverlay { place, .. }
            | Entry::ExceptionToMark { place, .. }
            | Entry::OverlayToMark { place, .. }
                if !state.space.contains(place) =>
            {
                return wrong("a store chunk lies outside the data region");
            }
            Entry::Exception {
                chunk, seq, place, ..
            } => {
                if seq.0 >= u64::MAX - 1 {
                    return wrong("a chunk is recorded for a sequence that is none");
                }
                // Of a snapshot that was created in a lost record: older ones may need it.
                state.next_seq = state.next_seq.max(SnapSeq(seq.0 + 1));
                self.claim(
                    media,
                    state,
                    place,
                    Some((Kind::Exceptions, (chunk.0, seq.0))),
                );
            }
            Entry::Overlay { seq, chunk, place } => {
                if known(state, seq).is_none() {
                    return Ok(()); // its snapshot is lost
                }
                self.claim(
                    media,
                    state,
                    place,
                    Some((Kind::Overlays, (seq.0, chunk.0))),
                );
            }
            Entry::RemoveException { place, .. }
            | Entry::RemoveOverlay { place, .. }
            | Entry::ExceptionToMark { place, .. } => {
                self.claim(media, state, place, None);
            }
            Entry::OverlayToMark { seq, chunk, place } => {
                self.claim(media, state, place, None);
                if known(state, seq).is_none() {
                    state.apply(&Entry::RemoveOverlay { seq, chunk, place });
                    return Ok(()); // its bookmark is lost
                }
            }
            Entry::Mark { seq, .. } => {
                if seq.0 >= u64::MAX - 1 {
                    return wrong("a chunk is recorded for a sequence that is none");
                }
                state.next_seq = state.next_seq.max(SnapSeq(seq.0 + 1));
            }
            Entry::Create { seq, tag, .. } | Entry::Bookmark { seq, tag, .. } => {
                if seq < state.next_seq || seq.0 >= u64::MAX - 1 {
                    return wrong("a snapshot is created out of sequence");
                }
                if state.snapshots.len() >= MAX_ENTRIES {
                    return wrong("more snapshots are created than a store can have");
                }
                if let Some(old) = state.snapshots.by_tag(tag).map(|snapshot| snapshot.seq) {
                    state.apply(&Entry::Delete(old));
                }
            }
            // What it had may not all be removed.
            Entry::Forget(seq) => {
                if known(state, seq).is_some_and(|state| state != SnapshotState::Deleted) {
                    state.apply(&Entry::Delete(seq));
                }
                return Ok(());
            }
            Entry::Delete(seq)
            | Entry::Squash(seq)
            | Entry::Priority(seq, _)
            | Entry::Usecount(seq, _)
            | Entry::WhenFull(seq, _) => {
                if known(state, seq).is_none_or(|state| state == SnapshotState::Deleted) {
                    return Ok(());
                }
            }
            Entry::ToBookmark(seq)
            | Entry::RevertBegin(seq)
            | Entry::RevertProgress { seq, .. } => {
                if known(state, seq) != Some(SnapshotState::Live) {
                    return Ok(());
                }
            }
            Entry::Guard { seq, .. } => {
                if known(state, seq).is_none() {
                    return Ok(());
                }
            }
            Entry::RevertEnd(_)
            | Entry::Doubtful(_)
            | Entry::CutBookmarks(_)
            | Entry::Opened { .. }
            | Entry::Again { .. } => {}
        }
        state.apply(entry);
        Ok(())
    }

    /// A chunk gets an owner, or loses it; the space map is made what it was before that.
    fn claim(
        &mut self,
        media: &mut Media,
        state: &mut State,
        place: StoreChunk,
        owner: Option<(Kind, Key)>,
    ) {
        // What cannot be read of the map is found where it is proven.
        let used = state.space.is_used(media, place);
        if used.is_ok_and(|used| used == owner.is_some()) {
            state.space.mark(place, owner.is_none());
        }
        self.claimed.insert(place.0, owner);
    }
}
