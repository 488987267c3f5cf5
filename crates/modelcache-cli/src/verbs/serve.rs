//! `serve`: runs the HTTP daemon.

use super::Session;
use crate::{exit, human};
use clap::Args;
use modelcache::config::ByteBound;
use modelcache::settings::ServeSettings;
use modelcache::{Cache, Config, Error, ErrorKind, Reference, Result};
use modelcache_server::{
    Daemon, Listeners, Notifier, Options, Scheme, ServeOptions, TlsFiles, complete_config, watchdog_time,
};
use std::net::SocketAddr;

/// Serve the cache over HTTP, and be a Hugging Face endpoint
///
/// Clients of the Hub work unchanged with HF_ENDPOINT set to the address of the daemon. Its own routes are below
/// /cache, the probes are /livez and /readyz, metrics for Prometheus are at /metrics, and / is a status page. The
/// references on the command line, and those of MODEL_CACHE_PREWARM, are downloaded first: /readyz answers 503 until
/// they are on disk.
#[derive(Debug, Args)]
pub(crate) struct Serve {
    #[arg(value_name = "REF", help = super::reference_forms())]
    references: Vec<String>,
    /// Check the configuration, the cache directory, the certificate and the addresses, and end
    #[arg(long)]
    check: bool,
}

impl Serve {
    pub(crate) async fn run(&self, session: &Session<'_>) -> Result<u8> {
        let settings = &session.serve;
        let tls = tls_files(settings)?;
        let from_systemd = Listeners::from_systemd()?;
        let addresses = from_systemd.as_ref().map_or(Ok(settings.listen.clone()), Listeners::local_addrs)?;
        require_token(&addresses, settings)?;
        let mut config = session.config.clone();
        complete_config(&mut config);
        let cache = Cache::open(config)?;
        let prewarm = self.prewarm(settings, &cache)?;
        if let Some(tls) = &tls {
            tls.check()?;
        }
        let listeners = match from_systemd {
            Some(listeners) => listeners,
            None => match Listeners::bind(&settings.listen) {
                // The daemon itself may be running, or systemd may hold its socket.
                Err(error) if self.check && error.kind() == ErrorKind::Other => {
                    tracing::warn!(%error, "the rest of the configuration is usable");
                    return Ok(exit::DONE);
                }
                listeners => listeners?,
            },
        };
        let addresses = listeners.local_addrs()?;
        let admin = match settings.admin_listen.as_slice() {
            [] => None,
            addresses => Some(Listeners::bind(addresses)?),
        };
        let scheme = if tls.is_some() { Scheme::Https } else { Scheme::Http }.as_str();
        let urls = addresses.iter().map(|address| format!("{scheme}://{address}")).collect::<Vec<_>>();
        if self.check {
            session.output.message(&format!("ready to serve {} at {}", shown_dir(cache.config()), urls.join(", ")));
            return Ok(exit::DONE);
        }
        let daemon = Daemon::start(
            cache.clone(),
            Options {
                token: settings.token.clone(),
                insecure: settings.insecure,
                allow_any_origin: settings.allow_any_origin,
                auth_stale: settings.auth_stale,
                prewarm,
                has_admin_listener: admin.is_some(),
                listen: urls.clone(),
                doctor: Some(super::doctor::for_daemon(session.global, cache.config())),
                ..Options::default()
            },
        );
        for url in &urls {
            session.output.message(&format!("serving {} at {url}", shown_dir(cache.config())));
        }
        if let Some(url) = urls.first() {
            session.output.message(&format!("for Hugging Face clients: export HF_ENDPOINT={url}"));
        }
        let variable = |name| std::env::var_os(name);
        let text = |name| variable(name).and_then(|value| value.into_string().ok());
        let watchdog = watchdog_time(text("WATCHDOG_USEC").as_deref(), text("WATCHDOG_PID").as_deref());
        let notifier = Notifier::new(variable("NOTIFY_SOCKET").as_deref(), watchdog)?;
        notifier.status(&format!("serving at {}", urls.join(", ")));
        let options = ServeOptions { tls, notifier, counters: daemon.connection_counters(), ..ServeOptions::default() };
        let (stop, stopping) = tokio::sync::watch::channel(false);
        let stopped = || {
            let mut stopping = stopping.clone();
            async move {
                let _ = stopping.wait_for(|stop| *stop).await;
            }
        };
        let main = modelcache_server::serve(listeners, daemon.router(), options, stopped());
        let admin = async {
            match admin {
                Some(listeners) => {
                    let router = daemon.admin_router();
                    modelcache_server::serve(listeners, router, ServeOptions::default(), stopped()).await
                }
                None => Ok(()),
            }
        };
        let signal = async {
            let signal = crate::signals::next().await;
            session.output.message(&format!("{}: finishing the running requests", signal.name()));
            stop.send_replace(true);
        };
        let serving = async { tokio::try_join!(main, admin) };
        tokio::pin!(serving);
        tokio::select! {
            ended = &mut serving => ended?,
            () = signal => serving.await?,
        };
        // Wait until the downloads that are complete are published.
        cache.wait_for_fills().await;
        Ok(exit::DONE)
    }

    /// Returns the references to get at the start: those of the settings, then those of the command line.
    fn prewarm(&self, settings: &ServeSettings, cache: &Cache) -> Result<Vec<Reference>> {
        settings.prewarm.iter().chain(&self.references).map(|text| cache.reference(text)).collect()
    }
}

/// Refuses to listen without a token on an address that other machines can reach, unless `insecure` is set.
fn require_token(addresses: &[SocketAddr], settings: &ServeSettings) -> Result<()> {
    let is_open = |address: &&SocketAddr| !address.ip().to_canonical().is_loopback();
    match addresses.iter().find(is_open) {
        Some(address) if settings.token.is_none() && !settings.insecure => Err(Error::invalid(format!(
            "{address} can be reached from other machines, and there is no token"
        ))
        .hint("set MODEL_CACHE_TOKEN (openssl rand -hex 32), or listen on 127.0.0.1, or accept everyone: --insecure")),
        _ => Ok(()),
    }
}

fn tls_files(settings: &ServeSettings) -> Result<Option<TlsFiles>> {
    match (settings.tls_certificate.clone(), settings.tls_key.clone()) {
        (Some(certificate), Some(key)) => Ok(Some(TlsFiles { certificate, key })),
        (None, None) => Ok(None),
        _ => Err(Error::invalid("a certificate and its key belong together")
            .hint("set both MODEL_CACHE_TLS_CERTIFICATE and MODEL_CACHE_TLS_KEY, or neither")),
    }
}

/// Returns the directory and its budget, for messages.
fn shown_dir(config: &Config) -> String {
    let budget = match config.max_bytes {
        ByteBound::Bytes(bytes) => human::bytes(bytes),
        ByteBound::Percent(percent) => format!("{percent} % of the filesystem"),
    };
    format!("{} (at most {budget})", config.dir.display())
}
