//! Asking the workload whether it is well, as often as its check says, while it runs.
//!
//! The question runs beside the owner: orders do not wait for an answer, and an end of the machine
//! calls it off.

use std::future;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio_util::task::AbortOnDropHandle;

use crate::agent::exec::Ran;
use crate::agent::{Agents, ExecSpec};
use crate::fleet::files;
use crate::instances::health::{Health, HealthCheck, HealthState, Probe};
use crate::instances::owner::Owner;
use crate::instances::restart::later;
use crate::instances::state::State;
use crate::network::Network;

/// What is kept of the output of a check that fails, to say why.
const OUTPUT_BYTES_MAX: usize = 512;

/// What a check answers.
type Answer = Result<(), String>;

/// The checks of one boot.
#[derive(Debug, Default)]
pub(super) struct Checks {
    /// What they add up to.
    pub(super) health: Health,
    next_at: Option<DateTime<Utc>>,
    asking: Option<AbortOnDropHandle<Answer>>,
}

impl Checks {
    /// The answer to what was asked; never, if nothing was.
    pub(super) async fn answer(&mut self) -> Answer {
        let Some(asking) = &mut self.asking else { return future::pending().await };
        let answer = asking.await;
        self.asking = None;
        answer.unwrap_or_else(|error| Err(error.to_string()))
    }
}

impl Owner {
    /// Begins anew, now if the workload runs.
    pub(super) fn begin_checks(&mut self) {
        let runs = self.state == State::Running;
        self.checks = Checks { next_at: runs.then(Utc::now), ..Checks::default() };
    }

    /// When to ask next.
    pub(super) fn check_at(&self) -> Option<DateTime<Utc>> {
        let check = self.record.spec.health_check.as_ref()?;
        let is_free = self.state == State::Running && self.checks.asking.is_none();
        let at = self.checks.next_at.filter(|_| is_free)?;
        // A clock that was set back does not hold up checks.
        Some(at.min(later(Utc::now(), check.interval)))
    }

    /// Asks.
    pub(super) fn ask(&mut self) {
        let Some(check) = self.record.spec.health_check.clone() else { return };
        let HealthCheck { probe, timeout, .. } = check;
        let asked = Asked {
            agents: self.shared.agents.clone(),
            socket: self.shared.dir_of(&self.record.id).join(files::VSOCK),
            network: self.shared.network.clone(),
            address: self.record.address,
        };
        let asking = self.shared.owners.spawn(asked.answer(probe, timeout));
        self.checks.asking = Some(AbortOnDropHandle::new(asking));
    }

    /// Takes an answer. Bad health ends the machine if it is to be started again.
    pub(super) async fn take_answer(&mut self, answer: Answer) {
        let Some(check) = self.record.spec.health_check.clone() else { return };
        let now = Utc::now();
        let before = self.checks.health.state;
        self.checks.next_at = Some(later(now, check.interval));
        self.checks.health.take(&check, answer, now, self.started_at.unwrap_or(now));
        self.publish();
        let Health { state, last_error, .. } = &self.checks.health;
        if *state != before {
            let name = &self.record.spec.name;
            tracing::info!(%name, health = state.name(), error = last_error, "Health changed");
            self.diary.note(&format!("health: {}", state.name()));
        }
        if *state == HealthState::Unhealthy && self.record.spec.restart_policy.is_some() {
            self.end_unhealthy().await;
        }
    }
}

/// Who is asked, and by which ways.
struct Asked {
    agents: Agents,
    socket: PathBuf,
    network: Network,
    address: Option<Ipv4Addr>,
}

impl Asked {
    async fn answer(self, probe: Probe, timeout: Duration) -> Answer {
        let prober = self.network.prober();
        let no_network = || "it has no network".to_owned();
        match probe {
            Probe::Exec { command, working_dir } => {
                let spec = ExecSpec { argv: command, working_dir, ..ExecSpec::default() };
                match self.agents.run(&self.socket, spec, timeout, OUTPUT_BYTES_MAX).await {
                    Ok(Ran { code: 0, output: _ }) => Ok(()),
                    Ok(Ran { code, output }) => Err(format!(
                        "exit code {code}: {}",
                        String::from_utf8_lossy(&output).trim()
                    )),
                    Err(error) => Err(error.to_string()),
                }
            }
            Probe::Http(probe) => {
                let guest = self.address.ok_or_else(no_network)?;
                prober.get(guest, &probe, timeout).await.map_err(|error| error.to_string())
            }
            Probe::Tcp { port } => {
                let guest = self.address.ok_or_else(no_network)?;
                prober.connect(guest, port, timeout).await.map_err(|error| error.to_string())
            }
        }
    }
}
