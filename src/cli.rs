//! The command line: what can be typed. Each command is a file in `cli/`.
//!
//! A command's output goes to stdout, everything about it to stderr. `ovum run` and `ovum exec`
//! exit as what they ran does; the others with 0 or 1.

use std::env;
use std::io::{self, IsTerminal};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand};
use tokio::runtime::{Builder, Runtime};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::client::{self, Client};
use crate::config::{ConfigArgs, Home, HomeArgs};
use crate::control::WORKER_COMMAND;
use crate::server;
use crate::token::Secret;
use crate::worker::{self, WorkerLog};

mod boot;
mod cp;
mod devices;
mod embedded;
mod exec;
mod health;
mod host;
mod images;
mod instances;
mod interrupt;
mod orders;
mod output;
mod resources;
mod run;
mod stats;
mod tags;
mod terminal;
mod top;
mod upkeep;
mod volumes;
mod wait;
mod waterfall;

/// What is typed first.
const NAME: &str = "ovum";

/// States in which an instance costs nothing but disk.
const AT_REST: [&str; 2] = ["Stopped", "Standby"];

/// Runs OCI images as virtual machines
#[derive(Debug, Parser)]
#[command(name = NAME, version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the server
    Serve(ConfigArgs),
    /// Pull an image if need be, run a command in a new instance, show its output, exit as it exits
    Run(Box<run::RunArgs>),
    /// List instances
    Ps(instances::PsArgs),
    /// Run a command in an instance, exit as it exits
    Exec(exec::ExecArgs),
    /// Copy files and folders into an instance, or out of it
    Cp(cp::CpArgs),
    /// Show what an instance wrote
    Logs(instances::LogsArgs),
    /// Wait until an instance is in a state
    Wait(wait::WaitArgs),
    /// Show all there is to know about an instance, as JSON
    Inspect(instances::InspectArgs),
    /// Stop instances; their disks stay
    Stop(orders::StopArgs),
    /// Start stopped instances again, on the same disks
    Start(orders::StartArgs),
    /// Change when instances are started again, whether they are well, how long they live
    Update(orders::UpdateArgs),
    /// Delete instances
    Rm(orders::RmArgs),
    /// Show what instances cost the host, once
    Stats(stats::StatsArgs),
    /// Show what instances cost the host, again and again
    Top(top::TopArgs),
    /// See whether the server answers, or whether instances are well
    Health(health::HealthArgs),
    /// Pull, load, list and delete images
    #[command(subcommand)]
    Image(images::ImageCommand),
    /// Make, list and delete volumes
    #[command(subcommand)]
    Volume(volumes::VolumeCommand),
    /// Register, list and forget devices of the host that instances can have
    #[command(subcommand)]
    Device(devices::DeviceCommand),
    /// See what the host has, and who was promised what
    Resources(ListArgs),
    /// Make a token for a client of the API
    Token(host::TokenArgs),
    /// See what this host lacks to run instances
    Doctor(host::DoctorArgs),
    /// Boot a bare kernel in this process, its console on stdout
    Boot(boot::BootArgs),
    /// Write what makes a shell complete these commands: eval "$(ovum completions bash)"
    Completions(host::CompletionsArgs),
    /// Write the initramfs with the guest agent to a file
    #[command(hide = true)]
    Initramfs(host::InitramfsArgs),
}

/// Which server, and the right to use it.
#[derive(Debug, Clone, Args)]
struct ServerArgs {
    /// The server's URL [env: HYPEMAN_BASE_URL or OVUM_BASE_URL] [default: this host's]
    #[arg(long, value_name = "URL")]
    base_url: Option<String>,
    /// Token [env: HYPEMAN_API_KEY or OVUM_API_KEY] [default: made with this host's secret]
    #[arg(long)]
    token: Option<String>,
    #[command(flatten)]
    home: HomeArgs,
}

/// What is typed after a command that lists.
#[derive(Debug, Args)]
struct ListArgs {
    /// As JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    server: ServerArgs,
}

impl ServerArgs {
    /// The server that was named, or else this host's, whether or not it is there.
    fn client(&self) -> anyhow::Result<Client> {
        let home = self.home.find()?;
        match self.client_elsewhere(&home)? {
            Some(client) => Ok(client),
            None => self.client_of_host(&home),
        }
    }

    /// For a server that was named by its URL.
    fn client_elsewhere(&self, home: &Home) -> anyhow::Result<Option<Client>> {
        let url = self.base_url.clone();
        let url = url.or_else(|| from_environment(["HYPEMAN_BASE_URL", "OVUM_BASE_URL"]));
        Ok(url.map(|url| Client::new(&url, self.token(home))).transpose()?)
    }

