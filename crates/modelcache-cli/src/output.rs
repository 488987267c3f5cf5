//! All output of the program: results go to standard output, everything else to standard error.
//!
//! No other module writes to these streams, except `arguments`: it prints help, version and usage errors before there
//! is an [`Output`]. Text from servers, files, other users and the command line is made safe for a terminal here: every
//! line passes through [`printable`]. Two results stay exact, because scripts read them: the path that `get` prints,
//! and the reference that `resolve` prints into a pipe. If the reader closes standard output early
//! (`modelcache ls | head`), the rest of the output is dropped without an error. Lines on standard error and the
//! progress bar never overlap.

use crate::arguments::Global;
use crate::signals::Signal;
use crate::taskbar::Taskbar;
use indicatif::{MultiProgress, ProgressDrawTarget};
use modelcache::{Error, ErrorKind, Reference, Result, Tier, printable};
use serde::Serialize;
use std::backtrace::{Backtrace, BacktraceStatus};
use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::os::unix::ffi::OsStrExt;
use std::panic::PanicHookInfo;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Standard output and standard error, with the caller's output options.
pub(crate) struct Output {
    json: bool,
    quiet: bool,
    colour: bool,
    /// True if standard error is a terminal that can redraw lines.
    can_redraw: bool,
    /// True if standard output is a terminal that can redraw lines.
    can_redraw_stdout: bool,
    bars: OnceLock<MultiProgress>,
    /// `None` if the terminal is not known to show progress in the taskbar.
    taskbar: Option<Mutex<Taskbar>>,
    /// True once standard output was closed by its reader.
    closed: AtomicBool,
}

