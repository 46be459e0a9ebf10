// SPDX-License-Identifier: GPL-2.0-only
//! A layer of changes that a checkpoint has frozen: it can be looked up in, and is handed out in slices.
//!
//! A layer has hundreds of thousands of changes. To lay them out as one sorted slice takes a tenth of a second,
//! which the request that begins the checkpoint would wait for. So the map is taken over as it is, in no time,
//! and each step of the checkpoint lays out what it merges.

use std::collections::{BTreeMap, btree_map};
use std::iter::{Chain, Copied, Map};
use std::slice;

/// See the module.
#[derive(Debug)]
pub(crate) struct Frozen<K, V> {
    /// The changes laid out so far, ascending: all that come before those in `rest`.
    head: Vec<(K, V)>,
    rest: BTreeMap<K, V>,
}

/// Changes of a layer, ascending.
pub(crate) type Ascending<'a, K, V> = Chain<Copied<slice::Iter<'a, (K, V)>>, Rest<'a, K, V>>;
type Rest<'a, K, V> = Map<btree_map::Range<'a, K, V>, fn((&'a K, &'a V)) -> (K, V)>;

impl<K: Ord + Copy, V: Copy> Frozen<K, V> {
    /// No changes.
    pub fn new() -> Self {
        Frozen {
            head: Vec::new(),
            rest: BTreeMap::new(),
        }
    }

    /// These changes.
    pub fn of(changes: BTreeMap<K, V>) -> Self {
        Frozen {
            // All at once: growing it would copy what is there.
            head: Vec::with_capacity(changes.len()),
            rest: changes,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn len(&self) -> usize {
        self.head.len() + self.rest.len()
    }

    /// What `key` was changed to.
    pub fn get(&self, key: K) -> Option<V> {
        match self.head.binary_search_by_key(&key, |&(key, _)| key) {
            Ok(place) => Some(self.head[place].1),
            // Behind all that is laid out.
            Err(place) if place == self.head.len() => self.rest.get(&key).copied(),
            Err(_) => None,
        }
    }

    /// The changes of keys from `key` on.
    pub fn from(&self, key: K) -> Ascending<'_, K, V> {
        let first = self.head.partition_point(|&(changed, _)| changed < key);
        let copied: fn((&_, &_)) -> _ = |(&key, &value)| (key, value);
        let rest = self.rest.range(key..).map(copied);
        self.head[first..].iter().copied().chain(rest)
    }

    /// Up to `most` changes from the place `first` on, counted from 0.
    pub fn slice(&mut self, first: usize, most: usize) -> &[(K, V)] {
        let end = first.saturating_add(most);
        while self.head.len() < end && self.lay_out_next(|_| true) {}
        let end = end.min(self.head.len());
        &self.head[first.min(end)..end]
    }

    /// The changes from the place `first` on, as far as `belongs` holds for their keys.
    pub fn run(&mut self, first: usize, belongs: impl Fn(K) -> bool) -> &[(K, V)] {
        while self.lay_out_next(&belongs) {}
        let tail = self.head.get(first..).unwrap_or_default();
        let end = tail.partition_point(|&(key, _)| belongs(key));
        &tail[..end]
    }

    /// Lays out one change more, if there is one and `wanted` holds for its key.
    fn lay_out_next(&mut self, wanted: impl Fn(K) -> bool) -> bool {
        let next = self.rest.first_entry();
        match next.filter(|next| wanted(*next.key())) {
            Some(next) => {
                self.head.push(next.remove_entry());
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first group after a crash waited for the whole layer to be laid out, 100 ms with ten million exceptions.
    #[test]
    fn a_layer_is_laid_out_as_far_as_it_is_asked_for() {
        let changes: BTreeMap<u64, u64> = (0..100).map(|key| (key, key)).collect();
        let mut frozen = Frozen::of(changes);
        assert_eq!(frozen.head.len(), 0);
        assert_eq!(frozen.from(40).count(), 60);
        assert_eq!(frozen.get(99), Some(99));
        assert_eq!(frozen.head.len(), 0);
        assert_eq!(frozen.slice(10, 20).len(), 20);
        assert_eq!(frozen.head.len(), 30);
        assert_eq!(frozen.run(30, |key| key < 50).len(), 20);
        assert_eq!(frozen.head.len(), 50);
    }

    /// However far it is laid out, a layer says the same.
    #[test]
    fn a_layer_is_the_same_however_far_it_is_laid_out() {
        let changes: BTreeMap<u64, char> = [(2, 'b'), (3, 'c'), (5, 'e'), (8, 'h')].into();
        let all: Vec<_> = changes.clone().into_iter().collect();
        for laid_out in 0..=5 {
            let mut frozen = Frozen::of(changes.clone());
            assert_eq!(
                frozen.slice(0, laid_out),
                &all[..laid_out.min(4)],
                "{laid_out}"
            );
            assert_eq!(frozen.len(), 4);
            for key in 0..10 {
                assert_eq!(frozen.get(key), changes.get(&key).copied(), "{key}");
                let from: Vec<_> = changes.range(key..).map(|(&k, &v)| (k, v)).collect();
                assert_eq!(frozen.from(key).collect::<Vec<_>>(), from, "{key}");
            }
            assert_eq!(frozen.run(1, |key| key < 8), &all[1..3]);
            assert_eq!(frozen.slice(2, 1), &all[2..3]);
            assert_eq!(frozen.slice(3, usize::MAX), &all[3..]);
            assert_eq!(frozen.slice(4, 1), &[]);
        }
        assert!(Frozen::<u64, u64>::new().is_empty());
    }
}
