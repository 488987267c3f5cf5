//! Arrival: what has come of one file that is being poured, for those who read it meanwhile, and what they wish for.
//!
//! The pour tells and asks what is wished for next; readers look, wish and watch. Both only ever hold a lock for
//! moments, so that no reader holds up a fill. Which bytes may be read before the whole is proven follows here from
//! what the plan says of the file ([`ReadGate`]), from whether a ladder checked them, and from whether the reader minds;
//! nothing else decides it.
//!
//! Surprise: a file that turns out wrong is filled anew, as another generation, and nothing of the earlier one may be
//! read any more. The inode does not tell them apart: a filesystem gives the number of a file that is gone to the very
//! next one. A generation begins before its file is made and the earlier one goes, so whoever opens what lies there and
//! finds the same generation afterwards has opened that one.

use super::order::PartQueue;
use crate::disk::RootedPath;
use crate::key::FilePath;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, watch};

/// Parts that are asked for beyond what a reader waits for, at first; more as it goes on in sequence.
const AHEAD_PARTS: u64 = 4;
/// A reader that goes on within so many bytes of where it stopped reads in sequence.
const GAP_BYTES: u64 = 1 << 20;
/// For how long a reader that was just given something is expected to wish for more, before connections are taken by
/// what nobody waits for.
pub(super) const NEXT_DEMAND_WAIT: Duration = Duration::from_millis(20);
/// For how long the rest of a file stands back for what a reader waits for: a connection may have stalled.
const DEMAND_PRIORITY_MAX: Duration = Duration::from_secs(1);

/// When the bytes of a file may be read while it is filled, by whoever wants only bytes that are vouched for; the
/// earliest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum ReadGate {
    /// Part by part, as its ladder finds them right.
    ByPart,
    /// Once the whole file is proven.
    Proven,
    /// Not before all that is filled is published.
    Published,
}

/// The files of a fill.
pub(crate) type PartialFiles = BTreeMap<FilePath, Arc<PartialFile>>;

/// One file of a fill.
#[derive(Debug)]
pub(crate) struct PartialFile {
    staged: RootedPath,
    size: u64,
    read_gate: ReadGate,
    received: watch::Sender<Received>,
    demands: Mutex<BTreeMap<u64, Demand>>,
    demand_changed: Notify,
}

/// What has come so far.
#[derive(Debug, Clone, Default)]
struct Received {
    /// How often the file was begun anew: what an earlier fill left is 0.
    generation: u64,
    /// It is being filled, or there.
    is_there: bool,
    /// Whether a ladder checks its parts.
    by_ladder: bool,
    /// What was written of it, as the end of each span by its beginning.
    spans: BTreeMap<u64, u64>,
    is_proven: bool,
}

/// What one reader wants.
#[derive(Debug)]
struct Demand {
    /// It takes what is written, checked or not.
    unchecked: bool,
    /// What it waits for.
    range: Option<Range<u64>>,
    /// Where it has read in sequence.
    read: Range<u64>,
    /// When it last began to wait, or was given what it waited for.
    touched: Instant,
}

/// One reader. Dropped, it wishes for nothing any more.
#[derive(Debug)]
pub(crate) struct PartialReader {
    partial_file: Arc<PartialFile>,
    id: u64,
    unchecked: bool,
}

/// What the pour shall ask for next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// A part that a reader waits for, or will soon.
    Demanded(u64),
    /// Whatever comes next in order.
    Any,
    /// Nothing: what a reader waits for is under way and shall have the connection for itself.
    Wait,
}

impl PartialFile {
    /// A file of `size` bytes that is to be filled at `staged`.
    pub(crate) fn new(staged: RootedPath, size: u64, read_gate: ReadGate) -> Arc<Self> {
        let (received, demands, demand_changed) = (watch::Sender::default(), Mutex::default(), Notify::new());
        Arc::new(Self { staged, size, read_gate, received, demands, demand_changed })
    }

    /// Where the file is staged.
    pub(crate) fn staged(&self) -> &RootedPath {
        &self.staged
    }

    /// Bytes of the file.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Whether all of it is written and right.
    pub(crate) fn is_complete(&self) -> bool {
        let received = self.received.borrow();
        received.is_proven || received.by_ladder && received.has(&(0..self.size))
    }

    /// A new generation, whose file is about to be made: what was there before counts no more.
    pub(super) fn begin(&self, by_ladder: bool) -> u64 {
        self.replace(1, Received { is_there: true, by_ladder, ..Received::default() })
    }

