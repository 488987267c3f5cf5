//! Moving bytes: trying again, and pouring sources into staging.

mod answer;
mod arrival;
mod buffer;
mod engine;
mod hedge;
mod limiter;
mod order;
mod pace;
mod paging;
mod part;
mod pour;
mod retry;
mod sink;
mod tidy;
mod workers;

pub(crate) use answer::{BodyLimits, Cut, StallDetector, check_headers, content_range, read_body};
pub(crate) use arrival::{Arrival, Arrivals, Reading, Release};
pub(crate) use pace::Pace;
pub(crate) use paging::Paging;
pub(crate) use pour::{PourFile, Poured, Pourer, blocking};
pub(crate) use retry::within;
pub use retry::{Attempts, Retry};
pub(crate) use sink::{FilledPart, PartSink};
pub use tidy::tidied;
pub(crate) use tidy::tidy;
