//! The product from outside: a real server, real guests, a real registry.
//!
//! Runs where there is a real /dev/kvm: `dev/in-host` provides one. Each case gets the same
//! server and registry, and leaves nothing behind, which is checked after every one of them.
//! Arguments are parts of case names; without any, all cases run, and the monitor's own suite.

#![expect(clippy::print_stdout, reason = "a verdict on each case")]
#![expect(clippy::unwrap_used, reason = "a step that fails is a case that fails")]
#![expect(clippy::disallowed_methods, reason = "programs are started as a user would")]

mod api;
mod attach;
mod boot;
mod ceilings;
mod cli;
mod copy;
mod crash;
mod crowd;
mod devices;
mod disk;
mod exec;
mod headers;
mod images;
mod iommufd;
mod kernel_text;
mod killed;
mod kvm;
mod lifecycle;
mod memory;
mod network;
mod nursery;
mod outside;
mod refusals;
mod resources;
mod sdk;
mod systemd;
mod volumes;

use std::any::Any;
use std::env;
use std::panic::AssertUnwindSafe;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use ovum_test_host::TestHost;
use tokio::runtime::Builder;
use tokio::time;

use crate::kvm::Tally;

/// Longest that one case may take, in one of two emulated hosts on a busy machine.
const CASE_TIMEOUT: Duration = Duration::from_secs(600);

/// One claim about the product.
struct Case {
    name: &'static str,
    run: for<'h> fn(&'h TestHost) -> LocalBoxFuture<'h, ()>,
}

/// A case that did not hold, told once more at the end of all that was said.
struct Failure {
    name: &'static str,
    /// What its panic said.
    reason: String,
}

/// Some of the cases, where other hosts run the rest.
#[derive(Clone, Copy)]
enum Part {
    /// A share of those for any host: `OVUM_PART=1/2`. The monitor's suite belongs to the first.
    Share { number: usize, of: usize },
    /// Those for a host with devices to lend, the monitor's included: `OVUM_PART=devices`.
    Devices,
}

impl Part {
    fn from_environment() -> Self {
        let Ok(text) = env::var("OVUM_PART") else { return Self::Share { number: 1, of: 1 } };
        if text == "devices" {
            return Self::Devices;
        }
        let numbers = text.split_once('/').map(|(number, of)| (number.parse(), of.parse()));
        match numbers {
            Some((Ok(number), Ok(of))) if (1..=of).contains(&number) => Self::Share { number, of },
            _ => panic!("OVUM_PART is {text:?}: it has to be like 1/2, or devices"),
        }
    }

    /// Whether the case at this place is among them: long ones lie together, so each goes to
    /// another part than its neighbour.
    fn has(self, place: usize) -> bool {
        match self {
            Self::Share { number, of } => place % of == number - 1,
            Self::Devices => true,
        }
    }
}

/// Lists async functions as cases.
macro_rules! cases {
    ($($name:ident),* $(,)?) => {
        pub(crate) const CASES: &[crate::Case] = &[$(crate::Case {
            name: concat!(module_path!(), "::", stringify!($name)),
            run: |host| Box::pin($name(host)),
        }),*];
    };
}
pub(crate) use cases;

fn main() -> ExitCode {
    let part = Part::from_environment();
    let filters: Vec<String> = env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let chosen = chosen(part, &filters);
    let monitor = match part {
        Part::Share { number: 1, .. } if filters.is_empty() => kvm::run(&["--skip", "vfio::"]),
        Part::Devices if filters.is_empty() => kvm::run(&["vfio::"]),
        Part::Share { .. } | Part::Devices => Tally { passed: 0, failed: 0 },
    };
    let runtime = Builder::new_current_thread().enable_all().build();
    let failed = runtime.expect("a runtime needs only memory").block_on(run(&chosen));
    let once_more = match part {
        Part::Devices if filters.is_empty() => {
            iommufd::replace_vfio();
            kvm::run(&["vfio::"])
        }
        Part::Share { .. } | Part::Devices => Tally { passed: 0, failed: 0 },
    };
    println!();
    for Failure { name, reason } in &failed {
        println!("failed: {name}: {reason}");
    }
    let Tally { passed, failed } = Tally {
        passed: monitor.passed + once_more.passed + chosen.len() - failed.len(),
        failed: monitor.failed + once_more.failed + failed.len(),
    };
    println!("{passed} passed, {failed} failed");
    if failed == 0 && passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The cases of a part that the filters mean.
fn chosen(part: Part, filters: &[String]) -> Vec<&'static Case> {
    let for_any_host = [
        boot::CASES,
        crowd::CASES,
        ceilings::CASES,
        api::CASES,
        lifecycle::CASES,
        exec::CASES,
        copy::CASES,
        systemd::CASES,
        memory::CASES,
        headers::CASES,
        disk::CASES,
        sdk::CASES,
        volumes::CASES,
        attach::CASES,
        resources::CASES,
        images::CASES,
        network::CASES,
        nursery::CASES,
        refusals::CASES,
        crash::CASES,
        kernel_text::CASES,
        killed::CASES,
        cli::CASES,
        cli::inside::CASES,
        cli::orders::CASES,
    ];
    let suites = match part {
        Part::Share { .. } => for_any_host.as_slice(),
        Part::Devices => &[devices::CASES, iommufd::CASES],
    };
    suites
        .iter()
        .copied()
        .flatten()
        .filter(|case| filters.is_empty() || filters.iter().any(|f| case.name.contains(f)))
        .enumerate()
        .filter_map(|(place, case)| part.has(place).then_some(case))
        .collect()
}

async fn run(chosen: &[&Case]) -> Vec<Failure> {
    let host = TestHost::start().await;
    let mut failed = Vec::new();
    for Case { name, run } in chosen {
        let started = Instant::now();
        let outcome = AssertUnwindSafe(async {
            run(&host).await;
            host.check_nothing_is_left().await;
        });
        let reason = match time::timeout(CASE_TIMEOUT, outcome.catch_unwind()).await {
            Ok(Ok(())) => None,
            Ok(Err(panic)) => Some(reason(panic.as_ref())),
            Err(_) => Some("It timed out".to_owned()),
        };
        let verdict = if reason.is_none() { "ok" } else { "FAILED" };
        println!("test {name} ... {verdict} ({:.1} s)", started.elapsed().as_secs_f32());
        if let Some(reason) = reason {
            failed.push(Failure { name, reason });
            host.clear().await;
        }
    }
    host.stop().await;
    failed
}

/// What a panic said.
fn reason(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("It panicked").to_owned()
}
