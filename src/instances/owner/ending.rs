//! The ends of an instance: stopped, its disk kept, or deleted with all of it.
//!
//! A machine is ended in steps, each bounded, until one of them works: the agent is asked to end
//! the workload, the machine's power is cut, the process is killed.

use std::sync::Arc;
use std::time::Duration;

use tokio::time;

use crate::agent;
use crate::control::Order as WorkerOrder;
use crate::fleet::files;
use crate::fleet::worker::Worker;
use crate::instances::owner::{Owner, next};
use crate::instances::record::{Phase, Record};
use crate::instances::restart::Blocked;
use crate::instances::state::{Event, Request, State, Verdict};
use crate::instances::{
    DeleteError, EndError, Instance, RecordError, StopError, guest, remove_folder,
};

/// How long a machine may take to end once its power is cut; then the process is killed.
const CUT_TIMEOUT: Duration = Duration::from_secs(2);

/// How long the kernel may take to end a killed process: it frees the guest's memory.
const KILL_TIMEOUT: Duration = Duration::from_secs(30);

/// How long the agent may take to acknowledge, each of [`AGENT_TRIES`] times.
const AGENT_TIMEOUT: Duration = Duration::from_millis(1500);

/// How often the agent is asked, each time over a connection of its own.
const AGENT_TRIES: u32 = 2;

/// How patiently a guest is asked to end before its power is cut.
#[derive(Debug, Clone, Copy)]
struct Patience {
    /// What the workload has before it is killed in the guest.
    grace: Duration,
    /// From the first word to the agent to the end of the machine.
    total: Duration,
}

/// For one whose disk shall be in order afterwards: 5 s, and some to write it back.
const STOP: Patience = Patience { grace: Duration::from_secs(5), total: Duration::from_secs(9) };

/// For one with an init system, which has units of its own to end in order.
const STOP_INIT: Patience =
    Patience { grace: Duration::from_secs(20), total: Duration::from_secs(24) };

/// For one of which nothing stays.
const DELETE: Patience =
    Patience { grace: Duration::from_millis(1500), total: Duration::from_secs(2) };

impl Owner {
    /// Ends the machine; the disk stays.
    ///
    /// The record says first that this is under way: a server that is killed in between leaves it
    /// to the next one to finish.
    pub(super) async fn stop(&mut self) -> Result<Arc<Instance>, StopError> {
        match self.state.verdict(Request::Stop) {
            Verdict::Refuse => return Err(StopError::Refused { state: self.state }),
            Verdict::Done => {
                self.update(|record| record.restart.blocked = Some(Blocked::ManualStop))?;
            }
            Verdict::Act => {
                self.intend(|record| {
                    record.phase = Phase::Stopping;
                    record.restart.blocked = Some(Blocked::ManualStop);
                })?;
                self.end_worker(Some(self.patience())).await?;
            }
        }
        Ok(self.instance())
    }

    /// Ends the machine for its bad health, as gracefully as a stop. The policy says what follows.
    pub(super) async fn end_unhealthy(&mut self) {
        self.is_unhealthy = true;
        if let Err(error) = self.end_worker(Some(self.patience())).await {
            tracing::error!(id = self.record.id, %error, "Failed to end an unhealthy instance");
        }
    }

    /// Goes on with a stop that an earlier server began.
    pub(super) async fn finish_stop(&mut self) {
        if self.record.phase == Phase::Stopping
            && let Err(error) = self.end_worker(Some(self.patience())).await
        {
            tracing::error!(id = self.record.id, %error, "Failed to finish a stop");
        }
    }

