//! Multipart uploads of a bucket, and the listing of unfinished ones.
//!
//! Listing needs the permission `s3:ListBucketMultipartUploads`, and some stores do not support listing.

use super::{S3Backend, xml};
use crate::digest::Digest;
use crate::remote::backend::{Backend as _, MultipartUploads, UnfinishedUpload};
use async_trait::async_trait;
use bytes::Bytes;
use object_store::multipart::{MultipartStore as _, PartId};
use object_store::path::Path;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};

/// Most pages of a listing, of 1,000 uploads each.
const PAGES_MAX: usize = 10;

#[async_trait]
impl MultipartUploads for S3Backend {
    async fn create(&self, key: &Path) -> object_store::Result<String> {
        self.s3.create_multipart(key).await
    }

    fn signs_digests(&self) -> bool {
        self.copier().is_some_and(|copier| copier.client().signs_payload())
    }

    async fn put_part(
        &self,
        key: &Path,
        id: &str,
        index: usize,
        bytes: Bytes,
        sha256: Option<Digest>,
    ) -> object_store::Result<PartId> {
        match (sha256, self.copier()) {
            // The digest is known. `object_store` would compute it again to sign the request.
            (Some(sha256), Some(copier)) => copier.client().put_part(key, id, index, bytes, sha256).await,
            _ => self.s3.put_part(key, &id.to_owned(), index, bytes.into()).await,
        }
    }

    async fn complete(&self, key: &Path, id: &str, parts: Vec<PartId>) -> object_store::Result<Option<String>> {
        Ok(self.s3.complete_multipart(key, &id.to_owned(), parts).await?.e_tag)
    }

    async fn abort(&self, key: &Path, id: &str) -> object_store::Result<()> {
        self.s3.abort_multipart(key, &id.to_owned()).await
    }

    async fn list(&self, prefix: &str) -> Vec<UnfinishedUpload> {
        let Some(read_client) = self.read_client() else { return Vec::new() };
        let (mut uploads, mut after) = (Vec::new(), String::new());
        for _ in 0..PAGES_MAX {
            let query = format!("uploads=&prefix={}{after}", encoded(prefix));
            let page = match read_client.get(&query).await {
                Ok(page) => page,
                Err(error) => {
                    let error = self.explain(error, "cannot list multipart uploads").await;
                    tracing::debug!(%error, "skipping the search for orphaned multipart uploads");
                    break;
                }
            };
            // Some stores ignore the parameter `prefix`.
            uploads.extend(uploads_in(&page).into_iter().filter(|upload| upload.key.starts_with(prefix)));
            match (xml::text(&page, "NextKeyMarker"), xml::text(&page, "NextUploadIdMarker")) {
                (Some(key), id) if xml::text(&page, "IsTruncated").as_deref() == Some("true") => {
                    let id = id.map(|id| format!("&upload-id-marker={}", encoded(&id))).unwrap_or_default();
                    let next = format!("&key-marker={}{id}", encoded(&key));
                    // A store that ignores the markers would return the same page forever.
                    if next == after {
                        break;
                    }
                    after = next;
                }
                _ => break,
            }
        }
        uploads
    }
}

/// Percent-encodes the value of a query parameter.
fn encoded(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}

/// Parses a `ListMultipartUploadsResult`. Entries without key or id are skipped.
fn uploads_in(page: &str) -> Vec<UnfinishedUpload> {
    let upload = |row: &str| {
        let begun_at = xml::text(row, "Initiated").and_then(|time| humantime::parse_rfc3339(&time).ok());
        Some(UnfinishedUpload { key: xml::text(row, "Key")?, id: xml::text(row, "UploadId")?, begun_at })
    };
    xml::elements(page, "Upload").filter_map(|at| upload(&page[at])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, SystemTime};

    #[test]
    fn a_listing_of_uploads_is_parsed() {
        let page = "<ListMultipartUploadsResult><Prefix>a</Prefix><NextKeyMarker></NextKeyMarker>\
                    <Upload><Key>a/&amp;b</Key><UploadId>1</UploadId><Initiated>1970-01-02T00:00:00.000Z</Initiated>\
                    </Upload><Upload><UploadId>2</UploadId></Upload><Upload><Key>c</Key><UploadId>3</UploadId>\
                    <Initiated>soon</Initiated></Upload></ListMultipartUploadsResult>";
        let day = SystemTime::UNIX_EPOCH + Duration::from_secs(24 * 3600);
        let row = |key: &str, id: &str, begun_at| UnfinishedUpload { key: key.into(), id: id.into(), begun_at };
        assert_eq!(uploads_in(page), [row("a/&b", "1", Some(day)), row("c", "3", None)]);
        assert_eq!(uploads_in("<Upload>"), []);
    }
}