impl Output {
    pub(crate) fn new(global: &Global) -> Self {
        let is_set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        // Some CI systems run commands on a terminal, and write everything that it receives to a log.
        let keeps_log = is_set("CI") && std::env::var_os("CI").is_none_or(|value| value != "false");
        let can_redraw = io::stderr().is_terminal() && !dumb && !keeps_log;
        Self {
            json: global.json,
            quiet: global.quiet,
            colour: io::stderr().is_terminal() && !dumb && !is_set("NO_COLOR"),
            can_redraw,
            can_redraw_stdout: io::stdout().is_terminal() && !dumb && !keeps_log,
            bars: OnceLock::new(),
            taskbar: Taskbar::detect(can_redraw).map(Mutex::new),
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

    /// Returns true if standard error is a terminal that can redraw lines, as a progress bar needs.
    pub(crate) fn can_redraw(&self) -> bool {
        self.can_redraw
    }

    /// Returns true if standard output is a terminal that can redraw lines, as a live view needs.
    pub(crate) fn can_redraw_stdout(&self) -> bool {
        self.can_redraw_stdout
    }

    /// Returns true once standard output was closed by its reader.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// Writes the text that `change` returns to the terminal, if it shows progress in the taskbar.
    pub(crate) fn show_in_taskbar(&self, change: impl FnOnce(&mut Taskbar) -> String) {
        if let Some(taskbar) = &self.taskbar {
            let mut taskbar = taskbar.lock().unwrap_or_else(PoisonError::into_inner);
            // The sequence does not move the cursor, so that the bars need not be hidden meanwhile.
            let _ = io::stderr().lock().write_all(change(&mut taskbar).as_bytes());
        }
    }

    /// Returns the progress bars of this terminal.
    pub(crate) fn bars(&self) -> &MultiProgress {
        self.bars.get_or_init(|| {
            let target = if self.can_redraw { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
            MultiProgress::with_draw_target(target)
        })
    }

    /// Prints the lines of a result for people.
    pub(crate) fn print(&self, lines: &Lines) -> Result<()> {
        self.print_unescaped(&lines.0)
    }

    /// Prints `text` without escaping, and one line end. The text must not contain untrusted input.
    pub(crate) fn print_unescaped(&self, text: &str) -> Result<()> {
        self.write(text.trim_end_matches('\n').as_bytes())
    }

    /// Prints a reference: unchanged into a pipe, made printable on a terminal.
    pub(crate) fn print_reference(&self, reference: &str) -> Result<()> {
        match io::stdout().is_terminal() {
            true => self.write(printable::line(reference).as_bytes()),
            false => self.write(reference.as_bytes()),
        }
    }

    /// Prints a path byte for byte. Scripts read it, and it need not be UTF-8.
    pub(crate) fn print_path(&self, path: &Path) -> Result<()> {
        self.write(path.as_os_str().as_bytes())
    }

    /// Writes a line.
    fn write(&self, line: &[u8]) -> Result<()> {
        self.write_exactly(&[line, b"\n"].concat())
    }

    /// Writes to standard output, for instance control sequences of a live view.
    pub(crate) fn write_exactly(&self, bytes: &[u8]) -> Result<()> {
        if self.is_closed() {
            return Ok(());
        }
        let mut stdout = io::stdout().lock();
        match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
            // The reader closed the pipe: `modelcache ls | head`.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                self.closed.store(true, Ordering::Relaxed);
                Ok(())
            }
            written => written
                .map_err(|cause| Error::new(ErrorKind::Other, "cannot write to the standard output").cause(cause)),
        }
    }

    /// Prints one report as a JSON object on a line, with its fields in alphabetical order.
    pub(crate) fn print_json(&self, report: &impl Serialize) -> Result<()> {
        let value = serde_json::to_value(report)
            .map_err(|cause| Error::new(ErrorKind::Other, "cannot serialize the JSON output").cause(cause))?;
        self.write(printable::json(&value.to_string()).as_bytes())
    }

    /// Prints a message for people to standard error, unless `--quiet` was passed.
    pub(crate) fn message(&self, text: &str) {
        if !self.quiet {
            self.write_error(&format!("modelcache: {}\n", printable::line(text)));
        }
    }

    /// Prints a question to standard error, without a line end.
    pub(crate) fn ask(&self, question: &str) {
        self.write_error(&printable::line(question));
    }

    /// Prints an error and its hint. `reference` names the reference that failed, if the command has several.
    pub(crate) fn error(&self, error: &Error, reference: Option<&str>) {
        let (red, bold, end) = if self.colour { ("\x1b[1;31m", "\x1b[1m", "\x1b[0m") } else { ("", "", "") };
        let mut text = format!("{red}error:{end} {error}\n");
        if let Some(hint) = error.hint_text() {
            text.push_str(&format!("  {bold}hint:{end} {hint}\n"));
        }
        self.write_error(&text);
        if self.json {
            let reference = reference.map(Reference::shown);
            // The original error matters more than a failure to print it.
            let _ = self.print_json(&Failure { reference, error: ErrorJson::of(error) });
        }
    }

    /// Prints that a signal ended the command.
    pub(crate) fn report_signal(&self, signal: Signal) {
        let hint = "run the same command again; a get resumes its download";
        let error = Error::new(ErrorKind::Other, signal.name()).hint(hint);
        self.write_error(&format!("modelcache: {}; {hint}\n", signal.name()));
        if self.json {
            let error = ErrorJson { code: signal.name(), ..ErrorJson::of(&error) };
            let _ = self.print_json(&Failure { reference: None, error });
        }
    }

    /// Returns a writer of whole lines to standard error.
    pub(crate) fn error_line(&self) -> ErrorLine {
        ErrorLine(self.can_redraw.then(|| self.bars().clone()))
    }

    fn write_error(&self, text: &str) {
        // A closed standard error leaves no stream to report to.
        let _ = self.error_line().write_all(text.as_bytes());
    }
}

/// The panic hook: prints the panic on one line, with a backtrace if `RUST_BACKTRACE` is set.
pub(crate) fn report_panic(info: &PanicHookInfo<'_>) {
    let backtrace = Backtrace::capture();
    let backtrace = match backtrace.status() {
        BacktraceStatus::Captured => format!("{backtrace}\n"),
        _ => "  hint: please report this defect; RUST_BACKTRACE=1 prints a backtrace\n".to_owned(),
    };
    // A closed standard error leaves no stream to report to.
    let _ = io::stderr().lock().write_all(format!("error: {}\n{backtrace}", printable::panic(info)).as_bytes());
}

/// A report, with the reference that it is about.
#[derive(Debug, Serialize)]
pub(crate) struct WithReference<'a, T> {
    /// The reference, as it was given to the command.
    pub(crate) reference: &'a str,
    #[serde(flatten)]
    pub(crate) report: T,
}

