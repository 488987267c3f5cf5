//! Where everything is written: the answer to standard output, all talk to standard error.
//!
//! Nothing else in this program writes, so this is where foreign words (of servers, files, other users, the command
//! line) are made fit for a terminal: every line goes through [`printable`]. Only the answers that scripts take as they
//! are stay exact: a path that `get` prints, and a reference that `resolve` prints into a pipe. A reader that closes standard output early (`modelcache ls | head`) is no
//! failure: the rest of the answer is dropped. Lines on standard error and the progress bar never mix.

use crate::arguments::Global;
use crate::signals::Signal;
use indicatif::{MultiProgress, ProgressDrawTarget};
use modelcache::{Error, ErrorKind, Reference, Result, printable};
use serde_json::{Value, json};
use std::backtrace::{Backtrace, BacktraceStatus};
use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::os::unix::ffi::OsStrExt;
use std::panic::PanicHookInfo;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// Both streams, and what the caller wants on them.
pub(crate) struct Output {
    json: bool,
    quiet: bool,
    colour: bool,
    /// Whether standard error is a terminal on which lines can be drawn anew.
    draws: bool,
    bars: OnceLock<MultiProgress>,
    /// Whoever read standard output has closed it.
    closed: AtomicBool,
}

impl Output {
    pub(crate) fn new(global: &Global) -> Self {
        let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let draws = io::stderr().is_terminal() && !dumb;
        Self {
            json: global.json,
            quiet: global.quiet,
            colour: draws && !set("NO_COLOR"),
            draws,
            bars: OnceLock::new(),
            closed: AtomicBool::new(false),
        }
    }

    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    pub(crate) fn is_quiet(&self) -> bool {
        self.quiet
    }

    pub(crate) fn has_colour(&self) -> bool {
        self.colour
    }

    /// Whether a progress bar can be drawn.
    pub(crate) fn draws(&self) -> bool {
        self.draws
    }

    /// The bars on this terminal.
    pub(crate) fn bars(&self) -> &MultiProgress {
        self.bars.get_or_init(|| {
            let target = if self.draws { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
            MultiProgress::with_draw_target(target)
        })
    }

    /// A part of the answer for people.
    pub(crate) fn answer(&self, lines: &Lines) -> Result<()> {
        self.answer_own(&lines.0)
    }

    /// Text of this program's own, with nothing foreign in it: `text` and one line end.
    pub(crate) fn answer_own(&self, text: &str) -> Result<()> {
        self.write(text.trim_end_matches('\n').as_bytes())
    }

    /// A reference: exact for a script that reads it, printable on a terminal.
    pub(crate) fn answer_reference(&self, reference: &str) -> Result<()> {
        match io::stdout().is_terminal() {
            true => self.write(printable::line(reference).as_bytes()),
            false => self.write(reference.as_bytes()),
        }
    }

    /// A path, byte for byte: scripts take it as it is, and it need not be UTF-8.
    pub(crate) fn answer_path(&self, path: &Path) -> Result<()> {
        self.write(path.as_os_str().as_bytes())
    }

    fn write(&self, line: &[u8]) -> Result<()> {
        if self.closed.load(Ordering::Relaxed) {
            return Ok(());
        }
        let mut stdout = io::stdout().lock();
        match stdout.write_all(&[line, b"\n"].concat()).and_then(|()| stdout.flush()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                self.closed.store(true, Ordering::Relaxed);
                Ok(())
            }
            written => written
                .map_err(|cause| Error::new(ErrorKind::Other, "cannot write to the standard output").cause(cause)),
        }
    }

    /// One object of a JSON answer.
    pub(crate) fn answer_json(&self, value: &Value) -> Result<()> {
        self.write(printable::json(&value.to_string()).as_bytes())
    }

    /// A remark for people; none with `--quiet`.
    pub(crate) fn remark(&self, text: &str) {
        if !self.quiet {
            self.talk(&format!("modelcache: {}\n", printable::line(text)));
        }
    }

    /// A question; it stays on its line.
    pub(crate) fn ask(&self, question: &str) {
        self.talk(&printable::line(question));
    }

    /// A failure, of `reference` if the command has several.
    pub(crate) fn error(&self, error: &Error, reference: Option<&str>) {
        let (red, bold, end) = if self.colour { ("\x1b[1;31m", "\x1b[1m", "\x1b[0m") } else { ("", "", "") };
        let mut text = format!("{red}error:{end} {error}\n");
        if let Some(hint) = error.hint_text() {
            text.push_str(&format!("  {bold}hint:{end} {hint}\n"));
        }
        self.talk(&text);
        if self.json {
            let mut object = json!({"error": error_object(error)});
            if let Some(reference) = reference {
                object["reference"] = Reference::shown(reference).into();
            }
            // The failure that is being told matters more than a failure to tell it.
            let _ = self.answer_json(&object);
        }
    }

