//! A herd: 50 processes that want the same artifact at once, on one directory that does not have it.

use super::pull::Stage;
use super::usage::measure;
use anyhow::{Context, Result, ensure};
use std::process::Stdio;
use std::time::Instant;

const PROCESSES: usize = 50;

pub(super) fn rows(bytes: u64) -> Result<Vec<Vec<String>>> {
    let stage = Stage::set(bytes)?;
    let alone = measure(stage.modelcache("alone").args(["get", "bench/model@1", "--quiet"]))?;
    stage.clear("alone")?;
    stage.s3.clear_requests();
    let started = Instant::now();
    let mut herd = Vec::new();
    for _ in 0..PROCESSES {
        let mut command = stage.modelcache("herd");
        command.args(["get", "bench/model@1", "--json"]).stdout(Stdio::piped()).stderr(Stdio::null());
        herd.push(command.spawn().context("cannot run modelcache")?);
    }
    let mut received = 0;
    for process in herd {
        let output = process.wait_with_output()?;
        ensure!(output.status.success(), "one of the herd failed");
        let answer: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        received += answer["bytes"]["remote"].as_u64().context("the answer tells no bytes")?;
    }
    let took = started.elapsed().as_secs_f64();
    stage.clear("herd")?;
    let what = format!("{} MiB S3 -> disk", bytes >> 20);
    let ratio = received as f64 / bytes as f64;
    let slower = took / alone.seconds;
    Ok(vec![
        vec![format!("{what}: one alone"), format!("{:.2} s", alone.seconds), "".into(), "".into(), "".into()],
        vec![
            format!("{what}: {PROCESSES} at once"),
            format!("{took:.2} s"),
            "".into(),
            "".into(),
            format!("all done after {slower:.2} x one alone; {ratio:.3} x the bytes of one"),
        ],
    ])
}
