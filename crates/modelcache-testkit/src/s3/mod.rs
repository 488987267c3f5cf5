//! A stand-in for S3: path-style addresses, one key pair, objects as files in a folder.
//!
//! It checks signatures, streams objects, honours conditional requests like S3, and logs all requests; [`S3::faults`]
//! injects failures. An object is the file `<folder>/<bucket>/<key>`, so a test may read, change or remove objects
//! without a request.
//!
//! [`S3::flip_byte`] deliberately leaves the ETag unchanged: only a client that computes a digest can detect the
//! damage.

mod fault;
mod store;

use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use async_trait::async_trait;
use futures::future::BoxFuture;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::header::{DATE, ETAG, HeaderName, HeaderValue, IF_MATCH};
use hyper::{Request, StatusCode};
use percent_encoding::percent_decode_str;
use s3s::auth::{S3Auth, SecretKey};
use s3s::dto::{Timestamp, TimestampFormat};
use s3s::service::{S3Service, S3ServiceBuilder};
use s3s::{S3Result, s3_error};
use tempfile::TempDir;

pub use self::fault::{Kind as S3FaultKind, S3Fault};

use self::fault::Kind;
use self::store::{Store, Uploads};
use crate::content::Content;
use crate::faults::Faults;
use crate::log::{Log, LoggedRequest, Place};
use crate::serve::{Answer, Dropped, Server, answer, bind, lock, serve};

const ACCESS_KEY: &str = "TESTKITACCESSKEY";
const SECRET_KEY: &str = "testkit/secret+key";
const REGION: &str = "us-east-1";

/// A running S3 server. It stops when it is dropped, and removes the folder if it created it.
#[derive(Debug)]
pub struct S3 {
    shared: Arc<Shared>,
    server: Server,
    folder: PathBuf,
    _own_folder: Option<TempDir>,
}

#[derive(Debug)]
struct Shared {
    service: S3Service,
    faults: Arc<Faults<Kind>>,
    log: Log,
    uploads: Uploads,
    /// Seconds by which the server's clock is ahead.
    clock_ahead_s: AtomicI64,
}

impl S3 {
    /// Starts a server over a new folder on a free port. Fails if the folder cannot be created or the server cannot
    /// listen.
    pub async fn start() -> anyhow::Result<Self> {
        let own = tempfile::tempdir()?;
        let mut server = Self::start_in(own.path(), 0)?;
        server._own_folder = Some(own);
        Ok(server)
    }

    /// Starts a server over this folder, for callers without a runtime and for a fixed port (0 picks a free one).
    pub fn start_in(folder: impl AsRef<Path>, port: u16) -> anyhow::Result<Self> {
        let folder = folder.as_ref();
        std::fs::create_dir_all(folder)?;
        let folder = folder.canonicalize()?;
        let faults = Arc::new(Faults::default());
        let store = Store::new(folder.clone(), faults.clone())?;
        let uploads = store.uploads();
        let mut builder = S3ServiceBuilder::new(store);
        builder.set_auth(OneKey);
        let shared = Arc::new(Shared {
            service: builder.build(),
            faults,
            log: Log::default(),
            uploads,
            clock_ahead_s: AtomicI64::new(0),
        });
        let server = serve(bind(("127.0.0.1", port))?, handler(&shared));
        Ok(Self { shared, server, folder, _own_folder: None })
    }

