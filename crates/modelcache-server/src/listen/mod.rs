//! Listening sockets, the accept loop and shutdown.
//!
//! [`serve`] replaces `axum::serve`, which has no limits on connections and no time limits. Each connection is a task
//! (`connection.rs`) with a watched socket (`socket.rs`); the table of connections (`connections.rs`) enforces their
//! number. [`ConnectionLimits`] lists all limits. HTTP/1.1 only: the clients of the daemon use it, and HTTP/2 would
//! need limits of its own on streams, resets and windows.

mod activity;
mod body;
mod connection;
mod connections;
mod counters;
mod limits;
mod socket;
mod systemd;
mod tls;

use std::future::{pending, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use axum::Router;
use modelcache::{Error, ErrorKind, Result};
use rustix::net::sockopt;
use rustix::process::{Resource, getrlimit};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at, sleep, timeout};

pub(crate) use self::body::WithoutLength;
pub use self::connection::Scheme;
pub use self::counters::ConnectionCounters;
pub use self::limits::ConnectionLimits;
pub use self::systemd::{Notifier, watchdog_time};
pub use self::tls::TlsFiles;

use self::connection::Shared;
use self::connections::{Connections, Full};
use self::tls::Tls;

/// Connections that the kernel queues until they are accepted. It lowers the number to `net.core.somaxconn`.
const BACKLOG: u32 = 4096;
/// Time without new connections after one could not be accepted for lack of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Time to close the connections that are cut at the end of the grace time.
const CUT_TIME: Duration = Duration::from_secs(1);
/// Shortest time between two warnings of the same kind.
const WARN_INTERVAL: Duration = Duration::from_secs(60);
/// Silence on a connection after which the kernel asks whether the peer still exists, the time between two such
/// questions, and how many stay unanswered before the kernel closes the connection.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(60), Duration::from_secs(15), 4);

/// Listening sockets.
#[derive(Debug)]
pub struct Listeners(Vec<TcpListener>);

impl Listeners {
    /// Binds all `addresses`. Port 0 takes a free port; [`Self::local_addrs`] tells which. Must be called within a
    /// Tokio runtime.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] if there is no address, or if this machine or user may not use one of them;
    /// [`ErrorKind::Other`] if another program uses it, or for other failures.
    pub fn bind(addresses: &[SocketAddr]) -> Result<Self> {
        if addresses.is_empty() {
            return Err(Error::invalid("there is no address to listen on").hint("set MODEL_CACHE_LISTEN"));
        }
        let has_ipv4 = |port| addresses.iter().any(|address| address.is_ipv4() && address.port() == port);
        let bind = |address: &SocketAddr| {
            // `[::]` also takes the port of IPv4, unless that has a listener of its own.
            let only_v6 = address.is_ipv6() && has_ipv4(address.port());
            bind(*address, only_v6).map_err(|error| bind_error(*address, error))
        };
        addresses.iter().map(bind).collect::<Result<_>>().map(Self)
    }

    /// Takes the sockets that systemd passed to this process (socket activation). Returns `None` if it passed none.
    /// Must be called within a Tokio runtime, and once only.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] if a descriptor is not a listening TCP socket; [`ErrorKind::Other`] if this was called
    /// before.
    pub fn from_systemd() -> Result<Option<Self>> {
        let listeners = systemd::take_listeners()?.into_iter().map(TcpListener::from_std);
        let listeners: Vec<_> = listeners
            .collect::<io::Result<_>>()
            .map_err(|error| Error::new(ErrorKind::Other, "cannot use the sockets from systemd").cause(error))?;
        Ok((!listeners.is_empty()).then_some(Self(listeners)))
    }

    /// Returns the addresses, with the ports that were taken for port 0.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Other`] if the kernel does not tell.
    pub fn local_addrs(&self) -> Result<Vec<SocketAddr>> {
        let addresses = self.0.iter().map(TcpListener::local_addr).collect::<io::Result<_>>();
        addresses
            .map_err(|error| Error::new(ErrorKind::Other, "cannot read the address of a listening socket").cause(error))
    }

    /// Accepts the next connection of any socket. `first` is the socket to ask first; it is advanced, so that a busy
    /// socket does not starve the others.
    async fn accept(&self, first: &mut usize) -> io::Result<(TcpStream, SocketAddr)> {
        poll_fn(|cx| {
            for offset in 0..self.0.len() {
                let at = (*first + offset) % self.0.len();
                if let Poll::Ready(accepted) = self.0[at].poll_accept(cx) {
                    *first = at + 1;
                    return Poll::Ready(accepted);
                }
            }
            Poll::Pending
        })
        .await
    }
}

