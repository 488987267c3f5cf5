//! Faults of the Hub and its CDN.
//!
//! There are three sorts. Faults that apply before routing (`throttle`, `rate_limit`, `status`, `redirect_loop`,
//! `hang_up`, `delay`) match any request on both listeners. Faults of a body (`flip`, `cut`, `short`, `stall`,
//! `stall_at`, `ignore_range`) apply only to answers with file content, so a redirect to the CDN never uses one up.
//! `lie_size` alters metadata.
//!
//! [`Fault::on`] is compared with the decoded path. Faults that apply before routing are also compared with the query
//! of a request to the Hub. The CDN's URLs name only digests, so its requests are compared by the path of the resolve
//! URL that redirected there (`/org/model/resolve/<commit>/<file>`).

use std::time::Duration;

use crate::faults::Fault;

/// The kinds of fault. Use the constructors on [`HubFault`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Kind {
    /// 429 with `Retry-After`, in seconds.
    Throttle(u64),
    /// 429 with the `RateLimit` header, without `Retry-After`.
    RateLimit(u64),
    /// Any status, with an error body.
    Status(u16),
    /// 302 to the same path with a counter in the query, without end.
    RedirectLoop,
    /// The connection is closed without an answer.
    HangUp,
    /// The head of the answer is delayed by this time.
    Delay(Duration),
    /// The lowest bit of the byte at this offset of the file is inverted.
    Flip(u64),
    /// The connection closes after this many body bytes, fewer than `Content-Length` promised.
    Cut(u64),
    /// The body is this many bytes shorter than the requested range; `Content-Length` states the shorter length.
    Short(u64),
    /// The body pauses once, after this many bytes and for this time.
    Stall(u64, Duration),
    /// The body pauses once, before the byte at this offset of the file and for this time.
    StallAt(u64, Duration),
    /// `Range` is ignored: the answer is 200 with the whole file.
    IgnoreRange,
    /// Trees, infos and `X-Linked-Size` state a size that is off by this many bytes.
    LieSize(i64),
}

/// A fault of the Hub stand-in. Without `.times(n)` it stays armed; without `.on(part)` it applies to every path.
pub type HubFault = Fault<Kind>;

impl Fault<Kind> {
    /// 429 with `Retry-After: <seconds>`.
    pub fn throttle(retry_after_s: u64) -> Self {
        Self::new(Kind::Throttle(retry_after_s))
    }

    /// 429 with `RateLimit: "resolvers";r=0;t=<seconds>` instead of `Retry-After`.
    pub fn rate_limit(reset_s: u64) -> Self {
        Self::new(Kind::RateLimit(reset_s))
    }

    /// This status with an error body, for example 500 or 503.
    pub fn status(code: u16) -> Self {
        Self::new(Kind::Status(code))
    }

    /// 302 to the same path with a counter in the query, without end.
    pub fn redirect_loop() -> Self {
        Self::new(Kind::RedirectLoop)
    }

    /// The connection is closed without an answer.
    pub fn hang_up() -> Self {
        Self::new(Kind::HangUp)
    }

    /// The answer is delayed by `time`.
    pub fn delay(time: Duration) -> Self {
        Self::new(Kind::Delay(time))
    }

    /// Inverts one bit of the byte at `offset` of the file. Applies only to answers that contain this byte.
    pub fn flip(offset: u64) -> Self {
        Self::new(Kind::Flip(offset))
    }

    /// The connection closes after `bytes` of the body, short of `Content-Length`.
    pub fn cut(bytes: u64) -> Self {
        Self::new(Kind::Cut(bytes))
    }

    /// A well-formed answer without the last `bytes` of its body.
    pub fn short(bytes: u64) -> Self {
        Self::new(Kind::Short(bytes))
    }

    /// The body pauses for `time` after `bytes`.
    pub fn stall(bytes: u64, time: Duration) -> Self {
        Self::new(Kind::Stall(bytes, time))
    }

    /// The body pauses for `time` before the byte at `offset` of the file. Applies only to answers that contain this
    /// byte.
    pub fn stall_at(offset: u64, time: Duration) -> Self {
        Self::new(Kind::StallAt(offset, time))
    }

    /// `Range` is ignored: the answer is 200 with the whole file.
    pub fn ignore_range() -> Self {
        Self::new(Kind::IgnoreRange)
    }

    /// Sizes in metadata are off by `by` bytes. Matched against the path in the repo; applies once per listed entry.
    pub fn lie_size(by: i64) -> Self {
        Self::new(Kind::LieSize(by))
    }
}

impl Kind {
    /// Returns true if the fault applies before routing, false if it alters a body or metadata.
    pub(super) fn applies_before_routing(&self) -> bool {
        use Kind::{Delay, HangUp, RateLimit, RedirectLoop, Status, Throttle};
        matches!(self, Throttle(_) | RateLimit(_) | Status(_) | RedirectLoop | HangUp | Delay(_))
    }
}
