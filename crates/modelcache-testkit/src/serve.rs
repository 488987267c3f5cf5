//! Listeners and answers shared by the stand-ins.
//!
//! One small runtime carries all servers of the process. A [`Server`] stops, with its connections, when it is dropped.
//! While it is `down` it closes every new connection.

use std::convert::Infallible;
use std::future::Future;
use std::net::{SocketAddr, TcpListener as StdListener, ToSocketAddrs};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use anyhow::Context as _;
use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::header::{CONTENT_LENGTH, CONTENT_TYPE};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::task::{AbortHandle, JoinSet};

pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;
pub(crate) type Body = UnsyncBoxBody<Bytes, BoxError>;
pub(crate) type Answer = Response<Body>;

/// Returns a port of 127.0.0.1 that nothing listens on, for a program that is started with it. The port is below those
/// that the kernel assigns, so that no other connection or server takes it meanwhile.
///
/// # Errors
/// All ports are taken.
pub fn free_port() -> std::io::Result<u16> {
    const PORTS: Range<u16> = 20_000..32_000;
    /// Number of ports that a process may take before it meets those of the process that was started after it.
    const PORTS_PER_PROCESS: u32 = 7;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let first = std::process::id().wrapping_mul(PORTS_PER_PROCESS);
    for _ in PORTS {
        let number = first.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
        let offset = number % u32::from(PORTS.end - PORTS.start);
        let port = PORTS.start + u16::try_from(offset).unwrap_or_default();
        if StdListener::bind(("127.0.0.1", port)).is_ok() {
            return Ok(port);
        }
    }
    Err(std::io::ErrorKind::AddrInUse.into())
}

/// Error of a handler that drops the connection without an answer.
#[derive(Debug)]
pub(crate) struct Dropped;

impl std::fmt::Display for Dropped {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("connection dropped on purpose")
    }
}

impl std::error::Error for Dropped {}

/// Locks a mutex, even if a test thread panicked while holding it.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns the runtime shared by all stand-ins of this process. It is never shut down.
pub(crate) fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("testkit")
            .enable_all()
            .build()
            .expect("a test process can start two threads")
    })
}

/// A listening task, with a switch that makes it drop connections.
#[derive(Debug)]
pub(crate) struct Server {
    addr: SocketAddr,
    down: Arc<AtomicBool>,
    task: AbortHandle,
}

impl Server {
    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// While down, new connections are closed at once, and open ones at their next request.
    pub(crate) fn set_down(&self, down: bool) {
        self.down.store(down, Ordering::SeqCst);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Binds `addr` for use on the shared runtime.
pub(crate) fn bind(addr: impl ToSocketAddrs + std::fmt::Debug) -> anyhow::Result<(TcpListener, SocketAddr)> {
    let listener = StdListener::bind(&addr).with_context(|| format!("cannot listen on {addr:?}"))?;
    listener.set_nonblocking(true)?;
    let addr = listener.local_addr()?;
    let _inside = runtime().enter();
    Ok((TcpListener::from_std(listener)?, addr))
}

/// Answers HTTP/1.1 requests on `listener` with `handler` until the server is dropped.
pub(crate) fn serve<H, F>((listener, addr): (TcpListener, SocketAddr), handler: H) -> Server
where
    H: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Result<Answer, Dropped>> + Send + 'static,
{
    let down = Arc::new(AtomicBool::new(false));
    let accept = accept(listener, down.clone(), handler);
    let task = runtime().spawn(accept).abort_handle();
    Server { addr, down, task }
}

async fn accept<H, F>(listener: TcpListener, down: Arc<AtomicBool>, handler: H) -> Infallible
where
    H: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Result<Answer, Dropped>> + Send + 'static,
{
    // Owned by this task, so that aborting the task closes the connections.
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok((stream, _)) = listener.accept().await else { continue };
        // Dropping the stream closes the connection.
        if down.load(Ordering::SeqCst) {
            continue;
        }
        let _ = stream.set_nodelay(true);
        let (down, handler) = (down.clone(), handler.clone());
        let service = service_fn(move |request| {
            // Checked for each request, because a connection may outlive the switch.
            let answer = (!down.load(Ordering::SeqCst)).then(|| handler(request));
            async move {
                match answer {
                    Some(answer) => answer.await,
                    None => Err(Dropped),
                }
            }
        });
        let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
        // Errors are expected here: a client disconnected, or a fault dropped the connection.
        connections.spawn(async move { drop(connection.await) });
    }
}

/// Returns a body that is held in memory.
pub(crate) fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// Builds an answer with a body held in memory.
pub(crate) fn answer(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Answer {
    let body = body.into();
    let length = body.len();
    let mut answer = Response::new(full(body));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, content_type.parse().expect("a content type is a header value"));
    answer.headers_mut().insert(CONTENT_LENGTH, length.into());
    answer
}
