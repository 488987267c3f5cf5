//! State of one file that is being downloaded, shared between the download and the readers of the incomplete file.
//!
//! The download records received ranges and takes the demands of readers into account when it chooses the next part.
//! Locks are held only briefly, so that no reader delays a fill. Which bytes may be read before the whole file is
//! verified is decided here and nowhere else, from three facts: the [`ReadGate`] of the file, whether a ladder verified
//! the bytes, and whether the reader accepts unverified bytes.
//!
//! A file that fails verification is downloaded again as a new *generation*; bytes of an earlier generation must not be
//! read any more. Inodes cannot identify a generation, because filesystems reuse inode numbers at once.

use super::order::PartQueue;
use crate::disk::RootedPath;
use crate::key::FilePath;
use crate::mutex::Mutex;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{Notify, watch};

/// Number of parts to request ahead of a reader. A sequential reader gets more.
const AHEAD_PARTS: u64 = 4;
/// Largest gap, in bytes, between two reads that still count as sequential.
const GAP_BYTES: u64 = 1 << 20;
/// Largest range, in bytes, for which a slice is written before it is full, because a reader of unverified bytes waits
/// for the range. For a longer range, the reader waits until the slice with its end is full.
const SHORT_BYTES: u64 = 64 << 10;
/// Time to wait for a reader's next demand after its last one was satisfied. After it, parts without a demand are
/// requested.
pub(super) const NEXT_DEMAND_WAIT: Duration = Duration::from_millis(20);
/// Longest time for which only demanded parts are requested while a reader waits. It is limited because the connection
/// of the demanded part may have stalled.
const DEMAND_PRIORITY_MAX: Duration = Duration::from_secs(1);

/// The time from which readers of verified bytes may read a file that is being downloaded. The variants are ordered
/// from the earliest to the latest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum ReadGate {
    /// Each part, once the ladder verified it.
    ByPart,
    /// All bytes, once the whole file is verified.
    Verified,
    /// Only after all files of the fill are published.
    Published,
}

/// The files of a fill, keyed by their paths in the artifact.
pub(crate) type PartialFiles = BTreeMap<FilePath, Arc<PartialFile>>;

/// One file that is being downloaded by a fill.
#[derive(Debug)]
pub(crate) struct PartialFile {
    staged: RootedPath,
    size: u64,
    read_gate: ReadGate,
    received: watch::Sender<ReceivedBytes>,
    demands: Mutex<BTreeMap<u64, Demand>>,
    demand_changed: Notify,
}

/// The bytes received so far.
#[derive(Debug, Clone, Default)]
struct ReceivedBytes {
    /// Number of times the download was started from an empty file. Leftovers of an earlier fill have generation 0.
    generation: u64,
    /// True if the staged file exists, complete or not.
    exists: bool,
    /// True if a ladder verifies the parts.
    has_ladder: bool,
    /// The written ranges: the end of each range, keyed by its start. Ranges neither overlap nor touch.
    spans: BTreeMap<u64, u64>,
    is_verified: bool,
}

/// The reading position and the demand of one reader.
#[derive(Debug)]
struct Demand {
    /// True if the reader accepts written bytes that are not verified.
    unchecked: bool,
    /// The range that the reader waits for.
    range: Option<Range<u64>>,
    /// The range that the reader has read sequentially.
    read: Range<u64>,
    /// Time at which the reader last started or stopped waiting.
    wait_changed_at: Instant,
}

/// One reader of the incomplete file. Dropping it withdraws its demand.
#[derive(Debug)]
pub(crate) struct PartialReader {
    partial_file: Arc<PartialFile>,
    id: u64,
    unchecked: bool,
}

/// The part that the download should request next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NextPart {
    /// A part that a reader waits for or is expected to read soon.
    Demanded(u64),
    /// The next part in the usual order.
    Any,
    /// No part yet: the demanded part is already being downloaded and gets the whole bandwidth, or the next demand of a
    /// reader is expected within [`NEXT_DEMAND_WAIT`].
    Wait,
}

