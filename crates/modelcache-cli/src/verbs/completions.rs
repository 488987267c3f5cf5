//! `completions`: prints the completion script for a shell.

use crate::arguments::Arguments;
use crate::output::Output;
use clap::{Args, CommandFactory};
use clap_complete::Shell;
use modelcache::Result;

/// Print the completion script for a shell
///
/// Example: modelcache completions bash > /etc/bash_completion.d/modelcache
#[derive(Debug, Args)]
pub(crate) struct Completions {
    /// The shell
    #[arg(value_enum)]
    pub(crate) shell: Shell,
}

impl Completions {
    pub(crate) fn run(&self, output: &Output) -> Result<()> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Arguments::command(), "modelcache", &mut script);
        output.print_unescaped(&String::from_utf8_lossy(&script))
    }
}
