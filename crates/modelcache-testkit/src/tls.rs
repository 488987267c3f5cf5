//! A certificate authority, a tunnelling proxy (`CONNECT` and SOCKS 5), and a TLS front for a stand-in.
//!
//! The TLS front terminates TLS and forwards the bytes, so any plain HTTP server becomes reachable by `https`. The
//! proxy maps host names to addresses that the test chooses, so it also replaces DNS.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};

use anyhow::Context as _;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;

use crate::serve::{bind, lock, runtime};

/// A certificate authority. Clients have to be configured to trust it.
#[derive(Debug)]
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    /// Creates an authority with a new key.
    pub fn new() -> anyhow::Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // Replace the default common name. OpenSSL takes a certificate whose subject equals its issuer for self-signed,
        // and all certificates would have the default name.
        params.distinguished_name.push(DnType::CommonName, "stand-in authority");
        Ok(Self(CertifiedIssuer::self_signed(params, KeyPair::generate()?)?))
    }

    /// Writes the authority's certificate as PEM.
    pub fn write_to(&self, path: &Path) -> anyhow::Result<()> {
        std::fs::write(path, self.0.pem()).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Returns a TLS server configuration with a new certificate for `names`, signed by this authority.
    pub fn server(&self, names: &[&str]) -> anyhow::Result<Arc<ServerConfig>> {
        let key = KeyPair::generate()?;
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let certificate = CertificateParams::new(names)?.signed_by(&key, &self.0)?;
        let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?;
        let config = ServerConfig::builder().with_no_client_auth();
        Ok(Arc::new(config.with_single_cert(vec![certificate.der().clone()], key)?))
    }
}

/// A listener that stops, with its connections, when it is dropped.
#[derive(Debug)]
struct ListenerGuard {
    addr: SocketAddr,
    task: AbortHandle,
}

