//! The command line: standard output, standard error, and exit codes.
//!
//! No test here uses the network. Every test has its own home and cache directory.

use assert_cmd::Command;
use serde_json::Value;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Output, Stdio};
use tempfile::TempDir;

/// A temporary home directory. Runs inherit nothing from the environment of the tests.
struct Home(TempDir);

impl Home {
    fn new() -> Self {
        Self(TempDir::new().expect("temporary folder"))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn file(&self, name: &str, text: &str) -> String {
        let path = self.path().join(name);
        fs::create_dir_all(path.parent().expect("parent")).expect("folder");
        fs::write(&path, text).expect("file");
        path.display().to_string()
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_modelcache"));
        command.env_clear().env("HOME", self.path()).current_dir(self.path());
        command
    }

    fn run<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Outcome {
        self.command().args(args).output().expect("runs").into()
    }

    fn run_with(&self, variables: &[(&str, &str)], args: &[&str]) -> Outcome {
        self.command().envs(variables.iter().copied()).args(args).output().expect("runs").into()
    }
}

struct Outcome {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl From<Output> for Outcome {
    fn from(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
        Self { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }
}

impl Outcome {
    #[track_caller]
    fn refused(self, code: i32, message_parts: &[&str]) -> Self {
        assert_eq!(self.code, Some(code), "{}{}", self.stdout, self.stderr);
        for part in message_parts {
            assert!(self.stderr.contains(part), "{part:?} is not in:\n{}", self.stderr);
        }
        self
    }

