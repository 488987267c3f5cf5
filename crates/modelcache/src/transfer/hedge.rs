//! One range, read over one connection, or over two when the first is far slower than its peers.
//!
//! Both then read on from the same byte. Each byte is taken from whichever brings it first, once: what the other brings
//! later is thrown away, and nothing is hashed or written twice. When the range is complete the slower one is dropped,
//! and the other must end.

use super::limiter::Permit;
use crate::error::Result;
use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use std::future::poll_fn;
use std::task::{Context, Poll};

/// A connection that brings bytes of the range.
struct Connection<'a> {
    stream: BoxStream<'a, Result<Bytes>>,
    /// Where its next byte belongs.
    at: u64,
    /// The right to have it, where that is not its reader's own.
    _permit: Option<Permit>,
}

/// The connections that bring one range.
pub(super) struct HedgedRead<'a> {
    lanes: Vec<Connection<'a>>,
    is_hedged: bool,
    /// Received, and thrown away because the other lane was first.
    wasted_bytes: u64,
}

impl<'a> HedgedRead<'a> {
    /// One connection, whose stream begins at `at`.
    pub(super) fn new(stream: BoxStream<'a, Result<Bytes>>, at: u64) -> Self {
        Self { lanes: vec![Connection { stream, at, _permit: None }], is_hedged: false, wasted_bytes: 0 }
    }

    /// Another one.
    pub(super) fn join(&mut self, stream: BoxStream<'a, Result<Bytes>>, at: u64, permit: Permit) {
        self.lanes.push(Connection { stream, at, _permit: Some(permit) });
        self.is_hedged = true;
    }

    /// Whether two are at it, or were.
    pub(super) fn is_hedged(&self) -> bool {
        self.is_hedged
    }

    /// Drops the connections that are not at `position`, the end of the range. Returns false if none is left: all that
    /// had come so far have ended.
    pub(super) fn keep_those_at(&mut self, position: u64) -> bool {
        self.lanes.retain(|lane| lane.at == position);
        !self.lanes.is_empty()
    }

    /// What was thrown away since this was last asked.
    pub(super) fn take_wasted(&mut self) -> u64 {
        std::mem::take(&mut self.wasted_bytes)
    }

    /// The next bytes, which belong at `wanted`. Ends and fails when the last lane does.
    pub(super) async fn next(&mut self, wanted: u64) -> Option<Result<Bytes>> {
        poll_fn(|context| self.poll(wanted, context)).await
    }

    fn poll(&mut self, wanted: u64, context: &mut Context<'_>) -> Poll<Option<Result<Bytes>>> {
        let mut index = 0;
        while let Some(lane) = self.lanes.get_mut(index) {
            match lane.stream.poll_next_unpin(context) {
                Poll::Pending => index += 1,
                Poll::Ready(Some(Ok(mut chunk))) => {
                    let late = usize::try_from(wanted - lane.at).unwrap_or(usize::MAX).min(chunk.len());
                    lane.at += chunk.len() as u64;
                    self.wasted_bytes += late as u64;
                    let fresh = chunk.split_off(late);
                    if !fresh.is_empty() {
                        return Poll::Ready(Some(Ok(fresh)));
                    }
                }
                // It ended, well or not, and so did the race if it was alone.
                Poll::Ready(ended) if self.lanes.len() == 1 => return Poll::Ready(ended),
                Poll::Ready(_) => drop(self.lanes.remove(index)),
            }
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use crate::transfer::limiter::Limiter;
    use futures::stream;

    fn chunks(texts: &'static [&'static str]) -> BoxStream<'static, Result<Bytes>> {
        stream::iter(texts.iter().map(|text| match *text {
            "!" => Err(Error::unavailable("cut")),
            text => Ok(Bytes::from(text)),
        }))
        .boxed()
    }

    async fn text(mut race: HedgedRead<'_>) -> (String, Option<Error>, u64) {
        let mut got = String::new();
        loop {
            match race.next(got.len() as u64).await {
                Some(Ok(bytes)) => got.push_str(std::str::from_utf8(&bytes).expect("text")),
                ended => return (got, ended.and_then(Result::err), race.take_wasted()),
            }
        }
    }

    #[tokio::test]
    async fn each_byte_is_taken_once_from_whoever_is_first() {
        let permit = Limiter::new(None).acquire().await;
        let mut race = HedgedRead::new(chunks(&["0", "1", "2"]).chain(stream::pending()).boxed(), 0);
        race.join(
            stream::once(tokio::task::yield_now()).map(|()| Ok(Bytes::from("01"))).chain(chunks(&["23", "45"])).boxed(),
            0,
            permit,
        );
        let mut got = String::new();
        while got.len() < 6 {
            let bytes = race.next(got.len() as u64).await.expect("goes on").expect("well");
            got.push_str(std::str::from_utf8(&bytes).expect("text"));
        }
        assert_eq!(got, "012345");
        assert_eq!(race.take_wasted(), 3);
    }

    #[tokio::test]
    async fn one_that_fails_leaves_the_range_to_the_other() {
        let permit = Limiter::new(None).acquire().await;
        let mut race = HedgedRead::new(chunks(&["ab", "!"]), 0);
        race.join(chunks(&["ab", "cd"]), 0, permit);
        assert!(matches!(text(race).await, (text, None, 2) if text == "abcd"));
        let permit = Limiter::new(None).acquire().await;
        let mut race = HedgedRead::new(chunks(&["ab", "!"]), 0);
        race.join(chunks(&["!"]), 0, permit);
        assert!(matches!(text(race).await, (text, Some(_), 0) if text == "ab"), "the last failure counts");
    }
}
