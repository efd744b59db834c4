//! How many filters become few bindings.
//!
//! A broker pays for every binding, and for every change of one; devices come by the ten thousand, each with a topic
//! of its own. So a queue is bound to at most so many patterns: where there would be more, those that begin with the
//! same words are replaced by one that takes whatever begins so. What a queue gets beyond its filters is left out by
//! the exact match of whoever reads it. A coarse pattern is only parted again when far fewer filters are left, so that a
//! number of filters that swings about the limit changes nothing.
//!
//! This is the bookkeeping alone: it says what is to be bound and unbound, and speaks to no broker.

use std::collections::HashMap;

use ahash::RandomState;

use super::routing_key::{LONG, Words, pattern};

/// What is to be done for the broker to have what is wanted. Whoever does it binds before it unbinds, so that no
/// publication falls between.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// Patterns to bind.
    pub bind: Vec<String>,
    /// Patterns to unbind.
    pub unbind: Vec<String>,
}

impl Changes {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.bind.is_empty() && self.unbind.is_empty()
    }

    /// What is left to do for both.
    pub(crate) fn merge(&mut self, later: Self) {
        for pattern in later.bind {
            self.bound(pattern);
        }
        for pattern in later.unbind {
            self.unbound(pattern);
        }
    }

    fn bound(&mut self, pattern: String) {
        match self.unbind.iter().position(|other| *other == pattern) {
            Some(at) => drop(self.unbind.swap_remove(at)),
            None => self.bind.push(pattern),
        }
    }

    fn unbound(&mut self, pattern: String) {
        match self.bind.iter().position(|other| *other == pattern) {
            Some(at) => drop(self.bind.swap_remove(at)),
            None => self.unbind.push(pattern),
        }
    }
}

/// The filters of one queue, each counted as often as it was added, and the patterns that stand for them.
#[derive(Debug)]
pub struct Bindings {
    root: Level,
    /// Patterns that the tree may hold; [`LONG`] comes on top.
    limit: usize,
    /// Filters that may match a topic without a key of its own.
    long: usize,
}

/// What begins with the same words.
///
/// No pattern is held below one that is open: that one takes everything below.
#[derive(Debug, Default)]
struct Level {
    children: HashMap<Box<str>, Level, RandomState>,
    /// Filters that end here, and that end here with `#`.
    closed: usize,
    open: usize,
    /// Different filters here and below.
    filters: usize,
    /// Patterns here and below.
    patterns: usize,
    /// The pattern that ends here is bound, or the one that takes whatever begins so.
    is_bound: bool,
    is_bound_open: bool,
}

impl Bindings {
    /// `patterns_max` is at least 2.
    pub fn new(patterns_max: usize) -> Self {
        Self {
            root: Level::default(),
            limit: patterns_max.max(2) - 1,
            long: 0,
        }
    }

    /// Adds a filter (that behind the group in a shared subscription), or counts it once more.
    pub fn add(&mut self, filter: &str) -> Changes {
        let wanted = Words::of(filter);
        let mut changes = Changes::default();
        if wanted.long {
            self.long += 1;
            if self.long == 1 {
                changes.bound(LONG.to_owned());
            }
        }
        let mut path = Vec::with_capacity(wanted.words.len());
        self.root.add(&wanted, &mut path, false, &mut changes);
        while self.root.patterns > self.limit {
            self.coarsen(&mut changes);
        }
        changes
    }

    /// Counts a filter once less.
    pub fn remove(&mut self, filter: &str) -> Changes {
        let wanted = Words::of(filter);
        let mut changes = Changes::default();
        let mut path = Vec::with_capacity(wanted.words.len());
        if !self.root.remove(&wanted, &mut path, &mut changes) {
            return changes;
        }
        if wanted.long {
            self.long -= 1;
            if self.long == 0 {
                changes.unbound(LONG.to_owned());
            }
        }
        // Half of what may be held, or the next few filters would bring it back.
        let room = self.limit / 2;
        loop {
            let spare = (room + 1).saturating_sub(self.root.patterns);
            path.clear();
            if spare == 0 || !self.root.part(spare, &mut path, &mut changes) {
                return changes;
            }
        }
    }

