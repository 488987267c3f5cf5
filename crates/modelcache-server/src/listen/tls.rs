//! TLS from PEM files, reloaded when the files change.

use std::fmt;
use std::fs::{File, Metadata};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use modelcache::mutex::Mutex;
use modelcache::{Error, ErrorKind, Result};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::rustls::client::verify_server_cert_signed_by_trust_anchor;
use tokio_rustls::rustls::crypto::{CryptoProvider, aws_lc_rs};
use tokio_rustls::rustls::server::{ClientHello, ParsedCertificate, ResolvesServerCert};
use tokio_rustls::rustls::sign::CertifiedKey;
use tokio_rustls::rustls::{self, CertificateError, InconsistentKeys, RootCertStore, ServerConfig};
use tokio_rustls::{Accept, TlsAcceptor};

/// Largest PEM file that is read. Chains are a few KiB.
const PEM_BYTES_MAX: u64 = 1 << 20;

/// The PEM files of a server certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate of the server, followed by the intermediate certificates.
    pub certificate: PathBuf,
    /// The private key of the certificate, not encrypted.
    pub key: PathBuf,
}

impl TlsFiles {
    /// Reads the files and checks that the key belongs to the certificate and that the certificate is valid now.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] if a file cannot be read or has no PEM block of its kind, if the key does not belong to
    /// the certificate, or if the certificate has expired or is not valid yet.
    pub fn check(&self) -> Result<()> {
        self.read(&aws_lc_rs::default_provider()).map(|_| ())
    }

    fn read(&self, provider: &CryptoProvider) -> Result<Arc<CertifiedKey>> {
        let (certificate, key) = (self.certificate.display(), self.key.display());
        let pem = read_pem(&self.certificate, "certificate")?;
        let chain: Vec<_> = CertificateDer::pem_slice_iter(&pem).collect::<Result<_, _>>().map_err(|error| {
            Error::invalid(format!("the TLS certificate {certificate} is not valid PEM")).cause(error)
        })?;
        let [first, intermediates @ ..] = &chain[..] else {
            return Err(Error::invalid(format!("the TLS certificate {certificate} has no PEM block CERTIFICATE"))
                .hint("write the certificate of the server and then its intermediates into the file, as PEM"));
        };
        check_validity(first, intermediates, provider).map_err(|problem| {
            Error::invalid(format!("the TLS certificate {certificate} {problem}"))
                .hint("replace the certificate, or correct the clock of this machine")
        })?;
        let pem = read_pem(&self.key, "key")?;
        let key_der = PrivateKeyDer::from_pem_slice(&pem).map_err(|error| {
            Error::invalid(format!("the TLS key {key} has no PEM block of a private key"))
                .hint("the file must hold a private key that is not encrypted (BEGIN PRIVATE KEY)")
                .cause(error)
        })?;
        let certified = CertifiedKey::from_der(chain, key_der, provider).map_err(|error| match error {
            rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
                Error::invalid(format!("the TLS key {key} does not belong to the certificate {certificate}"))
                    .hint("the first certificate of the file must be the server's, and the key must be its key")
            }
            error => Error::invalid(format!("the TLS key {key} or the certificate {certificate} cannot be used"))
                .hint("use an RSA, ECDSA (P-256, P-384, P-521) or Ed25519 key")
                .cause(error),
        })?;
        Ok(Arc::new(certified))
    }
}

fn read_pem(path: &Path, what: &str) -> Result<Vec<u8>> {
    let read = || -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(path)?.take(PEM_BYTES_MAX).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    read().map_err(|error| {
        Error::invalid(format!("cannot read the TLS {what} {}", path.display()))
            .hint("check that the file exists and that the user of the daemon may read it")
            .cause(error)
    })
}

/// Checks the period of validity of a certificate. Returns what is wrong with it.
fn check_validity(
    certificate: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    provider: &CryptoProvider,
) -> Result<(), String> {
    let parsed = ParsedCertificate::try_from(certificate).map_err(|error| format!("cannot be parsed: {error}"))?;
    // Without trust anchors this always fails; a certificate outside its period of validity fails for that reason, as
    // that is checked first.
    let algorithms = provider.signature_verification_algorithms.all;
    let roots = RootCertStore::empty();
    match verify_server_cert_signed_by_trust_anchor(&parsed, &roots, intermediates, UnixTime::now(), algorithms) {
        Err(rustls::Error::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. })) => {
            Err("has expired".to_owned())
        }
        Err(rustls::Error::InvalidCertificate(
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. },
        )) => Err("is not valid yet".to_owned()),
        _ => Ok(()),
    }
}

/// The identity and time of both files, to notice changes. A replaced symbolic link (Kubernetes secrets) changes the
/// inode.
type Version = [Option<(u64, u64, u64, i64, i64)>; 2];

/// Accepts TLS connections with the current certificate.
#[derive(Debug)]
pub(super) struct Tls {
    acceptor: Acceptor,
    current: Arc<Current>,
    files: TlsFiles,
    provider: Arc<CryptoProvider>,
    /// The version that was read last, whether or not it was usable.
    version: Mutex<Version>,
}

struct Acceptor(TlsAcceptor);

impl fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TlsAcceptor")
    }
}

/// The certificate that new connections get.
#[derive(Debug)]
struct Current(Mutex<Arc<CertifiedKey>>);

impl ResolvesServerCert for Current {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0.lock()))
    }
}

impl Tls {
    /// Reads the files. Fails as [`TlsFiles::check`] does.
    pub(super) fn load(files: TlsFiles) -> Result<Self> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        // Taken before reading, so that a change while the files are read is noticed.
        let version = version(&files);
        let current = Arc::new(Current(Mutex::new(files.read(&provider)?)));
        let mut config = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| Error::new(ErrorKind::Other, "cannot configure TLS").cause(error))?
            .with_no_client_auth()
            .with_cert_resolver(Arc::<Current>::clone(&current));
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let acceptor = Acceptor(TlsAcceptor::from(Arc::new(config)));
        Ok(Self { acceptor, current, files, provider, version: Mutex::new(version) })
    }

    pub(super) fn accept<S: AsyncRead + AsyncWrite + Unpin>(&self, stream: S) -> Accept<S> {
        self.acceptor.0.accept(stream)
    }

    /// Reads the files again if they have changed. If the new files cannot be used, the certificate stays as it is until
    /// they change once more. Blocks on the files.
    pub(super) fn reload_if_changed(&self) {
        let version = version(&self.files);
        if std::mem::replace(&mut *self.version.lock(), version) == version {
            return;
        }
        match self.files.read(&self.provider) {
            Ok(key) => {
                *self.current.0.lock() = key;
                tracing::info!(certificate = %self.files.certificate.display(), "TLS certificate reloaded");
            }
            Err(error) => tracing::error!(%error, "cannot reload the TLS certificate; the previous one stays in use"),
        }
    }
}

fn version(files: &TlsFiles) -> Version {
    let identity =
        |metadata: Metadata| (metadata.dev(), metadata.ino(), metadata.len(), metadata.mtime(), metadata.mtime_nsec());
    [&files.certificate, &files.key].map(|path| std::fs::metadata(path).ok().map(identity))
}
