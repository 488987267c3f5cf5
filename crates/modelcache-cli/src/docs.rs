//! Generates reference pages under `docs/` from the tables of settings, commands, exit codes and metrics.
//!
//! `cargo xtask docs` writes the pages, and CI compares them with this output. Do not edit the pages by hand.

mod json;

pub use json::{Report, reports};

use crate::arguments::Arguments;
use crate::exit::EXITS;
use crate::verbs::help;
use clap::CommandFactory;
use modelcache::metrics::markdown;
use modelcache::settings;

/// The width of help texts on the pages, in columns.
const HELP_COLUMNS: usize = 100;

/// Returns the pages that this module generates: their paths relative to the repository, and their texts.
/// `cargo xtask docs` also writes docs/json.md and docs/http.md.
pub fn pages() -> Vec<(&'static str, String)> {
    vec![
        ("docs/configuration.md", configuration()),
        ("docs/command-line.md", command_line()),
        ("docs/metrics.md", metrics()),
    ]
}

/// Returns the page of all settings.
pub fn configuration() -> String {
    format!(
        "# Configuration\n\n{GENERATED}\n\n\
         A flag overrides a variable, a variable overrides the file, and the file overrides the default. An empty \
         value counts as unset.\n\n\
         `--config PATH`, or else the variable `{variable}`, names the configuration file. That file must exist, and \
         no other is read. Without either, modelcache reads `$XDG_CONFIG_HOME/modelcache/{file}` (or \
         `~/.config/modelcache/{file}`) and `/etc/modelcache/{file}`, if they exist; the former overrides the \
         latter. An unknown key is an error.\n\n\
         ```toml\nmax_bytes = \"200GB\"\norigin = [\"hf://{{name}}@{{version}}\"]\n\n\
         [remote]                      # without options: remote = \"s3://models/prod\"\n\
         url = \"s3://models/prod\"\n\n[remote.options]\nregion = \"eu-west-1\"\n```\n\n\
         ## Settings\n\n{table}",
        variable = settings::FILE_VARIABLE,
        file = settings::FILE_NAME,
        table = settings::markdown(),
    )
}

/// Returns the page of all commands and exit codes.
pub fn command_line() -> String {
    let mut command = Arguments::command().term_width(HELP_COLUMNS).disable_help_subcommand(true);
    command.build();
    let mut page = format!("# Command line\n\n{GENERATED}\n");
    let mut verbs: Vec<_> = command.get_subcommands().filter(|verb| !verb.is_hide_set()).cloned().collect();
    page.push_str(&help_block("modelcache", command.after_long_help("")));
    page.push_str(&help_block("modelcache help settings", help::settings_command().term_width(HELP_COLUMNS)));
    for verb in &mut verbs {
        // Global options are documented once, under `modelcache`.
        let verb = verb.clone().mut_args(|argument| {
            let global = argument.is_global_set();
            argument.hide(global)
        });
        page.push_str(&help_block(&format!("modelcache {}", verb.get_name()), verb.clone()));
    }
    format!("{page}\n## Exit codes\n\n{}", exit_codes())
}

/// Returns the page of all metrics.
pub fn metrics() -> String {
    format!(
        "# Metrics\n\n{GENERATED}\n\n\
         [observability.md](observability.md) describes how to collect them.\n\n\
         ## Cache\n\n\
         Counters and gauges of one process since it opened the cache: `/metrics` and `/cache/metrics` of the daemon \
         and of the FastAPI integration, `cache.metrics` in Python, `Cache::metrics` in Rust. The JSON form also has `hit_rate`, the \
         fraction of gets that the local disk answered.\n\n{cache}\n\
         ## Directory\n\n\
         Gauges of the local directory, in all exports. The column JSON names the field of \
         [`stats --json`](json.md#stats).\n\n{directory}\n\
         ## Daemon\n\n\
         At `/metrics` and `/cache/metrics` of `modelcache serve`, beside those of its cache and directory.\n\n{daemon}\n\
         ## Metrics file\n\n\
         Gauges of the last command, in the file of `MODEL_CACHE_METRICS_FILE`, beside those of the directory.\n\n\
         {command}",
        cache = markdown(modelcache::metrics::FAMILIES),
        directory = markdown(modelcache::cache::DIRECTORY_FAMILIES),
        daemon = markdown(modelcache_server::HTTP_METRICS),
        command = markdown(crate::metrics::FAMILIES),
    )
}

/// Returns the table of exit codes.
pub fn exit_codes() -> String {
    let rows = EXITS.iter().map(|exit| format!("| {} | {} |\n", exit.code, exit.meaning));
    std::iter::once("| exit | meaning |\n|---|---|\n".to_owned()).chain(rows).collect()
}

const GENERATED: &str = "<!-- Written by `cargo xtask docs`; edit the tables in the code. -->";

fn help_block(title: &str, mut command: clap::Command) -> String {
    let help = command.render_long_help().to_string();
    let lines: Vec<_> = help.lines().map(str::trim_end).collect();
    format!("\n## `{title}`\n\n```text\n{}\n```\n", lines.join("\n").trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_verb_setting_and_exit_code_is_documented() {
        let page = command_line();
        for verb in Arguments::command().get_subcommands() {
            let heading = format!("## `modelcache {}`", verb.get_name());
            assert_eq!(page.contains(&heading), !verb.is_hide_set(), "{heading} in {page}");
        }
        assert!(page.contains("| 143 | terminated"), "{page}");
        assert!(!page.contains("\x1b"), "no colours in a file");
        assert!(configuration().contains("`MODEL_CACHE_DIR`"));
    }

    #[test]
    fn the_file_shown_as_an_example_is_accepted() {
        let page = configuration();
        let file = page.split("```").find_map(|block| block.strip_prefix("toml\n")).expect("an example");
        let files = [("example.toml".into(), file.to_owned())];
        let settings = settings::Settings::gather(&Default::default(), &Default::default(), &files, |_| Ok(None));
        let config = settings.expect("accepted").config;
        assert_eq!(config.remote.expect("a remote").options["region"], "eu-west-1");
        assert_eq!(config.origins.len(), 1);
    }
}
