//! The TCP socket of a connection, below TLS and HTTP: it closes connections whose client stops reading, and reports
//! received bytes.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep_until};

use super::activity::Activity;
use super::counters::ConnectionCounters;
use super::limits::{LINGER, LINGER_BYTES};

/// A TCP stream with a time limit on writes.
#[derive(Debug)]
pub(super) struct Socket {
    stream: TcpStream,
    activity: Arc<Activity>,
    counters: Arc<ConnectionCounters>,
    send_timeout: Duration,
    /// When the kernel's send buffer became full, if it is.
    blocked_since: Option<Instant>,
    /// Wakes the task of a blocked write. Created by the first one.
    timer: Option<Pin<Box<Sleep>>>,
    linger: Option<Linger>,
}

/// State of a close while the client may still send. Its input is read and discarded: the kernel resets a connection
/// that is closed with unread input, and the client could lose the response.
#[derive(Debug)]
struct Linger {
    until: Pin<Box<Sleep>>,
    bytes_left: u64,
}

impl Socket {
    pub(super) fn new(
        stream: TcpStream,
        activity: Arc<Activity>,
        counters: Arc<ConnectionCounters>,
        send_timeout: Duration,
    ) -> Self {
        Self { stream, activity, counters, send_timeout, blocked_since: None, timer: None, linger: None }
    }

    /// Passes the result of a write on, or fails if the socket has been blocked for too long.
    fn check_write(&mut self, cx: &mut Context<'_>, result: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if result.is_ready() {
            if self.blocked_since.take().is_some() {
                self.activity.set_stalled(false);
            }
            return result;
        }
        let since = *self.blocked_since.get_or_insert_with(|| {
            self.activity.set_stalled(true);
            Instant::now()
        });
        let due = since + self.send_timeout;
        // The timer is not set for each wait, because a fast client blocks the socket thousands of times per second. If
        // the timer of an earlier wait expires during this one, it is set to the end of this one.
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(due)));
        while timer.as_mut().poll(cx).is_ready() {
            if Instant::now() >= due {
                // Discards the unsent bytes. Otherwise the kernel would keep them for minutes.
                let _ = rustix::net::sockopt::set_socket_linger(&self.stream, Some(Duration::ZERO));
                self.counters.count_send_timeout();
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client stopped reading")));
            }
            timer.as_mut().reset(due);
        }
        Poll::Pending
    }
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        if buf.filled().len() > before {
            self.activity.received();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.check_write(cx, result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.check_write(cx, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { stream, activity, linger, .. } = &mut *self;
        if linger.is_none() {
            ready!(Pin::new(&mut *stream).poll_shutdown(cx))?;
            if !activity.has_unread_input() {
                return Poll::Ready(Ok(()));
            }
        }
        let linger = linger.get_or_insert_with(|| Linger {
            until: Box::pin(sleep_until(Instant::now() + LINGER)),
            bytes_left: LINGER_BYTES,
        });
        let mut space = [0; 8 << 10];
        loop {
            let mut discarded = ReadBuf::new(&mut space);
            match Pin::new(&mut *stream).poll_read(cx, &mut discarded) {
                Poll::Ready(Ok(())) if !discarded.filled().is_empty() => {
                    match linger.bytes_left.checked_sub(discarded.filled().len() as u64) {
                        Some(left) => linger.bytes_left = left,
                        None => return Poll::Ready(Ok(())),
                    }
                }
                // The client has closed the connection.
                Poll::Ready(_) => return Poll::Ready(Ok(())),
                Poll::Pending => return linger.until.as_mut().poll(cx).map(Ok),
            }
        }
    }
}
