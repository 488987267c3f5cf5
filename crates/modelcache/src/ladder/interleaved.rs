//! Interleaves two SHA-256 streams on one core, with the SHA extensions of the processor.
//!
//! Each round of SHA-256 depends on the previous one, so that a single stream leaves the SHA unit idle most of the
//! time. The rounds of a second stream fill the gaps, for almost twice the throughput. A third stream gains nothing,
//! because there are too few registers. Without the extensions, the streams are hashed one after the other, with equal
//! results.
//!
//! The only `unsafe` of the library is a single call in this module. The intrinsics that load vectors through a pointer
//! would need more of it. The vectors are built from words passed by value instead, which the compiler turns into plain
//! vector loads. Source: FIPS 180-4, 6.2.2; Intel SDM, `SHA256RNDS2`, `SHA256MSG1`, `SHA256MSG2`.

use super::{BLOCK, State};
use sha2::block_api::compress256;

/// Proof that this processor has the SHA extensions, SSSE3 and SSE4.1.
#[derive(Debug, Clone, Copy)]
pub(super) struct ShaExtensions(());

impl ShaExtensions {
    /// Returns the proof, or `None` if an extension is missing. The standard library caches the result of the
    /// detection.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn detect() -> Option<Self> {
        let found = std::arch::is_x86_feature_detected!("sha")
            && std::arch::is_x86_feature_detected!("ssse3")
            && std::arch::is_x86_feature_detected!("sse4.1");
        found.then_some(Self(()))
    }

    /// Returns `None`: there is no interleaved implementation for this architecture.
    #[cfg(not(target_arch = "x86_64"))]
    pub(super) fn detect() -> Option<Self> {
        None
    }
}

/// Compresses the blocks `x` into state `a` and the blocks `y` into state `b`. The blocks are interleaved in pairs; the
/// rest of the longer list follows alone.
pub(super) fn compress_pair(
    extensions: Option<ShaExtensions>,
    a: &mut State,
    x: &[[u8; BLOCK]],
    b: &mut State,
    y: &[[u8; BLOCK]],
) {
    let pairs = if extensions.is_some() { x.len().min(y.len()) } else { 0 };
    let ((x, x_alone), (y, y_alone)) = (x.split_at(pairs), y.split_at(pairs));
    if let Some(extensions) = extensions.filter(|_| pairs > 0) {
        compress_pairs(extensions, [a, b], [x, y]);
    }
    compress256(a, x_alone);
    compress256(b, y_alone);
}

#[cfg(target_arch = "x86_64")]
#[expect(
    unsafe_code,
    reason = "these instructions are not on every processor; the caller holds the proof that they are on this one"
)]
fn compress_pairs(_: ShaExtensions, states: [&mut State; 2], blocks: [&[[u8; BLOCK]]; 2]) {
    // SAFETY: the only requirement of `x86::compress` is a processor with the features `sha`, `ssse3` and `sse4.1` (and
    // `sse2`, which every x86_64 has). Only `detect` creates a `ShaExtensions`, after it has found all three.
    unsafe { x86::compress(states, blocks) }
}

