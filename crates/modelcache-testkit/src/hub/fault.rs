//! What can go wrong at the Hub and its CDN.
//!
//! Faults of two sorts: those that replace the answer (`throttle`, `status`, `redirect_loop`) strike any request they
//! are aimed at, on both listeners; those that spoil a body (`flip`, `cut`, `short`, `stall`, `stall_at`,
//! `ignore_range`) strike only answers that carry file content, so a redirect to the CDN never uses one up.
//!
//! The aim of [`Fault::on`] is compared with the decoded path; for the CDN, where the URL names only digests, with the
//! path of the resolve URL that redirected there (`/org/model/resolve/<commit>/<file>`).

use std::time::Duration;

use crate::faults::Fault;

/// The kinds; build them with the constructors on [`HubFault`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Kind {
    /// 429 with `Retry-After`, in seconds.
    Throttle(u64),
    /// 429 with the `RateLimit` header and no `Retry-After`.
    RateLimit(u64),
    /// Any status, with an error body.
    Status(u16),
    /// 302 to another address of the same request, for ever.
    RedirectLoop,
    /// The connection is closed without an answer.
    HangUp,
    /// The answer's head is held back for this long.
    Delay(Duration),
    /// One bit of the byte at this offset of the file is inverted.
    Flip(u64),
    /// The connection ends after this many body bytes, fewer than `Content-Length` promised.
    Cut(u64),
    /// The body is this many bytes shorter than asked, and `Content-Length` agrees with it.
    Short(u64),
    /// The body pauses after so many bytes for so long, then goes on.
    Stall(u64, Duration),
    /// The body pauses before the byte at this offset of the file for so long, then goes on.
    StallAt(u64, Duration),
    /// The whole file is answered with 200, whatever `Range` said.
    IgnoreRange,
    /// Trees, infos and the linked size say a size that is this far off.
    LieSize(i64),
}

/// A fault of the Hub stand-in. Without `.times(n)` it stays; without `.on(part)` it strikes every path.
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

    /// This status with an error body, 500 and 503 for example.
    pub fn status(code: u16) -> Self {
        Self::new(Kind::Status(code))
    }

    /// A redirect that leads to itself.
    pub fn redirect_loop() -> Self {
        Self::new(Kind::RedirectLoop)
    }

    /// The connection is closed instead of an answer.
    pub fn hang_up() -> Self {
        Self::new(Kind::HangUp)
    }

    /// The answer comes this much later.
    pub fn delay(time: Duration) -> Self {
        Self::new(Kind::Delay(time))
    }

    /// One wrong bit in the byte at `offset` of the file; strikes only answers that contain this byte.
    pub fn flip(offset: u64) -> Self {
        Self::new(Kind::Flip(offset))
    }

    /// The connection ends after `bytes` of the body, short of `Content-Length`.
    pub fn cut(bytes: u64) -> Self {
        Self::new(Kind::Cut(bytes))
    }

    /// A well-formed answer whose body lacks its last `bytes`.
    pub fn short(bytes: u64) -> Self {
        Self::new(Kind::Short(bytes))
    }

    /// A pause of `time` after `bytes` of the body.
    pub fn stall(bytes: u64, time: Duration) -> Self {
        Self::new(Kind::Stall(bytes, time))
    }

    /// A pause of `time` before the byte at `offset` of the file; strikes only answers that contain this byte.
    pub fn stall_at(offset: u64, time: Duration) -> Self {
        Self::new(Kind::StallAt(offset, time))
    }

    /// `Range` is ignored: 200 and the whole file.
    pub fn ignore_range() -> Self {
        Self::new(Kind::IgnoreRange)
    }

    /// Sizes in metadata are off by `by` bytes. Aimed at the path in the repo; strikes once per entry listed.
    pub fn lie_size(by: i64) -> Self {
        Self::new(Kind::LieSize(by))
    }
}

impl Kind {
    /// Whether it takes the place of the answer, as opposed to spoiling a body or a listing.
    pub(super) fn replaces_answer(&self) -> bool {
        use Kind::{Delay, HangUp, RateLimit, RedirectLoop, Status, Throttle};
        matches!(self, Throttle(_) | RateLimit(_) | Status(_) | RedirectLoop | HangUp | Delay(_))
    }
}
