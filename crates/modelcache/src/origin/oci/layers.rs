//! Parsing of registry manifests: the files of an artifact and the blob of each.
//!
//! Each layer is one file, named by its annotation or, without one, by its digest. The configuration blob is not a
//! file. An archive is stored packed, and its file name ends with `.tar`, `.tar.gz` or `.tar.zst`.

use crate::digest::{Digest, Provenance};
use crate::error::{Error, ErrorKind, Result};
use crate::human::first_few;
use crate::key::{ArtifactKey, FilePath};
use crate::manifest::{FileDetails, FileEntry, Manifest, Shape};
use crate::origin::no_files;
use crate::printable;
use crate::reference::OciRepo;
use crate::reference::oci::parse_digest;
use serde::Deserialize;
use std::collections::{BTreeMap, HashMap};

/// Maximum number of manifests listed in the hint if an index has several.
const CHOICES_LISTED_MAX: usize = 8;

/// The content of a manifest: the files, and the blob of each.
pub(super) struct Layers {
    pub(super) manifest: Manifest,
    pub(super) blobs: HashMap<FilePath, Digest>,
}

/// A parsed manifest or index.
pub(super) enum Document {
    Layers(Vec<Descriptor>),
    Index(Vec<Descriptor>),
}

/// The entry of a blob in a manifest, or of a manifest in an index.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    annotations: Option<BTreeMap<String, String>>,
    platform: Option<Platform>,
}

#[derive(Deserialize)]
struct Platform {
    os: Option<String>,
    architecture: Option<String>,
}

impl Document {
    /// Parses a manifest or an index. They are distinguished by their fields, because the media type is optional.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self> {
        #[derive(Deserialize)]
        struct Fields {
            layers: Option<Vec<Descriptor>>,
            blobs: Option<Vec<Descriptor>>,
            manifests: Option<Vec<Descriptor>>,
        }
        let fields: Fields = serde_json::from_slice(bytes)
            .map_err(|cause| Error::corrupt("the response of the registry is not a manifest").cause(cause))?;
        // `blobs` is the field of the older artifact manifest.
        match (fields.manifests, fields.layers.or(fields.blobs)) {
            (Some(manifests), None) => Ok(Self::Index(manifests)),
            (None, Some(layers)) => Ok(Self::Layers(layers)),
            (None, None) => Err(Error::new(ErrorKind::Other, "the manifest lists neither layers nor manifests")
                .hint("manifests of docker's schema 1 are not supported; push the artifact again with a newer tool")),
            (Some(_), Some(_)) => Err(Error::corrupt("the manifest lists both layers and manifests")),
        }
    }
}

/// Returns the only manifest of an index. Entries with the platform `unknown` (attestations) are ignored.
///
/// # Errors
/// `NotFound` if there is none. `Invalid` if there are several; the hint lists them, so that the caller can select one.
pub(super) fn single_manifest(repo: &OciRepo, manifests: Vec<Descriptor>) -> Result<Digest> {
    let is_attestation =
        |entry: &Descriptor| entry.platform.as_ref().is_some_and(|platform| platform.os.as_deref() == Some("unknown"));
    let choices: Vec<Descriptor> = manifests.into_iter().filter(|entry| !is_attestation(entry)).collect();
    match choices.as_slice() {
        [only] => only.digest(),
        [] => Err(Error::not_found("the index lists no manifest")),
        several => {
            let place = format!("oci://{}/{}", repo.registry, repo.repository);
            let listed = first_few(several.iter().map(|entry| entry.reference(&place)), CHOICES_LISTED_MAX);
            Err(Error::invalid(format!(
                "the index offers {} manifests, and the reference does not select one",
                several.len()
            ))
            .hint(format!("name one by its digest: {listed}")))
        }
    }
}

impl Descriptor {
    /// Parses the digest, which must be SHA-256.
    fn digest(&self) -> Result<Digest> {
        parse_digest(&self.digest).map_err(|error| {
            Error::corrupt(format!("the manifest lists {:?}: {}", self.digest, error.message()))
                .hint(error.hint_text().unwrap_or_default())
        })
    }

    /// Returns the value of an annotation.
    fn annotation(&self, name: &str) -> Option<&str> {
        Some(self.annotations.as_ref()?.get(name)?.as_str())
    }

    /// Returns the reference to this manifest of an index, with its platform.
    fn reference(&self, place: &str) -> String {
        let quoted = |text: &Option<String>| printable::quote(text.as_deref().unwrap_or("?"));
        match &self.platform {
            Some(platform) => {
                format!("{place}@{} ({}/{})", self.digest, quoted(&platform.os), quoted(&platform.architecture))
            }
            None => format!("{place}@{}", self.digest),
        }
    }