    /// For the server of this host: through its data folder if that is open to us.
    fn client_of_host(&self, home: &Home) -> anyhow::Result<Client> {
        let socket = server::socket(&home.data_dir);
        let token = self.token(home);
        Ok(match UnixStream::connect(&socket) {
            Ok(_knock) => Client::at_socket(&socket, token)?,
            Err(_nobody) => Client::new(&format!("http://{}", home.address), token)?,
        })
    }

    /// The token that was given, or else one made with this host's secret, if that can be read.
    fn token(&self, home: &Home) -> Option<String> {
        let given = self.token.clone();
        given.or_else(|| from_environment(["HYPEMAN_API_KEY", "OVUM_API_KEY"])).or_else(|| {
            let chosen = home.jwt_secret.as_deref().map(Secret::new);
            let secret = chosen.or_else(|| Secret::load(&home.data_dir).ok())?;
            Some(client::own_token(&secret))
        })
    }
}

/// The first of these variables that says something.
fn from_environment(names: [&str; 2]) -> Option<String> {
    names.into_iter().find_map(|name| env::var(name).ok().filter(|text| !text.is_empty()))
}

/// Does what was typed.
pub fn main() -> ExitCode {
    // Before the commands are even listed: what a worker touches, every instance pays for.
    if env::args_os().nth(1).is_some_and(|word| word == WORKER_COMMAND) {
        return match be_worker() {
            Ok(()) => ExitCode::SUCCESS,
            Err(_logged) => ExitCode::FAILURE,
        };
    }
    let outcome = match Cli::parse().command {
        Command::Serve(args) => serve(args).map(|()| ExitCode::SUCCESS),
        Command::Run(args) => run(*args),
        Command::Ps(args) => block_on(instances::ps(args)),
        Command::Exec(args) => client_runtime().and_then(|on| on.block_on(exec::exec(args))),
        Command::Cp(args) => block_on(cp::cp(args)),
        Command::Logs(args) => block_on(instances::logs(args)),
        Command::Wait(args) => block_on(wait::wait(args)),
        Command::Inspect(args) => block_on(instances::inspect(args)),
        Command::Stop(args) => block_on(orders::stop(args)),
        Command::Start(args) => block_on(orders::start(args)),
        Command::Update(args) => block_on(orders::update(args)),
        Command::Rm(args) => block_on(orders::rm(args)),
        Command::Stats(args) => block_on(stats::stats(args)),
        Command::Top(args) => client_runtime().and_then(|on| on.block_on(top::top(args))),
        Command::Health(args) => client_runtime().and_then(|on| on.block_on(health::health(args))),
        Command::Image(command) => block_on(images::image(command)),
        Command::Volume(command) => block_on(volumes::volume(command)),
        Command::Device(command) => block_on(devices::device(command)),
        Command::Resources(args) => block_on(resources::resources(args)),
        Command::Token(args) => host::token(args).map(|()| ExitCode::SUCCESS),
        Command::Doctor(args) => host::doctor(args),
        Command::Boot(args) => boot::boot(args).map(|()| ExitCode::SUCCESS),
        Command::Completions(args) => {
            host::completions(&args, &Cli::command()).map(|()| ExitCode::SUCCESS)
        }
        Command::Initramfs(args) => host::initramfs(&args).map(|()| ExitCode::SUCCESS),
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
    let config = args.load()?;
    Builder::new_multi_thread().enable_all().build()?.block_on(server::serve(config))
}

fn run(args: run::RunArgs) -> anyhow::Result<ExitCode> {
    // Of a server in this process only what is wrong is said: stderr is the workload's, too.
    log_to_stderr("warn");
    Builder::new_multi_thread().enable_all().build()?.block_on(run::run(args))
}

fn be_worker() -> anyhow::Result<()> {
    log_to("info", || WorkerLog);
    let ended = worker::main();
    if let Err(error) = &ended {
        tracing::error!("{error:#}");
    }
    ended
}

fn log_to_stderr(default: &str) {
    log_to(default, io::stderr);
}

fn log_to<W>(default: &str, log: W)
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(log)
        .with_ansi(io::stderr().is_terminal())
        .init();
}

fn block_on(command: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<ExitCode> {
    client_runtime()?.block_on(command).map(|()| ExitCode::SUCCESS)
}

fn client_runtime() -> anyhow::Result<Runtime> {
    Ok(Builder::new_current_thread().enable_all().build()?)
}