impl PartialFile {
    /// Creates the state of a file of `size` bytes that will be downloaded to `staged`.
    pub(crate) fn new(staged: RootedPath, size: u64, read_gate: ReadGate) -> Arc<Self> {
        let (received, demands, demand_changed) = (watch::Sender::default(), Mutex::default(), Notify::new());
        Arc::new(Self { staged, size, read_gate, received, demands, demand_changed })
    }

    /// Returns the path of the staged file.
    pub(crate) fn staged(&self) -> &RootedPath {
        &self.staged
    }

    /// Returns the size of the complete file in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Returns true if all bytes are written and verified.
    pub(crate) fn is_complete(&self) -> bool {
        let received = self.received.borrow();
        received.is_verified || received.has_ladder && received.contains(&(0..self.size))
    }

    /// Starts a new generation and returns its number. All bytes received before become invalid.
    ///
    /// Must be called before the old file is removed and the new one created. A reader gets a generation from
    /// [`begin_read`](PartialReader::begin_read), opens the staged file, and then checks that this generation is
    /// current. If it is, the opened file is the file of that generation.
    pub(super) fn begin_generation(&self, has_ladder: bool) -> u64 {
        self.replace(1, ReceivedBytes { exists: true, has_ladder, ..ReceivedBytes::default() })
    }

    /// Continues the generation of the existing file and returns its number. Its received ranges are recorded again as
    /// they are verified.
    pub(super) fn resume_generation(&self, has_ladder: bool) -> u64 {
        self.replace(0, ReceivedBytes { exists: true, has_ladder, ..ReceivedBytes::default() })
    }

    /// Returns true if `generation` is the one of the staged file.
    pub(crate) fn is_current(&self, generation: u64) -> bool {
        self.received.borrow().current() == Some(generation)
    }

    /// Records that `range`, a part or a slice of one, is written into the file of `generation` and, if there is a
    /// ladder, verified. Has no effect if `generation` is not current.
    pub(super) fn range_received(&self, generation: u64, range: &Range<u64>) {
        self.received.send_if_modified(|received| {
            let is_current = received.current() == Some(generation);
            if is_current {
                received.add(range);
            }
            is_current
        });
        let received = self.received.borrow();
        // Satisfied demands end now, even if their readers have not woken up yet.
        for demand in self.demands.lock().values_mut() {
            if demand.range.as_ref().is_some_and(|range| received.contains(range)) {
                (demand.range, demand.wait_changed_at) = (None, Instant::now());
            }
        }
    }

    /// Records that the whole staged file is verified.
    pub(crate) fn mark_verified(&self) {
        self.replace(0, ReceivedBytes { exists: true, is_verified: true, ..ReceivedBytes::default() });
    }

    /// Returns true if the whole file is verified and belongs to `generation`.
    pub(crate) fn is_verified(&self, generation: u64) -> bool {
        let received = self.received.borrow();
        received.is_verified && received.current() == Some(generation)
    }

    /// Records that the download failed. No bytes may be read any more.
    pub(crate) fn mark_failed(&self) {
        self.replace(0, ReceivedBytes::default());
    }

    /// Replaces the received bytes. Adds `increment` to the generation and returns the result.
    fn replace(&self, increment: u64, received: ReceivedBytes) -> u64 {
        let generation = self.received.borrow().generation + increment;
        self.received.send_replace(ReceivedBytes { generation, ..received });
        generation
    }

    /// Registers a reader that starts at the beginning of the file. `unchecked`: it accepts unverified bytes.
    pub(crate) fn open_reader(self: &Arc<Self>, unchecked: bool) -> PartialReader {
        // Demand the first byte at once, so that the first part is requested before the reader asks for it.
        let first = Some(0..self.size.min(1)).filter(|first| !first.is_empty());
        let demand = Demand { unchecked, range: first, read: 0..0, wait_changed_at: Instant::now() };
        let mut demands = self.demands.lock();
        let id = demands.last_key_value().map_or(0, |(last, _)| last + 1);
        demands.insert(id, demand);
        drop(demands);
        self.demand_changed.notify_one();
        PartialReader { partial_file: self.clone(), id, unchecked }
    }

