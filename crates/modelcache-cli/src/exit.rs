//! The table of exit codes. The mapping of errors, the help text and the documentation are generated from it.

use modelcache::{ErrorKind, Result};

/// Success.
pub const DONE: u8 = 0;
/// Any failure without an exit code of its own.
pub const OTHER: u8 = 1;
/// The command line or the configuration is invalid.
pub const USAGE: u8 = 2;
/// A panic: a defect in the program (EX_SOFTWARE of sysexits.h).
pub const PANIC: u8 = 70;
/// `exec`: the command was found but could not be run. Shells use the same code.
pub const NOT_RUN: u8 = 126;
/// `exec`: the command was not found. Shells use the same code.
pub const NO_COMMAND: u8 = 127;
/// The terminal or the connection was closed (128 + SIGHUP).
pub const HUNG_UP: u8 = 129;
/// Interrupted with Ctrl-C (128 + SIGINT).
pub const INTERRUPTED: u8 = 130;
/// Terminated (128 + SIGTERM).
pub const TERMINATED: u8 = 143;

/// One exit code.
#[derive(Debug)]
pub struct Exit {
    /// The number.
    pub code: u8,
    /// The meaning, for help and documentation.
    pub meaning: &'static str,
    /// The error kinds that map to this code.
    pub kinds: &'static [ErrorKind],
}

/// Every exit code. An error kind without a row maps to [`OTHER`].
pub const EXITS: &[Exit] = &[
    Exit { code: DONE, meaning: "done", kinds: &[] },
    Exit { code: OTHER, meaning: "anything else", kinds: &[ErrorKind::Conflict, ErrorKind::Other] },
    Exit { code: USAGE, meaning: "usage, configuration", kinds: &[ErrorKind::Invalid] },
    Exit { code: 3, meaning: "not found", kinds: &[ErrorKind::NotFound] },
    Exit {
        code: 4,
        meaning: "credentials missing or refused, or access to the repository not granted",
        kinds: &[ErrorKind::Unauthorized],
    },
    Exit { code: 5, meaning: "integrity: bytes that do not match their digest", kinds: &[ErrorKind::Corrupt] },
    Exit { code: 6, meaning: "no room: budget or disk", kinds: &[ErrorKind::Full] },
    Exit { code: 7, meaning: "unavailable: network, timeout, store down", kinds: &[ErrorKind::Unavailable] },
    Exit {
        code: 8,
        meaning: "cache directory not usable, or a limit on threads or memory is too low",
        kinds: &[ErrorKind::Directory, ErrorKind::Limits],
    },
    Exit { code: PANIC, meaning: "a defect in modelcache: please report it", kinds: &[] },
    Exit { code: NOT_RUN, meaning: "exec: the command cannot be run", kinds: &[] },
    Exit { code: NO_COMMAND, meaning: "exec: there is no such command", kinds: &[] },
    Exit { code: HUNG_UP, meaning: "hung up (SIGHUP); a later get resumes", kinds: &[] },
    Exit { code: INTERRUPTED, meaning: "interrupted (SIGINT); a later get resumes", kinds: &[] },
    Exit { code: TERMINATED, meaning: "terminated (SIGTERM); a later get resumes", kinds: &[] },
];

/// Returns the exit code of an error of `kind`.
pub fn code(kind: ErrorKind) -> u8 {
    EXITS.iter().find(|exit| exit.kinds.contains(&kind)).map_or(OTHER, |exit| exit.code)
}

/// Returns the exit code of a command that ended with `result`.
pub(crate) fn code_of<T>(result: &Result<T>) -> u8 {
    result.as_ref().map_or_else(|error| code(error.kind()), |_| DONE)
}

/// Returns the table as a help text.
pub(crate) fn help() -> String {
    let rows = EXITS.iter().map(|exit| format!("  {:>3}  {}\n", exit.code, exit.meaning));
    std::iter::once("Exit codes:\n".to_owned()).chain(rows).collect::<String>().trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scripts depend on these numbers.
    #[test]
    fn codes_are_those_of_the_contract() {
        use ErrorKind::*;
        let promised = [
            (NotFound, 3),
            (Unauthorized, 4),
            (Corrupt, 5),
            (Full, 6),
            (Unavailable, 7),
            (Directory, 8),
            (Limits, 8),
            (Invalid, 2),
            (Conflict, 1),
            (Other, 1),
        ];
        for (kind, number) in promised {
            assert_eq!(code(kind), number, "{kind:?}");
            assert_eq!(EXITS.iter().filter(|exit| exit.kinds.contains(&kind)).count(), 1, "{kind:?}");
        }
        assert!(EXITS.windows(2).all(|pair| pair[0].code < pair[1].code), "in order, each once");
    }
}
