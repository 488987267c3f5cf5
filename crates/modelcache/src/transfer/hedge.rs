//! Hedged read of one range: a second connection is opened if the first is far slower than its peers.
//!
//! Both connections continue from the same byte. Each byte is taken once, from the connection that delivers it first;
//! the duplicate is discarded, so nothing is hashed or written twice. When the range is complete, connections that lag
//! behind are dropped, and the remaining one must end there.

use super::limiter::Permit;
use crate::error::Result;
use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use std::future::poll_fn;
use std::task::{Context, Poll};

/// One connection that delivers bytes of the range.
struct Connection<'a> {
    stream: BoxStream<'a, Result<Bytes>>,
    /// Offset in the file of its next byte.
    position: u64,
    /// The permit of the second connection. `None` for the first, whose permit is in the `RunRequest` (`part.rs`).
    _permit: Option<Permit>,
}

/// A range read over one or two connections.
pub(super) struct HedgedRead<'a> {
    connections: Vec<Connection<'a>>,
    is_hedged: bool,
    /// Bytes received and discarded because another connection delivered them first.
    wasted_bytes: u64,
}

impl<'a> HedgedRead<'a> {
    /// Starts with one connection. Its stream begins at offset `position`.
    pub(super) fn new(stream: BoxStream<'a, Result<Bytes>>, position: u64) -> Self {
        Self { connections: vec![Connection { stream, position, _permit: None }], is_hedged: false, wasted_bytes: 0 }
    }

    /// Adds a second connection. Its stream begins at offset `position`.
    pub(super) fn add(&mut self, stream: BoxStream<'a, Result<Bytes>>, position: u64, permit: Permit) {
        self.connections.push(Connection { stream, position, _permit: Some(permit) });
        self.is_hedged = true;
    }

    /// Returns true if a second connection was ever added.
    pub(super) fn is_hedged(&self) -> bool {
        self.is_hedged
    }

    /// Drops the connections that are not at `position`, the end of the range. Returns false if none is left, because
    /// all connections that got there have ended.
    pub(super) fn retain_at(&mut self, position: u64) -> bool {
        self.connections.retain(|connection| connection.position == position);
        !self.connections.is_empty()
    }

    /// Returns the number of discarded bytes since the last call.
    pub(super) fn take_wasted(&mut self) -> u64 {
        std::mem::take(&mut self.wasted_bytes)
    }

    /// Returns the next bytes, which belong at offset `wanted`. If the only remaining connection ends or fails, returns
    /// `None` or its error.
    pub(super) async fn next(&mut self, wanted: u64) -> Option<Result<Bytes>> {
        poll_fn(|context| self.poll(wanted, context)).await
    }

    fn poll(&mut self, wanted: u64, context: &mut Context<'_>) -> Poll<Option<Result<Bytes>>> {
        let mut index = 0;
        while let Some(connection) = self.connections.get_mut(index) {
            match connection.stream.poll_next_unpin(context) {
                Poll::Pending => index += 1,
                Poll::Ready(Some(Ok(mut chunk))) => {
                    // Skip the bytes that another connection already delivered.
                    let duplicate =
                        usize::try_from(wanted - connection.position).unwrap_or(usize::MAX).min(chunk.len());
                    connection.position += chunk.len() as u64;
                    self.wasted_bytes += duplicate as u64;
                    let fresh = chunk.split_off(duplicate);
                    if !fresh.is_empty() {
                        return Poll::Ready(Some(Ok(fresh)));
                    }
                }
                // If the last connection ends or fails, so does the whole read. If one of two does, the other
                // one continues.
                Poll::Ready(ended) if self.connections.len() == 1 => return Poll::Ready(ended),
                Poll::Ready(_) => drop(self.connections.remove(index)),
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

    async fn text(mut hedged: HedgedRead<'_>) -> (String, Option<Error>, u64) {
        let mut got = String::new();
        loop {
            match hedged.next(got.len() as u64).await {
                Some(Ok(bytes)) => got.push_str(std::str::from_utf8(&bytes).expect("text")),
                ended => return (got, ended.and_then(Result::err), hedged.take_wasted()),
            }
        }
    }

    #[tokio::test]
    async fn each_byte_is_taken_once_from_the_faster_connection() {
        let permit = Limiter::new(16).acquire().await;
        let mut hedged = HedgedRead::new(chunks(&["0", "1", "2"]).chain(stream::pending()).boxed(), 0);
        hedged.add(
            stream::once(tokio::task::yield_now()).map(|()| Ok(Bytes::from("01"))).chain(chunks(&["23", "45"])).boxed(),
            0,
            permit,
        );
        let mut got = String::new();
        while got.len() < 6 {
            let bytes = hedged.next(got.len() as u64).await.expect("goes on").expect("well");
            got.push_str(std::str::from_utf8(&bytes).expect("text"));
        }
        assert_eq!(got, "012345");
        assert_eq!(hedged.take_wasted(), 3);
    }

    #[tokio::test]
    async fn after_a_failure_the_other_connection_continues_alone() {
        let permit = Limiter::new(16).acquire().await;
        let mut hedged = HedgedRead::new(chunks(&["ab", "!"]), 0);
        hedged.add(chunks(&["ab", "cd"]), 0, permit);
        assert!(matches!(text(hedged).await, (text, None, 2) if text == "abcd"));
        let permit = Limiter::new(16).acquire().await;
        let mut hedged = HedgedRead::new(chunks(&["ab", "!"]), 0);
        hedged.add(chunks(&["!"]), 0, permit);
        assert!(matches!(text(hedged).await, (text, Some(_), 0) if text == "ab"), "the last failure counts");
    }
}