    /// Returns which of the queued parts to request next.
    pub(super) fn next_part(&self, queue: &PartQueue, part_size: u64) -> NextPart {
        let by_part = self.is_readable_by_part();
        let demands = self.demands.lock();
        // A reader that must wait until the whole file is verified does not change the order of requests: no order
        // gives it the bytes earlier.
        let relevant: Vec<&Demand> = demands.values().filter(|demand| demand.unchecked || by_part).collect();
        let parts = |range: Range<u64>| range.start / part_size..range.end.div_ceil(part_size);
        // Ranges that readers wait for come before ranges that they are expected to read next.
        let waited_for = relevant.iter().filter_map(|demand| demand.range.clone());
        let ahead = relevant.iter().map(|demand| demand.ahead(part_size));
        if let Some(part) = waited_for.chain(ahead).find_map(|range| queue.first_in(parts(range))) {
            return NextPart::Demanded(part);
        }
        match relevant.iter().any(|demand| demand.is_urgent()) {
            true => NextPart::Wait,
            false => NextPart::Any,
        }
    }

    /// Returns true if a reader of unverified bytes waits for a short range, which ends within `received`. A longer
    /// range is not worth a slice of its own.
    pub(super) fn is_waited_for(&self, received: &Range<u64>) -> bool {
        let ends_here = |range: &Range<u64>| {
            range.end - range.start <= SHORT_BYTES && range.end > received.start && range.end <= received.end
        };
        self.demands.lock().values().any(|demand| demand.unchecked && demand.range.as_ref().is_some_and(ends_here))
    }

    /// Waits until the demand of a reader changes.
    pub(super) async fn demand_changed(&self) {
        self.demand_changed.notified().await;
    }

    /// Returns true if readers that want only verified bytes may read single parts.
    fn is_readable_by_part(&self) -> bool {
        self.read_gate == ReadGate::ByPart && self.received.borrow().has_ladder
    }
}

impl ReceivedBytes {
    /// Returns the generation of the staged file, if it exists.
    fn current(&self) -> Option<u64> {
        self.exists.then_some(self.generation)
    }

    /// Adds `range`, merging it with all ranges that it touches.
    fn add(&mut self, range: &Range<u64>) {
        let (mut start, mut end) = (range.start, range.end);
        // Merge with the range that begins before this one.
        if let Some((before, other_end)) = self.spans.range(..=start).next_back().map(|(start, end)| (*start, *end))
            && other_end >= start
        {
            (start, end) = (before, end.max(other_end));
        }
        // Merge with all ranges that begin within it.
        while let Some((next, other_end)) = self.spans.range(start..=end).next().map(|(start, end)| (*start, *end)) {
            self.spans.remove(&next);
            end = end.max(other_end);
        }
        self.spans.insert(start, end);
    }

    /// Returns true if all bytes of `range` are written.
    fn contains(&self, range: &Range<u64>) -> bool {
        self.is_verified
            || range.is_empty()
            || self.spans.range(..=range.start).next_back().is_some_and(|(_, end)| *end >= range.end)
    }
}

impl Demand {
    /// Returns the range that the reader will probably need next. It is as long as the range read sequentially so far,
    /// plus [`AHEAD_PARTS`] parts.
    fn ahead(&self, part_size: u64) -> Range<u64> {
        let read_bytes = self.read.end - self.read.start;
        self.read.end..self.read.end.saturating_add(read_bytes).saturating_add(AHEAD_PARTS * part_size)
    }

    /// Returns true if parts without a demand should not be requested yet.
    fn is_urgent(&self) -> bool {
        self.wait_changed_at.elapsed() < if self.range.is_some() { DEMAND_PRIORITY_MAX } else { NEXT_DEMAND_WAIT }
    }

    /// Records that the reader reads `range`, continuing its sequence or starting a new one.
    fn record_read(&mut self, range: &Range<u64>) {
        let continuation = self.read.start..=self.read.end.saturating_add(GAP_BYTES);
        match continuation.contains(&range.start) {
            true => self.read.end = self.read.end.max(range.end),
            false => self.read = range.clone(),
        }
    }
}

impl PartialReader {
    /// Returns the file that this reader reads.
    pub(crate) fn partial_file(&self) -> &PartialFile {
        &self.partial_file
    }