    /// Returns the file name ending for an archive of this media type; `None` if it is not an archive.
    fn archive_ending(&self) -> Option<&'static str> {
        let media_type = self.media_type.as_str();
        // OCI writes `+gzip`, docker `.gzip`.
        [(".tar", ".tar"), (".tar+gzip", ".tar.gz"), (".tar.gzip", ".tar.gz"), (".tar+zstd", ".tar.zst")]
            .into_iter()
            .find(|(ending, _)| media_type.ends_with(ending))
            .map(|(_, ending)| ending)
    }

    /// Returns true if the layer is the packed form of the file or folder that its name denotes. ORAS uses archive
    /// media types also for plain files and marks packed folders with an annotation.
    fn is_packed_content(&self) -> bool {
        let packed_types =
            ["application/vnd.cncf.model.", "application/vnd.cnai.model.", "application/vnd.kitops.modelkit."];
        self.annotation("io.deis.oras.content.unpack").is_some_and(|unpack| unpack == "true")
            || packed_types.iter().any(|prefix| self.media_type.starts_with(prefix))
    }

    /// Returns the path of the layer's file: from its annotation, else from its digest.
    fn path(&self, digest: &Digest) -> Result<FilePath> {
        const NAMES: [&str; 3] =
            ["org.cncf.model.filepath", "org.cnai.model.filepath", "org.opencontainers.image.title"];
        let archive_ending = self.archive_ending();
        // The name given by ModelPack comes before the one of ORAS.
        let named = NAMES.iter().find_map(|name| self.annotation(name)).filter(|name| !name.is_empty());
        let Some(name) = named else { return FilePath::new(&format!("{digest}{}", archive_ending.unwrap_or(".bin"))) };
        // ORAS keeps a leading `./` of the path that was pushed.
        let plain = name.strip_prefix("./").unwrap_or(name);
        let plain = if self.is_packed_content() { plain.trim_end_matches('/') } else { plain };
        let path = match archive_ending.filter(|_| self.is_packed_content()) {
            // The name of an archive may have the ending already.
            Some(ending) if !has_archive_ending(plain) => format!("{plain}{ending}"),
            _ => plain.to_owned(),
        };
        FilePath::new(&path).map_err(|error| {
            Error::corrupt(format!("the manifest names a layer {name:?}: {}", error.message()))
                .hint("nothing was downloaded: an artifact with an unsafe file name is rejected as a whole")
        })
    }
}

/// Returns true if `name` ends like the name of an archive.
fn has_archive_ending(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    [".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst"].iter().any(|ending| name.ends_with(ending))
}

impl Layers {
    /// Builds the manifest of an artifact from the layers of its OCI manifest.
    pub(super) fn new(key: &ArtifactKey, layers: Vec<Descriptor>) -> Result<Self> {
        /// Media type of the placeholder for an absent blob.
        const EMPTY_BLOB_TYPE: &str = "application/vnd.oci.empty.v1+json";
        let (mut manifest, mut blobs) = (Manifest::new(key.clone(), Shape::Tree), HashMap::new());
        for layer in layers.into_iter().filter(|layer| layer.media_type != EMPTY_BLOB_TYPE) {
            let digest = layer.digest()?;
            let path = layer.path(&digest)?;
            let provenance = Some(Provenance::Origin);
            let entry =
                FileEntry::with(layer.size, FileDetails { sha256: Some(digest), provenance, ..FileDetails::default() });
            match manifest.files.insert(path.clone(), entry) {
                // A blob listed twice under one name is harmless; two blobs are ambiguous.
                Some(other) if other.sha256 != Some(digest) => {
                    return Err(Error::corrupt(format!("the manifest has two layers called {path}")));
                }
                _ => blobs.insert(path, digest),
            };
        }
        manifest.check()?;
        Ok(Self { manifest, blobs })
    }