    /// What lies there is filled further, as the generation that it is; what is there of it is told anew.
    pub(super) fn go_on(&self, by_ladder: bool) -> u64 {
        self.replace(0, Received { is_there: true, by_ladder, ..Received::default() })
    }

    /// Whether `generation` is the one that is being filled, or is there.
    pub(crate) fn is_current(&self, generation: u64) -> bool {
        self.received.borrow().current() == Some(generation)
    }

    /// These bytes are written into the file of `generation` and, where a ladder can tell, right.
    pub(super) fn part_received(&self, generation: u64, range: &Range<u64>) {
        self.received.send_if_modified(|received| {
            let is_current = received.current() == Some(generation);
            if is_current {
                received.add(range);
            }
            is_current
        });
        let received = self.received.borrow();
        for demand in self.demands().values_mut() {
            if demand.range.as_ref().is_some_and(|range| received.has(range)) {
                (demand.range, demand.touched) = (None, Instant::now());
            }
        }
    }

    /// The whole file, as it lies there, is proven.
    pub(crate) fn proven(&self) {
        self.replace(0, Received { is_there: true, is_proven: true, ..Received::default() });
    }

    /// Whether the whole file is proven, and of `generation`.
    pub(crate) fn is_proven(&self, generation: u64) -> bool {
        let received = self.received.borrow();
        received.is_proven && received.current() == Some(generation)
    }

    /// Nothing came of it.
    pub(crate) fn failed(&self) {
        self.replace(0, Received::default());
    }

    /// What came until now counts no more, but for how often the file was begun; which generation this is.
    fn replace(&self, begun: u64, received: Received) -> u64 {
        let generation = self.received.borrow().generation + begun;
        self.received.send_replace(Received { generation, ..received });
        generation
    }

    /// A reader, which begins at the beginning. `unchecked`: it takes what is written, proven or not.
    pub(crate) fn read(self: &Arc<Self>, unchecked: bool) -> PartialReader {
        let first = Some(0..self.size.min(1)).filter(|first| !first.is_empty());
        let demand = Demand { unchecked, range: first, read: 0..0, touched: Instant::now() };
        let mut demands = self.demands();
        let id = demands.last_key_value().map_or(0, |(last, _)| last + 1);
        demands.insert(id, demand);
        drop(demands);
        self.demand_changed.notify_one();
        PartialReader { partial_file: self.clone(), id, unchecked }
    }

    /// Which of the parts that are `left` is asked for next.
    pub(super) fn next(&self, left: &PartQueue, part_size: u64) -> Next {
        let by_part = self.gives_by_part();
        let demands = self.demands();
        // Whoever has to wait for the whole file anyway shall not disturb the order in which it is hashed.
        let heard: Vec<&Demand> = demands.values().filter(|demand| demand.unchecked || by_part).collect();
        let parts = |range: Range<u64>| range.start / part_size..range.end.div_ceil(part_size);
        let waited_for = heard.iter().filter_map(|demand| demand.range.clone());
        let ahead = heard.iter().map(|demand| demand.ahead(part_size));
        if let Some(part) = waited_for.chain(ahead).find_map(|range| left.first_in(parts(range))) {
            return Next::Demanded(part);
        }
        match heard.iter().any(|demand| demand.is_urgent()) {
            true => Next::Wait,
            false => Next::Any,
        }
    }

    /// Waits until a reader wishes for something else.
    pub(super) async fn demand_changed(&self) {
        self.demand_changed.notified().await;
    }

    fn gives_by_part(&self) -> bool {
        self.read_gate == ReadGate::ByPart && self.received.borrow().by_ladder
    }

    fn demands(&self) -> MutexGuard<'_, BTreeMap<u64, Demand>> {
        self.demands.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Received {
    fn current(&self) -> Option<u64> {
        self.is_there.then_some(self.generation)
    }

    fn add(&mut self, range: &Range<u64>) {
        let (mut start, mut end) = (range.start, range.end);
        if let Some((before, its_end)) = self.spans.range(..=start).next_back().map(|(start, end)| (*start, *end))
            && its_end >= start
        {
            (start, end) = (before, end.max(its_end));
        }
        while let Some((next, its_end)) = self.spans.range(start..=end).next().map(|(start, end)| (*start, *end)) {
            self.spans.remove(&next);
            end = end.max(its_end);
        }
        self.spans.insert(start, end);
    }

    fn has(&self, range: &Range<u64>) -> bool {
        self.is_proven
            || range.is_empty()
            || self.spans.range(..=range.start).next_back().is_some_and(|(_, end)| *end >= range.end)
    }
}

impl Demand {
    /// What it will probably want next: as much as it has read in sequence, and some parts.
    fn ahead(&self, part_size: u64) -> Range<u64> {
        let read = self.read.end - self.read.start;
        self.read.end..self.read.end.saturating_add(read).saturating_add(AHEAD_PARTS * part_size)
    }

