//! Tests the S3 stand-in with the S3 client that the cache uses.

use std::time::Duration;

use modelcache_testkit::s3::S3Fault;
use modelcache_testkit::{Content, Moto, S3, content};
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::path::Path;
use object_store::{
    Attributes, ClientOptions, Error, GetOptions, GetRange, ObjectStore as _, ObjectStoreExt as _, PutMode, PutOptions,
    PutPayload, RetryConfig, UpdateVersion,
};

const BUCKET: &str = "models";

async fn s3() -> (S3, AmazonS3) {
    let s3 = S3::start().await.unwrap();
    s3.bucket(BUCKET).unwrap();
    let store = store(&s3.endpoint(), s3.access_key(), s3.secret_key(), BUCKET);
    (s3, store)
}

fn store(endpoint: &str, key: &str, secret: &str, bucket: &str) -> AmazonS3 {
    AmazonS3Builder::new()
        .with_endpoint(endpoint)
        .with_allow_http(true)
        .with_region("us-east-1")
        .with_access_key_id(key)
        .with_secret_access_key(secret)
        .with_bucket_name(bucket)
        .with_client_options(ClientOptions::new().with_allow_http(true))
        .with_retry(RetryConfig { max_retries: 0, ..Default::default() })
        .build()
        .unwrap()
}

fn create() -> PutOptions {
    PutMode::Create.into()
}

async fn bytes_of(store: &AmazonS3, key: &str) -> Vec<u8> {
    store.get(&Path::parse(key).unwrap()).await.unwrap().bytes().await.unwrap().to_vec()
}

#[tokio::test]
async fn an_object_is_put_listed_read_in_ranges_and_deleted() {
    let (s3, store) = s3().await;
    let body = content::bytes(1, 1_000_000);
    let key = Path::parse("org/model/é+%.bin").unwrap();
    let put = store.put(&key, body.clone().into()).await.unwrap();
    assert_eq!(s3.object(BUCKET, "org/model/é+%.bin").unwrap(), body);
    assert_eq!(s3.keys(BUCKET), ["org/model/é+%.bin"]);
    assert_eq!(bytes_of(&store, "org/model/é+%.bin").await, body);
    assert_eq!(store.get_range(&key, 500_000..700_000).await.unwrap(), &body[500_000..700_000]);
    let suffix = GetOptions { range: Some(GetRange::Suffix(10)), ..Default::default() };
    assert_eq!(store.get_opts(&key, suffix).await.unwrap().bytes().await.unwrap(), &body[body.len() - 10..]);
    assert!(store.get_range(&key, 2_000_000..2_000_001).await.is_err(), "416");
    let listed = store.list_with_delimiter(Some(&Path::from("org/model"))).await.unwrap();
    assert_eq!((listed.objects.len(), listed.objects[0].size), (1, 1_000_000));
    assert_eq!(listed.objects[0].e_tag, put.e_tag, "listings carry the ETag");
    assert_eq!(s3.object_gets("model/").len(), 3);
    let ranged: Vec<_> = s3.requests().into_iter().filter_map(|seen| seen.range).collect();
    assert_eq!(ranged[0], "bytes=500000-699999");
    assert!(s3.requests().iter().all(|seen| seen.authorized() && seen.status != 0));
    store.delete(&key).await.unwrap();
    assert!(matches!(store.head(&key).await, Err(Error::NotFound { .. })));
    assert!(matches!(store.head(&Path::from("org/model")).await, Err(Error::NotFound { .. })), "a folder is no object");
}

