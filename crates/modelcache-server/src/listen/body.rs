//! Request bodies with limits on size and receive rate, and response bodies that report their end.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes};
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};

use super::activity::{Activity, BodyFailure};
use super::connections::Entry;
use super::counters::ConnectionCounters;
use super::limits::ConnectionLimits;

/// A request body that fails if it is too large or arrives too slowly.
#[derive(Debug)]
pub(super) struct RequestBody {
    body: Incoming,
    activity: Arc<Activity>,
    counters: Arc<ConnectionCounters>,
    received: u64,
    bytes_max: u64,
    rate_min: u64,
    /// Time before `rate_min` applies.
    grace: Duration,
    started: Option<Instant>,
    timer: Option<Pin<Box<Sleep>>>,
    ended: bool,
}

impl RequestBody {
    pub(super) fn new(
        body: Incoming,
        activity: Arc<Activity>,
        counters: Arc<ConnectionCounters>,
        limits: &ConnectionLimits,
    ) -> Self {
        let ended = body.is_end_stream();
        Self {
            body,
            activity,
            counters,
            received: 0,
            bytes_max: limits.body_bytes,
            rate_min: limits.body_rate_min.max(1),
            grace: limits.body_start,
            started: None,
            timer: None,
            ended,
        }
    }

    fn fail(&mut self, failure: BodyFailure) -> io::Error {
        self.activity.set_stalled(false);
        self.activity.set_body_failure(failure);
        match failure {
            BodyFailure::TooLarge => {
                let message = format!("the request body is larger than {} bytes", self.bytes_max);
                io::Error::new(io::ErrorKind::FileTooLarge, message)
            }
            BodyFailure::TooSlow => {
                self.counters.count_body_timeout();
                io::Error::new(io::ErrorKind::TimedOut, "the request body arrives too slowly")
            }
        }
    }

    /// Returns when the next byte must have arrived.
    fn due(&self, started: Instant) -> Instant {
        started + self.grace + Duration::from_secs_f64(self.received as f64 / self.rate_min as f64)
    }
}

impl HttpBody for RequestBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let this = &mut *self;
        let started = *this.started.get_or_insert_with(Instant::now);
        match Pin::new(&mut this.body).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                this.activity.set_stalled(false);
                this.received += frame.data_ref().map_or(0, |data| data.len() as u64);
                if this.received > this.bytes_max {
                    return Poll::Ready(Some(Err(this.fail(BodyFailure::TooLarge))));
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => {
                this.activity.set_stalled(false);
                Poll::Ready(Some(Err(io::Error::other(error))))
            }
            Poll::Ready(None) => {
                this.activity.set_stalled(false);
                this.ended = true;
                Poll::Ready(None)
            }
            Poll::Pending => {
                this.activity.set_stalled(true);
                let due = this.due(started);
                let timer = this.timer.get_or_insert_with(|| Box::pin(sleep_until(due)));
                if timer.deadline() != due {
                    timer.as_mut().reset(due);
                }
                ready!(timer.as_mut().poll(cx));
                Poll::Ready(Some(Err(this.fail(BodyFailure::TooSlow))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        self.activity.set_stalled(false);
        if !self.ended && !self.body.is_end_stream() {
            self.activity.set_unread_body();
        }
    }
}

/// Marks the response to a HEAD request that must not state a length. Without the mark, the length of its empty body is
/// stated.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WithoutLength;

/// A response body that reports its end, when it is dropped.
#[derive(Debug)]
pub(super) struct ResponseBody {
    body: Body,
    has_length: bool,
    activity: Arc<Activity>,
    entry: Arc<Entry>,
}

impl ResponseBody {
    /// `has_length` is false if the length of the body must not be stated.
    pub(super) fn new(body: Body, has_length: bool, activity: Arc<Activity>, entry: Arc<Entry>) -> Self {
        Self { body, has_length, activity, entry }
    }
}

impl HttpBody for ResponseBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.has_length && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        if self.has_length { self.body.size_hint() } else { SizeHint::default() }
    }
}

impl Drop for ResponseBody {
    fn drop(&mut self) {
        self.activity.response_ended();
        self.entry.response_ended();
    }
}
