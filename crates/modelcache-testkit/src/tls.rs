//! TLS in front of a stand-in, a certificate authority of one's own, and a proxy that tunnels (`CONNECT`).
//!
//! The TLS front ends the encryption and passes bytes on, so that anything that speaks plain HTTP can be reached by
//! `https`. The proxy leads every name to where the test says, as if it were a resolver, too.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};

use anyhow::Context as _;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;

use crate::serve::{bind, lock, runtime};

/// A certificate authority that nobody trusts by default.
#[derive(Debug)]
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    /// A new one.
    pub fn new() -> anyhow::Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // Not the name that certificates have by default: OpenSSL takes one that names itself for its own issuer.
        params.distinguished_name.push(DnType::CommonName, "stand-in authority");
        Ok(Self(CertifiedIssuer::self_signed(params, KeyPair::generate()?)?))
    }

    /// Writes its certificate as PEM.
    pub fn write_to(&self, path: &Path) -> anyhow::Result<()> {
        std::fs::write(path, self.0.pem()).with_context(|| format!("cannot write {}", path.display()))
    }

    /// What a server needs to speak TLS under these names: a certificate of this authority, and its key.
    pub fn server(&self, names: &[&str]) -> anyhow::Result<Arc<ServerConfig>> {
        let key = KeyPair::generate()?;
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let certificate = CertificateParams::new(names)?.signed_by(&key, &self.0)?;
        let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?;
        let config = ServerConfig::builder().with_no_client_auth();
        Ok(Arc::new(config.with_single_cert(vec![certificate.der().clone()], key)?))
    }
}

/// A listener that ends, with its connections, when it is dropped.
#[derive(Debug)]
struct Listening {
    addr: SocketAddr,
    task: AbortHandle,
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn listen<F>(host: &str, connection: impl Fn(TcpStream) -> F + Send + 'static) -> anyhow::Result<Listening>
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
    Ok(Listening { addr, task: task.abort_handle() })
}

/// TLS in front of something that speaks plain HTTP.
#[derive(Debug)]
pub struct TlsFront(Listening);

impl TlsFront {
    /// Starts one on a free port of `host`, with a certificate of `authority` for `names`.
    pub fn start(host: &str, to: SocketAddr, authority: &Authority, names: &[&str]) -> anyhow::Result<Self> {
        let acceptor = TlsAcceptor::from(authority.server(names)?);
        let front = listen(host, move |stream| {
            let acceptor = acceptor.clone();
            async move {
                let Ok(mut outside) = acceptor.accept(stream).await else { return };
                let Ok(mut inside) = TcpStream::connect(to).await else { return };
                drop(copy_bidirectional(&mut outside, &mut inside).await);
            }
        })?;
        Ok(Self(front))
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.0.addr
    }
}

/// A proxy that tunnels.
#[derive(Debug)]
pub struct ConnectProxy {
    listening: Listening,
    asked: Arc<Mutex<Vec<String>>>,
}

impl ConnectProxy {
    /// Starts one on a free port. It leads `host:port` as in `hosts`, and answers 502 for any other. With `wants`, it
    /// answers 407 to whoever does not send exactly this `Proxy-Authorization`.
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

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.listening.addr
    }

    /// The places that tunnels were asked to, in order.
    pub fn asked(&self) -> Vec<String> {
        lock(&self.asked).clone()
    }
}

async fn tunnel(
    stream: TcpStream,
    log: &Mutex<Vec<String>>,
    wants: Option<&str>,
    hosts: &BTreeMap<String, SocketAddr>,
) -> std::io::Result<()> {
    let mut client = BufReader::new(stream);
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
