//! `completions`: the completion script of a shell.

use crate::arguments::Arguments;
use crate::output::Output;
use clap::{Args, Command, CommandFactory};
use clap_complete::Shell;
use modelcache::Result;

/// Print the completion script for a shell
///
/// For instance: modelcache completions bash > /etc/bash_completion.d/modelcache
#[derive(Debug, Args)]
pub(crate) struct Completions {
    /// The shell
    #[arg(value_enum)]
    pub(crate) shell: Shell,
}

impl Completions {
    pub(crate) fn run(&self, output: &Output) -> Result<()> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut for_people(), "modelcache", &mut script);
        output.answer_own(&String::from_utf8_lossy(&script))
    }
}

/// The command without the verbs that only processes of its own call.
fn for_people() -> Command {
    let all = Arguments::command();
    let verbs = all.get_subcommands().filter(|verb| !verb.is_hide_set());
    Command::new("modelcache").args(all.get_arguments().cloned()).subcommands(verbs.cloned())
}
