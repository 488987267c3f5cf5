//! A live view on a terminal, redrawn in place.
//!
//! Lines are cut to the width of the terminal and never wrapped. If there are more lines than rows, the last row says
//! how many are left out. The view changes no state of the terminal, so that there is nothing to restore when the
//! process is stopped or killed. Its last content stays on the screen.

use crate::output::{Lines, Output};
use console::{Term, truncate_str};
use modelcache::Result;

/// The visible part of the terminal at standard output.
pub(crate) struct Screen<'a>(&'a Output);

impl<'a> Screen<'a> {
    /// Scrolls the present content of the terminal out of sight.
    pub(crate) fn open(output: &'a Output) -> Result<Self> {
        let (rows, _) = Term::stdout().size();
        output.write_exactly("\n".repeat(rows.into()).as_bytes())?;
        Ok(Self(output))
    }

    /// Replaces the content of the screen.
    pub(crate) fn draw(&self, lines: &Lines) -> Result<()> {
        let (rows, columns) = Term::stdout().size();
        self.0.write_exactly(frame(lines, rows.into(), columns.into()).as_bytes())
    }
}

impl Drop for Screen<'_> {
    fn drop(&mut self) {
        // The next output of the shell starts below the view.
        let _ = self.0.write_exactly(b"\r\n");
    }
}

/// Returns the text that shows `lines` on a screen of this size, in place of its present content. It leaves the cursor
/// below the lines.
fn frame(lines: &Lines, rows: usize, columns: usize) -> String {
    let mut shown: Vec<String> = lines.iter().map(|line| truncate_str(line, columns, "…").into_owned()).collect();
    if shown.len() > rows {
        let left_out = shown.len() + 1 - rows.max(1);
        shown.truncate(rows.saturating_sub(1));
        shown.push(truncate_str(&format!("… {left_out} more lines"), columns, "…").into_owned());
    }
    let below = (shown.len() + 1).min(rows);
    shown.resize(rows, String::new());
    // Each row is cleared before it is written. After a full row, the cursor is on the row's last character, and clearing
    // would erase it.
    let row = |text: String| format!("\x1b[2K{text}");
    format!("\x1b[H{}\x1b[{below}H", shown.into_iter().map(row).collect::<Vec<_>>().join("\r\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(lines: &[&str], rows: usize, columns: usize) -> Vec<String> {
        let lines = lines.iter().fold(Lines::default(), |lines, line| lines.and(line));
        let frame = frame(&lines, rows, columns);
        let frame = frame.strip_prefix("\x1b[H").expect("the cursor starts at the top");
        let (frame, _) = frame.rsplit_once("\x1b[").expect("the cursor goes below the lines");
        frame.split("\r\n").map(|row| row.strip_prefix("\x1b[2K").expect("a cleared row").to_owned()).collect()
    }

    #[test]
    fn every_row_of_the_screen_is_replaced() {
        assert_eq!(rows(&["a", "b"], 4, 10), ["a", "b", "", ""]);
        let lines = Lines::one("a").and("b");
        assert!(frame(&lines, 4, 10).ends_with("\x1b[3H"), "the cursor is below the lines");
        assert!(frame(&lines, 2, 10).ends_with("\x1b[2H"), "the cursor is in the last row");
    }

    #[test]
    fn long_lines_are_cut_by_their_width_on_the_screen() {
        assert_eq!(rows(&["abcdef", "abcde", "模型模型"], 3, 5), ["abcd…", "abcde", "模型…"]);
        assert_eq!(rows(&["a\x1b[31mb"], 1, 80), ["a\\u{1b}[31mb"], "no control sequence gets through");
    }

    #[test]
    fn lines_that_do_not_fit_are_counted() {
        assert_eq!(rows(&["a", "b", "c", "d"], 3, 20), ["a", "b", "… 2 more lines"]);
        assert_eq!(rows(&["a", "b", "c"], 3, 20), ["a", "b", "c"]);
        assert_eq!(rows(&["a", "b"], 1, 6), ["… 2 m…"]);
    }
}