#[cfg(not(target_arch = "x86_64"))]
fn compress_pairs(_: ShaExtensions, [a, b]: [&mut State; 2], [x, y]: [&[[u8; BLOCK]]; 2]) {
    compress256(a, x);
    compress256(b, y);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! Data layout of the instructions: the eight words of a state are in two vectors, A B E F and C D G H, with the
    //! first word in the highest lane. One instruction does two rounds. Each round uses one word of the message
    //! schedule.
    //!
    //! The inner functions have no closures: the compiler cannot inline a closure with these instructions into an
    //! adapter of the standard library, which is compiled without them.

    use super::{BLOCK, State};
    use std::arch::x86_64::*;

    /// The round constants of SHA-256 (FIPS 180-4, 4.2.2).
    #[rustfmt::skip]
    const ROUND_CONSTANTS: [u32; 64] = [
        0x428a_2f98, 0x7137_4491, 0xb5c0_fbcf, 0xe9b5_dba5, 0x3956_c25b, 0x59f1_11f1, 0x923f_82a4, 0xab1c_5ed5,
        0xd807_aa98, 0x1283_5b01, 0x2431_85be, 0x550c_7dc3, 0x72be_5d74, 0x80de_b1fe, 0x9bdc_06a7, 0xc19b_f174,
        0xe49b_69c1, 0xefbe_4786, 0x0fc1_9dc6, 0x240c_a1cc, 0x2de9_2c6f, 0x4a74_84aa, 0x5cb0_a9dc, 0x76f9_88da,
        0x983e_5152, 0xa831_c66d, 0xb003_27c8, 0xbf59_7fc7, 0xc6e0_0bf3, 0xd5a7_9147, 0x06ca_6351, 0x1429_2967,
        0x27b7_0a85, 0x2e1b_2138, 0x4d2c_6dfc, 0x5338_0d13, 0x650a_7354, 0x766a_0abb, 0x81c2_c92e, 0x9272_2c85,
        0xa2bf_e8a1, 0xa81a_664b, 0xc24b_8b70, 0xc76c_51a3, 0xd192_e819, 0xd699_0624, 0xf40e_3585, 0x106a_a070,
        0x19a4_c116, 0x1e37_6c08, 0x2748_774c, 0x34b0_bcb5, 0x391c_0cb3, 0x4ed8_aa4a, 0x5b9c_ca4f, 0x682e_6ff3,
        0x748f_82ee, 0x78a5_636f, 0x84c8_7814, 0x8cc7_0208, 0x90be_fffa, 0xa450_6ceb, 0xbef9_a3f7, 0xc671_78f2,
    ];

    /// One stream: its state, and the next sixteen words of the message schedule.
    #[derive(Clone, Copy)]
    struct Stream {
        abef: __m128i,
        cdgh: __m128i,
        schedule: [__m128i; 4],
    }

    /// Compresses two streams of the same length.
    #[target_feature(enable = "sha,ssse3,sse4.1")]
    pub(super) fn compress([a, b]: [&mut State; 2], [x, y]: [&[[u8; BLOCK]]; 2]) {
        let mut streams = [load(a), load(b)];
        for (x, y) in x.iter().zip(y) {
            let before = streams;
            streams[0].schedule = words(x);
            streams[1].schedule = words(y);
            // Rounds 0 to 15 use the words of the block.
            for quarter in 0..4 {
                for stream in &mut streams {
                    four_rounds(stream, quarter, quarter);
                }
            }
            // Rounds 16 to 63 extend the schedule. The nested loops let the compiler unroll the inner one and keep the
            // schedule in registers.
            for sixteen_rounds in 1..4 {
                for quarter in 0..4 {
                    for stream in &mut streams {
                        next_words(stream, quarter);
                        four_rounds(stream, 4 * sixteen_rounds + quarter, quarter);
                    }
                }
            }
            // The new state is the sum of the old state and the result of the rounds.
            for (stream, before) in streams.iter_mut().zip(before) {
                stream.abef = _mm_add_epi32(stream.abef, before.abef);
                stream.cdgh = _mm_add_epi32(stream.cdgh, before.cdgh);
            }
        }
        *a = store(&streams[0]);
        *b = store(&streams[1]);
    }

    /// Does the rounds `4 * at` to `4 * at + 3` with the four words in `quarter` of the schedule.
    #[inline]
    #[target_feature(enable = "sha,sse2")]
    fn four_rounds(stream: &mut Stream, at: usize, quarter: usize) {
        let constants = _mm_set_epi32(
            ROUND_CONSTANTS[4 * at + 3].cast_signed(),
            ROUND_CONSTANTS[4 * at + 2].cast_signed(),
            ROUND_CONSTANTS[4 * at + 1].cast_signed(),
            ROUND_CONSTANTS[4 * at].cast_signed(),
        );
        let first = _mm_add_epi32(stream.schedule[quarter], constants);
        stream.cdgh = _mm_sha256rnds2_epu32(stream.cdgh, stream.abef, first);
        let second = _mm_shuffle_epi32(first, 0x0e);
        stream.abef = _mm_sha256rnds2_epu32(stream.abef, stream.cdgh, second);
    }

    /// Replaces the oldest four words of the schedule, which are in `quarter`, with the next four.
    #[inline]
    #[target_feature(enable = "sha,ssse3")]
    fn next_words(stream: &mut Stream, quarter: usize) {
        let schedule = &stream.schedule;
        let (w0, w1) = (schedule[quarter], schedule[(quarter + 1) % 4]);
        let (w2, w3) = (schedule[(quarter + 2) % 4], schedule[(quarter + 3) % 4]);
        let sum = _mm_add_epi32(_mm_sha256msg1_epu32(w0, w1), _mm_alignr_epi8(w3, w2, 4));
        stream.schedule[quarter] = _mm_sha256msg2_epu32(sum, w3);
    }

    /// Loads a block as big-endian words, with the first word in the lowest lane.
    #[inline]
    #[target_feature(enable = "ssse3")]
    fn words(block: &[u8; BLOCK]) -> [__m128i; 4] {
        let big_endian = _mm_set_epi64x(0x0c0d_0e0f_0809_0a0b, 0x0405_0607_0001_0203);
        let mut words = [_mm_setzero_si128(); 4];
        for (words, bytes) in words.iter_mut().zip(block.as_chunks::<16>().0) {
            let (halves, _) = bytes.as_chunks::<8>();
            let [low, high] = [i64::from_le_bytes(halves[0]), i64::from_le_bytes(halves[1])];
            *words = _mm_shuffle_epi8(_mm_set_epi64x(high, low), big_endian);
        }
        words
    }

    /// Returns a stream with this state and an empty schedule.
    #[target_feature(enable = "sse2")]
    fn load(state: &State) -> Stream {
        let [a, b, c, d, e, f, g, h] = state.map(u32::cast_signed);
        Stream { abef: _mm_set_epi32(a, b, e, f), cdgh: _mm_set_epi32(c, d, g, h), schedule: [_mm_setzero_si128(); 4] }
    }

    /// Returns the state of a stream.
    #[target_feature(enable = "sse4.1")]
    fn store(stream: &Stream) -> State {
        let (abef, cdgh) = (stream.abef, stream.cdgh);
        let [a, b] = [_mm_extract_epi32::<3>(abef), _mm_extract_epi32::<2>(abef)];
        let [e, f] = [_mm_extract_epi32::<1>(abef), _mm_extract_epi32::<0>(abef)];
        let [c, d] = [_mm_extract_epi32::<3>(cdgh), _mm_extract_epi32::<2>(cdgh)];
        let [g, h] = [_mm_extract_epi32::<1>(cdgh), _mm_extract_epi32::<0>(cdgh)];
        [a, b, c, d, e, f, g, h].map(i32::cast_unsigned)
    }
}
