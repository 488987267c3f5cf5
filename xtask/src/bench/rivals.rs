//! The commands of the peers for one task, each at its defaults and at a setting tuned for large files.
//!
//! The tuned setting is the same for all peers that have one: 16 concurrent requests of 16 MiB.

use super::served::Served;
use super::setup::{BUCKET, Setup};
use anyhow::Result;
use std::fs;
use std::path::Path;
use std::process::Command;

/// Direction of a copy.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// One object to a file.
    Get,
    /// All objects of a prefix into a folder.
    Tree,
    /// A file to an object.
    Put,
}

/// A peer that copies from and to S3, at one setting.
#[derive(Clone, Copy)]
pub(super) struct Rival {
    pub(super) who: &'static str,
    /// The package or program that it needs.
    needs: &'static str,
    pub(super) tuned: bool,
}

const fn rival(who: &'static str, needs: &'static str, tuned: bool) -> Rival {
    Rival { who, needs, tuned }
}

/// All peers, the fastest first.
pub(super) const ALL: [Rival; 10] = [
    rival("s5cmd", "s5cmd", false),
    rival("s5cmd", "s5cmd", true),
    rival("obstore", "obstore", false),
    rival("obstore", "obstore", true),
    rival("rclone", "rclone", false),
    rival("rclone", "rclone", true),
    rival("boto3", "boto3", false),
    rival("boto3", "boto3", true),
    rival("aws", "awscli", false),
    rival("aws", "awscli", true),
];

impl Rival {
    pub(super) fn setting(&self) -> String {
        if self.tuned { "16 x 16 MiB" } else { "defaults" }.to_owned()
    }

    /// Returns the command that copies `key` (an object or a prefix) to or from `path`.
    pub(super) fn command(&self, setup: &Setup, served: &Served, way: Way, key: &str, path: &Path) -> Result<Command> {
        setup.peers.want(self.needs)?;
        let mut command = match self.who {
            "s5cmd" => self.s5cmd(setup, served, way, key, path),
            "aws" => self.aws(setup, way, key, path)?,
            "rclone" => self.rclone(setup, served, way, key, path),
            script => self.script(setup, script, way, key, path),
        };
        command.envs(served.env()).env("HOME", &setup.scratch.disk);
        Ok(command)
    }

    fn s5cmd(&self, setup: &Setup, served: &Served, way: Way, key: &str, path: &Path) -> Command {
        let mut command = setup.peers.program("s5cmd");
        command.args(["--endpoint-url", &served.url(), "cp"]);
        if self.tuned {
            command.args(["--concurrency", "16", "--part-size", "16"]);
        }
        match way {
            Way::Get => command.arg(url(key)).arg(path),
            Way::Tree => command.arg(url(&format!("{key}/*"))).arg(folder(path)),
            Way::Put => command.arg(path).arg(url(key)),
        };
        command
    }

    fn aws(&self, setup: &Setup, way: Way, key: &str, path: &Path) -> Result<Command> {
        let config = setup.scratch.disk.join("aws-config");
        let text = "[default]\ns3 =\n  max_concurrent_requests = 20\n  multipart_chunksize = 16MB\n";
        fs::write(&config, if self.tuned { text } else { "[default]\n" })?;
        let mut command = setup.peers.program("aws");
        command.env("AWS_CONFIG_FILE", config).args(["s3", "cp", "--only-show-errors"]);
        match way {
            Way::Get => command.arg(url(key)).arg(path),
            Way::Tree => command.args(["--recursive", &url(&format!("{key}/"))]).arg(path),
            Way::Put => command.arg(path).arg(url(key)),
        };
        Ok(command)
    }

    fn rclone(&self, setup: &Setup, served: &Served, way: Way, key: &str, path: &Path) -> Command {
        let mut command = setup.peers.found("rclone");
        let remote = format!(":s3,provider=Other,env_auth=true,endpoint='{}':{BUCKET}/{key}", served.url());
        match way {
            Way::Get => command.args(["copyto", &remote]).arg(path),
            Way::Tree => command.args(["copy", &remote]).arg(path),
            Way::Put => command.arg("copyto").arg(path).arg(&remote),
        };
        if self.tuned {
            command.args(["--multi-thread-streams", "16", "--multi-thread-chunk-size", "16Mi", "--transfers", "16"]);
            command.args(["--s3-upload-concurrency", "16", "--s3-chunk-size", "16Mi"]);
        }
        command
    }

    fn script(&self, setup: &Setup, who: &str, way: Way, key: &str, path: &Path) -> Command {
        let mut command = setup.peers.script(&format!("{who}_copy.py"));
        let verb = match way {
            Way::Get => "get",
            Way::Tree => "tree",
            Way::Put => "put",
        };
        command.args([verb, BUCKET, key]).arg(path);
        if self.tuned {
            command.args(["16", "16"]);
        }
        command
    }
}

/// Returns a download command for aria2c, which does not speak S3: plain HTTP with 16 connections.
pub(super) fn aria2(setup: &Setup, served: &Served, key: &str, path: &Path) -> Result<Command> {
    setup.peers.want("aria2c")?;
    let mut command = setup.peers.found("aria2c");
    command.args(["--quiet", "--max-connection-per-server=16", "--split=16", "--min-split-size=16M"]);
    command.args(["--file-allocation=falloc", "--check-certificate=false"]);
    let (folder, name) = (path.parent().unwrap_or(path), path.file_name().unwrap_or_default());
    command.arg("--dir").arg(folder).arg("--out").arg(name).arg(format!("{}/{BUCKET}/{key}", served.url()));
    Ok(command)
}

pub(super) fn url(key: &str) -> String {
    format!("s3://{BUCKET}/{key}")
}

/// Adds the trailing slash that marks the target as a folder.
fn folder(path: &Path) -> String {
    format!("{}/", path.display())
}
