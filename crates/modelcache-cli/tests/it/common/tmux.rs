//! A terminal: a window of a tmux server of its own, in which a run of the binary is the only command.

use super::Run;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const TMUX: &str = "/usr/bin/tmux";

/// A terminal of tmux. The server ends when this value is dropped.
pub struct Tmux {
    socket: PathBuf,
    raw: PathBuf,
}

impl Tmux {
    /// Starts the binary in a terminal with this number of columns and rows. After its end, the terminal stays open
    /// and shows `exit` with the exit code. Prints `SKIPPED` and returns `None` without tmux; in CI that is a failure.
    /// `folder` is for the files of the terminal.
    #[allow(clippy::print_stderr)]
    pub fn start(run: Run, args: &[&str], folder: &Path, (columns, rows): (u16, u16)) -> Option<Self> {
        if !Path::new(TMUX).exists() {
            eprintln!("SKIPPED: {TMUX} is not installed");
            return None;
        }
        fs::create_dir_all(folder).unwrap();
        let tmux = Self { socket: folder.join("tmux"), raw: folder.join("raw") };
        // The shell waits until everything that the terminal receives is also written to `raw`. Ctrl-C does not end it.
        let script = "trap : INT; read line; \"$@\"; echo \"exit $?\"; exec sleep 600";
        let (socket, columns, rows) = (tmux.socket.to_str().unwrap(), columns.to_string(), rows.to_string());
        let new = [TMUX, "-u", "-S", socket, "-f", "/dev/null", "new-session", "-d", "-x", &columns, "-y", &rows];
        // tmux sets variables of its own, from which programs see that they are in tmux.
        let shell = ["/usr/bin/env", "-u", "TMUX", "-u", "TERM_PROGRAM", "/bin/sh", "-c", script, "sh"];
        run.through(&[&new[..], &shell].concat()).run(args).ok();
        tmux.command(&["pipe-pane", &format!("exec cat > '{}'", tmux.raw.display())]);
        tmux.send("Enter");
        Some(tmux)
    }

    /// Runs a command of tmux and returns its output.
    #[track_caller]
    fn command(&self, args: &[&str]) -> String {
        let output = Command::new(TMUX).arg("-S").arg(&self.socket).args(args).output().unwrap();
        assert!(output.status.success(), "tmux {args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Returns the visible lines, without the empty ones at the end.
    #[track_caller]
    pub fn lines(&self) -> Vec<String> {
        let text = self.command(&["capture-pane", "-p"]);
        text.trim_end().lines().map(|line| line.trim_end().to_owned()).collect()
    }

    /// Returns everything that the terminal has received.
    pub fn received(&self) -> String {
        String::from_utf8(fs::read(&self.raw).unwrap_or_default()).unwrap()
    }

    /// Presses a key, such as `C-c`.
    #[track_caller]
    pub fn send(&self, key: &str) {
        self.command(&["send-keys", key]);
    }

    #[track_caller]
    pub fn resize(&self, columns: u16, rows: u16) {
        self.command(&["resize-window", "-x", &columns.to_string(), "-y", &rows.to_string()]);
    }

    /// Returns true if the cursor is visible.
    #[track_caller]
    pub fn has_cursor(&self) -> bool {
        self.command(&["display-message", "-p", "#{cursor_flag}"]).trim() == "1"
    }
}

impl Drop for Tmux {
    fn drop(&mut self) {
        // The server ended by itself if its command has ended.
        let _ = Command::new(TMUX).arg("-S").arg(&self.socket).arg("kill-server").output();
    }
}
