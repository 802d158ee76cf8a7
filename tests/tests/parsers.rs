//! A short run of the program `fuzz`. In its own process, so that its allocator counts for it alone and a stack that
//! overflows is a failure too.

use std::process::Command;

#[test]
fn no_parser_is_broken_by_some_thousands_of_inputs() {
    let run = Command::new(env!("CARGO_BIN_EXE_fuzz")).args(["--count", "20000", "--seconds", "10"]).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&run.stdout), String::from_utf8_lossy(&run.stderr));
    assert!(run.status.success(), "{out}\n{err}");
    assert_eq!(out.lines().filter(|l| l.contains("inputs,")).count(), 7, "a line for each target:\n{out}");
}