    fn is_urgent(&self) -> bool {
        self.touched.elapsed() < if self.range.is_some() { DEMAND_PRIORITY_MAX } else { NEXT_DEMAND_WAIT }
    }

    /// It reads here now.
    fn is_at(&mut self, range: &Range<u64>) {
        let goes_on = self.read.start..=self.read.end.saturating_add(GAP_BYTES);
        match goes_on.contains(&range.start) {
            true => self.read.end = self.read.end.max(range.end),
            false => self.read = range.clone(),
        }
    }
}

impl PartialReader {
    /// The file that is read.
    pub(crate) fn partial_file(&self) -> &PartialFile {
        &self.partial_file
    }

    /// What tells of every change.
    pub(crate) fn watch(&self) -> ReceivedWatch {
        ReceivedWatch(self.partial_file.received.subscribe())
    }

    /// The generation of the staged file, if `range` of it may be read now. It reads on from there.
    pub(crate) fn may_read(&self, range: &Range<u64>) -> Option<u64> {
        let generation = {
            let (received, read_gate) = (self.partial_file.received.borrow(), self.partial_file.read_gate);
            let is_given = match read_gate {
                _ if self.unchecked => received.has(range),
                ReadGate::ByPart => received.is_proven || received.by_ladder && received.has(range),
                ReadGate::Proven => received.is_proven,
                ReadGate::Published => false,
            };
            received.current().filter(|_| is_given)?
        };
        if let Some(demand) = self.partial_file.demands().get_mut(&self.id) {
            demand.is_at(range);
        }
        Some(generation)
    }

    /// Has this asked for before anything else.
    pub(crate) fn demand(&self, range: &Range<u64>) {
        if let Some(demand) = self.partial_file.demands().get_mut(&self.id) {
            demand.is_at(range);
            (demand.range, demand.touched) = (Some(range.clone()), Instant::now());
        }
        self.partial_file.demand_changed.notify_one();
    }

    /// The generation that is filled now, if any is.
    pub(crate) fn generation(&self) -> Option<u64> {
        self.partial_file.received.borrow().current()
    }
}

impl Drop for PartialReader {
    fn drop(&mut self) {
        self.partial_file.demands().remove(&self.id);
        self.partial_file.demand_changed.notify_one();
    }
}

/// Sees that something came.
#[derive(Debug)]
pub(crate) struct ReceivedWatch(watch::Receiver<Received>);

impl ReceivedWatch {
    /// What was there until now is known.
    pub(crate) fn look(&mut self) {
        self.0.mark_unchanged();
    }

    /// Waits until there is more, or nothing any more. For ever where nobody could tell.
    pub(crate) async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending().await
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::order::Order;
    use super::*;

    const PART: u64 = GAP_BYTES;

    fn partial_file(read_gate: ReadGate) -> Arc<PartialFile> {
        let partial_file = PartialFile::new(RootedPath::root(std::path::Path::new("/")), 100 * PART, read_gate);
        assert_eq!(partial_file.begin(true), 1);
        partial_file
    }

    fn part(partial_file: &PartialFile, part: u64) {
        partial_file.part_received(1, &(part * PART..(part + 1) * PART));
    }

    fn asked(partial_file: &PartialFile, left: &mut PartQueue) -> Option<u64> {
        match partial_file.next(left, PART) {
            Next::Demanded(part) => {
                left.begin(part);
                Some(part)
            }
            Next::Any => left.peek().inspect(|part| left.begin(*part)),
            Next::Wait => None,
        }
    }

    fn all_demanded(partial_file: &PartialFile, left: &mut PartQueue) -> Vec<u64> {
        std::iter::from_fn(|| match partial_file.next(left, PART) {
            Next::Demanded(part) => asked(partial_file, left).inspect(|asked| assert_eq!(*asked, part)),
            Next::Any | Next::Wait => None,
        })
        .collect()
    }

    #[test]
    fn spans_grow_together_whatever_comes_first() {
        let mut received = Received::default();
        for range in [4..6, 0..2, 8..9, 2..4, 5..8] {
            received.add(&range);
        }
        assert_eq!(received.spans, BTreeMap::from([(0, 9)]));
        assert!(received.has(&(3..9)) && !received.has(&(3..10)) && received.has(&(20..20)));
    }

