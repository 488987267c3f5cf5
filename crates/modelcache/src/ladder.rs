//! The ladder of a file: its checkpoints, which are the SHA-256 midstates at the part boundaries.
//!
//! With the states before and after a part, the part can be verified on its own, in any order and on any core. If all
//! parts verify, from SHA-256's initial value to the padded end, the file has the expected digest, even if the ladder
//! comes from an untrusted source. [`PartHasher`] is a SHA-256 that can start and stop at a boundary.
//! Source of the algorithm: FIPS 180-4.

mod interleaved;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::limits;
use base64::prelude::{BASE64_STANDARD, Engine as _};
use interleaved::ShaExtensions;
use serde::{Deserialize, Serialize};
use sha2::block_api::compress256;
use std::ops::Range;

/// The chaining value of SHA-256: eight 32-bit words.
pub type State = [u32; 8];

/// The initial value of SHA-256 (FIPS 180-4, 5.3.3).
pub const INITIAL: State =
    [0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19];

/// The block size of SHA-256 in bytes.
const BLOCK: usize = 64;

/// Returns the size of every part but the last, in bytes, for a file of `size` bytes. It is a power of two that grows
/// with the file, so that ladders stay small.
pub fn part_size(size: u64) -> u64 {
    let minimum = if size > limits::LARGE_FILE_BYTES { 2 * limits::PART_BYTES_MIN } else { limits::PART_BYTES_MIN };
    minimum.max(size.div_ceil(limits::PARTS_MAX).next_power_of_two())
}

/// The states at the part boundaries strictly inside a file, in order.
///
/// A file of `size` bytes has `ceil(size / part_size)` parts, and one state fewer than parts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "StoredLadder", into = "StoredLadder")]
pub struct Ladder {
    part_size: u64,
    states: Vec<State>,
}

/// The stored form of a ladder: the states as concatenated big-endian words, in base64.
#[derive(Serialize, Deserialize)]
struct StoredLadder {
    part_size: u64,
    states: String,
}

impl Ladder {
    /// Creates a ladder from states. `part_size` is in bytes and must be a multiple of 64.
    pub fn new(part_size: u64, states: Vec<State>) -> Result<Self> {
        if part_size == 0 || !part_size.is_multiple_of(BLOCK as u64) {
            return Err(Error::corrupt(format!(
                "invalid ladder: its part size {part_size} is not a multiple of {BLOCK}"
            )));
        }
        Ok(Self { part_size, states })
    }

    /// Parses a ladder from its stored states: base64 of big-endian words.
    pub(crate) fn from_base64(part_size: u64, states: &str) -> Result<Self> {
        let bytes = BASE64_STANDARD
            .decode(states)
            .map_err(|cause| Error::corrupt("invalid ladder: it is not base64").cause(cause))?;
        let (states, rest) = bytes.as_chunks::<32>();
        if !rest.is_empty() {
            return Err(Error::corrupt(format!("invalid ladder: {} bytes, not a multiple of 32", bytes.len())));
        }
        let states = states.iter().map(|state| {
            let (words, _) = state.as_chunks::<4>();
            std::array::from_fn(|at| u32::from_be_bytes(words[at]))
        });
        Self::new(part_size, states.collect())
    }

    /// Returns the heap memory that the states use, in bytes.
    pub(crate) fn heap_bytes(&self) -> usize {
        self.states.capacity() * size_of::<State>()
    }

    /// Returns the size of every part but the last, in bytes.
    pub fn part_size(&self) -> u64 {
        self.part_size
    }

    /// Returns true if the ladder has the right number of states for a file of `size` bytes: one for each boundary
    /// strictly inside the file.
    pub fn fits(&self, size: u64) -> bool {
        self.states.len() as u64 == size.div_ceil(self.part_size).saturating_sub(1)
    }

    /// Returns the state before part `index` (0-based), or `None` beyond the end.
    pub fn before(&self, index: u64) -> Option<State> {
        match index.checked_sub(1) {
            None => Some(INITIAL),
            Some(at) => self.states.get(usize::try_from(at).ok()?).copied(),
        }
    }