    /// Fails if the manifest lists no files.
    pub(super) fn require_files(&self, digest: &Digest) -> Result<()> {
        match self.manifest.files.is_empty() {
            true => Err(no_files(format!("the manifest sha256:{digest} lists no files"))
                .hint("check the reference: it is an artifact without files, for instance a signature")),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::{Reference, Target};
    use serde_json::{Value, json};

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn layer(media_type: &str, annotations: Value) -> Value {
        json!({"mediaType": media_type, "digest": format!("sha256:{HEX}"), "size": 7, "annotations": annotations})
    }

    fn layers(rows: Vec<Value>) -> Result<Layers> {
        let document = Document::parse(json!({"schemaVersion": 2, "layers": rows}).to_string().as_bytes())?;
        let Document::Layers(layers) = document else { panic!("not an index") };
        Layers::new(&ArtifactKey::new("oci/r/m".parse()?, format!("sha256:{HEX}").parse()?), layers)
    }

    /// Returns the file name of a single layer.
    fn name(media_type: &str, annotations: Value) -> String {
        let layers = layers(vec![layer(media_type, annotations)]).unwrap_or_else(|error| panic!("{error}"));
        let names: Vec<_> = layers.manifest.files.into_iter().map(|(path, _)| String::from(path)).collect();
        names.join(" ")
    }

    #[test]
    fn files_get_the_names_that_the_pushing_tool_intended() {
        const TITLE: &str = "org.opencontainers.image.title";
        const PATH: &str = "org.cncf.model.filepath";
        const ORAS: &str = "application/vnd.oci.image.layer.v1.tar";
        const RAW: &str = "application/vnd.cncf.model.weight.v1.raw";
        const KIT: &str = "application/vnd.kitops.modelkit.model.v1.tar+gzip";
        // ORAS calls every file an archive, and marks folders.
        assert_eq!(name(ORAS, json!({TITLE: "config.json"})), "config.json");
        assert_eq!(name(ORAS, json!({TITLE: "./sub/w.bin"})), "sub/w.bin");
        let folder = json!({TITLE: "weights", "io.deis.oras.content.unpack": "true"});
        assert_eq!(name(&format!("{ORAS}+gzip"), folder), "weights.tar.gz");
        // ModelPack: files as they are, or packed.
        assert_eq!(name(RAW, json!({PATH: "sub/model.safetensors", TITLE: "other"})), "sub/model.safetensors");
        assert_eq!(name(RAW, json!({"org.cnai.model.filepath": "a"})), "a");
        assert_eq!(name("application/vnd.cnai.model.weight.v1.tar", json!({PATH: "model/"})), "model.tar");
        assert_eq!(name("application/vnd.cncf.model.weight.v1.tar+zstd", json!({PATH: "w.tar.zst"})), "w.tar.zst");
        // KitOps.
        assert_eq!(name(KIT, json!({TITLE: "model"})), "model.tar.gz");
        assert_eq!(name("application/vnd.kitops.modelkit.code.v1.tar", json!({PATH: "src.tgz"})), "src.tgz");
        // Without a name: the digest and the ending of the type.
        assert_eq!(name(KIT, Value::Null), format!("{HEX}.tar.gz"));
        assert_eq!(name("application/octet-stream", json!({TITLE: ""})), format!("{HEX}.bin"));
        assert_eq!(name("application/vnd.docker.image.rootfs.diff.tar.gzip", json!({})), format!("{HEX}.tar.gz"));
    }

    #[test]
    fn unsafe_or_conflicting_names_reject_the_whole_artifact() {
        for bad in
            ["../x", "/etc/passwd", "a/../../x", "a\\b", "a\0b", ".modelcache/x", "./../x", "a//b", "./", ".", ".."]
        {
            let rows = vec![layer("x", json!({"org.opencontainers.image.title": bad}))];
            assert_eq!(layers(rows).map(|_| ()).expect_err(bad).kind(), ErrorKind::Corrupt, "{bad:?}");
        }
        let other = Digest::of(b"other").to_string();
        let row = |hex: &str| {
            let annotations = json!({"org.cncf.model.filepath": "a"});
            json!({"digest": format!("sha256:{hex}"), "size": 1, "annotations": annotations})
        };
        assert!(layers(vec![row(HEX), row(&other)]).is_err(), "two files of one name");
        assert!(layers(vec![row(HEX), row(HEX)]).is_ok(), "the same file twice");
    }

    #[test]
    fn digests_other_than_sha256_are_rejected_by_name() {
        let error =
            layers(vec![json!({"digest": format!("sha512:{HEX}{HEX}"), "size": 1})]).map(|_| ()).expect_err("sha512");
        assert!(error.to_string().contains("sha512") && error.hint_text().is_some_and(|hint| hint.contains("sha256")));
        assert!(layers(vec![json!({"digest": "sha256:12", "size": 1})]).is_err());
    }

    #[test]
    fn manifests_indexes_and_malformed_documents_are_distinguished() {
        let parse = |value: Value| Document::parse(value.to_string().as_bytes());
        assert!(matches!(parse(json!({"blobs": []})), Ok(Document::Layers(_))), "an artifact manifest");
        assert!(matches!(parse(json!({"manifests": []})), Ok(Document::Index(_))));
        for bad in [json!({}), json!([]), json!({"layers": [], "manifests": []}), json!({"layers": [{"size": 1}]})] {
            assert!(parse(bad.clone()).is_err(), "{bad}");
        }
        let nothing = layer("application/vnd.oci.empty.v1+json", Value::Null);
        assert!(layers(vec![nothing]).expect("layers").manifest.files.is_empty());
    }

    #[test]
    fn an_index_resolves_to_its_only_manifest_or_lists_the_choices() {
        let Target::Oci(repo) = Reference::parse("oci://r:1/m:t").expect("parses").target else {
            panic!("no repository")
        };
        let entry = |os: &str, hex: &str| {
            let platform = json!({"os": os, "architecture": "amd64"});
            json!({"digest": format!("sha256:{hex}"), "size": 1, "platform": platform})
        };
        let other = Digest::of(b"other").to_string();
        let choose = |rows: Vec<Value>| {
            let Ok(Document::Index(rows)) = Document::parse(json!({"manifests": rows}).to_string().as_bytes()) else {
                panic!("no index")
            };
            single_manifest(&repo, rows)
        };
        assert_eq!(choose(vec![entry("linux", HEX), entry("unknown", &other)]).expect("one").to_string(), HEX);
        let error = choose(vec![entry("linux", HEX), entry("windows", &other)]).expect_err("two");
        let hint = error.hint_text().expect("a hint");
        assert!(hint.contains(&format!("oci://r:1/m@sha256:{other} (windows/amd64)")), "{hint}");
        assert_eq!(choose(vec![]).expect_err("none").kind(), ErrorKind::NotFound);
    }
}
