//! Limited address space (`ulimit -v`): the program replaces itself once, with a single malloc arena.
//!
//! glibc reserves 64 MiB of address space for each thread that allocates. That exceeds the limits of batch systems,
//! which may be a few hundred megabytes. glibc reads `MALLOC_ARENA_MAX` only when a program starts, hence the `exec`.
//! Without a limit the program keeps its arenas, because more arenas are faster.

use crate::program;
use rustix::process::{Resource, getrlimit};
use std::env;
use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

/// The variable that limits the number of glibc's malloc arenas.
const ARENAS_VARIABLE: &str = "MALLOC_ARENA_MAX";
/// A variable that is set together with [`ARENAS_VARIABLE`], to mark that this module set that one, not the user.
const RESTARTED_VARIABLE: &str = "_MODELCACHE_ONE_ARENA";

/// Replaces the process with the same command and a single arena if the address space is limited. Returns if there is
/// nothing to do or if `exec` fails.
pub(crate) fn restart_with_one_arena(args: &[OsString]) {
    if getrlimit(Resource::As).current.is_none() || arenas_are_limited() {
        return;
    }
    let Some(mut command) = env::current_exe().ok().and_then(program::command) else { return };
    let arguments = args.get(1..).unwrap_or_default();
    // `exec` returns only on failure. This process then continues with all arenas, and starts fewer threads.
    drop(command.args(arguments).env(ARENAS_VARIABLE, "1").env(RESTARTED_VARIABLE, "1").exec());
}

/// Returns true if `MALLOC_ARENA_MAX` is set, by this module or by the user.
pub(crate) fn arenas_are_limited() -> bool {
    env::var_os(ARENAS_VARIABLE).is_some()
}

/// Removes the variables that this module set, if any, from the environment of the user's `command`.
pub(crate) fn remove_from(command: &mut Command) {
    if env::var_os(RESTARTED_VARIABLE).is_some() {
        command.env_remove(ARENAS_VARIABLE).env_remove(RESTARTED_VARIABLE);
    }
}
