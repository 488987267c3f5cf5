//! Moving bytes: trying again, and pouring sources into staging.

mod answer;
mod buffer;
mod cleanup;
mod download;
mod engine;
mod hedge;
mod limiter;
mod order;
mod paging;
mod part;
mod part_sink;
mod partial_file;
mod rate_limiter;
mod retry;
mod workers;

pub(crate) use answer::{BodyLimits, Cut, StallDetector, check_headers, content_range, read_body};
pub(crate) use cleanup::spawn_cleanup;
pub use cleanup::wait_for_cleanup;
pub(crate) use download::{DownloadFile, DownloadedFile, Downloader, blocking};
pub(crate) use paging::Paging;
pub(crate) use part_sink::{CompletedPart, PartSink};
pub(crate) use partial_file::{PartialFile, PartialFiles, PartialReader, ReadGate};
pub(crate) use rate_limiter::RateLimiter;
pub(crate) use retry::within;
pub use retry::{Attempts, Retry};