/// The serialized form of a failure.
#[derive(Debug, Serialize)]
pub(crate) struct Failure<'a> {
    /// The reference that failed. Absent if the command as a whole failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reference: Option<String>,
    /// The error.
    pub(crate) error: ErrorJson<'a>,
}

/// The serialized form of an error.
#[derive(Debug, Serialize)]
pub(crate) struct ErrorJson<'a> {
    /// The kind of error, for example `not_found`; or the name of the signal that ended the command.
    code: &'a str,
    /// The error and its causes, in words.
    message: String,
    /// The suggested remedy.
    hint: Option<&'a str>,
    /// The artifact that the error is about.
    artifact: Option<&'a str>,
    /// The tier that failed.
    tier: Option<Tier>,
}

impl<'a> ErrorJson<'a> {
    pub(crate) fn of(error: &'a Error) -> Self {
        Self {
            code: error.kind().name(),
            message: error.message_with_causes(),
            hint: error.hint_text(),
            artifact: error.artifact_name(),
            tier: error.failed_tier(),
        }
    }
}

/// A writer to standard error that hides the progress bar while it writes.
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

/// Lines of a result for people. Each line is made printable when it is added, so that untrusted text cannot break it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Lines(String);

impl Lines {
    /// Creates a single line.
    pub(crate) fn one(line: &str) -> Self {
        Self::default().and(line)
    }

    /// Returns these lines with one more.
    pub(crate) fn and(mut self, line: &str) -> Self {
        self.push(line);
        self
    }

    /// Appends a line.
    pub(crate) fn push(&mut self, line: &str) {
        self.0.push_str(&printable::line(line));
        self.0.push('\n');
    }

    /// Returns an iterator over the lines.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.lines()
    }
}

/// Formats the lines without the last line end.
impl fmt::Display for Lines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.trim_end_matches('\n'))
    }
}

/// Formats rows as a table without borders. The columns whose indexes are in `right` are aligned to the right.
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

/// Appends the lines of `more`.
impl std::ops::AddAssign<Lines> for Lines {
    fn add_assign(&mut self, more: Self) {
        self.0.push_str(&more.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn tables_align_their_columns() {
        let rows = [vec!["a".to_owned(), "1.2 GB".into()], vec!["longer".into(), "3 B".into()]];
        assert_eq!(table(&["NAME", "SIZE"], &[1], rows).to_string(), "NAME      SIZE\na       1.2 GB\nlonger     3 B");
    }

    #[test]
    fn untrusted_text_cannot_break_a_line_or_a_cell() {
        let hostile = "a\x1b[2J\nerror: false\u{202e}";
        let shown = "a\\u{1b}[2J error: false\\u{202e}";
        assert_eq!(Lines::one(hostile).and("b").to_string(), format!("{shown}\nb"));
        assert_eq!(table(&["X"], &[], [vec![hostile.to_owned()]]).to_string(), format!("X\n{shown}"));
    }

    #[test]
    fn the_json_form_has_every_part_of_an_error() {
        let error = Error::corrupt("sha256 mismatch")
            .artifact("a@1")
            .tier(Tier::Remote)
            .hint("try again")
            .cause(io::Error::other("short"));
        let expected = json!({
            "code": "corrupt", "message": "sha256 mismatch: short", "hint": "try again",
            "artifact": "a@1", "tier": "remote",
        });
        assert_eq!(json!(ErrorJson::of(&error)), expected);
    }
}
