//! The command line: what can be typed. Each command is a file in `cli/`.
//!
//! A command's output goes to stdout, everything about it to stderr. `ovum run` exits as its
//! workload does; the others with 0 or 1.

use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use tokio::runtime::{Builder, Runtime};
use tracing_subscriber::EnvFilter;

use crate::client::Client;
use crate::config::{Config, ConfigArgs, DATA_DIR};
use crate::server;
use crate::worker;

mod boot;
mod host;
mod images;
mod instances;
mod output;
mod run;

/// Runs OCI images as virtual machines
#[derive(Debug, Parser)]
#[command(name = "ovum", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the server
    Serve(ConfigArgs),
    /// Pull an image if need be, run a command in a new instance, show its output, exit as it exits
    Run(run::RunArgs),
    /// List instances
    Ps(instances::PsArgs),
    /// Show what an instance wrote
    Logs(instances::LogsArgs),
    /// Show all there is to know about an instance, as JSON
    Inspect(instances::InspectArgs),
    /// Delete instances
    Rm(instances::RmArgs),
    /// Pull, load, list and delete images
    #[command(subcommand)]
    Image(images::ImageCommand),
    /// Make a token for a client of the API
    Token(host::TokenArgs),
    /// See what this host lacks to run instances
    Doctor(ConfigArgs),
    /// Boot a bare kernel in this process, its console on stdout
    Boot(boot::BootArgs),
    /// Write the initramfs with the guest agent to a file
    #[command(hide = true)]
    Initramfs(host::InitramfsArgs),
    /// Be the process of one machine; started by the server
    #[command(hide = true)]
    Worker,
}

/// Which server, and the right to use it.
#[derive(Debug, Args)]
struct ServerArgs {
    /// The server's URL [env: HYPEMAN_BASE_URL or OVUM_BASE_URL] [default: this host's]
    #[arg(long)]
    base_url: Option<String>,
    /// Token [env: HYPEMAN_API_KEY or OVUM_API_KEY] [default: made with this host's secret]
    #[arg(long)]
    token: Option<String>,
    /// The server's data folder, if it is on this host
    #[arg(long, env = "OVUM_DATA_DIR", default_value = DATA_DIR)]
    data_dir: PathBuf,
}

impl ServerArgs {
    fn client(self) -> anyhow::Result<Client> {
        Ok(Client::new(self.base_url, self.token, &self.data_dir)?)
    }
}

/// Does what was typed.
pub fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Serve(args) => serve(args).map(|()| ExitCode::SUCCESS),
        Command::Run(args) => client_runtime().and_then(|runtime| runtime.block_on(run::run(args))),
        Command::Ps(args) => block_on(instances::ps(args)),
        Command::Logs(args) => block_on(instances::logs(args)),
        Command::Inspect(args) => block_on(instances::inspect(args)),
        Command::Rm(args) => block_on(instances::rm(args)),
        Command::Image(command) => block_on(images::image(command)),
        Command::Token(args) => host::token(args).map(|()| ExitCode::SUCCESS),
        Command::Doctor(args) => host::doctor(args),
        Command::Boot(args) => boot::boot(args).map(|()| ExitCode::SUCCESS),
        Command::Initramfs(args) => host::initramfs(&args).map(|()| ExitCode::SUCCESS),
        Command::Worker => be_worker().map(|()| ExitCode::SUCCESS),
    };
    outcome.unwrap_or_else(|error| {
        // Whoever reads our output through `head` has seen enough.
        let is_pipe = error
            .downcast_ref::<io::Error>()
            .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe);
        if is_pipe {
            return ExitCode::SUCCESS;
        }
        output::error(&error);
        ExitCode::FAILURE
    })
}

fn serve(args: ConfigArgs) -> anyhow::Result<()> {
    log_to_stderr("info");
    let config = Config::try_from(args)?;
    Builder::new_multi_thread().enable_all().build()?.block_on(server::serve(config))
}

fn be_worker() -> anyhow::Result<()> {
    log_to_stderr("info");
    let ended = worker::main();
    if let Err(error) = &ended {
        tracing::error!("{error:#}");
    }
    ended
}

fn log_to_stderr(default: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .init();
}

fn block_on(command: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<ExitCode> {
    client_runtime()?.block_on(command).map(|()| ExitCode::SUCCESS)
}

fn client_runtime() -> anyhow::Result<Runtime> {
    Ok(Builder::new_current_thread().enable_all().build()?)
}
