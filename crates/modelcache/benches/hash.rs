//! Measures SHA-256 on one core over bytes in memory: plain, two streams at once, and with a ladder (SHA-256
//! checkpoints at part boundaries) that is computed or used for verification.
//!
//! Run it with `cargo bench --bench hash [-- --quick]`. `cargo xtask bench` copies the results into its page.
#![allow(missing_docs, clippy::unwrap_used)]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use modelcache::digest::Digest;
use modelcache::ladder::{LadderHasher, PartHasher, part_size};
use std::hint::black_box;

/// Size of each of the two streams: larger than the caches of one core.
const STREAM_BYTES: usize = 32 << 20;
/// Bytes hashed per call, as in a download.
const SLICE_BYTES: usize = 1 << 20;

/// Returns reproducible bytes.
fn stream(seed: u64) -> Vec<u8> {
    (0..STREAM_BYTES as u64).map(|at| (at ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()[7]).collect()
}

fn sha256(criterion: &mut Criterion) {
    let (x, y) = (stream(1), stream(2));
    let slices = || x.chunks(SLICE_BYTES).zip(y.chunks(SLICE_BYTES));
    let mut group = criterion.benchmark_group("sha256");
    group.throughput(Throughput::Bytes(STREAM_BYTES as u64)).sample_size(10);
    group.bench_function("sha2, one stream", |bencher| bencher.iter(|| Digest::of(black_box(&x))));
    group.bench_function("PartHasher, one stream", |bencher| {
        bencher.iter(|| {
            let mut hasher = PartHasher::new();
            slices().for_each(|(x, _)| hasher.update(black_box(x)));
            hasher.finish()
        });
    });
    group.throughput(Throughput::Bytes(2 * STREAM_BYTES as u64));
    group.bench_function("PartHasher, two streams at once", |bencher| {
        bencher.iter(|| {
            let (mut a, mut b) = (PartHasher::new(), PartHasher::new());
            slices().for_each(|(x, y)| PartHasher::update_pair(&mut a, black_box(x), &mut b, black_box(y)));
            (a.finish(), b.finish())
        });
    });
    // The same as `update_pair` on a processor without supported SHA extensions.
    group.bench_function("PartHasher, two streams one after the other", |bencher| {
        bencher.iter(|| {
            let (mut a, mut b) = (PartHasher::new(), PartHasher::new());
            slices().for_each(|(x, y)| {
                a.update(black_box(x));
                b.update(black_box(y));
            });
            (a.finish(), b.finish())
        });
    });
    group.finish();
}

fn ladder(criterion: &mut Criterion) {
    let (x, y) = (stream(3), stream(4));
    let (size, part) = (STREAM_BYTES as u64, part_size(STREAM_BYTES as u64));
    let hash = |content: &[u8]| {
        let mut hasher = LadderHasher::new(part);
        content.chunks(SLICE_BYTES).for_each(|slice| hasher.update(black_box(slice)));
        hasher.finish()
    };
    let (digest, ladder) = hash(&x);
    let bytes = |index| ladder.range(index, size).start as usize..ladder.range(index, size).end as usize;
    let mut group = criterion.benchmark_group("ladder");
    group.throughput(Throughput::Bytes(size)).sample_size(10);
    group.bench_function("computed in order, one file", |bencher| bencher.iter(|| hash(&x)));
    group.bench_function("verified part by part", |bencher| {
        bencher.iter(|| {
            (0..size / part).all(|index| {
                let mut hasher = ladder.hasher(index).unwrap();
                x[bytes(index)].chunks(SLICE_BYTES).for_each(|slice| hasher.update(black_box(slice)));
                ladder.holds(index, Some(digest), hasher)
            })
        });
    });
    group.bench_function("verified two parts at once", |bencher| {
        bencher.iter(|| {
            (0..size / part).step_by(2).all(|index| {
                let (mut a, mut b) = (ladder.hasher(index).unwrap(), ladder.hasher(index + 1).unwrap());
                let slices = x[bytes(index)].chunks(SLICE_BYTES).zip(x[bytes(index + 1)].chunks(SLICE_BYTES));
                slices.for_each(|(x, y)| PartHasher::update_pair(&mut a, black_box(x), &mut b, black_box(y)));
                ladder.holds(index, Some(digest), a) && ladder.holds(index + 1, Some(digest), b)
            })
        });
    });
    group.throughput(Throughput::Bytes(2 * size));
    group.bench_function("computed in order, two files at once", |bencher| {
        bencher.iter(|| {
            let (mut a, mut b) = (LadderHasher::new(part), LadderHasher::new(part));
            let slices = x.chunks(SLICE_BYTES).zip(y.chunks(SLICE_BYTES));
            slices.for_each(|(x, y)| LadderHasher::update_pair(&mut a, black_box(x), &mut b, black_box(y)));
            (a.finish(), b.finish())
        });
    });
    group.finish();
}

criterion_group!(benches, sha256, ladder);
criterion_main!(benches);