impl Drop for ListenerGuard {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn listen<F>(host: &str, connection: impl Fn(TcpStream) -> F + Send + 'static) -> anyhow::Result<ListenerGuard>
where
    F: Future<Output = ()> + Send + 'static,
{
    let (listener, addr) = bind((host, 0))?;
    let accept = async move {
        let mut connections = JoinSet::new();
        loop {
            while connections.try_join_next().is_some() {}
            if let Ok((stream, _)) = TcpListener::accept(&listener).await {
                connections.spawn(connection(stream));
            }
        }
    };
    let task = runtime().spawn(async move {
        let () = accept.await;
    });
    Ok(ListenerGuard { addr, task: task.abort_handle() })
}

/// A TLS front for a plain HTTP server.
#[derive(Debug)]
pub struct TlsFront(ListenerGuard);

impl TlsFront {
    /// Starts a front on a free port of `host` that forwards to `to`, with a certificate of `authority` for `names`.
    pub fn start(host: &str, to: SocketAddr, authority: &Authority, names: &[&str]) -> anyhow::Result<Self> {
        let acceptor = TlsAcceptor::from(authority.server(names)?);
        let front = listen(host, move |stream| {
            let acceptor = acceptor.clone();
            async move {
                // A failed handshake or connection drops the client.
                let Ok(mut outside) = acceptor.accept(stream).await else { return };
                let Ok(mut inside) = TcpStream::connect(to).await else { return };
                drop(copy_bidirectional(&mut outside, &mut inside).await);
            }
        })?;
        Ok(Self(front))
    }

    /// Address of the front.
    pub fn addr(&self) -> SocketAddr {
        self.0.addr
    }
}

/// A proxy for `CONNECT` tunnels and SOCKS 5.
#[derive(Debug)]
pub struct ConnectProxy {
    listening: ListenerGuard,
    asked: Arc<Mutex<Vec<String>>>,
}

impl ConnectProxy {
    /// Starts a proxy on a free port. `hosts` maps `host:port` to addresses; any other target is answered with 502.
    /// With `wants`, a request without exactly this `Proxy-Authorization` is answered with 407.
    pub fn start(hosts: BTreeMap<String, SocketAddr>, wants: Option<&str>) -> anyhow::Result<Self> {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (log, wants, hosts) = (asked.clone(), wants.map(str::to_owned), Arc::new(hosts));
        let listening = listen("127.0.0.1", move |stream| {
            let (log, wants, hosts) = (log.clone(), wants.clone(), hosts.clone());
            async move {
                drop(tunnel(stream, &log, wants.as_deref(), &hosts).await);
            }
        })?;
        Ok(Self { listening, asked })
    }

    /// Address of the proxy.
    pub fn addr(&self) -> SocketAddr {
        self.listening.addr
    }

    /// Returns the targets of all tunnel requests, in order.
    pub fn asked(&self) -> Vec<String> {
        lock(&self.asked).clone()
    }
}

/// Version 5 of SOCKS, the first byte of each of its messages (RFC 1928).
const SOCKS_VERSION: u8 = 5;

/// Serves a client that speaks SOCKS 5, without authentication and with host names.
async fn socks_tunnel(
    mut client: BufReader<TcpStream>,
    log: &Mutex<Vec<String>>,
    hosts: &BTreeMap<String, SocketAddr>,
) -> std::io::Result<()> {
    // The greeting lists authentication methods. The answer selects "no authentication" (0).
    let mut greeting = [0; 2];
    client.read_exact(&mut greeting).await?;
    client.read_exact(&mut vec![0; greeting[1].into()]).await?;
    client.write_all(&[SOCKS_VERSION, 0]).await?;
    // Version, command, reserved, address type (3 is a host name), length of the name.
    let mut request = [0; 5];
    client.read_exact(&mut request).await?;
    let mut name = vec![0; request[4].into()];
    client.read_exact(&mut name).await?;
    let port = client.read_u16().await?;
    let target = format!("{}:{port}", String::from_utf8_lossy(&name));
    lock(log).push(target.clone());
    let answer = |code: u8| [SOCKS_VERSION, code, 0, 1, 0, 0, 0, 0, 0, 0];
    match hosts.get(&target) {
        Some(to) => {
            let mut inside = TcpStream::connect(to).await?;
            client.write_all(&answer(0)).await?;
            copy_bidirectional(&mut client, &mut inside).await.map(drop)
        }
        // 4: host unreachable.
        None => client.write_all(&answer(4)).await,
    }
}

async fn tunnel(
    stream: TcpStream,
    log: &Mutex<Vec<String>>,
    wants: Option<&str>,
    hosts: &BTreeMap<String, SocketAddr>,
) -> std::io::Result<()> {
    let mut client = BufReader::new(stream);
    if client.fill_buf().await?.first() == Some(&SOCKS_VERSION) {
        return socks_tunnel(client, log, hosts).await;
    }
    let (mut target, mut authorization) = (String::new(), None);
    loop {
        let mut line = String::new();
        if client.read_line(&mut line).await? == 0 || line.trim_end().is_empty() {
            break;
        }
        if let Some(rest) = line.strip_prefix("CONNECT ") {
            target = rest.split(' ').next().unwrap_or_default().to_owned();
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("proxy-authorization")
        {
            authorization = Some(value.trim().to_owned());
        }
    }
    lock(log).push(target.clone());
    let refusal = match hosts.get(&target) {
        // Authentication first, then the target.
        _ if wants.is_some() && authorization.as_deref() != wants => "407 Proxy Authentication Required",
        None => "502 Bad Gateway",
        Some(to) => {
            let mut inside = TcpStream::connect(to).await?;
            client.write_all(b"HTTP/1.1 200 Connection Established\r\n\r\n").await?;
            copy_bidirectional(&mut client, &mut inside).await?;
            return Ok(());
        }
    };
    client.write_all(format!("HTTP/1.1 {refusal}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").as_bytes()).await
}
