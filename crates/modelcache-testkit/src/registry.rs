//! Starts a real OCI registry: Debian's `docker-registry` over a folder.
//!
//! Artifacts are pushed with the requests that common tools send: blobs first, then the manifest. A registry with a
//! password requires it from every client (`Basic`); put a [`Gate`](crate::Gate) in front of it for tokens and
//! redirects.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use base64::Engine as _;
use serde_json::{Value, json};

use crate::content::sha256;
use crate::wire::{Answer, request};

const START_DEADLINE: Duration = Duration::from_secs(30);
/// User name of a registry with a password.
pub const USER: &str = "reader";
/// Password of [`USER`].
pub const PASSWORD: &str = "oci-canary-password";
/// `htpasswd` line for both. The registry accepts only bcrypt.
const HTPASSWD: &str = "reader:$2b$05$5a.1eEFWW8ZTi/N5BleNeeNYFqXaucWezJoC0rx8ySDshUIJJXNl2\n";
/// Media type of an image manifest.
pub const IMAGE_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Media type of an image index.
pub const IMAGE_INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// A running registry. It is killed when it is dropped.
#[derive(Debug)]
pub struct Registry {
    child: Child,
    addr: SocketAddr,
    authorization: Option<String>,
}

/// One layer of an artifact to push.
#[derive(Debug, Clone)]
pub struct Layer {
    /// Media type.
    pub media_type: String,
    /// Annotations, as a JSON object.
    pub annotations: Value,
    /// Content.
    pub content: Vec<u8>,
}

impl Layer {
    /// A layer with one annotation.
    pub fn new(media_type: &str, annotation: &str, value: &str, content: impl Into<Vec<u8>>) -> Self {
        Self { media_type: media_type.into(), annotations: json!({ annotation: value }), content: content.into() }
    }
}

impl Registry {
    /// Starts `program` on a free port over `folder`, with [`USER`] and [`PASSWORD`] or without authentication, and
    /// blocks until it answers, at most 30 s. Fails if it exits early or does not answer in time.
    pub fn start(program: &Path, folder: &Path, with_password: bool) -> anyhow::Result<Self> {
        std::fs::create_dir_all(folder)?;
        let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, crate::free_port()?));
        let users = folder.join("htpasswd");
        std::fs::write(&users, HTPASSWD)?;
        let auth = if with_password { json!({"htpasswd": {"realm": "testkit", "path": users}}) } else { json!({}) };
        let config = json!({
            "version": "0.1",
            "log": {"level": "error"},
            "storage": {"filesystem": {"rootdirectory": folder.join("data")}, "delete": {"enabled": true}},
            "http": {"addr": addr.to_string(), "secret": "testkit"},
            "auth": auth,
        });
        // The configuration is YAML, of which JSON is a subset.
        let file = folder.join("config.yml");
        std::fs::write(&file, config.to_string())?;
        let child = Command::new(program)
            .arg("serve")
            .arg(&file)
            .env("OTEL_TRACES_EXPORTER", "none")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let login = base64::engine::general_purpose::STANDARD.encode(format!("{USER}:{PASSWORD}"));
        let authorization = with_password.then(|| format!("Basic {login}"));
        let mut registry = Self { child, addr, authorization };
        let deadline = Instant::now() + START_DEADLINE;
        while registry.ask("GET", "/v2/", &[], b"").is_err() {
            anyhow::ensure!(registry.child.try_wait()?.is_none(), "the registry ended before it answered");
            anyhow::ensure!(Instant::now() < deadline, "the registry did not answer within {START_DEADLINE:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(registry)
    }

    /// Address of the registry.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Pushes a blob and returns its digest (`sha256:…`).
    pub fn push_blob(&self, repository: &str, content: &[u8]) -> anyhow::Result<String> {
        let digest = format!("sha256:{}", sha256(content));
        let begun = self.ask("POST", &format!("/v2/{repository}/blobs/uploads/"), &[], b"")?.want(202)?;
        let place = begun.header("location").context("the answer has no location for the upload")?;
        // The location may be a full URL, and may have a query.
        let path = place.split_once("://").map_or(place, |(_, rest)| &rest[rest.find('/').unwrap_or(rest.len())..]);
        let joint = if path.contains('?') { '&' } else { '?' };
        let target = format!("{path}{joint}digest={digest}");
        self.ask("PUT", &target, &[("Content-Type", "application/octet-stream")], content)?.want(201)?;
        Ok(digest)
    }

    /// Pushes a manifest under a tag or digest and returns its digest.
    pub fn push_manifest(&self, repository: &str, at: &str, media_type: &str, bytes: &[u8]) -> anyhow::Result<String> {
        let target = format!("/v2/{repository}/manifests/{at}");
        self.ask("PUT", &target, &[("Content-Type", media_type)], bytes)?.want(201)?;
        Ok(format!("sha256:{}", sha256(bytes)))
    }

    /// Pushes an artifact under a tag and returns the digest of its manifest.
    pub fn push(&self, repository: &str, tag: &str, artifact_type: &str, layers: &[Layer]) -> anyhow::Result<String> {
        let config = b"{}".as_slice();
        let config_digest = self.push_blob(repository, config)?;
        let mut rows = Vec::new();
        for layer in layers {
            let digest = self.push_blob(repository, &layer.content)?;
            let (media_type, annotations) = (&layer.media_type, &layer.annotations);
            rows.push(json!({
                "mediaType": media_type, "digest": digest, "size": layer.content.len(), "annotations": annotations
            }));
        }
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": IMAGE_MANIFEST,
            "artifactType": artifact_type,
            "config": {"mediaType": artifact_type, "digest": config_digest, "size": config.len()},
            "layers": rows,
        });
        self.push_manifest(repository, tag, IMAGE_MANIFEST, manifest.to_string().as_bytes())
    }

    /// Deletes the manifest with `digest`, together with its tags.
    pub fn delete(&self, repository: &str, digest: &str) -> anyhow::Result<()> {
        self.ask("DELETE", &format!("/v2/{repository}/manifests/{digest}"), &[], b"")?.want(202)?;
        Ok(())
    }

    fn ask(&self, method: &str, target: &str, headers: &[(&str, &str)], body: &[u8]) -> anyhow::Result<Answer> {
        let mut headers = headers.to_vec();
        headers.extend(self.authorization.as_deref().map(|value| ("Authorization", value)));
        request(self.addr, method, target, &headers, body)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
