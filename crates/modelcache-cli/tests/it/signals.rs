//! Signals that are ignored when the program starts, and what the command of `exec` gets of it all.

use crate::common::*;
use modelcache_testkit::s3::S3Fault;
use std::time::Duration;

/// A `get` that was started with `signal` ignored, is sent it in the midst of the download, and must not care.
fn survives(signal: &str) {
    let house = House::new();
    house.write("file", "content");
    house.on("a").run(["put", "m@1", "file", "--tier", "remote"]).ok();
    let slow = S3Fault::delay(Duration::from_millis(700)).method("GET").on("/m/1/file").once();
    let slow = house.s3.faults().add(slow);
    let trap = format!("trap '' {signal}; exec \"$@\"");
    let get = house.on("a").through(&["/bin/sh", "-c", &trap, "sh"]).start(["get", "m@1"]);
    wait_until("the file is asked for", || slow.count() > 0);
    get.signal(signal);
    get.wait().path();
}

#[test]
fn nohup_keeps_a_get_alive() {
    survives("HUP");
}

#[test]
fn a_shells_background_job_goes_on_after_ctrl_c() {
    survives("INT");
}

#[test]
fn the_command_of_exec_has_the_signals_that_exec_was_started_with() {
    let (house, _) = House::with_model();
    for trap in ["", "trap '' HUP XFSZ;"] {
        let masks = "grep -E '^Sig(Ign|Blk):' /proc/self/status";
        let before = house.on_local("a").shell(&format!("{trap} {masks}")).ok().stdout;
        let start = format!("{trap} exec {BIN} exec hf://org/model -- {masks}");
        assert_eq!(house.on_local("a").shell(&start).ok().stdout, before, "{trap}");
    }
}