fn bind(address: SocketAddr, only_v6: bool) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    if only_v6 {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    // Otherwise a restart fails while connections of the previous process are in TIME_WAIT.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

fn bind_error(address: SocketAddr, error: io::Error) -> Error {
    let port = address.port();
    let (kind, problem, hint) = match error.kind() {
        io::ErrorKind::AddrInUse => (
            ErrorKind::Other,
            "another program uses the port",
            format!("stop it (`ss -ltnp 'sport = :{port}'` shows it), or set MODEL_CACHE_LISTEN to another port"),
        ),
        io::ErrorKind::AddrNotAvailable => (
            ErrorKind::Invalid,
            "no interface of this machine has the address",
            "set MODEL_CACHE_LISTEN to an address that `ip address` shows, or to 127.0.0.1:8917".to_owned(),
        ),
        io::ErrorKind::PermissionDenied => (
            ErrorKind::Invalid,
            "this user may not use the port",
            "set MODEL_CACHE_LISTEN to a port from 1024 on, or let systemd pass the socket".to_owned(),
        ),
        _ => (ErrorKind::Other, "the socket cannot be opened", "check MODEL_CACHE_LISTEN".to_owned()),
    };
    Error::new(kind, format!("cannot listen on {address}: {problem}")).hint(hint).cause(error)
}

/// Options of [`serve`].
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// Limits on connections and requests.
    pub limits: ConnectionLimits,
    /// Serve HTTPS, with the certificate of these files, instead of HTTP.
    pub tls: Option<TlsFiles>,
    /// Time between two checks whether the files of `tls` have changed. Default 5 s.
    pub tls_check_interval: Duration,
    /// Time that running requests have to finish at shutdown. Default 25 s: Kubernetes kills a container 30 s after it
    /// has asked it to stop.
    pub grace: Duration,
    /// Messages to the service manager.
    pub notifier: Notifier,
    /// Where connections are counted.
    pub counters: Arc<ConnectionCounters>,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self {
            limits: ConnectionLimits::default(),
            tls: None,
            tls_check_interval: Duration::from_secs(5),
            grace: Duration::from_secs(25),
            notifier: Notifier::default(),
            counters: Arc::default(),
        }
    }
}

/// Serves `router` on `listeners` until `shutdown` completes, and then lets running requests finish, for
/// [`ServeOptions::grace`] at most.
///
/// Handlers find the address of the client in the request extension `ConnectInfo<SocketAddr>` (an IPv4 client of an
/// IPv6 socket as IPv4) and the [`Scheme`] of the connection in another. Dropping the future closes all connections at
/// once.
///
/// # Errors
///
/// Those of [`TlsFiles::check`], before the first connection is accepted.
pub async fn serve(
    listeners: Listeners,
    router: Router,
    options: ServeOptions,
    shutdown: impl Future<Output = ()>,
) -> Result<()> {
    let ServeOptions { mut limits, tls, tls_check_interval, grace, notifier, counters } = options;
    limits.connections = connections_max(limits.connections, getrlimit(Resource::Nofile).current);
    let tls = tls.map(Tls::load).transpose()?;
    let (stop, stopping) = watch::channel(false);
    let connections = Connections::new(limits.connections, limits.connections_per_address, Arc::clone(&counters));
    let shared = Arc::new(Shared { router, tls, limits, counters, stopping });
    let mut background = JoinSet::new();
    if shared.tls.is_some() {
        background.spawn(reload_tls(Arc::clone(&shared), tls_check_interval));
    }

    let mut tasks = JoinSet::new();
    let mut watchdog = notifier.watchdog_interval().map(every);
    let mut first = 0;
    let mut pause = None;
    let mut warnings = Warnings::default();
    let mut shutdown = pin!(shutdown);
    notifier.ready();
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            // From this loop, so that a loop that hangs is noticed.
            () = tick(&mut watchdog) => notifier.watchdog(),
            Some(ended) = tasks.join_next() => log_panic(ended),
            () = until(pause) => pause = None,
            accepted = listeners.accept(&mut first), if pause.is_none() => match accepted {
                Ok((stream, peer)) => open(&shared, &connections, &mut tasks, &mut warnings, stream, peer),
                Err(error) if is_of_connection(&error) => {}
                Err(error) => {
                    shared.counters.count_accept_error();
                    // Frees a descriptor. The connection stays in the kernel's queue meanwhile.
                    connections.evict_one();
                    warnings.accept.warn(|| tracing::error!(
                        %error,
                        "cannot accept connections; raise the limit on open files (LimitNOFILE=, ulimit -n)"
                    ));
                    pause = Some(Instant::now() + ACCEPT_PAUSE);
                }
            },
        }
    }

    notifier.stopping();
    drop(listeners);
    stop.send_replace(true);
    let finish = async {
        loop {
            tokio::select! {
                () = tick(&mut watchdog) => notifier.watchdog(),
                ended = tasks.join_next() => match ended {
                    Some(ended) => log_panic(ended),
                    None => return,
                },
            }
        }
    };
    if timeout(grace, finish).await.is_err() {
        tracing::warn!(connections = tasks.len(), ?grace, "requests did not finish in time and are cut");
        // A handler that blocks its thread cannot be cut, and must not hold up the shutdown.
        let _ = timeout(CUT_TIME, tasks.shutdown()).await;
    }
    Ok(())
}

