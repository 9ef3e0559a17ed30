//! Starting an instance that has stopped, with a new machine on the same disk.
//!
//! ```text
//! record `Starting` ──> worker ──> record `Kept`, without the previous end
//! ```
//!
//! What fails on the way leaves the instance stopped as it was; so does a server that is killed,
//! by way of the next one.

use std::sync::Arc;

use chrono::Utc;

use crate::devices::NewLoan;
use crate::instances::boot::{Boot, Booted};
use crate::instances::disks;
use crate::instances::history::{Ending, History};
use crate::instances::owner::Owner;
use crate::instances::record::{Phase, Record};
use crate::instances::restart::{RestartReason, RestartStatus};
use crate::instances::spec::{Command, InstanceSpec};
use crate::instances::state::{Event, Request, Verdict};
use crate::instances::{BootError, Instance, StartError};
use crate::timeline::{Moment, Timeline};

impl Owner {
    /// Starts the instance; `command` replaces what it was created with.
    pub(super) async fn start(&mut self, command: Command) -> Result<Arc<Instance>, StartError> {
        let request = if command.is_empty() { Request::Start } else { Request::StartChanged };
        match self.state.verdict(request) {
            Verdict::Refuse => return Err(StartError::Refused { state: self.state }),
            Verdict::Done => return Ok(self.instance()),
            Verdict::Act if self.record.phase == Phase::Deleting => {
                return Err(StartError::HalfDeleted);
            }
            Verdict::Act => {}
        }
        let spec = self.record.spec.clone().with_command(command);
        self.boot(spec, RestartStatus::default()).await?;
        Ok(self.instance())
    }

    /// Starts it by itself; `reason` is why it had to end, if not by itself.
    ///
    /// An attempt that fails counts as well: it is told by its time and number.
    pub(super) async fn restart(&mut self, reason: Option<RestartReason>) {
        let restart = self.record.restart.with_attempt(Utc::now(), reason);
        let name = self.record.spec.name.to_string();
        tracing::info!(name, attempt = restart.attempts, "Starts an instance again");
        let Err(error) = self.boot(self.record.spec.clone(), restart.clone()).await else { return };
        if matches!(error, StartError::Boot(BootError::Closing)) {
            // Not an attempt: the next server makes it.
            return;
        }
        tracing::warn!(name, %error, "Failed to start an instance again");
        self.diary.note(&format!("attempt {} to start it again: {error}", restart.attempts));
        self.record.restart = restart;
        self.hush();
        self.reckon();
        self.save();
        self.publish();
    }

    /// Boots `spec`; if it works, `restart` is how restarting has gone.
    async fn boot(&mut self, spec: InstanceSpec, restart: RestartStatus) -> Result<(), StartError> {
        let mut timeline = Timeline::begin();
        let shared = Arc::clone(&self.shared);
        let image = shared.images.root_disk(&self.record.digest).map_err(StartError::Image)?;
        timeline.mark(Moment::ImageReady);
        let mut boot = Boot::prepare(&shared, &spec, image, self.record.address)?;
        let address = boot.address();
        let dir = shared.dir_of(&self.record.id);
        let claim = shared.resources.claim_instance(
            &self.record.id,
            self.record.spec.name.as_str(),
            spec.need(),
        )?;
        boot.await_turn(&shared).await?;
        timeline.mark(Moment::Admitted);
        let disks = disks::reopen(&shared, &spec, &dir).await?;
        self.begin(|record| record.phase = Phase::Starting)?;
        self.change(Event::Start);
        self.started_at = None;
        self.ending = Ending::default();
        self.publish();
        let booted = async {
            boot.connect(&shared, &self.record.id).await?;
            boot.lend(&shared, &spec, &self.record.id).await?;
            timeline.mark(Moment::DisksReady);
            let booted = boot.launch(&shared, &spec, &dir, &disks).await?;
            self.keep(booted, |record| {
                *record = Record {
                    spec,
                    address,
                    phase: Phase::Kept,
                    end: None,
                    timeline,
                    restart,
                    ..record.clone()
                };
            })
            .await
        };
        let outcome = booted.await;
        match &outcome {
            Ok(()) => self.claim = Some(claim),
            Err(_) => self.undo_start(),
        }
        outcome
    }

    /// The machine runs: the record says so, or the machine goes.
    async fn keep(
        &mut self,
        Booted { worker, lease, loan, turn }: Booted,
        change: impl FnOnce(&mut Record),
    ) -> Result<(), StartError> {
        if let Err(error) = self.update(change) {
            worker.discard().await;
            return Err(error.into());
        }
        self.history = History::new(self.record.timeline.clone());
        self.turn = turn;
        self.attach(worker.keep(), lease, loan.map(NewLoan::keep));
        Ok(())
    }

    fn undo_start(&mut self) {
        self.change(Event::Ended);
        self.recall_end();
        // If this fails the next server undoes it once more.
        self.record.phase = Phase::Kept;
        self.save();
        self.publish();
    }
}
