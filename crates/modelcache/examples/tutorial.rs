//! Publishes two versions of a model, tags one of them, and gets it by its tag. The program of docs/tutorials/rust.md.
#![expect(clippy::print_stdout, reason = "a program for the terminal")]

use modelcache::cache::EvictTier;
use modelcache::config::ByteBound;
use modelcache::{ArtifactKey, Cache, ErrorKind};
use std::error::Error;
use std::fs;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    // The remote is a folder here, and usually a bucket: s3://my-bucket/models.
    let here = std::env::current_dir()?;
    let cache = Cache::builder(here.join("cache"))
        .remote(format!("file://{}", here.join("bucket").display()))
        .environment(std::env::vars()) // for the credentials of a bucket
        .budget(ByteBound::Percent(80))
        .min_free(ByteBound::Bytes(0)) // only for this example: without it, 10 % of the disk stays free
        .open()?;

    // Publish two versions, to the disk and to the remote.
    let weights = here.join("weights.bin");
    for key in ["fraud@1", "fraud@2"] {
        fs::write(&weights, format!("weights of {key}"))?;
        let report = cache.put(key, &weights).await?;
        println!("published {key}: {} bytes", report.bytes);
    }

    // A rollout moves the tag. Services request the tag.
    cache.tag(&ArtifactKey::try_from("fraud@2")?, &"prod".parse()?).await?;
    let model = cache.get("fraud@prod").await?;
    println!("fraud@prod is {}: {}", model.key, fs::read_to_string(&model.path)?);

    // The version is leased while `model` lives, so it is not evicted.
    if let Err(error) = cache.evict(&"fraud@2".parse()?, EvictTier::Disk, false).await {
        println!("{error}");
    }
    drop(model);
    cache.evict(&"fraud@2".parse()?, EvictTier::Disk, false).await?;

    // An error has a kind that the program can act on.
    match cache.get("fraud@3").await {
        Err(error) if error.kind() == ErrorKind::NotFound => println!("fraud@3 does not exist"),
        other => println!("fraud@3 is at {}", other?.path.display()),
    }
    Ok(())
}
