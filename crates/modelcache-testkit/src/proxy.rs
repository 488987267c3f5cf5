//! A TCP proxy that simulates a bad network.
//!
//! It listens in front of any address and copies bytes both ways. A connection takes at most one fault, when it is
//! accepted, and keeps it: a pooled connection stays faulty or healthy for its lifetime. [`FaultProxy::sever`] ends all
//! open connections. Offsets count the bytes sent to the client on one connection, including the heads of answers; with
//! keep-alive, all answers of a connection share one count.
//!
//! [`FaultProxy::let_through`] limits how many bytes reach clients, over all connections together.

use std::future::pending;
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore};
use tokio::task::{AbortHandle, JoinSet};

use crate::faults::{Fault, Faults};
use crate::serve::{bind, runtime};

/// The kinds of fault. Use the constructors on [`ProxyFault`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Kind {
    /// The connection is reset right after it was accepted.
    Refuse,
    /// The connection is closed after this many bytes.
    Cut(u64),
    /// The connection is reset after this many bytes.
    Reset(u64),
    /// The connection pauses after this many bytes, for this time or for ever.
    Stall(u64, Option<Duration>),
    /// The connection passes this many bytes per second.
    Slow(u64),
    /// One bit of the byte at this offset is inverted.
    Flip(u64),
    /// The proxy itself answers with this status and, if given, `Retry-After` in seconds.
    Answer(u16, Option<u64>),
}

/// A fault of one connection. Without `.times(n)` it applies to every connection; `.on` and `.method` have no effect.
pub type ProxyFault = Fault<Kind>;

impl Fault<Kind> {
    /// The connection is reset before a byte is read.
    pub fn refuse() -> Self {
        Self::new(Kind::Refuse)
    }

    /// The connection is closed in an orderly way after `bytes`.
    pub fn cut(bytes: u64) -> Self {
        Self::new(Kind::Cut(bytes))
    }

    /// The connection is reset after `bytes`.
    pub fn reset(bytes: u64) -> Self {
        Self::new(Kind::Reset(bytes))
    }

    /// The connection pauses for `time` after `bytes`, then continues.
    pub fn stall(bytes: u64, time: Duration) -> Self {
        Self::new(Kind::Stall(bytes, Some(time)))
    }

    /// The connection stays open but passes nothing after `bytes`.
    pub fn hang(bytes: u64) -> Self {
        Self::new(Kind::Stall(bytes, None))
    }

    /// The connection passes at most `bytes_per_s` from its first byte on.
    pub fn slow(bytes_per_s: u64) -> Self {
        Self::new(Kind::Slow(bytes_per_s.max(1)))
    }

    /// Inverts one bit of the byte at `offset`.
    pub fn flip(offset: u64) -> Self {
        Self::new(Kind::Flip(offset))
    }

    /// The proxy answers 503 without contacting the target, with `Retry-After` in seconds if given.
    pub fn unavailable(retry_after_s: Option<u64>) -> Self {
        Self::new(Kind::Answer(503, retry_after_s))
    }

    /// The proxy answers with this status without contacting the target.
    pub fn answer(status: u16) -> Self {
        Self::new(Kind::Answer(status, None))
    }
}

/// A running proxy. It stops, with all its connections, when it is dropped.
#[derive(Debug)]
pub struct FaultProxy {
    shared: Arc<Shared>,
    addr: SocketAddr,
    task: AbortHandle,
}

#[derive(Debug)]
struct Shared {
    target: SocketAddr,
    faults: Faults<Kind>,
    connections: AtomicU64,
    bytes_up: AtomicU64,
    bytes_down: AtomicU64,
    sever: Notify,
    /// Bytes that may still reach clients. Has no effect until [`FaultProxy::let_through`] is called.
    allowance: Semaphore,
    /// True after the first call of [`FaultProxy::let_through`].
    is_limited: AtomicBool,
}

impl FaultProxy {
    /// Starts a proxy for `target`: `host:port`, or a URL of which only host and port are used. Fails if the target has
    /// no address or the proxy cannot listen.
    pub async fn start(target: impl AsRef<str>) -> anyhow::Result<Self> {
        Self::start_on(target, 0)
    }