    /// How many patterns stand for the filters.
    pub fn len(&self) -> usize {
        self.root.patterns + usize::from(self.long > 0)
    }

    /// Whether there is no filter.
    pub fn is_empty(&self) -> bool {
        self.root.filters == 0
    }

    /// Every pattern.
    pub fn patterns(&self) -> Vec<String> {
        let mut found = Vec::with_capacity(self.len());
        self.root.collect(&mut Vec::new(), &mut found);
        found.extend((self.long > 0).then(|| LONG.to_owned()));
        found
    }

    /// Replaces patterns that begin alike by one: those with the most words in common of which there are enough
    /// to be worth it.
    fn coarsen(&mut self, changes: &mut Changes) {
        let mut enough = (self.limit / 4).max(2);
        let mut path = loop {
            let mut best = None;
            self.root.deepest(enough, &mut Vec::new(), &mut best);
            match best {
                Some(path) => break path,
                None if enough == 2 => break Vec::new(),
                None => enough = (enough / 2).max(2),
            }
        };
        path.reverse();
        self.root.close_in(path, &mut Vec::new(), changes);
    }
}

impl Level {
    fn add(
        &mut self,
        wanted: &Words,
        path: &mut Vec<Box<str>>,
        covered: bool,
        changes: &mut Changes,
    ) {
        let covered = covered || self.is_bound_open;
        let before = self.counts();
        if let Some(word) = wanted.words.get(path.len()) {
            let child = self.children.entry(word.clone()).or_default();
            let (filters, patterns) = child.counts();
            path.push(word.clone());
            child.add(wanted, path, covered, changes);
            path.pop();
            self.filters = before.0 - filters + child.filters;
            self.patterns = before.1 - patterns + child.patterns;
            return;
        }
        let count = match wanted.open {
            true => &mut self.open,
            false => &mut self.closed,
        };
        *count += 1;
        if *count > 1 {
            return;
        }
        self.filters += 1;
        if covered {
            return;
        }
        if wanted.open {
            self.bind_open(path, changes);
        } else {
            self.is_bound = true;
            self.patterns += 1;
            changes.bound(pattern(path, false));
        }
    }

    /// Says whether the filter was held.
    fn remove(&mut self, wanted: &Words, path: &mut Vec<Box<str>>, changes: &mut Changes) -> bool {
        if let Some(word) = wanted.words.get(path.len()) {
            let Some(child) = self.children.get_mut(word) else {
                return false;
            };
            let (filters, patterns) = child.counts();
            path.push(word.clone());
            let held = child.remove(wanted, path, changes);
            path.pop();
            if !held {
                return false;
            }
            self.filters = self.filters - filters + child.filters;
            self.patterns = self.patterns - patterns + child.patterns;
            if child.filters == 0 {
                self.children.remove(word);
            }
        } else {
            let count = match wanted.open {
                true => &mut self.open,
                false => &mut self.closed,
            };
            if *count == 0 {
                return false;
            }
            *count -= 1;
            if *count > 0 {
                return true;
            }
            self.filters -= 1;
            if !wanted.open && self.is_bound {
                self.is_bound = false;
                self.patterns -= 1;
                changes.unbound(pattern(path, false));
            }
        }
        if self.is_bound_open && self.filters == 0 {
            self.is_bound_open = false;
            self.patterns -= 1;
            changes.unbound(pattern(path, true));
        }
        true
    }

    fn counts(&self) -> (usize, usize) {
        (self.filters, self.patterns)
    }

    /// One open pattern in place of all there are here and below.
    fn bind_open(&mut self, path: &mut Vec<Box<str>>, changes: &mut Changes) {
        changes.bound(pattern(path, true));
        self.unbind_all(path, changes);
        self.is_bound_open = true;
        self.patterns = 1;
    }