    #[track_caller]
    fn answered(self) -> Self {
        assert_eq!(self.code, Some(0), "{}{}", self.stdout, self.stderr);
        self
    }
}

#[test]
fn without_arguments_help_is_shown_and_the_code_is_2() {
    let home = Home::new();
    home.run::<&str>([]).refused(2, &["Usage: modelcache", "inspect"]);
    let help = home.run(["--help"]).answered();
    for part in ["MODEL_CACHE_CONFIG", "modelcache help settings", "143  terminated", "completions"] {
        assert!(help.stdout.contains(part), "{part:?} is not in:\n{}", help.stdout);
    }
    let settings = home.run(["help", "settings"]).answered().stdout;
    assert!(settings.contains("MODEL_CACHE_DIR") && settings.contains("--max-bytes"), "{settings}");
    assert_eq!(home.run(["--version"]).answered().stdout, concat!("modelcache ", env!("CARGO_PKG_VERSION"), "\n"));
}

#[test]
fn a_wrong_command_line_ends_in_2_and_leaves_the_answer_empty() {
    let home = Home::new();
    for (args, message_part) in [
        (&["fetch"][..], "unrecognized subcommand 'fetch'"),
        (&["get"], "<REF>"),
        (&["get", "--inclde", "x", "a@1"], "--include"),
        (&["get", "--timeout", "soon", "a@1"], "not a duration"),
        (
            &["prune", "--older-than", "7"],
            "a number without a unit; write 7d for days, 7h for hours, or 7s for seconds",
        ),
        (&["pin", "a@1", "--for", "30"], "write 30d for days"),
        (&["evict", "a@1", "--tier", "cloud"], "[possible values: all, disk, remote]"),
        (&["completions", "cmd"], "possible values"),
    ] {
        assert_eq!(home.run(args).refused(2, &["error: ", message_part]).stdout, "", "{args:?}");
    }
}

#[test]
fn an_argument_that_is_not_utf8_is_a_usage_error() {
    Home::new().run([OsStr::new("get"), OsStr::from_bytes(b"a\xff@1")]).refused(2, &["error: ", "UTF-8"]);
}

#[test]
fn usage_errors_are_a_json_object_with_json() {
    let home = Home::new();
    for args in [&["get", "--json"][..], &["--json", "stats", "--max-bytes", "much"], &["man", "fetch", "--json"]] {
        let outcome = home.run(args).refused(2, &["error: "]);
        let object: Value = serde_json::from_str(&outcome.stdout).expect("one object");
        assert_eq!(object["error"]["code"], "invalid", "{object}");
        assert!(object["error"]["message"].as_str().is_some_and(|message| !message.is_empty()), "{object}");
    }
}

#[test]
fn the_error_for_a_bad_setting_names_its_source_and_the_accepted_values() {
    let home = Home::new();
    let message_parts = |source: &'static str| [source, "much", "hint: accepted: 14GB, 1.5TiB, 80%"];
    home.run(["stats", "--max-bytes", "much"]).refused(2, &message_parts("--max-bytes"));
    home.run_with(&[("MODEL_CACHE_MAX_BYTES", "much")], &["stats"]).refused(2, &message_parts("MODEL_CACHE_MAX_BYTES"));
    home.file(".config/modelcache/modelcache.toml", "max_bytes = 'much'");
    home.run(["stats"]).refused(2, &message_parts("modelcache/modelcache.toml: max_bytes"));
}

#[test]
fn an_unknown_key_names_the_nearest_known_one() {
    let home = Home::new();
    let file = home.file("c.toml", "max-byte = 1\n");
    home.run(["stats", "--config", &file]).refused(2, &["c.toml", "\"max-byte\"", "did you mean \"max_bytes\"?"]);
    home.run_with(&[("MODEL_CACHE_CONFIG", &file)], &["stats"]).refused(2, &["did you mean \"max_bytes\"?"]);
    let file = home.file("d.toml", "[remote]\nurl = 's3://b'\n\nmax_bytes = 1 2");
    home.run(["stats", "--config", &file]).refused(2, &["d.toml: line 4"]);
}

#[test]
fn a_named_file_must_exist_and_the_usual_ones_need_not() {
    let home = Home::new();
    home.run(["stats", "--config", "none.toml"]).refused(2, &["none.toml", "--config"]);
    home.run(["ls", "--remote"]).refused(2, &["no remote is configured", "MODEL_CACHE_REMOTE"]);
}

#[test]
fn two_settings_of_a_remote_are_refused() {
    let home = Home::new();
    let both = [("MODEL_CACHE_REMOTE", "s3://a"), ("MODEL_CACHE_S3_BUCKET", "b")];
    home.run_with(&both, &["stats"]).refused(2, &["MODEL_CACHE_REMOTE", "MODEL_CACHE_S3_BUCKET", "only one"]);
}

#[test]
fn a_bad_log_filter_is_refused_by_name() {
    let home = Home::new();
    home.run_with(&[("MODEL_CACHE_LOG", "a=b=c")], &["stats"]).refused(2, &["MODEL_CACHE_LOG", "a=b=c", "debug"]);
    home.run_with(&[("MODEL_CACHE_LOG", "warning")], &["stats"])
        .refused(2, &["MODEL_CACHE_LOG", "\"warning\" is not a log level"]);
    for slip in ["https://r/{name}/{verson}", "hf://{name}", "https://r/x-{version}", "https://r/{name}/{version"] {
        home.run_with(&[("MODEL_CACHE_ORIGIN", slip)], &["stats"]).refused(2, &["MODEL_CACHE_ORIGIN", "{name}"]);
    }
}

#[test]
fn an_unknown_variable_is_logged_in_the_chosen_format() {
    let home = Home::new();
    let odd = ("MODEL_CACHE_MAX_BYTE", "1");
    let text = home.run_with(&[odd], &["stats"]).stderr;
    assert!(text.contains("WARN") && text.contains("did you mean MODEL_CACHE_MAX_BYTES?"), "{text}");
    let json = home.run_with(&[odd, ("MODEL_CACHE_LOG_FORMAT", "json")], &["stats"]).stderr;
    let object: Value = serde_json::from_str(json.lines().next().expect("a line")).expect("an object");
    assert_eq!(object["level"], "WARN");
    let quiet = home.run_with(&[odd], &["stats", "--quiet"]).stderr;
    assert!(!quiet.contains("WARN"), "{quiet}");
}

#[test]
fn invalid_references_are_refused_with_a_remedy() {
    let home = Home::new();
    home.run(["evict", "fraud"]).refused(2, &["has no version", "hint: write NAME@VERSION"]);
    home.run(["put", "hf/org/model@1", "."]).refused(2, &["is reserved"]);
    home.run(["inspect", "ftp://host/x"]).refused(2, &["unknown scheme"]);
}

#[test]
fn completions_know_verbs_and_flags_of_settings() {
    let home = Home::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = home.run(["completions", shell]).answered().stdout;
        assert!(script.contains("inspect") && script.contains("min-free-bytes"), "{shell}: {script}");
    }
    home.run(["man", "sync"]).refused(2, &["unknown command", "inspect"]);
}

#[test]
fn completions_and_man_work_under_a_broken_configuration() {
    let home = Home::new();
    let broken = [("MODEL_CACHE_MAX_BYTES", "much")];
    home.run_with(&broken, &["completions", "bash"]).answered();
    home.run_with(&broken, &["man"]).answered();
}

#[test]
fn manual_pages_are_roff() {
    let home = Home::new();
    let page = home.run(["man"]).answered().stdout;
    for part in [".TH modelcache 1", ".SH \"EXIT STATUS\"", ".SH ENVIRONMENT", "MODEL_CACHE_DIR"] {
        assert!(page.contains(part), "{part:?} is not in:\n{page}");
    }
    let page = home.run(["man", "get"]).answered().stdout;
    assert!(page.contains("modelcache\\-get") && page.contains("\\-\\-include"), "{page}");
    home.run(["man", "fetch"]).refused(2, &["unknown command \"fetch\"", "commands: get, exec, prewarm, put"]);
}

#[test]
fn all_manual_pages_are_written_into_a_folder() {
    let home = Home::new();
    let folder = home.path().join("new/man1");
    let path = folder.to_str().expect("UTF-8");
    home.run(["man", "--output", path]).answered();
    for (page, arguments) in [("modelcache.1", &["man"][..]), ("modelcache-get.1", &["man", "get"])] {
        let written = fs::read_to_string(folder.join(page)).expect("a page");
        assert_eq!(written.trim_end(), home.run(arguments).answered().stdout.trim_end());
    }
    home.run(["man", "get", "--output", path]).refused(2, &["cannot be used with"]);
    home.run(["man", "--output", "/dev/null/x"]).refused(1, &["cannot write /dev/null/x"]);
}

#[test]
fn a_closed_pipe_is_no_failure() {
    let home = Home::new();
    let (reader, writer) = std::io::pipe().expect("pipe");
    drop(reader);
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_modelcache"));
    command.args(["completions", "bash"]).env("HOME", home.path()).stdout(writer).stderr(Stdio::piped());
    let outcome = command.output().expect("runs");
    assert_eq!((outcome.status.code(), outcome.stderr.as_slice()), (Some(0), &b""[..]));
}

#[test]
fn unwritable_standard_output_is_a_failure() {
    let home = Home::new();
    let full = File::options().write(true).open("/dev/full").expect("/dev/full");
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_modelcache"));
    command.args(["man"]).env("HOME", home.path()).stdout(full).stderr(Stdio::piped());
    let outcome = command.output().expect("runs");
    assert_eq!(outcome.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&outcome.stderr).contains("cannot write to the standard output"));
}

#[test]
fn commands_and_options_of_other_tools_are_answered_with_the_right_ones() {
    let home = Home::new();
    for (args, message_part) in [
        (&["rm", "a@1"][..], "modelcache evict REF"),
        (&["cp", "a", "b"], "modelcache get REF --into DIR"),
        (&["download", "org/model"], "modelcache get REF"),
        (&["upload", "x"], "modelcache put NAME@VERSION PATH"),
        (&["list"], "modelcache ls"),
        (&["delete", "a@1"], "modelcache evict"),
        (&["get", "--token", "canary", "a@1"], "HF_TOKEN"),
        (&["get", "--cache-dir", "/d", "a@1"], "--dir"),
        (&["get", "--repo-type=dataset", "a@1"], "hf://datasets/org/name"),
        (&["get", "--max-workers", "8", "a@1"], "prewarm --jobs"),
        (&["get", "--force-download", "a@1"], "--refresh"),
    ] {
        let outcome = home.run(args).refused(2, &["error: ", "tip: ", message_part]);
        assert!(!outcome.stderr.contains("similar") && !outcome.stderr.contains("canary"), "{}", outcome.stderr);
        let json = home.run([args, &["--json"]].concat());
        let object: Value = serde_json::from_str(json.stdout.trim_end()).expect("an object");
        assert!(object["error"]["hint"].as_str().expect("a hint").contains(message_part), "{object}");
    }
}

#[test]
fn settings_have_a_help_of_their_own() {
    let home = Home::new();
    let settings = home.run(["help", "settings"]).answered().stdout;
    assert!(settings.contains("--max-bytes") && settings.contains("MODEL_CACHE_DIR"), "{settings}");
    assert_eq!(home.run(["help", "get"]).answered().stdout, home.run(["get", "--help"]).answered().stdout);
    for args in [&["get", "--help"][..], &["pin", "--help"], &["--help"], &["help"], &["help", "--help"]] {
        let help = home.run(args).answered().stdout;
        assert!(!help.contains("--retry-deadline"), "{help}");
    }
    assert!(home.run(["get", "--help"]).answered().stdout.contains("modelcache help settings"));
    home.run(["help", "frobnicate"]).refused(2, &["there is no command \"frobnicate\""]);
}

#[test]
fn reading_commands_create_no_directory() {
    let home = Home::new();
    let dir = home.path().join("typo");
    let dir = dir.to_str().expect("UTF-8");
    for (args, code) in [
        (&["ls"][..], 0),
        (&["stats"], 0),
        (&["verify"], 0),
        (&["prune"], 0),
        (&["inspect", "a@1"], 3),
        (&["evict", "a@1"], 3),
        (&["pin", "a@1"], 3),
        (&["resolve", "hf://org/model", "--offline"], 3),
        (&["resolve", "a@1", "--local-files-only"], 3),
    ] {
        let outcome = home.run([args, &["--dir", dir]].concat());
        assert_eq!(outcome.code, Some(code), "{args:?}: {}{}", outcome.stdout, outcome.stderr);
        assert!(outcome.stderr.contains(&format!("there is no cache directory at {dir}")), "{}", outcome.stderr);
        assert!(!Path::new(dir).exists(), "{args:?} created it");
    }
    assert_eq!(home.run(["ls", "--dir", dir]).stdout, "0 artifacts, 0 B\n");
}
