//! Where everything is written: the answer to standard output, all talk to standard error.
//!
//! Nothing else in this program writes. A reader that closes standard output early (`modelcache ls | head`) is no
//! failure: the rest of the answer is dropped. Lines on standard error and the progress bar never mix.

use crate::arguments::Global;
use crate::signals::Signal;
use indicatif::{MultiProgress, ProgressDrawTarget};
use modelcache::{Error, ErrorKind, Result};
use serde_json::{Value, json};
use std::io::{self, IsTerminal, Write};
use std::os::unix::ffi::OsStrExt;
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

    /// A part of the answer: `text` and one line end.
    pub(crate) fn answer(&self, text: &str) -> Result<()> {
        self.write(text.trim_end_matches('\n').as_bytes())
    }

    /// A path as it is, also where it is not UTF-8.
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
        self.answer(&value.to_string())
    }

    /// A remark for people; none with `--quiet`.
    pub(crate) fn remark(&self, text: &str) {
        if !self.quiet {
            self.talk(&format!("modelcache: {text}\n"));
        }
    }

    /// A question; it stays on its line.
    pub(crate) fn ask(&self, question: &str) {
        self.talk(question);
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
                object["reference"] = reference.into();
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

/// A failure for machines.
fn error_object(error: &Error) -> Value {
    let mut message = error.message().to_owned();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        message.push_str(&format!(": {inner}"));
        cause = inner.source();
    }
    json!({
        "code": error.kind().name(),
        "message": message,
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

/// Rows in aligned columns without lines around them. Columns in `right` are aligned to the right.
pub(crate) fn table(header: &[&str], right: &[usize], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING).set_header(header.to_vec()).add_rows(rows);
    for (at, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if right.contains(&at) {
            column.set_cell_alignment(comfy_table::CellAlignment::Right);
        }
    }
    table.trim_fmt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use modelcache::Tier;

    #[test]
    fn tables_align_their_columns() {
        let rows = [vec!["a".to_owned(), "1.2 GB".into()], vec!["longer".into(), "3 B".into()]];
        assert_eq!(table(&["NAME", "SIZE"], &[1], rows), "NAME      SIZE\na       1.2 GB\nlonger     3 B");
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