    /// Returns the state after part `index`. Returns `None` for the last part, which ends with the digest.
    pub fn after(&self, index: u64) -> Option<State> {
        self.states.get(usize::try_from(index).ok()?).copied()
    }

    /// Returns the byte range of part `index` in a file of `size` bytes.
    pub fn range(&self, index: u64, size: u64) -> Range<u64> {
        let start = index.saturating_mul(self.part_size).min(size);
        start..start.saturating_add(self.part_size).min(size)
    }

    /// Returns a hasher that starts at part `index`, or `None` beyond the end.
    pub fn hasher(&self, index: u64) -> Option<PartHasher> {
        Some(PartHasher::resume(self.before(index)?, index * self.part_size))
    }

    /// Returns true if part `index` is right. `hasher` has hashed the part. Its state must equal the checkpoint after
    /// the part; for the last part, its digest must equal `digest`.
    ///
    /// A ladder that [fits](Self::fits) and holds for every part proves the digest of the file, even if the ladder is
    /// untrusted, because its checkpoints form a chain from SHA-256's initial value to the digest.
    pub fn holds(&self, index: u64, digest: Option<Digest>, hasher: PartHasher) -> bool {
        match self.after(index) {
            Some(after) => hasher.state() == Some(after),
            None => Some(hasher.finish()) == digest,
        }
    }
}

impl From<Ladder> for StoredLadder {
    fn from(ladder: Ladder) -> Self {
        let bytes: Vec<u8> = ladder.states.iter().flatten().flat_map(|word| word.to_be_bytes()).collect();
        Self { part_size: ladder.part_size, states: BASE64_STANDARD.encode(bytes) }
    }
}

impl TryFrom<StoredLadder> for Ladder {
    type Error = Error;

    fn try_from(stored: StoredLadder) -> Result<Self> {
        Self::from_base64(stored.part_size, &stored.states)
    }
}

/// A SHA-256 hasher for a range of a file. The range starts at a block boundary. If it also ends at one, another hasher
/// can continue from the [`state`](PartHasher::state) there.
#[derive(Clone)]
pub struct PartHasher {
    state: State,
    /// The position in the **file**: bytes hashed since its start.
    hashed: u64,
    /// The bytes of an incomplete block; the first `pending_len` of them are valid.
    pending: [u8; BLOCK],
    pending_len: usize,
}

impl PartHasher {
    /// Creates a hasher at the start of a file.
    pub fn new() -> Self {
        Self::resume(INITIAL, 0)
    }

    /// Creates a hasher that continues from `state`, the state after `hashed` bytes. `hashed` must be a multiple of 64.
    pub fn resume(state: State, hashed: u64) -> Self {
        assert_eq!(hashed % BLOCK as u64, 0, "a midstate lies at a block boundary");
        Self { state, hashed, pending: [0; BLOCK], pending_len: 0 }
    }

    /// Hashes the next bytes of the file.
    pub fn update(&mut self, bytes: &[u8]) {
        let (blocks, rest) = self.split(bytes);
        compress256(&mut self.state, blocks);
        self.append_pending(rest);
    }

    /// Hashes the next bytes `x` of `a`'s file and the next bytes `y` of `b`'s file, interleaved on this core if the
    /// processor supports it. This takes much less time than hashing them one after the other.
    pub fn update_pair(a: &mut Self, x: &[u8], b: &mut Self, y: &[u8]) {
        Self::update_pair_with(ShaExtensions::detect(), a, x, b, y);
    }

    fn update_pair_with(extensions: Option<ShaExtensions>, a: &mut Self, x: &[u8], b: &mut Self, y: &[u8]) {
        let (x, x_rest) = a.split(x);
        let (y, y_rest) = b.split(y);
        interleaved::compress_pair(extensions, &mut a.state, x, &mut b.state, y);
        a.append_pending(x_rest);
        b.append_pending(y_rest);
    }