    /// A signal ended the command.
    pub(crate) fn interrupted(&self, signal: Signal) {
        let error =
            Error::new(ErrorKind::Other, signal.name()).hint("the same command may be run again; a get resumes");
        self.talk(&format!("modelcache: {}; the same command may be run again, and a get resumes\n", signal.name()));
        if self.json {
            let mut object = json!({"error": error_object(&error)});
            object["error"]["code"] = signal.name().into();
            let _ = self.answer_json(&object);
        }
    }

    /// A writer of whole lines to standard error.
    pub(crate) fn error_line(&self) -> ErrorLine {
        ErrorLine(self.draws.then(|| self.bars().clone()))
    }

    fn talk(&self, text: &str) {
        // Where even standard error is closed there is nobody to tell.
        let _ = self.error_line().write_all(text.as_bytes());
    }
}

/// Tells of a panic in one line, and its backtrace where `RUST_BACKTRACE` asks for one.
pub(crate) fn tell_panic(info: &PanicHookInfo<'_>) {
    let backtrace = Backtrace::capture();
    let backtrace = match backtrace.status() {
        BacktraceStatus::Captured => format!("{backtrace}\n"),
        _ => "  hint: please report it; RUST_BACKTRACE=1 shows where it comes from\n".to_owned(),
    };
    // Where even standard error is closed there is nobody to tell.
    let _ = io::stderr().lock().write_all(format!("error: {}\n{backtrace}", printable::panic(info)).as_bytes());
}

/// A failure for machines.
fn error_object(error: &Error) -> Value {
    json!({
        "code": error.kind().name(),
        "message": error.message_with_causes(),
        "hint": error.hint_text(),
        "artifact": error.artifact_name(),
        "tier": error.failed_tier(),
    })
}

/// Standard error, written while the progress bar is out of the way.
#[derive(Clone)]
pub(crate) struct ErrorLine(Option<MultiProgress>);

impl Write for ErrorLine {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        let write = || io::stderr().lock().write_all(text).map(|()| text.len());
        match &self.0 {
            Some(bars) => bars.suspend(write),
            None => write(),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Lines of an answer for people. Each is made printable as it is added, so that no foreign word in it can end it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Lines(String);

impl Lines {
    /// One line.
    pub(crate) fn one(line: &str) -> Self {
        Self::default().and(line)
    }

    /// These lines and one more.
    pub(crate) fn and(mut self, line: &str) -> Self {
        self.push(line);
        self
    }

    /// Adds a line.
    pub(crate) fn push(&mut self, line: &str) {
        self.0.push_str(&printable::line(line));
        self.0.push('\n');
    }

    /// Each line.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.lines()
    }
}

/// Without the last line end.
impl fmt::Display for Lines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.trim_end_matches('\n'))
    }
}

/// Rows in aligned columns without lines around them. Columns in `right` are aligned to the right.
pub(crate) fn table(header: &[&str], right: &[usize], rows: impl IntoIterator<Item = Vec<String>>) -> Lines {
    let printable = |row: Vec<String>| row.iter().map(|cell| printable::line(cell).into_owned()).collect::<Vec<_>>();
    let rows = rows.into_iter().map(printable);
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING).set_header(header.to_vec()).add_rows(rows);
    for (at, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if right.contains(&at) {
            column.set_cell_alignment(comfy_table::CellAlignment::Right);
        }
    }
    Lines(table.trim_fmt() + "\n")
}

/// Adds the lines of `more`.
impl std::ops::AddAssign<Lines> for Lines {
    fn add_assign(&mut self, more: Self) {
        self.0.push_str(&more.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use modelcache::Tier;

    #[test]
    fn tables_align_their_columns() {
        let rows = [vec!["a".to_owned(), "1.2 GB".into()], vec!["longer".into(), "3 B".into()]];
        assert_eq!(table(&["NAME", "SIZE"], &[1], rows).to_string(), "NAME      SIZE\na       1.2 GB\nlonger     3 B");
    }

    #[test]
    fn a_foreign_word_ends_no_line_and_no_cell() {
        let hostile = "a\x1b[2J\nerror: false\u{202e}";
        let shown = "a\\u{1b}[2J error: false\\u{202e}";
        assert_eq!(Lines::one(hostile).and("b").to_string(), format!("{shown}\nb"));
        assert_eq!(table(&["X"], &[], [vec![hostile.to_owned()]]).to_string(), format!("X\n{shown}"));
    }

    #[test]
    fn machines_get_every_part_of_an_error() {
        let error = Error::corrupt("sha256 mismatch")
            .artifact("a@1")
            .tier(Tier::Remote)
            .hint("try again")
            .cause(io::Error::other("short"));
        let expected = json!({
            "code": "corrupt", "message": "sha256 mismatch: short", "hint": "try again",
            "artifact": "a@1", "tier": "remote",
        });
        assert_eq!(error_object(&error), expected);
    }
}
