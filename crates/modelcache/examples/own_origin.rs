#![doc = "An origin of an application: a shelf of books in memory."]

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt as _;
use modelcache::config::ByteBound;
use modelcache::key::FilePath;
use modelcache::manifest::{FileEntry, Manifest, Shape};
use modelcache::origin::{Origin, ResolvedSource};
use modelcache::reference::Scheme;
use modelcache::source::{Body, Source};
use modelcache::{ArtifactKey, Cache, Error, Reference, Result, Tier};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// `shelf://novels/emma@2`. A number is a version; any other revision, such as the default `current`, may move.
static SHELF: Scheme = Scheme::new("shelf://", "shelf://book[@edition]", |text| text.parse::<u32>().is_ok());

/// The files of one edition of a book.
type Files = BTreeMap<FilePath, Bytes>;

/// A shelf of books, each with its editions.
#[derive(Debug, Default)]
pub(crate) struct Shelf {
    pub(crate) books: BTreeMap<String, BTreeMap<u32, Files>>,
}

#[async_trait]
impl Origin for Shelf {
    fn scheme(&self) -> &'static Scheme {
        &SHELF
    }

    /// Every revision means the last edition.
    async fn resolve(&self, reference: &Reference) -> Result<Option<ResolvedSource>> {
        let Some(place) = reference.place() else { return Ok(None) };
        let Some(last) = self.books.get(place.path()).and_then(|editions| editions.keys().last()) else {
            return Err(Error::not_found(format!("there is no book {}", place.path())).hint("look at the catalogue"));
        };
        let key = match reference.exact_key() {
            Some(key) => key,
            None => place.key_at(&last.to_string())?,
        };
        Ok(self.source(reference, &key).map(|source| ResolvedSource { key, source }))
    }

    /// Opens no book: a source for an edition that does not exist has no manifest.
    fn source(&self, reference: &Reference, key: &ArtifactKey) -> Option<Arc<dyn Source>> {
        let editions = self.books.get(reference.place()?.path());
        let edition = key.version.as_str().parse().ok()?;
        let files = editions.and_then(|editions| editions.get(&edition)).cloned();
        Some(Arc::new(Edition { key: key.clone(), files }))
    }
}

/// One edition of a book.
#[derive(Debug)]
struct Edition {
    key: ArtifactKey,
    files: Option<Files>,
}

#[async_trait]
impl Source for Edition {
    fn tier(&self) -> Tier {
        Tier::Origin
    }

    async fn manifest(&self) -> Result<Option<Manifest>> {
        let Some(files) = &self.files else { return Ok(None) };
        let mut manifest = Manifest::new(self.key.clone(), Shape::Tree);
        let entry = |bytes: &Bytes| FileEntry::of(bytes.len() as u64);
        manifest.files = files.iter().map(|(path, bytes)| (path.clone(), entry(bytes))).collect();
        Ok(Some(manifest))
    }

    async fn read(&self, path: &FilePath, range: Range<u64>) -> Result<Body> {
        let Some(bytes) = self.files.as_ref().and_then(|files| files.get(path)) else {
            return Err(Error::not_found(format!("there is no page {path}")).tier(Tier::Origin));
        };
        if range.start > range.end || range.end > bytes.len() as u64 {
            return Err(Error::invalid(format!("{path} ends before byte {}", range.end)).tier(Tier::Origin));
        }
        let piece = bytes.slice(range.start as usize..range.end as usize);
        Ok(Body { start: range.start, stream: futures::stream::iter([Ok(piece)]).boxed() })
    }
}

/// Gets a book from a cache that knows the shelf.
#[tokio::main]
async fn main() -> Result<()> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let pages = Files::from([(FilePath::new("page-1.txt")?, Bytes::from_static(b"Emma Woodhouse, handsome, clever"))]);
    let shelf = Shelf { books: BTreeMap::from([("novels/emma".to_owned(), BTreeMap::from([(2, pages)]))]) };

    let builder = Cache::builder(folder.path()).min_free(ByteBound::Bytes(0));
    let cache = builder.own_origin(Arc::new(shelf)).open()?;
    let book = cache.get(&cache.reference("shelf://novels/emma")?).await?;
    assert_eq!(book.key.to_string(), "origin+shelf/novels/emma@2");
    assert!(book.path.join("page-1.txt").is_file());
    Ok(())
}
