//! How to start this program again.
//!
//! The program is the binary `modelcache`, or a Python interpreter that runs the command of the Python package. The
//! words before the arguments are therefore, for example, `modelcache` or `python -m modelcache`.

use std::ffi::{OsStr, OsString};
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::sync::OnceLock;

/// The words of the command line before the arguments. Empty if they are unknown.
static PROGRAM: OnceLock<Vec<OsString>> = OnceLock::new();

/// Records the words of the command line that precede the arguments. `args` is the name of the program, followed by the
/// arguments.
pub(crate) fn record(args: &[OsString]) {
    let words: Vec<OsString> = std::env::args_os().collect();
    let arguments = args.get(1..).unwrap_or_default();
    let program = words.strip_suffix(arguments).map(<[_]>::to_vec).unwrap_or_default();
    // A second `run` in one process has the same program.
    let _ = PROGRAM.set(program);
}

/// Returns a command that runs `executable` with the recorded words of this process; the caller adds the arguments.
/// `executable` must be the executable of this process. Returns `None` if the words are unknown.
pub(crate) fn command(executable: impl AsRef<OsStr>) -> Option<Command> {
    let [name, rest @ ..] = PROGRAM.get()?.as_slice() else { return None };
    let mut command = Command::new(executable);
    command.arg0(name).args(rest);
    Some(command)
}