    fn unbind_all(&mut self, path: &mut Vec<Box<str>>, changes: &mut Changes) {
        if self.patterns == 0 {
            return;
        }
        self.patterns = 0;
        if std::mem::take(&mut self.is_bound) {
            changes.unbound(pattern(path, false));
        }
        if std::mem::take(&mut self.is_bound_open) {
            changes.unbound(pattern(path, true));
        }
        for (word, child) in &mut self.children {
            path.push(word.clone());
            child.unbind_all(path, changes);
            path.pop();
        }
    }

    /// The level furthest down, but for the root, with so many patterns; of several the fullest.
    fn deepest(&self, enough: usize, path: &mut Vec<Box<str>>, best: &mut Option<Vec<Box<str>>>) {
        let mut found = Deepest { enough, best: None };
        self.look_for(path, &mut found);
        *best = found.best.map(|(_, _, path)| path);
    }

    fn look_for(&self, path: &mut Vec<Box<str>>, found: &mut Deepest) {
        for (word, child) in &self.children {
            if child.patterns < found.enough {
                continue;
            }
            path.push(word.clone());
            let rank = (path.len(), child.patterns);
            let is_better = |(depth, patterns, _): &(usize, usize, _)| rank > (*depth, *patterns);
            if found.best.as_ref().is_none_or(is_better) {
                found.best = Some((rank.0, rank.1, path.clone()));
            }
            child.look_for(path, found);
            path.pop();
        }
    }

    /// Binds the level at the end of `rest`, last word first, to whatever begins so.
    fn close_in(
        &mut self,
        mut rest: Vec<Box<str>>,
        path: &mut Vec<Box<str>>,
        changes: &mut Changes,
    ) {
        let Some(word) = rest.pop() else {
            self.bind_open(path, changes);
            return;
        };
        let Some(child) = self.children.get_mut(&word) else {
            return;
        };
        let before = child.patterns;
        path.push(word);
        child.close_in(rest, path, changes);
        path.pop();
        self.patterns = self.patterns - before + child.patterns;
    }

    /// Parts one open pattern that no filter asks for into those of its filters, if there are at most `spare`; says
    /// whether there was one.
    fn part(&mut self, spare: usize, path: &mut Vec<Box<str>>, changes: &mut Changes) -> bool {
        if self.patterns == 0 {
            return false;
        }
        if self.is_bound_open {
            if self.open > 0 || self.filters > spare {
                return false;
            }
            self.is_bound_open = false;
            self.patterns = 0;
            self.bind_each(path, changes);
            changes.unbound(pattern(path, true));
            return true;
        }
        for (word, child) in &mut self.children {
            let before = child.patterns;
            path.push(word.clone());
            let parted = child.part(spare, path, changes);
            path.pop();
            if parted {
                self.patterns = self.patterns - before + child.patterns;
                return true;
            }
        }
        false
    }

    fn bind_each(&mut self, path: &mut Vec<Box<str>>, changes: &mut Changes) {
        if self.open > 0 {
            self.is_bound_open = true;
            self.patterns = 1;
            changes.bound(pattern(path, true));
            return;
        }
        if self.closed > 0 {
            self.is_bound = true;
            self.patterns = 1;
            changes.bound(pattern(path, false));
        }
        for (word, child) in &mut self.children {
            path.push(word.clone());
            child.bind_each(path, changes);
            path.pop();
            self.patterns += child.patterns;
        }
    }

    fn collect(&self, path: &mut Vec<Box<str>>, found: &mut Vec<String>) {
        if self.is_bound {
            found.push(pattern(path, false));
        }
        if self.is_bound_open {
            found.push(pattern(path, true));
        }
        for (word, child) in &self.children {
            path.push(word.clone());
            child.collect(path, found);
            path.pop();
        }
    }
}

struct Deepest {
    enough: usize,
    /// Words, patterns, and the words themselves.
    best: Option<(usize, usize, Vec<Box<str>>)>,
}

#[cfg(test)]
#[path = "bindings_tests.rs"]
mod tests;