    /// Like [`FaultProxy::start`], for callers without a runtime and for a fixed port (0 picks a free one).
    pub fn start_on(target: impl AsRef<str>, port: u16) -> anyhow::Result<Self> {
        let target = target.as_ref();
        let authority = target.split_once("://").map_or(target, |(_, rest)| rest);
        let authority = authority.split('/').next().unwrap_or(authority);
        let target = authority.to_socket_addrs().with_context(|| format!("{target} is not host:port"))?.next();
        let shared = Arc::new(Shared {
            target: target.context("the target has no address")?,
            faults: Faults::default(),
            connections: AtomicU64::new(0),
            bytes_up: AtomicU64::new(0),
            bytes_down: AtomicU64::new(0),
            sever: Notify::new(),
            allowance: Semaphore::new(0),
            is_limited: AtomicBool::new(false),
        });
        let (listener, addr) = bind(("127.0.0.1", port))?;
        let task = runtime().spawn(accept(listener, shared.clone())).abort_handle();
        Ok(Self { shared, addr, task })
    }

    /// Address of the proxy.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The proxy's URL (`http://…`), without a trailing slash.
    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// The armed faults; see [`ProxyFault`] for the kinds.
    pub fn faults(&self) -> &Faults<Kind> {
        &self.shared.faults
    }

    /// Number of connections accepted so far, including faulty ones.
    pub fn connections(&self) -> u64 {
        self.shared.connections.load(Ordering::SeqCst)
    }

    /// Bytes forwarded to the target so far.
    pub fn bytes_up(&self) -> u64 {
        self.shared.bytes_up.load(Ordering::SeqCst)
    }

    /// Bytes forwarded to clients so far.
    pub fn bytes_down(&self) -> u64 {
        self.shared.bytes_down.load(Ordering::SeqCst)
    }

    /// Stops passing bytes to clients, except for `bytes` more over all connections, in the order of arrival. Further
    /// calls add to the allowance.
    pub fn let_through(&self, bytes: u64) {
        self.shared.is_limited.store(true, Ordering::SeqCst);
        self.shared.allowance.add_permits(usize::try_from(bytes).unwrap_or(Semaphore::MAX_PERMITS));
    }

    /// Closes all open connections.
    pub fn sever(&self) {
        self.shared.sever.notify_waiters();
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        // Reap finished connections.
        while connections.try_join_next().is_some() {}
        let Ok((client, _)) = listener.accept().await else { continue };
        shared.connections.fetch_add(1, Ordering::SeqCst);
        // The fault is fixed here, for the lifetime of the connection.
        let fault = shared.faults.take("", "", |_| true);
        let shared = shared.clone();
        // Subscribe before the connection runs, so that it does not miss a call of `sever`.
        connections.spawn(async move {
            let severed = shared.sever.notified();
            tokio::select! {
                _ = connection(client, fault, &shared) => {}
                () = severed => {}
            }
        });
    }
}

async fn connection(mut client: TcpStream, fault: Option<Kind>, shared: &Shared) -> std::io::Result<()> {
    match fault {
        // Closing a socket with zero linger sends a reset instead of an orderly shutdown.
        Some(Kind::Refuse) => return client.set_zero_linger(),
        Some(Kind::Answer(status, retry_after_s)) => return answer(client, status, retry_after_s).await,
        _ => {}
    }
    let mut target = TcpStream::connect(shared.target).await?;
    let _ = (client.set_nodelay(true), target.set_nodelay(true));
    let is_reset = matches!(fault, Some(Kind::Reset(_)));
    {
        let (client_reads, client_writes) = client.split();
        let (target_reads, target_writes) = target.split();
        let up = async {
            let _ = pass_up(client_reads, target_writes, &shared.bytes_up).await;
            // Do not end the connection here: a client may close its sending side and still read.
            pending::<()>().await;
        };
        // The target's side ends the connection: it closed, or the fault cut it.
        tokio::select! {
            _ = pass_down(target_reads, client_writes, fault, shared) => {}
            () = up => {}
        }
    }
    if is_reset { client.set_zero_linger() } else { client.shutdown().await }
}