/// Returns how many connections may be open: at most half of the limit on open files, or
/// [`limits::CONNECTIONS_MIN`] if that is more.
fn connections_max(wanted: usize, open_files: Option<u64>) -> usize {
    let possible = open_files.map_or(usize::MAX, |files| usize::try_from(files / 2).unwrap_or(usize::MAX));
    wanted.min(possible.max(limits::CONNECTIONS_MIN))
}

/// Starts the task of an accepted connection, or refuses it.
fn open(
    shared: &Arc<Shared>,
    connections: &Arc<Connections>,
    tasks: &mut JoinSet<()>,
    warnings: &mut Warnings,
    stream: TcpStream,
    peer: SocketAddr,
) {
    shared.counters.count_accepted();
    let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
    if let Err(error) = set_options(&stream) {
        // The client has closed the connection already.
        tracing::debug!(%peer, %error, "cannot set socket options");
        return;
    }
    // The task takes the stream only if the connection is admitted.
    let mut stream = Some(stream);
    let admitted = connections.admit(peer.ip(), |entry, activity| {
        let (shared, stream) = (Arc::clone(shared), stream.take());
        tasks.spawn(async move {
            if let Some(stream) = stream {
                connection::serve(shared, stream, peer, entry, activity).await;
            }
        })
    });
    if let Err(full) = admitted {
        shared.counters.count_refused();
        let limits = &shared.limits;
        warnings.refused.warn(|| match full {
            Full::Connections => tracing::warn!(
                limit = limits.connections,
                "refusing connections: all allowed ones run requests; raise the limit on connections or on open files"
            ),
            Full::Address => tracing::warn!(
                %peer,
                limit = limits.connections_per_address,
                "refusing connections of a client: all that one address is allowed run requests"
            ),
        });
        if let Some(stream) = stream.filter(|_| shared.tls.is_none()) {
            connection::refuse(&stream);
        }
    }
}

fn set_options(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let (idle, interval, count) = KEEPALIVE;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, idle)?;
    sockopt::set_tcp_keepintvl(stream, interval)?;
    sockopt::set_tcp_keepcnt(stream, count)?;
    Ok(())
}

/// Returns true for a failure of the connection that was to be accepted. Other failures, such as `EMFILE`, persist.
fn is_of_connection(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    matches!(
        error.kind(),
        Kind::ConnectionAborted | Kind::ConnectionReset | Kind::ConnectionRefused | Kind::Interrupted
    )
}

/// Reloads the certificate when its files change. Never returns.
async fn reload_tls(shared: Arc<Shared>, interval: Duration) {
    loop {
        sleep(interval).await;
        let shared = Arc::clone(&shared);
        let reload = move || shared.tls.iter().for_each(Tls::reload_if_changed);
        if let Err(error) = tokio::task::spawn_blocking(reload).await {
            tracing::error!(%error, "cannot check the files of the TLS certificate");
        }
    }
}

fn log_panic(ended: Result<(), JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "a connection ended by a panic");
    }
}

fn every(period: Duration) -> Interval {
    let mut interval = interval_at(Instant::now() + period, period.max(Duration::from_millis(1)));
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

/// Waits for the next tick, or for ever without an interval.
async fn tick(interval: &mut Option<Interval>) {
    match interval {
        Some(interval) => {
            interval.tick().await;
        }
        None => pending().await,
    }
}

/// Waits until a time, or for ever without one.
async fn until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => pending().await,
    }
}

/// When warnings that clients can cause were logged last.
#[derive(Debug, Default)]
struct Warnings {
    accept: Warning,
    refused: Warning,
}

#[derive(Debug, Default)]
struct Warning(Option<Instant>);

impl Warning {
    /// Calls `log`, at most once per [`WARN_INTERVAL`].
    fn warn(&mut self, log: impl FnOnce()) {
        if self.0.is_none_or(|last| last.elapsed() >= WARN_INTERVAL) {
            self.0 = Some(Instant::now());
            log();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_take_at_most_half_of_the_open_files() {
        assert_eq!(connections_max(4096, Some(1024)), 512);
        assert_eq!(connections_max(4096, Some(524_288)), 4096);
        assert_eq!(connections_max(4096, Some(10)), 16);
        assert_eq!(connections_max(4096, None), 4096);
    }
}