    #[test]
    fn what_is_waited_for_comes_first_then_what_follows_and_nothing_else_meanwhile() {
        let partial_file = partial_file(ReadGate::ByPart);
        let mut left = PartQueue::new(100, Order::Any);
        let reading = partial_file.read(false);
        assert_eq!(all_demanded(&partial_file, &mut left), [0, 1, 2, 3], "a reader begins at the beginning");
        assert_eq!(asked(&partial_file, &mut left), None);
        reading.demand(&(50 * PART + 1..52 * PART));
        assert_eq!(all_demanded(&partial_file, &mut left), (50..58).collect::<Vec<_>>());
        assert_eq!(asked(&partial_file, &mut left), None, "the others wait");
        part(&partial_file, 50);
        part(&partial_file, 51);
        assert_eq!(asked(&partial_file, &mut left), None, "another wish is expected");
        partial_file.demands().values_mut().for_each(|demand| demand.touched -= 2 * NEXT_DEMAND_WAIT);
        assert_eq!(partial_file.next(&left, PART), Next::Any);
        drop(reading);
        assert_eq!(partial_file.next(&left, PART), Next::Any);
    }

    #[test]
    fn who_reads_on_is_read_ahead_for_more_and_more() {
        let partial_file = partial_file(ReadGate::ByPart);
        let mut left = PartQueue::new(100, Order::Any);
        let reading = partial_file.read(false);
        all_demanded(&partial_file, &mut left);
        (0..4).for_each(|at| part(&partial_file, at));
        assert_eq!(reading.may_read(&(0..2 * PART)), Some(1));
        assert_eq!(reading.may_read(&(2 * PART..4 * PART)), Some(1));
        assert_eq!(all_demanded(&partial_file, &mut left), (4..12).collect::<Vec<_>>());
        reading.demand(&(90 * PART..91 * PART));
        assert_eq!(all_demanded(&partial_file, &mut left), (90..96).collect::<Vec<_>>(), "elsewhere it begins anew");
    }

    #[test]
    fn bytes_are_given_by_the_part_only_under_a_ladder_that_is_trusted() {
        let (trusted, doubted) = (partial_file(ReadGate::ByPart), partial_file(ReadGate::Proven));
        for (partial_file, unchecked, given) in
            [(&trusted, false, true), (&doubted, false, false), (&doubted, true, true), (&trusted, true, true)]
        {
            let reading = partial_file.read(unchecked);
            part(partial_file, 7);
            assert_eq!(reading.may_read(&(7 * PART..8 * PART)).is_some(), given, "{partial_file:?} {unchecked}");
            assert_eq!(reading.may_read(&(7 * PART..8 * PART + 1)), None);
        }
        let reading = trusted.read(false);
        assert_eq!(trusted.begin(false), 2);
        assert!(trusted.is_current(2) && !trusted.is_current(1));
        trusted.part_received(1, &(0..PART));
        trusted.part_received(2, &(PART..2 * PART));
        assert_eq!(reading.may_read(&(0..PART)), None, "it is of a file that is no more");
        assert_eq!(reading.may_read(&(PART..2 * PART)), None, "no ladder checked it");
        trusted.proven();
        assert_eq!(reading.may_read(&(0..100 * PART)), Some(2));
        assert!(trusted.is_proven(2) && !trusted.is_proven(1));
    }

    #[test]
    fn what_a_demand_for_the_whole_list_may_refuse_is_not_given_when_a_file_is_proven() {
        let partial_file = partial_file(ReadGate::Published);
        let (reading, careless) = (partial_file.read(false), partial_file.read(true));
        part(&partial_file, 0);
        partial_file.proven();
        assert_eq!(reading.may_read(&(0..PART)), None);
        assert_eq!(careless.may_read(&(0..PART)), Some(1));
    }

    #[test]
    fn the_order_of_what_is_hashed_in_order_is_left_alone() {
        let partial_file = partial_file(ReadGate::Proven);
        let reading = partial_file.read(false);
        reading.demand(&(50 * PART..51 * PART));
        assert_eq!(partial_file.next(&PartQueue::new(100, Order::Strict), PART), Next::Any);
        let _careless = partial_file.read(true);
        assert_eq!(partial_file.next(&PartQueue::new(100, Order::Strict), PART), Next::Demanded(0));
    }
}
