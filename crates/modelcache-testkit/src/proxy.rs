//! A bad network: a TCP proxy that breaks connections on demand.
//!
//! Stands in front of any address and copies bytes both ways. Each connection takes at most one fault, when it is
//! accepted. Offsets count the bytes sent to the client on that connection, heads of answers included; with
//! keep-alive several answers share one count.
//!
//! [`FaultProxy::let_through`] makes one narrow line of all connections, which passes as many bytes as the test says.
//!
//! Surprise: a pooled connection keeps the fault it was born with, or the lack of one. [`FaultProxy::sever`] ends all
//! open ones.

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

/// The kinds; build them with the constructors on [`ProxyFault`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Kind {
    /// Reset right after the connection was accepted.
    Refuse,
    /// Closed after so many bytes.
    Cut(u64),
    /// Reset after so many bytes.
    Reset(u64),
    /// Silent after so many bytes, for so long or for ever.
    Stall(u64, Option<Duration>),
    /// So many bytes per second.
    Slow(u64),
    /// One bit of the byte at this offset inverted.
    Flip(u64),
    /// The proxy answers itself with this status and `Retry-After`.
    Answer(u16, Option<u64>),
}

/// A fault of one connection. Without `.times(n)` it strikes every connection; `.on` and `.method` have no meaning.
pub type ProxyFault = Fault<Kind>;

impl Fault<Kind> {
    /// The connection is reset before a byte was read.
    pub fn refuse() -> Self {
        Self::new(Kind::Refuse)
    }

    /// The connection is closed in good order after `bytes`.
    pub fn cut(bytes: u64) -> Self {
        Self::new(Kind::Cut(bytes))
    }

    /// The connection is reset after `bytes`.
    pub fn reset(bytes: u64) -> Self {
        Self::new(Kind::Reset(bytes))
    }

    /// Nothing comes for `time` after `bytes`, then the rest.
    pub fn stall(bytes: u64, time: Duration) -> Self {
        Self::new(Kind::Stall(bytes, Some(time)))
    }

    /// Nothing comes any more after `bytes`; the connection stays open.
    pub fn hang(bytes: u64) -> Self {
        Self::new(Kind::Stall(bytes, None))
    }

    /// At most `bytes_per_s` from the first byte on.
    pub fn slow(bytes_per_s: u64) -> Self {
        Self::new(Kind::Slow(bytes_per_s.max(1)))
    }

    /// One wrong bit in the byte at `offset`.
    pub fn flip(offset: u64) -> Self {
        Self::new(Kind::Flip(offset))
    }

    /// The proxy answers 503 without asking the target, with `Retry-After` in seconds if given.
    pub fn unavailable(retry_after_s: Option<u64>) -> Self {
        Self::new(Kind::Answer(503, retry_after_s))
    }

    /// The proxy answers any status without asking the target.
    pub fn answer(status: u16) -> Self {
        Self::new(Kind::Answer(status, None))
    }
}

/// A running proxy; it ends with all its connections when it is dropped.
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
    /// Bytes that may still pass on to clients, once [`FaultProxy::let_through`] was called.
    line: Semaphore,
    is_narrow: AtomicBool,
}

impl FaultProxy {
    /// Starts in front of `target`: `host:port`, or a URL of which only host and port matter. Errors if it means no
    /// address or nothing can listen.
    pub async fn start(target: impl AsRef<str>) -> anyhow::Result<Self> {
        Self::start_on(target, 0)
    }

    /// Like [`FaultProxy::start`], for code without a runtime and for a fixed port (0 picks one).
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
            line: Semaphore::new(0),
            is_narrow: AtomicBool::new(false),
        });
        let (listener, addr) = bind(("127.0.0.1", port))?;
        let task = runtime().spawn(accept(listener, shared.clone())).abort_handle();
        Ok(Self { shared, addr, task })
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Where it listens, as `http://…` without a slash at the end.
    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// The faults; see [`ProxyFault`] for what there is.
    pub fn faults(&self) -> &Faults<Kind> {
        &self.shared.faults
    }

    /// Connections accepted so far, spoiled ones included.
    pub fn connections(&self) -> u64 {
        self.shared.connections.load(Ordering::SeqCst)
    }

    /// Bytes passed on to the target so far.
    pub fn bytes_up(&self) -> u64 {
        self.shared.bytes_up.load(Ordering::SeqCst)
    }

    /// Bytes passed on to clients so far.
    pub fn bytes_down(&self) -> u64 {
        self.shared.bytes_down.load(Ordering::SeqCst)
    }

    /// From now on clients get only so many bytes, over all connections and in turn; again, so many more.
    pub fn let_through(&self, bytes: u64) {
        self.shared.is_narrow.store(true, Ordering::SeqCst);
        self.shared.line.add_permits(usize::try_from(bytes).unwrap_or(Semaphore::MAX_PERMITS));
    }

    /// Ends every open connection now.
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
        while connections.try_join_next().is_some() {}
        let Ok((client, _)) = listener.accept().await else { continue };
        shared.connections.fetch_add(1, Ordering::SeqCst);
        let fault = shared.faults.strike("", "", |_| true);
        let shared = shared.clone();
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
            // A client that has said all it wants to may still listen.
            pending::<()>().await;
        };
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
        if shared.is_narrow.load(Ordering::SeqCst)
            && let Ok(turn) = shared.line.acquire_many(u32::try_from(read).unwrap_or(u32::MAX)).await
        {
            turn.forget();
        }
        let chunk = &mut buffer[..read];
        // Where in this chunk the fault's offset lies, if it does.
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

/// Twenty pieces a second, or single bytes when even that is too fast.
async fn write_slowly(to: &mut WriteHalf<'_>, bytes: &[u8], bytes_per_s: u64) -> std::io::Result<()> {
    let piece = usize::try_from(bytes_per_s / 20).unwrap_or(usize::MAX).max(1);
    for part in bytes.chunks(piece) {
        to.write_all(part).await?;
        tokio::time::sleep(Duration::from_secs_f64(part.len() as f64 / bytes_per_s as f64)).await;
    }
    Ok(())
}

/// Answers a request without looking at more than its head.
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
    // Closing with unread bytes would reset the connection and could lose the answer.
    let drain = async { while client.read(&mut buffer).await.is_ok_and(|read| read > 0) {} };
    let _ = tokio::time::timeout(Duration::from_secs(2), drain).await;
    Ok(())
}
