//! Limits on connections, so that slow or hostile clients cannot use up the daemon. Each field states its default and
//! the reason for it.

use std::time::Duration;

/// How long a connection may wait for its client before it can be closed to make room for a new one.
pub(super) const STALL_EVICTABLE: Duration = Duration::from_secs(10);
/// How long input is read and discarded after an early response (413, 431), so that the client receives the response.
/// Closing a socket with unread input resets the connection, and a client that is still sending fails before it reads.
pub(super) const LINGER: Duration = Duration::from_secs(2);
/// Bytes that are read and discarded at most after an early response.
pub(super) const LINGER_BYTES: u64 = 4 << 20;
/// The limit on open files never lowers the number of connections below this one.
pub(super) const CONNECTIONS_MIN: usize = 16;

/// Limits on connections and requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectionLimits {
    /// Open connections. Default 4096, and never more than half of the limit on open files (`ulimit -n`): a connection
    /// may also need a file, and fills need descriptors of their own. If the limit is reached, the oldest connection
    /// that has not sent a complete request head is closed, otherwise the oldest one that is idle between two
    /// requests, otherwise the one whose client has stalled longest (at least 10 s). If there is none of these, the
    /// new connection is refused with status 503.
    pub connections: usize,
    /// Open connections of one client address (IPv6: of one /64 network, which a single host usually owns). Default
    /// 2048, half of `connections`, so that one address cannot use all of them. Containers of one node often share an
    /// address, so a much lower limit would refuse them.
    pub connections_per_address: usize,
    /// Time for the TLS handshake. Default 10 s; a handshake needs two round trips at most.
    pub handshake_timeout: Duration,
    /// Time from the connection, or from the first byte of a later request, to the end of the request head. Default
    /// 30 s. A client that sends a byte now and then does not extend it.
    pub head_timeout: Duration,
    /// Time without a request on a kept-alive connection. Default 75 s, as nginx has it; longer than the pools of
    /// common clients and load balancers (60 s) keep connections, so that the client closes first and no request is
    /// lost.
    pub idle_timeout: Duration,
    /// Bytes of a request head, including the request line. Default 32 KiB, as nginx has it. Also the size of the read
    /// buffer, so a slow client costs at most this much memory. At least 8 KiB.
    pub head_bytes: usize,
    /// Header fields of a request. Default 100.
    pub header_count: usize,
    /// Bytes of a request body. Default 1 MiB: the daemon accepts requests as JSON only, never files.
    pub body_bytes: u64,
    /// Lowest receive rate of a request body, in bytes per second, after a start of `body_start`. Default 16 KiB/s, so
    /// that the largest body takes 74 s at most.
    pub body_rate_min: u64,
    /// Time that a request body has before `body_rate_min` applies. Default 10 s.
    pub body_start: Duration,
    /// Time in which a client must receive some bytes of a response. Default 60 s. The kernel accepts bytes again once
    /// a third of its send buffer (4 MiB at most) is free, so on a fast network this is also a lowest rate of about
    /// 20 KiB/s. The time does not run while the response waits for the daemon.
    pub send_timeout: Duration,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self {
            connections: 4096,
            connections_per_address: 2048,
            handshake_timeout: Duration::from_secs(10),
            head_timeout: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(75),
            head_bytes: 32 << 10,
            header_count: 100,
            body_bytes: 1 << 20,
            body_rate_min: 16 << 10,
            body_start: Duration::from_secs(10),
            send_timeout: Duration::from_secs(60),
        }
    }
}