async fn pass_up(mut from: ReadHalf<'_>, mut to: WriteHalf<'_>, count: &AtomicU64) -> std::io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let read = from.read(&mut buffer).await?;
        if read == 0 {
            return to.shutdown().await;
        }
        to.write_all(&buffer[..read]).await?;
        count.fetch_add(read as u64, Ordering::SeqCst);
    }
}

async fn pass_down(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    fault: Option<Kind>,
    shared: &Shared,
) -> std::io::Result<()> {
    let count = &shared.bytes_down;
    let mut buffer = vec![0; 64 * 1024];
    let mut sent = 0;
    loop {
        let read = from.read(&mut buffer).await?;
        if read == 0 {
            return Ok(());
        }
        // With `let_through`, wait for an allowance of this many bytes and use it up.
        if shared.is_limited.load(Ordering::SeqCst)
            && let Ok(permits) = shared.allowance.acquire_many(u32::try_from(read).unwrap_or(u32::MAX)).await
        {
            permits.forget();
        }
        let chunk = &mut buffer[..read];
        // Returns the position of the fault's offset in this chunk, or `None` if it is elsewhere.
        let within = |offset: u64| {
            let place = usize::try_from(offset.checked_sub(sent)?).ok()?;
            (place < read).then_some(place)
        };
        match &fault {
            Some(Kind::Cut(offset) | Kind::Reset(offset)) if let Some(place) = within(*offset) => {
                to.write_all(&chunk[..place]).await?;
                count.fetch_add(place as u64, Ordering::SeqCst);
                return Ok(());
            }
            Some(Kind::Stall(offset, time)) if let Some(place) = within(*offset) => {
                to.write_all(&chunk[..place]).await?;
                match time {
                    Some(time) => tokio::time::sleep(*time).await,
                    None => pending().await,
                }
                to.write_all(&chunk[place..]).await?;
            }
            Some(Kind::Flip(offset)) if let Some(place) = within(*offset) => {
                chunk[place] ^= 1;
                to.write_all(chunk).await?;
            }
            Some(Kind::Slow(bytes_per_s)) => write_slowly(&mut to, chunk, *bytes_per_s).await?,
            _ => to.write_all(chunk).await?,
        }
        sent += read as u64;
        count.fetch_add(read as u64, Ordering::SeqCst);
    }
}

/// Writes twenty pieces per second, or single bytes if the rate is below twenty bytes per second.
async fn write_slowly(to: &mut WriteHalf<'_>, bytes: &[u8], bytes_per_s: u64) -> std::io::Result<()> {
    let piece = usize::try_from(bytes_per_s / 20).unwrap_or(usize::MAX).max(1);
    for part in bytes.chunks(piece) {
        to.write_all(part).await?;
        tokio::time::sleep(Duration::from_secs_f64(part.len() as f64 / bytes_per_s as f64)).await;
    }
    Ok(())
}

/// Answers a request after reading its head; the body is ignored.
async fn answer(mut client: TcpStream, status: u16, retry_after_s: Option<u64>) -> std::io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    let mut head = Vec::new();
    while !head.windows(4).any(|window| window == b"\r\n\r\n") {
        match client.read(&mut buffer).await? {
            0 => return Ok(()),
            read => head.extend_from_slice(&buffer[..read]),
        }
    }
    let retry = retry_after_s.map(|seconds| format!("Retry-After: {seconds}\r\n")).unwrap_or_default();
    let text = format!("HTTP/1.1 {status} Struck\r\n{retry}Content-Length: 0\r\nConnection: close\r\n\r\n");
    client.write_all(text.as_bytes()).await?;
    client.shutdown().await?;
    // Closing a socket with unread bytes sends a reset, which could lose the answer. So read the rest of the request
    // first.
    let drain = async { while client.read(&mut buffer).await.is_ok_and(|read| read > 0) {} };
    let _ = tokio::time::timeout(Duration::from_secs(2), drain).await;
    Ok(())
}
