//! ovum: argv becomes a command; everything else lives in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    ovum::cli::main()
}