    /// The value for `AWS_ENDPOINT_URL`, without a trailing slash.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.server.addr())
    }

    /// The only accepted access key id.
    pub fn access_key(&self) -> &'static str {
        ACCESS_KEY
    }

    /// The secret of the access key.
    pub fn secret_key(&self) -> &'static str {
        SECRET_KEY
    }

    /// Environment variables that point an S3 client at this server.
    pub fn env(&self) -> Vec<(String, String)> {
        let pairs = [
            ("AWS_ACCESS_KEY_ID", ACCESS_KEY.to_owned()),
            ("AWS_SECRET_ACCESS_KEY", SECRET_KEY.to_owned()),
            ("AWS_REGION", REGION.to_owned()),
            ("AWS_ENDPOINT_URL", self.endpoint()),
            ("AWS_EC2_METADATA_DISABLED", "true".to_owned()),
        ];
        pairs.map(|(name, value)| (name.to_owned(), value)).into()
    }

    /// Creates a bucket if it does not exist. Requests need a name of 3 to 63 characters of `a-z0-9.-`. Fails on errors
    /// of the filesystem.
    pub fn bucket(&self, name: &str) -> io::Result<()> {
        std::fs::create_dir_all(self.folder.join(name))
    }

    /// The armed faults; see [`S3Fault`] for the kinds.
    pub fn faults(&self) -> &Faults<S3FaultKind> {
        &self.shared.faults
    }

    /// Sets the clock of the `Date` header this many seconds ahead. Signatures are accepted regardless.
    pub fn clock_ahead(&self, seconds: i64) {
        self.shared.clock_ahead_s.store(seconds, Ordering::SeqCst);
    }

    /// While down, every connection is closed without an answer.
    pub fn down(&self, down: bool) {
        self.server.set_down(down);
    }

    /// Returns all requests so far.
    pub fn requests(&self) -> Vec<LoggedRequest> {
        self.shared.log.all()
    }

    /// Clears the request log.
    pub fn clear_requests(&self) {
        self.shared.log.clear();
    }

    /// Returns the GETs answered with the content of an object with `part` in its key.
    pub fn object_gets(&self, part: &str) -> Vec<LoggedRequest> {
        let is_object = |seen: &LoggedRequest| {
            let has_key = seen.file.as_ref().is_some_and(|key| key.contains(part));
            seen.method == "GET" && has_key && matches!(seen.status, 200 | 206) && !seen.query.contains("uploadId")
        };
        self.requests().into_iter().filter(is_object).collect()
    }

    /// Returns the path of the object's file, even if the object does not exist.
    pub fn object_path(&self, bucket: &str, key: &str) -> PathBuf {
        self.folder.join(bucket).join(key)
    }

    /// Returns the bytes of an object, or `None` if it does not exist.
    pub fn object(&self, bucket: &str, key: &str) -> Option<Vec<u8>> {
        std::fs::read(self.object_path(bucket, key)).ok()
    }

    /// Returns the keys in a bucket, sorted. Empty if the bucket does not exist.
    pub fn keys(&self, bucket: &str) -> Vec<String> {
        let root = self.folder.join(bucket);
        let (mut folders, mut keys) = (vec![root.clone()], Vec::new());
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                let path = entry.path();
                match path.strip_prefix(&root) {
                    _ if path.is_dir() => folders.push(path),
                    Ok(key) => keys.push(key.to_string_lossy().into_owned()),
                    Err(_) => {}
                }
            }
        }
        keys.sort();
        keys
    }

    /// Returns the keys of multipart uploads that were neither completed nor aborted, sorted.
    pub fn uploads(&self, bucket: &str) -> Vec<String> {
        let uploads = lock(&self.shared.uploads);
        let mut keys: Vec<String> =
            uploads.values().filter(|upload| upload.bucket == bucket).map(|upload| upload.key.clone()).collect();
        keys.sort();
        keys
    }

    /// Makes unfinished uploads with `part` in their key older by this time.
    pub fn age_uploads(&self, part: &str, by: Duration) {
        let mut uploads = lock(&self.shared.uploads);
        uploads.values_mut().filter(|upload| upload.key.contains(part)).for_each(|upload| upload.initiated -= by);
    }

    /// Stores an object without a request, like another tool would. Fails on errors of the filesystem.
    pub fn put(&self, bucket: &str, key: &str, content: impl Into<Content>) -> io::Result<()> {
        let path = self.object_path(bucket, key);
        let _ = std::fs::remove_file(&path);
        // A note with the old ETag would otherwise survive.
        self.forget_note(bucket, key);
        content.into().write_to(path)
    }

    /// Removes an object without a request, like a lifecycle rule would. Fails if it does not exist.
    pub fn remove(&self, bucket: &str, key: &str) -> io::Result<()> {
        self.forget_note(bucket, key);
        std::fs::remove_file(self.object_path(bucket, key))
    }

    /// Inverts one bit of an object; size, modification time and ETag stay. Fails if the object has no byte at
    /// `offset`.
    pub fn flip_byte(&self, bucket: &str, key: &str, offset: u64) -> io::Result<()> {
        let file = std::fs::OpenOptions::new().read(true).write(true).open(self.object_path(bucket, key))?;
        let modified = file.metadata()?.modified()?;
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset)?;
        file.write_all_at(&[byte[0] ^ 1], offset)?;
        file.set_modified(modified)
    }

    fn forget_note(&self, bucket: &str, key: &str) {
        let _ = std::fs::remove_file(store::note_path(&self.folder, bucket, key));
    }
}

/// The number of the next ETag that [`Kind::OtherEtag`] makes up.
static ETAGS: AtomicU64 = AtomicU64::new(0);

/// Authentication with the one key pair.
struct OneKey;

#[async_trait]
impl S3Auth for OneKey {
    async fn get_secret_key(&self, access_key: &str) -> S3Result<SecretKey> {
        if access_key == ACCESS_KEY {
            return Ok(SECRET_KEY.into());
        }
        Err(s3_error!(InvalidAccessKeyId, "The access key id you provided does not exist in our records."))
    }
}