    /// Ends the machine and removes all there is. The record goes last: a server killed in
    /// between leaves it behind in phase `Deleting`, and the next one comes here again. A machine
    /// that cannot be ended leaves all as it was.
    pub(super) async fn delete(&mut self, graceful: bool) -> Result<(), DeleteError> {
        let id = self.record.id.clone();
        let before = self.record.phase;
        self.intend(|record| record.phase = Phase::Deleting)?;
        if let Err(error) = self.end_worker(graceful.then_some(DELETE)).await {
            self.record.phase = before;
            self.save();
            return Err(error.into());
        }
        // While there is an instance, so that it can be tried again.
        self.shared.devices.release(&id).await?;
        let dir = self.shared.dir_of(&id);
        remove_folder(&dir).map_err(|source| DeleteError::Folder { path: dir, source })?;
        let removed = self.shared.store.transact(|records| Record::remove(&id, records));
        removed.map_err(|source| RecordError { id: id.clone(), source })?;
        self.shared.write().remove(&id);
        Ok(())
    }

    /// How patient a stop is.
    fn patience(&self) -> Patience {
        let image = self.shared.images.root_disk(&self.record.digest);
        let is_init =
            image.is_ok_and(|image| guest::has_init_system(&self.record.spec, &image.config));
        if is_init { STOP_INIT } else { STOP }
    }

    /// Changes the record on the way to an end. A disk without room must not keep a guest running:
    /// then the change is written down with the next one.
    fn intend(&mut self, change: impl Fn(&mut Record)) -> Result<(), RecordError> {
        match self.begin(&change) {
            Err(error) if error.lacks_room() => {
                tracing::warn!(id = error.id, "No room to write down that an instance is ended");
                change(&mut self.record);
                Ok(())
            }
            outcome => outcome,
        }
    }

    /// Ends the worker, if there is one; with `patience` its guest is asked first.
    async fn end_worker(&mut self, patience: Option<Patience>) -> Result<(), EndError> {
        if self.state == State::Unknown && self.worker.is_none() {
            let dir = self.shared.dir_of(&self.record.id);
            let found = self.shared.fleet.adopt(&dir).await;
            self.worker = found.map_err(|error| EndError::Worker {
                id: self.record.id.clone(),
                source: error.source,
            })?;
        }
        let Some(pid) = self.worker.as_ref().map(Worker::pid) else { return Ok(()) };
        if self.state != State::Shutdown {
            self.change(Event::Stop);
            self.publish();
        }
        if let Some(patience) = patience
            && self.record.spec.agent
            && self.history.agent_ready()
        {
            let _late = time::timeout(patience.total, self.ask_agent(patience.grace)).await;
        }
        if self.worker.is_some() {
            let _late = time::timeout(CUT_TIMEOUT, self.cut_power()).await;
        }
        if let Some(worker) = &self.worker {
            let failed = |source| EndError::Worker { id: self.record.id.clone(), source };
            worker.kill().map_err(failed)?;
            let killed = time::timeout(KILL_TIMEOUT, self.wait_for_end()).await;
            killed.map_err(|_| EndError::Stuck { pid })?;
        }
        if let Some(returning) = self.returning.take() {
            // Bounded, and what fails is logged where it does.
            let _ = returning.await;
        }
        Ok(())
    }

    /// Asks the agent to end the guest, and waits for that once the agent has heard.
    async fn ask_agent(&mut self, grace: Duration) {
        let socket = self.shared.dir_of(&self.record.id).join(files::VSOCK);
        for _ in 0..AGENT_TRIES {
            let asked = time::timeout(AGENT_TIMEOUT, agent::shutdown(&socket, grace)).await;
            match asked {
                Ok(Ok(())) => return self.wait_for_end().await,
                Ok(Err(error)) => {
                    tracing::warn!(id = self.record.id, %error, "Agent was not asked to end");
                }
                Err(_elapsed) => tracing::warn!(id = self.record.id, "Agent does not answer"),
            }
        }
    }

    async fn cut_power(&mut self) {
        let Some(worker) = self.worker.as_mut() else { return };
        match worker.order(&WorkerOrder::Stop).await {
            Ok(_) => self.wait_for_end().await,
            Err(error) => tracing::warn!(id = self.record.id, %error, "Worker was not stopped"),
        }
    }

    async fn wait_for_end(&mut self) {
        while self.worker.is_some() {
            let happened = next(&mut self.worker).await;
            self.take(happened);
        }
    }
}