#[tokio::test]
async fn conditions_hold_on_writes_and_reads() {
    let (_s3, store) = s3().await;
    let key = Path::from("claim");
    let first = store.put_opts(&key, "one".into(), create()).await.unwrap();
    assert!(matches!(store.put_opts(&key, "two".into(), create()).await, Err(Error::AlreadyExists { .. })));
    let update = PutMode::Update(UpdateVersion { e_tag: first.e_tag.clone(), version: None });
    store.put_opts(&key, "three".into(), update.clone().into()).await.unwrap();
    assert!(matches!(store.put_opts(&key, "four".into(), update.into()).await, Err(Error::Precondition { .. })));
    assert_eq!(bytes_of(&store, "claim").await, b"three");
    let stale = GetOptions { if_match: first.e_tag, ..Default::default() };
    assert!(matches!(store.get_opts(&key, stale).await, Err(Error::Precondition { .. })));
    let now = store.head(&key).await.unwrap().e_tag;
    let same = GetOptions { if_none_match: now, ..Default::default() };
    assert!(matches!(store.get_opts(&key, same).await, Err(Error::NotModified { .. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_creators_one_wins() {
    let (_s3, store) = s3().await;
    for round in 0..10 {
        let key = Path::from(format!("claim-{round}"));
        let tries = (0..8).map(|writer: u8| store.put_opts(&key, vec![writer; 1000].into(), PutMode::Create.into()));
        let won = futures::future::join_all(tries).await.into_iter().filter(Result::is_ok).count();
        assert_eq!(won, 1, "round {round}");
    }
}

#[tokio::test]
async fn a_store_that_ignores_conditions_overwrites() {
    let (s3, store) = s3().await;
    let key = Path::from("claim");
    let hits = s3.faults().add(S3Fault::ignore_conditions());
    store.put_opts(&key, "one".into(), create()).await.unwrap();
    store.put_opts(&key, "two".into(), create()).await.unwrap();
    assert_eq!(bytes_of(&store, "claim").await, b"two");
    assert_eq!(hits.count(), 2);
}

#[tokio::test]
async fn a_multipart_upload_appears_when_it_is_complete() {
    let (s3, store) = s3().await;
    let key = Path::from("big.bin");
    let body = content::bytes(2, 11 * 1024 * 1024);
    let mut upload = store.put_multipart(&key).await.unwrap();
    for part in body.chunks(5 * 1024 * 1024) {
        upload.put_part(PutPayload::from(part.to_vec())).await.unwrap();
    }
    assert!(store.head(&key).await.is_err());
    upload.complete().await.unwrap();
    assert_eq!(bytes_of(&store, "big.bin").await, body);
    assert!(s3.requests().iter().any(|seen| seen.query.contains("partNumber=3")));
    let mut small = store.put_multipart_opts(&Path::from("s"), Attributes::new().into()).await.unwrap();
    small.put_part("a".into()).await.unwrap();
    small.put_part("b".into()).await.unwrap();
    assert!(small.complete().await.is_err(), "parts below 5 MiB are refused");
    small.abort().await.unwrap();
    let left = std::fs::read_dir(s3.object_path("", "")).unwrap();
    let left = left.filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().contains(".part-")).count();
    assert_eq!(left, 0, "an aborted upload leaves no parts");
}

#[tokio::test]
async fn listings_are_paged_above_a_thousand_keys() {
    let (s3, store) = s3().await;
    for index in 0..1500 {
        s3.put(BUCKET, &format!("many/{index:04}"), "x").unwrap();
    }
    let listed = store.list_with_delimiter(Some(&Path::from("many"))).await.unwrap();
    assert_eq!(listed.objects.len(), 1500);
    assert_eq!(s3.requests().len(), 2);
}

#[tokio::test]
async fn errors_name_the_missing_bucket_and_the_wrong_credential() {
    let (s3, good) = s3().await;
    let key = Path::from("absent");
    assert!(matches!(good.get(&key).await, Err(Error::NotFound { .. })));
    let other = store(&s3.endpoint(), s3.access_key(), s3.secret_key(), "no-such");
    for error in
        [other.get(&key).await.unwrap_err().to_string(), other.put(&key, "x".into()).await.unwrap_err().to_string()]
    {
        assert!(error.contains("NoSuchBucket"), "{error}");
    }
    let stranger = store(&s3.endpoint(), "NOBODY", "x", BUCKET);
    let error = stranger.get(&key).await.unwrap_err();
    assert!(format!("{error:?}").contains("InvalidAccessKeyId"), "{error:?}");
    let forger = store(&s3.endpoint(), s3.access_key(), "wrong", BUCKET);
    let error = forger.get(&key).await.unwrap_err();
    assert!(format!("{error:?}").contains("SignatureDoesNotMatch"), "{error:?}");
    s3.faults().add(S3Fault::no_list_permission());
    assert!(matches!(good.get(&key).await, Err(Error::PermissionDenied { .. })));
    let error = good.list_with_delimiter(None).await.unwrap_err();
    assert!(format!("{error:?}").contains("AccessDenied"), "{error:?}");
}

#[tokio::test]
async fn each_fault_answers_as_s3_would() {
    let (s3, store) = s3().await;
    let key = Path::from("a/b");
    store.put(&key, "body".into()).await.unwrap();
    let cases = [
        (S3Fault::access_denied(), "AccessDenied"),
        (S3Fault::invalid_access_key(), "InvalidAccessKeyId"),
        (S3Fault::expired_token(), "ExpiredToken"),
        (S3Fault::clock_skew(), "RequestTimeTooSkewed"),
        (S3Fault::slow_down(), "SlowDown"),
        (S3Fault::internal_error(), "InternalError"),
    ];
    for (fault, code) in cases {
        let hits = s3.faults().add(fault.on("/a/b").method("GET").once());
        assert!(store.head(&key).await.is_ok(), "aimed at GET only");
        let error = store.get(&key).await.unwrap_err();
        assert!(format!("{error:?}").contains(code), "{code}: {error:?}");
        assert_eq!(hits.count(), 1);
        assert_eq!(bytes_of(&store, "a/b").await, b"body");
    }
    s3.faults().add(S3Fault::wrong_region("eu-west-1").once());
    assert!(store.get(&key).await.is_err());
    assert_eq!(s3.requests().last().unwrap().status, 301);
    s3.faults().add(S3Fault::hang_up().once());
    assert!(store.get(&key).await.is_err());
    s3.faults().add(S3Fault::lose_reply().method("PUT").once());
    assert!(store.put(&Path::from("lost"), "done".into()).await.is_err());
    assert_eq!(s3.object(BUCKET, "lost").unwrap(), b"done");
    s3.faults().add(S3Fault::delay(Duration::from_millis(1)).once());
    assert_eq!(bytes_of(&store, "a/b").await, b"body");
    s3.down(true);
    assert!(store.get(&key).await.is_err());
}

#[tokio::test]
async fn an_object_can_be_changed_behind_the_servers_back() {
    let (s3, store) = s3().await;
    let key = Path::from("blob");
    let before = store.put(&key, "abcdef".into()).await.unwrap();
    s3.flip_byte(BUCKET, "blob", 2).unwrap();
    assert_eq!(bytes_of(&store, "blob").await, b"abbdef");
    assert_eq!(store.head(&key).await.unwrap().e_tag, before.e_tag, "only the bytes reveal the change");
    s3.put(BUCKET, "blob", Content::generated(1, 10)).unwrap();
    assert_ne!(store.head(&key).await.unwrap().e_tag, before.e_tag);
    s3.remove(BUCKET, "blob").unwrap();
    assert!(matches!(store.get(&key).await, Err(Error::NotFound { .. })));
}

#[tokio::test]
async fn a_store_over_a_given_folder_outlives_the_server() {
    let folder = tempfile::tempdir().unwrap();
    for round in 0..2 {
        let s3 = S3::start_in(folder.path(), 0).unwrap();
        s3.bucket(BUCKET).unwrap();
        assert_eq!(s3.keys(BUCKET).len(), round);
        let store = store(&s3.endpoint(), s3.access_key(), s3.secret_key(), BUCKET);
        store.put(&Path::from(format!("{round}")), "x".into()).await.unwrap();
    }
}

/// Runs only if `TESTKIT_MOTO_VENV` names a Python environment with `moto[server]`.
#[tokio::test]
async fn moto_starts_and_takes_objects() {
    let Some(venv) = std::env::var_os("TESTKIT_MOTO_VENV").filter(|venv| !venv.is_empty()) else { return };
    let moto = Moto::start(venv).unwrap();
    moto.bucket(BUCKET).unwrap();
    let store = store(&moto.endpoint(), "moto", "moto", BUCKET);
    store.put(&Path::from("a"), "b".into()).await.unwrap();
    assert_eq!(bytes_of(&store, "a").await, b"b");
}
