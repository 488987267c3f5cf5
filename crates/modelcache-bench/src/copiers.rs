//! The commands of the peers that copy objects, each at its defaults and at a setting tuned for large files.
//!
//! The tuned setting is 16 concurrent requests of 16 MiB, and 20 of them for `aws`.

use super::server_process::ServerProcess;
use super::setup::{BUCKET, Setup};
use anyhow::Result;
use std::fs;
use std::path::Path;
use std::process::Command;

/// What is copied.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    /// One object to a file.
    Get,
    /// All objects of a prefix into a folder.
    Tree,
    /// A file to an object.
    Put,
}

/// A peer that copies from and to S3, at one setting.
#[derive(Clone, Copy)]
pub(super) struct Copier {
    pub(super) program: &'static str,
    /// The package or program that must be installed.
    needs: &'static str,
    /// Number of concurrent requests, and MiB of each; `None` at the defaults.
    parts: Option<(u32, u32)>,
}

const fn copier(program: &'static str, needs: &'static str, tuned: bool) -> Copier {
    Copier { program, needs, parts: if tuned { Some((16, 16)) } else { None } }
}

/// All copy programs, in the order of the tables.
pub(super) const COPIERS: [Copier; 10] = [
    copier("s5cmd", "s5cmd", false),
    copier("s5cmd", "s5cmd", true),
    copier("obstore", "obstore", false),
    copier("obstore", "obstore", true),
    copier("rclone", "rclone", false),
    copier("rclone", "rclone", true),
    copier("boto3", "boto3", false),
    copier("boto3", "boto3", true),
    copier("aws", "awscli", false),
    Copier { program: "aws", needs: "awscli", parts: Some((20, 16)) },
];

impl Copier {
    /// Returns the copier `program` with this number of concurrent requests, and MiB of each.
    pub(super) fn with_parts(program: &'static str, requests: u32, mib: u32) -> Self {
        Self { program, needs: program, parts: Some((requests, mib)) }
    }

    pub(super) fn is_tuned(&self) -> bool {
        self.parts.is_some()
    }

    pub(super) fn setting(&self) -> String {
        self.parts.map_or("defaults".to_owned(), |(requests, mib)| format!("{requests} x {mib} MiB"))
    }

    /// Returns the command that copies `key` (an object or a prefix) to or from `path`.
    pub(super) fn command(
        &self,
        setup: &Setup,
        server: &ServerProcess,
        operation: Operation,
        key: &str,
        path: &Path,
    ) -> Result<Command> {
        setup.peers.require(self.needs)?;
        let mut command = match self.program {
            "s5cmd" => self.s5cmd(setup, server, operation, key, path),
            "aws" => self.aws(setup, operation, key, path)?,
            "rclone" => self.rclone(setup, server, operation, key, path)?,
            script => self.script(setup, script, operation, key, path),
        };
        command.envs(server.env()).env("HOME", &setup.scratch.disk);
        Ok(command)
    }

    fn s5cmd(&self, setup: &Setup, server: &ServerProcess, operation: Operation, key: &str, path: &Path) -> Command {
        let mut command = setup.peers.program("s5cmd");
        command.args(["--endpoint-url", &server.url(), "cp"]);
        if let Some((requests, mib)) = self.parts {
            command.args(["--concurrency", &requests.to_string(), "--part-size", &mib.to_string()]);
        }
        match operation {
            Operation::Get => command.arg(url(key)).arg(path),
            Operation::Tree => command.arg(url(&format!("{key}/*"))).arg(folder(path)),
            Operation::Put => command.arg(path).arg(url(key)),
        };
        command
    }

    fn aws(&self, setup: &Setup, operation: Operation, key: &str, path: &Path) -> Result<Command> {
        let config = setup.scratch.disk.join("aws-config");
        let text = "[default]\ns3 =\n  max_concurrent_requests = 20\n  multipart_chunksize = 16MB\n";
        fs::write(&config, if self.is_tuned() { text } else { "[default]\n" })?;
        let mut command = setup.peers.program("aws");
        command.env("AWS_CONFIG_FILE", config).args(["s3", "cp", "--only-show-errors"]);
        match operation {
            Operation::Get => command.arg(url(key)).arg(path),
            Operation::Tree => command.args(["--recursive", &url(&format!("{key}/"))]).arg(path),
            Operation::Put => command.arg(path).arg(url(key)),
        };
        Ok(command)
    }

    fn rclone(
        &self,
        setup: &Setup,
        server: &ServerProcess,
        operation: Operation,
        key: &str,
        path: &Path,
    ) -> Result<Command> {
        let mut command = setup.peers.debian_program("rclone")?;
        // rclone takes an ETag of 32 hex digits for the MD5 of the object, and compares it with that of the file. The
        // ETags of the bench server have this form, but are not MD5 digests.
        command.arg("--ignore-checksum");
        let remote = format!(":s3,provider=Other,env_auth=true,endpoint='{}':{BUCKET}/{key}", server.url());
        match operation {
            Operation::Get => command.args(["copyto", &remote]).arg(path),
            Operation::Tree => command.args(["copy", &remote]).arg(path),
            Operation::Put => command.arg("copyto").arg(path).arg(&remote),
        };
        if self.is_tuned() {
            // Debian's rclone 1.60 has no option for the size of a download's parts: each stream gets an equal share.
            command.args(["--multi-thread-streams", "16", "--transfers", "16"]);
            command.args(["--s3-upload-concurrency", "16", "--s3-chunk-size", "16Mi"]);
        }
        Ok(command)
    }

    fn script(&self, setup: &Setup, program: &str, operation: Operation, key: &str, path: &Path) -> Command {
        let mut command = setup.peers.script(&format!("{program}_copy.py"));
        let verb = match operation {
            Operation::Get => "get",
            Operation::Tree => "tree",
            Operation::Put => "put",
        };
        command.args([verb, BUCKET, key]).arg(path);
        if let Some((requests, mib)) = self.parts {
            command.args([requests, mib].map(|number| number.to_string()));
        }
        command
    }
}

/// Returns a download command for aria2c with 16 connections. aria2c does not speak S3 and sends plain HTTP requests.
pub(super) fn aria2(setup: &Setup, server: &ServerProcess, key: &str, path: &Path) -> Result<Command> {
    let mut command = setup.peers.debian_program("aria2c")?;
    command.args(["--quiet", "--max-connection-per-server=16", "--split=16", "--min-split-size=16M"]);
    command.args(["--file-allocation=falloc", "--check-certificate=false"]);
    let (folder, name) = (path.parent().unwrap_or(path), path.file_name().unwrap_or_default());
    command.arg("--dir").arg(folder).arg("--out").arg(name).arg(format!("{}/{BUCKET}/{key}", server.url()));
    Ok(command)
}

pub(super) fn url(key: &str) -> String {
    format!("s3://{BUCKET}/{key}")
}

/// Adds the trailing slash that marks the target as a folder.
fn folder(path: &Path) -> String {
    format!("{}/", path.display())
}
