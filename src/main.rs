//! ovum: argv becomes a command; everything else lives in the library.

use std::process::ExitCode;

use ovum::cli;

fn main() -> ExitCode {
    cli::main()
}
