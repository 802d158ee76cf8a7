//! The `moebius` program: train, evaluate and sample sparse-expert models, verify and measure the machine.
//!
//! `cli` is the command line; each other file is one command. Exit codes: see `failure`.

#![allow(clippy::print_stdout, clippy::print_stderr)]

mod bench;
mod cli;
mod devices;
mod distill;
mod eval;
mod failure;
mod generate;
mod inspect;
mod model;
mod progress;
mod routes;
mod stop;
mod study;
mod text;
mod train;
mod verify;

use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command};

fn main() -> ExitCode {
    // A closed pipe (`moebius inspect | head`) ends the program quietly instead of by a panic.
    std::panic::set_hook(Box::new(failure::report_panic));
    let result = match Cli::parse().command {
        Command::Train(args) => train::run(&args),
        Command::Distill(args) => distill::run(&args),
        Command::Study(args) => study::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Devices(args) => devices::run(&args),
        Command::Verify(args) => verify::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Routes(args) => routes::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}
