//! Limited address space (`ulimit -v`): the program starts itself once more, with one allocation arena.
//!
//! glibc reserves 64 MiB of address space for each thread that allocates, which a batch system's limit of a few hundred
//! megabytes does not hold. How many arenas there may be it reads from `MALLOC_ARENA_MAX` when a program starts, and only
//! then. Without a limit nothing happens here: more arenas are faster.

use rustix::process::{Resource, getrlimit};
use std::env;
use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

/// glibc's variable.
const ARENAS: &str = "MALLOC_ARENA_MAX";
/// Set beside it where it was set here, and not by the user.
const RESTARTED: &str = "_MODELCACHE_ONE_ARENA";

/// Becomes the same command with one arena where address space is limited; comes back where there is nothing to do, or
/// where that fails.
pub(crate) fn restart_with_one_arena(args: &[OsString]) {
    if getrlimit(Resource::As).current.is_none() || has_one_arena() {
        return;
    }
    let (Ok(program), [name, rest @ ..]) = (env::current_exe(), args) else { return };
    // It comes back only if it failed. Then there are arenas, and fewer threads.
    drop(Command::new(program).arg0(name).args(rest).env(ARENAS, "1").env(RESTARTED, "1").exec());
}

/// Whether somebody has limited the arenas.
pub(crate) fn has_one_arena() -> bool {
    env::var_os(ARENAS).is_some()
}

/// Takes what was set here out of the environment of `command`, which is the user's.
pub(crate) fn remove_from(command: &mut Command) {
    if env::var_os(RESTARTED).is_some() {
        command.env_remove(ARENAS).env_remove(RESTARTED);
    }
}