fn handler(
    shared: &Arc<Shared>,
) -> impl Fn(Request<Incoming>) -> BoxFuture<'static, Result<Answer, Dropped>> + Clone + use<> {
    let shared = shared.clone();
    move |request| {
        let shared = shared.clone();
        Box::pin(async move {
            let mut seen = LoggedRequest::of(Place::S3, &request);
            let answer = answered(&shared, &mut seen, request).await;
            seen.status = answer.as_ref().map_or(0, |answer| answer.status().as_u16());
            shared.log.push(seen);
            answer.map(|answer| with_date(answer, shared.clock_ahead_s.load(Ordering::SeqCst)))
        })
    }
}

/// Sets `Date` to a clock that is `ahead_s` seconds ahead. With 0, the server library sets it.
fn with_date(mut answer: Answer, ahead_s: i64) -> Answer {
    if ahead_s != 0 {
        let off = Duration::from_secs(ahead_s.unsigned_abs());
        let time = if ahead_s > 0 { SystemTime::now() + off } else { SystemTime::now() - off };
        let mut text = Vec::new();
        let formatted = Timestamp::from(time).format(TimestampFormat::HttpDate, &mut text);
        if let (Ok(()), Ok(date)) = (formatted, HeaderValue::from_bytes(&text)) {
            answer.headers_mut().insert(DATE, date);
        }
    }
    answer
}

async fn answered(shared: &Shared, seen: &mut LoggedRequest, request: Request<Incoming>) -> Result<Answer, Dropped> {
    let path = percent_decode_str(&seen.path).decode_utf8_lossy().into_owned();
    seen.file = path.trim_start_matches('/').split_once('/').map(|(_, key)| key.to_owned());
    let subject = format!("{path}?{}", percent_decode_str(&seen.query).decode_utf8_lossy());
    // The store itself applies the other two kinds, because they change how a request is processed.
    let struck = shared
        .faults
        .take(&seen.method, &subject, |kind| !matches!(kind, Kind::IgnoreConditions | Kind::NoListPermission));
    let (mut lose_reply, mut other_etag) = (false, None);
    match struck {
        Some(Kind::HangUp) => return Err(Dropped),
        Some(Kind::Delay(time)) => tokio::time::sleep(time).await,
        Some(Kind::LoseReply) => lose_reply = true,
        Some(Kind::Error(status, code, message)) => return refused(request, status, &code, &message, None).await,
        Some(Kind::WrongRegion(region)) => {
            let message = "The bucket you are attempting to access must be addressed using the specified endpoint.";
            return refused(request, 301, "PermanentRedirect", message, Some(&region)).await;
        }
        Some(Kind::OtherEtag(etag)) => {
            let number = ETAGS.fetch_add(1, Ordering::Relaxed);
            let etag = HeaderValue::from_str(&etag.unwrap_or_else(|| format!("\"etag-{number}\"")));
            let etag = etag.map_err(|_| Dropped)?;
            if request.headers().get(IF_MATCH).is_some_and(|wanted| *wanted != etag) {
                return refused(request, 412, "PreconditionFailed", "At least one condition did not hold", None).await;
            }
            other_etag = Some(etag);
        }
        Some(Kind::IgnoreConditions | Kind::NoListPermission) | None => {}
    }
    let mut answer = shared.service.call(request.map(s3s::Body::from)).await.map_err(|_| Dropped)?;
    if let Some(etag) = other_etag.filter(|_| answer.status().is_success()) {
        answer.headers_mut().insert(ETAG, etag);
    }
    // The request took effect; only its answer is lost.
    if lose_reply {
        return Err(Dropped);
    }
    Ok(answer.map(|body| body.boxed_unsync()))
}

/// Returns an S3 error document. Reads the body of the request first, because a client that is still sending would see
/// a reset.
async fn refused(
    mut request: Request<Incoming>,
    status: u16,
    code: &str,
    message: &str,
    region: Option<&str>,
) -> Result<Answer, Dropped> {
    while let Some(frame) = request.body_mut().frame().await {
        drop(frame.map_err(|_| Dropped)?);
    }
    let endpoint = region.map(|region| format!("<Endpoint>s3.{region}.invalid</Endpoint>")).unwrap_or_default();
    let body = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code><Message>{message}</Message>{endpoint}\
         <RequestId>TESTKIT</RequestId></Error>"
    );
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut answer = answer(status, "application/xml", body);
    if let Some(region) = region.and_then(|region| region.parse().ok()) {
        answer.headers_mut().insert(HeaderName::from_static("x-amz-bucket-region"), region);
    }
    Ok(answer)
}

/// Creates a bucket on a server that needs no signature, for example moto.
pub(crate) fn create_bucket_unsigned(addr: std::net::SocketAddr, name: &str) -> anyhow::Result<()> {
    let status = crate::moto::status_of(addr, "PUT", &format!("/{name}")).context("no answer to the bucket's PUT")?;
    anyhow::ensure!(status == 200, "creating bucket {name} answered {status}");
    Ok(())
}
