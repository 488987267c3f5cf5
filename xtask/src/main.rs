//! `cargo xtask TASK`: developer tasks of this repository, one file per task.
//!
//! If a task fails, it prints one line with the cause, and the exit code is 1. Tasks write below `target/`; `docs` and
//! `bench` also write pages below `docs/`, and `deploy --write` writes below `deploy/`. No task needs credentials.
#![expect(clippy::print_stderr, reason = "a program for the terminal")]

use xtask::{bench, crates, demo, deploy, dist, docs, fuzz, page, python, release, site, test};

use clap::{Parser, Subcommand};
use std::process::ExitCode;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

/// The tasks of this repository
#[derive(Debug, Subcommand)]
enum Task {
    Demo(demo::Demo),
    Test(test::Test),
    Bench(bench::Bench),
    Docs(docs::Docs),
    Fuzz(fuzz::Fuzz),
    Python(python::Python),
    Page(page::Page),
    Deploy(deploy::Deploy),
    Dist(dist::Dist),
    Crates(crates::Crates),
    Release(release::Release),
    Site(site::Site),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().task {
        Task::Demo(task) => task.run(),
        Task::Test(task) => task.run(),
        Task::Bench(task) => task.run(),
        Task::Docs(task) => task.run(),
        Task::Fuzz(task) => task.run(),
        Task::Python(task) => task.run(),
        Task::Page(task) => task.run(),
        Task::Deploy(task) => task.run(),
        Task::Dist(task) => task.run(),
        Task::Crates(task) => task.run(),
        Task::Release(task) => task.run(),
        Task::Site(task) => task.run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