    /// Returns a watch that reports every change of the received bytes.
    pub(crate) fn watch(&self) -> ReceivedWatch {
        ReceivedWatch(self.partial_file.received.subscribe())
    }

    /// Records that `range` is read now and returns the generation of the staged file. Returns `None` if `range` cannot
    /// be read yet.
    pub(crate) fn begin_read(&self, range: &Range<u64>) -> Option<u64> {
        let generation = {
            let (received, read_gate) = (self.partial_file.received.borrow(), self.partial_file.read_gate);
            let is_readable = match read_gate {
                _ if self.unchecked => received.contains(range),
                ReadGate::ByPart => received.is_verified || received.has_ladder && received.contains(range),
                ReadGate::Verified => received.is_verified,
                ReadGate::Published => false,
            };
            received.current().filter(|_| is_readable)?
        };
        if let Some(demand) = self.partial_file.demands.lock().get_mut(&self.id) {
            demand.record_read(range);
        }
        Some(generation)
    }

    /// Demands `range`: its parts are requested before all others.
    pub(crate) fn demand(&self, range: &Range<u64>) {
        if let Some(demand) = self.partial_file.demands.lock().get_mut(&self.id) {
            demand.record_read(range);
            (demand.range, demand.wait_changed_at) = (Some(range.clone()), Instant::now());
        }
        self.partial_file.demand_changed.notify_one();
    }

    /// Returns the generation of the staged file, if it exists.
    pub(crate) fn generation(&self) -> Option<u64> {
        self.partial_file.received.borrow().current()
    }
}

impl Drop for PartialReader {
    fn drop(&mut self) {
        self.partial_file.demands.lock().remove(&self.id);
        self.partial_file.demand_changed.notify_one();
    }
}

/// Watches the received bytes of a file.
#[derive(Debug)]
pub(crate) struct ReceivedWatch(watch::Receiver<ReceivedBytes>);

impl ReceivedWatch {
    /// Marks the present state as seen, so that [`changed`](Self::changed) waits for a later one.
    pub(crate) fn mark_seen(&mut self) {
        self.0.mark_unchanged();
    }

