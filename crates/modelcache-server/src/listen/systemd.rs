//! systemd: messages to the service manager (`sd_notify(3)`), and listening sockets from it (`sd_listen_fds(3)`).

use std::ffi::OsStr;
use std::net::TcpListener;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use modelcache::{Error, ErrorKind, Result};
use rustix::io::FdFlags;

/// Sends messages to the service manager. The default sends none.
#[derive(Debug, Clone, Default)]
pub struct Notifier {
    target: Option<Arc<(UnixDatagram, SocketAddr)>>,
    watchdog: Option<Duration>,
}

impl Notifier {
    /// Creates a notifier. `socket` is the value of `NOTIFY_SOCKET`: a path, or `@` and an abstract name. Without it
    /// nothing is sent. `watchdog` is the time after which systemd restarts a daemon that sent nothing; see
    /// [`watchdog_time`].
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] if `socket` is no address of a Unix socket.
    pub fn new(socket: Option<&OsStr>, watchdog: Option<Duration>) -> Result<Self> {
        let Some(socket) = socket.filter(|socket| !socket.is_empty()) else { return Ok(Self::default()) };
        let address = match socket.as_bytes() {
            #[cfg(target_os = "linux")]
            [b'@', name @ ..] => {
                use std::os::linux::net::SocketAddrExt as _;
                SocketAddr::from_abstract_name(name)
            }
            _ => SocketAddr::from_pathname(socket),
        };
        let target = address.and_then(|address| {
            let sender = UnixDatagram::unbound()?;
            // A service manager that does not read must not stop the daemon.
            sender.set_nonblocking(true)?;
            Ok(Arc::new((sender, address)))
        });
        let target = target.map_err(|error| {
            Error::invalid(format!("NOTIFY_SOCKET={} cannot be used", socket.display()))
                .hint("unset NOTIFY_SOCKET, unless systemd started the daemon")
                .cause(error)
        })?;
        Ok(Self { target: Some(target), watchdog })
    }

    /// Sets the text that `systemctl status` shows.
    pub fn status(&self, text: &str) {
        self.send(&format!("STATUS={}", text.replace(char::is_control, " ")));
    }

    /// Tells that the daemon accepts connections.
    pub(super) fn ready(&self) {
        self.send("READY=1");
    }

    /// Tells that the daemon is shutting down.
    pub(super) fn stopping(&self) {
        self.send("STOPPING=1");
    }

    /// Tells that the daemon works.
    pub(super) fn watchdog(&self) {
        self.send("WATCHDOG=1");
    }

    /// Returns the time between two calls of [`Self::watchdog`]: half of what systemd allows.
    pub(super) fn watchdog_interval(&self) -> Option<Duration> {
        self.target.as_ref()?;
        self.watchdog.map(|time| time / 2)
    }

    fn send(&self, message: &str) {
        let Some((sender, address)) = self.target.as_deref() else { return };
        if let Err(error) = sender.send_to_addr(message.as_bytes(), address) {
            tracing::debug!(%error, message, "cannot send to the service manager");
        }
    }
}

/// Returns the time after which systemd restarts a silent daemon, from the values of `WATCHDOG_USEC` and
/// `WATCHDOG_PID`. `None` if there is none, or if it is meant for another process.
pub fn watchdog_time(watchdog_usec: Option<&str>, watchdog_pid: Option<&str>) -> Option<Duration> {
    if watchdog_pid.is_some_and(|pid| pid.parse() != Ok(std::process::id())) {
        return None;
    }
    let usec = watchdog_usec?.parse().ok()?;
    (usec > 0).then(|| Duration::from_micros(usec))
}

/// Takes the listening sockets that systemd passed to this process. Empty if it passed none.
///
/// This reads `LISTEN_FDS`, `LISTEN_FDNAMES` and `LISTEN_PID`, the only environment variables that this crate reads.
/// `sd_listen_fds` reads them itself, and returns owned descriptors only if `LISTEN_PID` is this process.
pub(super) fn take_listeners() -> Result<Vec<TcpListener>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::Relaxed) {
        // A second owner of a descriptor could close it while the first one uses it.
        return Err(Error::new(ErrorKind::Other, "the sockets of systemd have already been taken"));
    }
    let hint = "the unit of type socket must have ListenStream= with an IP address and port, and Accept=no";
    let passed = sd_listen_fds::get().map_err(|error| {
        Error::invalid("LISTEN_FDS or LISTEN_PID is malformed")
            .hint("unset both variables, unless systemd started the daemon")
            .cause(error)
    })?;
    let mut listeners = Vec::new();
    for (name, descriptor) in passed {
        let listener = TcpListener::from(descriptor.into_std());
        let name = name.unwrap_or_default();
        let prepare = || {
            // systemd leaves the descriptors open for child processes.
            rustix::io::fcntl_setfd(&listener, FdFlags::CLOEXEC)?;
            listener.set_nonblocking(true)?;
            // Fails for sockets that are not IP sockets.
            listener.local_addr()?;
            rustix::net::sockopt::socket_acceptconn(&listener).map_err(std::io::Error::from)
        };
        let listening = prepare().map_err(|error: std::io::Error| {
            Error::invalid(format!("descriptor `{name}` from systemd is not a TCP socket")).hint(hint).cause(error)
        })?;
        if !listening {
            return Err(Error::invalid(format!("descriptor `{name}` from systemd does not listen")).hint(hint));
        }
        listeners.push(listener);
    }
    Ok(listeners)
}
