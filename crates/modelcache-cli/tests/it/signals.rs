//! Signals that are ignored when the program starts, and the signal state that `exec` leaves to its command.

use crate::common::*;
use modelcache_testkit::s3::S3Fault;
use std::time::Duration;

/// Starts a `get` with `signal` ignored, sends it the signal during the download, and asserts that the get succeeds.
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
fn a_background_job_of_a_shell_continues_after_ctrl_c() {
    survives("INT");
}

/// Returns the masks of blocked and of ignored signals that the started command reads from its own status. Only the
/// standard signals are included: the C library uses the ones above them.
fn blocked_and_ignored(run: Run, start: &str) -> Vec<u64> {
    let seen = run.shell(&format!("{start} grep -E '^Sig(Blk|Ign):' /proc/self/status")).ok();
    let masks = seen.stdout.lines().map(|line| u64::from_str_radix(line[7..].trim(), 16).unwrap());
    masks.map(|mask| mask & 0x7fff_ffff).collect()
}

#[test]
fn the_command_of_exec_has_the_signals_that_exec_was_started_with() {
    let (house, _) = House::with_model();
    let of = |start: &str| blocked_and_ignored(house.on_local("a"), start);
    let exec = format!("exec {BIN} exec hf://org/model --");
    assert_eq!((of(&exec), of("exec")), (vec![0, 0], vec![0, 0]));
    // SIGHUP and SIGXFSZ are 1 and 25.
    let ignored = vec![0, 1 | 1 << 24];
    assert_eq!((of(&format!("trap '' HUP XFSZ; {exec}")), of("trap '' HUP XFSZ; exec")), (ignored.clone(), ignored));
}