    /// Waits until the received bytes change: more were received, or the download failed or started over. Waits forever
    /// if the [`PartialFile`] was dropped, because nothing can change then.
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
        assert_eq!(partial_file.begin_generation(true), 1);
        partial_file
    }

    fn receive_part(partial_file: &PartialFile, part: u64) {
        partial_file.range_received(1, &(part * PART..(part + 1) * PART));
    }

    fn request_next(partial_file: &PartialFile, queue: &mut PartQueue) -> Option<u64> {
        match partial_file.next_part(queue, PART) {
            NextPart::Demanded(part) => Some(queue.take_run(part, 1, |_| false).start),
            NextPart::Any => queue.peek().map(|part| queue.take_run(part, 1, |_| false).start),
            NextPart::Wait => None,
        }
    }

    fn all_demanded(partial_file: &PartialFile, queue: &mut PartQueue) -> Vec<u64> {
        std::iter::from_fn(|| match partial_file.next_part(queue, PART) {
            NextPart::Demanded(part) => {
                request_next(partial_file, queue).inspect(|requested| assert_eq!(*requested, part))
            }
            NextPart::Any | NextPart::Wait => None,
        })
        .collect()
    }

    #[test]
    fn received_ranges_merge_in_any_order() {
        let mut received = ReceivedBytes::default();
        for range in [4..6, 0..2, 8..9, 2..4, 5..8] {
            received.add(&range);
        }
        assert_eq!(received.spans, BTreeMap::from([(0, 9)]));
        assert!(received.contains(&(3..9)) && !received.contains(&(3..10)) && received.contains(&(20..20)));
    }

    #[test]
    fn demanded_parts_are_requested_first_then_the_read_ahead_and_no_other_parts() {
        let partial_file = partial_file(ReadGate::ByPart);
        let mut queue = PartQueue::new(100, 1, Order::Any);
        let reading = partial_file.open_reader(false);
        assert_eq!(all_demanded(&partial_file, &mut queue), [0, 1, 2, 3], "a reader begins at the beginning");
        assert_eq!(request_next(&partial_file, &mut queue), None);
        reading.demand(&(50 * PART + 1..52 * PART));
        assert_eq!(all_demanded(&partial_file, &mut queue), (50..58).collect::<Vec<_>>());
        assert_eq!(request_next(&partial_file, &mut queue), None, "the others wait");
        receive_part(&partial_file, 50);
        receive_part(&partial_file, 51);
        assert_eq!(request_next(&partial_file, &mut queue), None, "the reader's next demand is expected");
        partial_file.demands.lock().values_mut().for_each(|demand| demand.wait_changed_at -= 2 * NEXT_DEMAND_WAIT);
        assert_eq!(partial_file.next_part(&queue, PART), NextPart::Any);
        drop(reading);
        assert_eq!(partial_file.next_part(&queue, PART), NextPart::Any);
    }

    #[test]
    fn read_ahead_grows_with_the_length_of_a_sequential_read() {
        let partial_file = partial_file(ReadGate::ByPart);
        let mut queue = PartQueue::new(100, 1, Order::Any);
        let reading = partial_file.open_reader(false);
        all_demanded(&partial_file, &mut queue);
        (0..4).for_each(|at| receive_part(&partial_file, at));
        assert_eq!(reading.begin_read(&(0..2 * PART)), Some(1));
        assert_eq!(reading.begin_read(&(2 * PART..4 * PART)), Some(1));
        assert_eq!(all_demanded(&partial_file, &mut queue), (4..12).collect::<Vec<_>>());
        reading.demand(&(90 * PART..91 * PART));
        assert_eq!(
            all_demanded(&partial_file, &mut queue),
            (90..96).collect::<Vec<_>>(),
            "read-ahead starts over after a jump"
        );
    }

    #[test]
    fn single_parts_are_readable_only_if_a_trusted_ladder_verifies_them() {
        let (trusted, untrusted) = (partial_file(ReadGate::ByPart), partial_file(ReadGate::Verified));
        for (partial_file, unchecked, expected) in
            [(&trusted, false, true), (&untrusted, false, false), (&untrusted, true, true), (&trusted, true, true)]
        {
            let reading = partial_file.open_reader(unchecked);
            receive_part(partial_file, 7);
            assert_eq!(reading.begin_read(&(7 * PART..8 * PART)).is_some(), expected, "{partial_file:?} {unchecked}");
            assert_eq!(reading.begin_read(&(7 * PART..8 * PART + 1)), None);
        }
        let reading = trusted.open_reader(false);
        assert_eq!(trusted.begin_generation(false), 2);
        assert!(trusted.is_current(2) && !trusted.is_current(1));
        trusted.range_received(1, &(0..PART));
        trusted.range_received(2, &(PART..2 * PART));
        assert_eq!(reading.begin_read(&(0..PART)), None, "it belongs to an earlier generation");
        assert_eq!(reading.begin_read(&(PART..2 * PART)), None, "no ladder checked it");
        trusted.mark_verified();
        assert_eq!(reading.begin_read(&(0..100 * PART)), Some(2));
        assert!(trusted.is_verified(2) && !trusted.is_verified(1));
    }

    #[test]
    fn with_the_gate_published_a_verified_file_is_not_readable_yet() {
        let partial_file = partial_file(ReadGate::Published);
        let (reading, unchecked_reader) = (partial_file.open_reader(false), partial_file.open_reader(true));
        receive_part(&partial_file, 0);
        partial_file.mark_verified();
        assert_eq!(reading.begin_read(&(0..PART)), None);
        assert_eq!(unchecked_reader.begin_read(&(0..PART)), Some(1));
    }

    #[test]
    fn demands_do_not_change_the_order_of_a_file_that_is_hashed_in_order() {
        let partial_file = partial_file(ReadGate::Verified);
        let reading = partial_file.open_reader(false);
        reading.demand(&(50 * PART..51 * PART));
        assert_eq!(partial_file.next_part(&PartQueue::new(100, 1, Order::Sequential), PART), NextPart::Any);
        let _unchecked_reader = partial_file.open_reader(true);
        assert_eq!(partial_file.next_part(&PartQueue::new(100, 1, Order::Sequential), PART), NextPart::Demanded(0));
    }
}
