//! `Cache::scrub`: reads all files at a low rate and finds damage that a hit does not look for.

use crate::common::{House, get};
use modelcache::finding::Problem;
use modelcache_testkit::Content;
use std::fs::{self, File, FileTimes, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};

#[tokio::test(flavor = "multi_thread")]
async fn a_scrub_reads_each_file_once_and_withdraws_damaged_files() {
    let house = House::new().await;
    let content = Content::generated(3, 1 << 20);
    for name in ["org/one", "org/two"] {
        house.hub.repo(name).commit().lfs("w.bin", content.clone()).file("own", name).publish().unwrap();
    }
    let cache = house.cache("a");
    let path = get(&cache, "hf://org/one").await.unwrap().path.join("own");
    let _ = get(&cache, "hf://org/two").await.unwrap();
    let modified = fs::metadata(&path).unwrap().modified().unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(b"X", 0).unwrap();
    file.set_times(FileTimes::new().set_modified(modified)).unwrap();

    let mut found = Vec::new();
    cache.scrub(2 << 20, |verified| found.push(verified)).await.unwrap();
    assert_eq!(found.len(), 2, "{found:?}");
    assert_eq!(found.iter().map(|verified| verified.bytes).sum::<u64>(), (1 << 20) + 14, "shared file read once");
    let [bad] = &found.iter().flat_map(|verified| &verified.findings).collect::<Vec<_>>()[..] else {
        panic!("{found:?}")
    };
    assert_eq!((bad.problem, bad.withdrawn, bad.path.as_ref().unwrap().as_str()), (Problem::WrongBytes, true, "own"));
    assert_eq!(fs::read(get(&cache, "hf://org/one").await.unwrap().path.join("own")).unwrap(), b"org/one");
}