    /// Completes and hashes the pending block with `bytes`. Returns the whole blocks that follow, and the rest.
    fn split<'a>(&mut self, mut bytes: &'a [u8]) -> (&'a [[u8; BLOCK]], &'a [u8]) {
        self.hashed += bytes.len() as u64;
        if self.pending_len > 0 {
            let (taken, left) = bytes.split_at(bytes.len().min(BLOCK - self.pending_len));
            self.append_pending(taken);
            if self.pending_len < BLOCK {
                return (&[], &[]);
            }
            compress256(&mut self.state, &[self.pending]);
            self.pending_len = 0;
            bytes = left;
        }
        bytes.as_chunks::<BLOCK>()
    }

    /// Appends `rest` to the pending block.
    fn append_pending(&mut self, rest: &[u8]) {
        self.pending[self.pending_len..self.pending_len + rest.len()].copy_from_slice(rest);
        self.pending_len += rest.len();
    }

    /// Returns the number of bytes hashed since the start of the file.
    pub fn position(&self) -> u64 {
        self.hashed
    }

    /// Returns the state at the current position, or `None` between block boundaries.
    pub fn state(&self) -> Option<State> {
        (self.pending_len == 0).then_some(self.state)
    }

    /// Pads as at the end of a file of [`position`](Self::position) bytes, and returns the digest.
    pub fn finish(mut self) -> Digest {
        // FIPS 180-4, 5.1.1: a one bit, zeros up to the last eight bytes of a block, and the length in bits.
        let bits = self.hashed * 8;
        let mut tail = [0; 2 * BLOCK];
        tail[..self.pending_len].copy_from_slice(&self.pending[..self.pending_len]);
        tail[self.pending_len] = 0x80;
        let len = if self.pending_len < BLOCK - 8 { BLOCK } else { 2 * BLOCK };
        tail[len - 8..len].copy_from_slice(&bits.to_be_bytes());
        compress256(&mut self.state, tail[..len].as_chunks::<BLOCK>().0);
        let mut digest = [0; 32];
        for (bytes, word) in digest.as_chunks_mut::<4>().0.iter_mut().zip(self.state) {
            *bytes = word.to_be_bytes();
        }
        Digest::from_bytes(digest)
    }
}

impl Default for PartHasher {
    fn default() -> Self {
        Self::new()
    }
}

/// Hashes a whole file in order, and collects its ladder.
pub struct LadderHasher {
    hasher: PartHasher,
    part_size: u64,
    states: Vec<State>,
}

impl LadderHasher {
    /// Creates a hasher for a file with parts of `part_size` bytes; see [`part_size`].
    pub fn new(part_size: u64) -> Self {
        Self { hasher: PartHasher::new(), part_size, states: Vec::new() }
    }

    /// Hashes the next bytes of the file.
    pub fn update(&mut self, bytes: &[u8]) {
        self.hash_by_part(bytes, PartHasher::update);
    }

    /// Hashes the next bytes of the file with this hasher and with `other`.
    pub fn update_both(&mut self, bytes: &[u8], other: &mut PartHasher) {
        self.hash_by_part(bytes, |hasher, bytes| PartHasher::update_pair(hasher, bytes, other, bytes));
    }

    /// Calls `update` for `bytes`, split at part boundaries. Records the state at each boundary.
    fn hash_by_part(&mut self, mut bytes: &[u8], mut update: impl FnMut(&mut PartHasher, &[u8])) {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(self.left_in_part()));
            update(&mut self.hasher, now);
            bytes = later;
        }
    }

    /// Hashes the next bytes `x` of `a`'s file and the next bytes `y` of `b`'s file, interleaved as in
    /// [`PartHasher::update_pair`].
    pub fn update_pair(a: &mut Self, mut x: &[u8], b: &mut Self, mut y: &[u8]) {
        while !x.is_empty() && !y.is_empty() {
            // Neither slice may cross a part boundary of its file.
            let both = x.len().min(a.left_in_part()).min(y.len()).min(b.left_in_part());
            let ((x_now, x_later), (y_now, y_later)) = (x.split_at(both), y.split_at(both));
            PartHasher::update_pair(&mut a.hasher, x_now, &mut b.hasher, y_now);
            (x, y) = (x_later, y_later);
        }
        a.update(x);
        b.update(y);
    }

    /// Returns the hasher for the next `len` bytes, so that a caller can interleave them with another stream. Returns
    /// `None` if the bytes cross a part boundary.
    pub(crate) fn within_part(&mut self, len: usize) -> Option<&mut PartHasher> {
        (len <= self.left_in_part()).then_some(&mut self.hasher)
    }

    /// Records the state if the hasher is at a part boundary. Returns the number of bytes to the next boundary, at
    /// least one.
    fn left_in_part(&mut self) -> usize {
        let position = self.hasher.position();
        let boundaries = position / self.part_size;
        if position.is_multiple_of(self.part_size) && boundaries > self.states.len() as u64 {
            self.states.extend(self.hasher.state());
        }
        usize::try_from(self.part_size - position % self.part_size).unwrap_or(usize::MAX)
    }

    /// Returns the number of bytes hashed so far.
    pub fn position(&self) -> u64 {
        self.hasher.position()
    }

    /// Returns the digest and the ladder of the file.
    pub fn finish(self) -> (Digest, Ladder) {
        (self.hasher.finish(), Ladder { part_size: self.part_size, states: self.states })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Returns `len` bytes that depend on `seed`.
    fn sample(len: usize, seed: u64) -> Vec<u8> {
        (0..len as u64).map(|at| (at ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()[7]).collect()
    }

    fn hashed(content: &[u8], part: u64, slice: usize) -> (Digest, Ladder) {
        let mut hasher = LadderHasher::new(part);
        content.chunks(slice.max(1)).for_each(|slice| hasher.update(slice));
        hasher.finish()
    }

    #[test]
    fn digests_equal_sha2_at_every_padding_edge() {
        for len in (0..=130).chain([191, 192, 193, 255, 256, 257, 4095, 4096, 4097]) {
            let content = sample(len, 0);
            assert_eq!(hashed(&content, 64, 7).0, Digest::of(&content), "length {len}");
        }
    }

    /// Generates sizes near the boundaries of blocks, padding and parts of 1 to 8 blocks, and any size up to `max`.
    fn size(max: usize) -> impl Strategy<Value = usize> {
        let edge = (0usize..=16, 0usize..=18).prop_map(|(blocks, past)| (blocks * BLOCK + past).saturating_sub(9));
        prop_oneof![Just(0), Just(1), 55usize..=65, edge, 0..=max]
    }

    /// Returns the implementations that this processor supports.
    fn implementations() -> impl Iterator<Item = Option<ShaExtensions>> {
        [Some(None), ShaExtensions::detect().map(Some)].into_iter().flatten()
    }

    #[test]
    fn a_pair_hashes_like_each_stream_alone_at_every_edge() {
        let sizes: Vec<usize> = [0, 1, 511, 512, 513, 1000].into_iter().chain(55..=65).chain(119..=129).collect();
        for extensions in implementations() {
            for (x, y) in sizes.iter().flat_map(|x| sizes.iter().map(move |y| (sample(*x, 1), sample(*y, 2)))) {
                let (mut a, mut b) = (PartHasher::new(), PartHasher::new());
                PartHasher::update_pair_with(extensions, &mut a, &x, &mut b, &y);
                assert_eq!((a.finish(), b.finish()), (Digest::of(&x), Digest::of(&y)), "{} and {}", x.len(), y.len());
            }
        }
    }

    #[test]
    fn part_sizes_keep_ladders_small() {
        assert_eq!(part_size(0), 4 << 20);
        assert_eq!(part_size(1 << 30), 4 << 20);
        assert_eq!(part_size((1 << 30) + 1), 8 << 20);
        let huge = 800_000_000_000;
        let states = vec![INITIAL; usize::try_from(huge / part_size(huge)).expect("fits")];
        let ladder = Ladder::new(part_size(huge), states).expect("a ladder");
        assert!(ladder.fits(huge));
        assert!(serde_json::to_string(&ladder).expect("serializes").len() < 2_000_000);
    }

    /// Returns true if `ladder` proves that `content` has `digest`.
    fn proves(ladder: &Ladder, content: &[u8], digest: Digest) -> bool {
        let size = content.len() as u64;
        let holds = |index| {
            let range = ladder.range(index, size);
            let mut hasher = ladder.hasher(index).expect("a ladder that fits has a state before each part");
            hasher.update(&content[range.start as usize..range.end as usize]);
            ladder.holds(index, Some(digest), hasher)
        };
        ladder.fits(size) && (0..size.div_ceil(ladder.part_size()).max(1)).all(holds)
    }

    /// A defect of a ladder.
    #[derive(Debug, Clone, Copy)]
    enum Defect {
        Swapped(usize, usize),
        Altered(usize, usize, u32),
        Shorter(usize),
        Longer(State),
        OtherParts(u64),
        /// States of another file from here on.
        Grafted(usize),
    }

    fn defect() -> impl Strategy<Value = Defect> {
        let at = any::<usize>;
        prop_oneof![
            (at(), at()).prop_map(|(a, b)| Defect::Swapped(a, b)),
            (at(), 0usize..8, 1u32..).prop_map(|(at, word, flip)| Defect::Altered(at, word, flip)),
            at().prop_map(Defect::Shorter),
            any::<State>().prop_map(Defect::Longer),
            (1u64..20).prop_map(Defect::OtherParts),
            at().prop_map(Defect::Grafted),
        ]
    }

    fn defective(defect: Defect, truth: &Ladder, other: &Ladder) -> Ladder {
        let mut defective = truth.clone();
        let count = defective.states.len();
        match defect {
            Defect::Longer(state) => defective.states.push(state),
            Defect::OtherParts(blocks) => defective.part_size = blocks * BLOCK as u64,
            _ if count == 0 => {}
            Defect::Swapped(a, b) => defective.states.swap(a % count, b % count),
            Defect::Altered(at, word, flip) => defective.states[at % count][word] ^= flip,
            Defect::Shorter(by) => defective.states.truncate(count - 1 - by % count),
            Defect::Grafted(from) => {
                let from = from % (count + 1);
                defective.states[from..].copy_from_slice(&other.states[from..]);
            }
        }
        defective
    }

    #[test]
    fn one_pass_yields_two_digests() {
        let (content, mut file, mut beside) = (sample(1000, 0), LadderHasher::new(256), PartHasher::new());
        file.update(&content[..300]);
        file.update_both(&content[300..], &mut beside);
        assert_eq!(file.finish(), hashed(&content, 256, 7));
        assert_eq!(beside.finish(), Digest::of(&content[300..]));
    }

    proptest! {
        #[test]
        fn pairs_of_slices_of_any_length_hash_like_sha2(
            slices in proptest::collection::vec((size(2000), size(2000)), 0..8), seed in any::<u64>(),
        ) {
            let (x, y) = (sample(16_000, seed), sample(16_000, !seed));
            for extensions in implementations() {
                let (mut a, mut b) = (PartHasher::new(), PartHasher::new());
                let (mut x_at, mut y_at) = (0, 0);
                for (x_len, y_len) in &slices {
                    let (x, y) = (&x[x_at..x_at + x_len], &y[y_at..y_at + y_len]);
                    PartHasher::update_pair_with(extensions, &mut a, x, &mut b, y);
                    (x_at, y_at) = (x_at + x_len, y_at + y_len);
                    prop_assert_eq!((a.position(), b.position()), (x_at as u64, y_at as u64));
                }
                prop_assert_eq!(a.finish(), Digest::of(&x[..x_at]));
                prop_assert_eq!(b.finish(), Digest::of(&y[..y_at]));
            }
        }

        #[test]
        fn files_hashed_in_pairs_have_the_same_ladders_as_alone(
            sizes in (size(3000), size(3000)), parts in (1u64..9, 1u64..9), slices in (1usize..400, 1usize..400),
        ) {
            let (x, y) = (sample(sizes.0, 3), sample(sizes.1, 4));
            let (x_part, y_part) = (parts.0 * 64, parts.1 * 64);
            let (mut a, mut b) = (LadderHasher::new(x_part), LadderHasher::new(y_part));
            let (mut x_slices, mut y_slices) = (x.chunks(slices.0), y.chunks(slices.1));
            loop {
                let (x, y) = (x_slices.next(), y_slices.next());
                if x.is_none() && y.is_none() {
                    break;
                }
                LadderHasher::update_pair(&mut a, x.unwrap_or_default(), &mut b, y.unwrap_or_default());
            }
            prop_assert_eq!(a.finish(), hashed(&x, x_part, 100));
            prop_assert_eq!(b.finish(), hashed(&y, y_part, 100));
        }

        #[test]
        fn no_file_has_more_parts_than_its_ladder_may_have(size in any::<u64>(), shift in 0u32..64) {
            let size = (size >> shift).min(1 << 60);
            let part = part_size(size);
            prop_assert!(part.is_power_of_two() && part >= limits::PART_BYTES_MIN);
            prop_assert!(size.div_ceil(part) <= limits::PARTS_MAX);
        }

        #[test]
        fn a_defective_ladder_proves_no_wrong_file(
            len in size(2000), part in 1u64..8, flip in any::<proptest::sample::Index>(),
            defects in (defect(), defect()), seed in any::<u64>(),
        ) {
            let good = sample(len, seed);
            let (digest, truth) = hashed(&good, part * 64, 100);
            prop_assert!(proves(&truth, &good, digest));
            let mut bad = good.clone();
            match len {
                0 => bad.push(0),
                _ => bad[flip.index(len)] ^= 1,
            }
            let (_, other) = hashed(&bad, part * 64, 100);
            let (first, second) = (defective(defects.0, &truth, &other), defective(defects.1, &other, &truth));
            for ladder in [truth.clone(), first, second, other.clone()] {
                prop_assert!(!proves(&ladder, &bad, digest), "{ladder:?}");
                // A wrong state does not prove the right file either.
                if ladder.part_size == truth.part_size && ladder != truth {
                    prop_assert!(!proves(&ladder, &good, digest), "{ladder:?}");
                }
            }
        }

        #[test]
        fn each_part_is_verified_alone_and_a_flipped_bit_is_found(
            len in size(2000), part in 1u64..8, slice in 1usize..300, flip in any::<proptest::sample::Index>(),
        ) {
            let part = part * 64;
            let content = sample(len, 0);
            let (digest, ladder) = hashed(&content, part, slice);
            prop_assert_eq!(digest, Digest::of(&content));
            prop_assert!(ladder.fits(len as u64));
            let json = serde_json::to_string(&ladder).expect("serializes");
            prop_assert_eq!(&serde_json::from_str::<Ladder>(&json).expect("parses"), &ladder);

            let holds = |content: &[u8]| -> Vec<bool> {
                (0..).zip(content.chunks(part as usize)).map(|(index, bytes)| {
                    let mut hasher = ladder.hasher(index).expect("inside");
                    bytes.chunks(slice).for_each(|slice| hasher.update(slice));
                    ladder.holds(index, Some(digest), hasher)
                }).collect()
            };
            prop_assert!(holds(&content).into_iter().all(|held| held));
            if len > 0 {
                let at = flip.index(len);
                let mut bad = content.clone();
                bad[at] ^= 1;
                for (index, held) in holds(&bad).into_iter().enumerate() {
                    prop_assert_eq!(held, index != at / part as usize, "only the part with the flipped bit fails");
                }
            }
        }
    }
}
