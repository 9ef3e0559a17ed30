//! The owner of one instance: the task in which all of its changes happen.
//!
//! Events of the worker and orders of clients are taken one at a time. Each change is published,
//! so that whoever waits for a state or reads a list sees it at once and never half.

use std::future;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time;

use crate::agent;
use crate::control::{Event as WorkerEvent, Happening, Order as WorkerOrder};
use crate::fleet::files;
use crate::fleet::worker::{Happened, Worker};
use crate::instances::history::{Ending, History};
use crate::instances::record::{End, Phase, Record};
use crate::instances::state::{Event, State};
use crate::instances::timeline::now_ns;
use crate::instances::{DeleteError, Instance, Shared, remove_folder};

/// How long a workload that is asked to end has before it is killed in the guest.
const GRACE: Duration = Duration::from_millis(1500);

/// How long a graceful end may take in all; then the machine's power is cut.
const GRACEFUL_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a machine may take to end once its power is cut; then the process is killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// How long the kernel may take to end a killed process: it frees the guest's memory.
const KILL_TIMEOUT: Duration = Duration::from_secs(30);

/// What a client orders.
#[derive(Debug)]
pub(super) enum Order {
    /// End it and remove all of it.
    Delete {
        /// The workload gets a moment to end by itself.
        graceful: bool,
        /// What came of it.
        done: oneshot::Sender<Result<(), DeleteError>>,
    },
}

/// One instance with all that belongs to it.
#[derive(Debug)]
pub(super) struct Owner {
    shared: Arc<Shared>,
    record: Record,
    state: State,
    history: History,
    started_at: Option<DateTime<Utc>>,
    ending: Ending,
    worker: Option<Worker>,
    view: watch::Sender<Arc<Instance>>,
}

impl Owner {
    /// Around an instance without a worker: one that ended, or that is about to get one.
    pub(super) fn new(shared: Arc<Shared>, record: Record) -> Self {
        let state = if record.end.is_some() { State::Stopped } else { State::Created };
        let history = History::new(record.timeline.clone());
        let (started_at, ending) = record
            .end
            .as_ref()
            .map_or((None, Ending::default()), |end| (end.started_at, end.how.clone()));
        let view = Instance {
            id: record.id.clone(),
            spec: record.spec.clone(),
            digest: record.digest,
            state,
            created_at: record.created_at,
            started_at,
            stopped_at: None,
            ending: ending.clone(),
            phases: Vec::new(),
        };
        let view = watch::Sender::new(Arc::new(view));
        let owner = Self { shared, record, state, history, started_at, ending, worker: None, view };
        owner.publish();
        owner
    }

    /// The machine runs in `worker`; what it has already said is taken.
    pub(super) fn with_worker(mut self, mut worker: Worker) -> Self {
        self.change(Event::Launched);
        while let Some(event) = worker.queued() {
            self.follow(&event);
        }
        self.worker = Some(worker);
        self.publish();
        self
    }

    /// There is no worker any more; these are its last words.
    pub(super) fn ended_unseen(mut self, events: &[WorkerEvent]) -> Self {
        self.change(Event::Launched);
        for event in events {
            self.follow(event);
        }
        self.ended();
        self
    }

    /// Whether there is a worker could not be told.
    pub(super) fn unknown(mut self, why: String) -> Self {
        self.state = State::Unknown;
        self.ending.error = Some(why);
        self.publish();
        self
    }

    /// The instance, now and later.
    pub(super) fn view(&self) -> watch::Receiver<Arc<Instance>> {
        self.view.subscribe()
    }

    /// Serves the instance until it is deleted or the server closes.
    pub(super) async fn run(mut self, mut orders: mpsc::Receiver<Order>) {
        let closing = self.shared.closing.clone();
        loop {
            tokio::select! {
                () = closing.cancelled() => return,
                happened = next(&mut self.worker) => self.take(happened),
                order = orders.recv() => match order {
                    Some(Order::Delete { graceful, done }) => {
                        let outcome = self.delete(graceful).await;
                        let is_gone = outcome.is_ok();
                        if let Err(error) = &outcome {
                            tracing::error!(id = self.record.id, %error, "Failed to delete");
                        }
                        // Nobody may be listening any more.
                        let _ = done.send(outcome);
                        if is_gone {
                            return;
                        }
                    }
                    None => return,
                },
            }
        }
    }

    fn take(&mut self, happened: Happened) {
        match happened {
            Happened::Event(event) => {
                let before = self.state;
                self.follow(&event);
                if before != State::Running && self.state == State::Running {
                    let total = self.history.timeline.total();
                    tracing::info!(name = %self.record.spec.name, ?total, "Instance runs");
                }
                self.publish();
            }
            Happened::Gone => self.ended(),
        }
    }

    fn follow(&mut self, event: &WorkerEvent) {
        self.history.add(event);
        if event.what == Happening::Booted {
            self.started_at = Some(wall_clock(event.at_ns));
        }
        let is_ready = self.history.is_ready(self.record.spec.agent);
        if is_ready && self.state == State::Initializing {
            self.change(Event::Ready);
        }
    }

    /// The worker is gone: writes down how it ended.
    fn ended(&mut self) {
        self.worker = None;
        self.change(Event::Ended);
        self.ending = self.history.ending();
        let at = self.history.stopped_ns().map_or_else(Utc::now, wall_clock);
        self.record.timeline = self.history.timeline.clone();
        self.record.end = Some(End { at, started_at: self.started_at, how: self.ending.clone() });
        let record = &self.record;
        // If this fails the events file still has it, and the next server reads that.
        if let Err(error) = self.shared.store.transact(|records| record.update(records)) {
            tracing::error!(id = record.id, %error, "Failed to write down the end of an instance");
        }
        let Ending { exit_code, error, .. } = &self.ending;
        tracing::info!(name = %record.spec.name, ?exit_code, error, "Instance stopped");
        self.publish();
    }

    fn change(&mut self, event: Event) {
        match self.state.after(event) {
            Ok(state) => self.state = state,
            Err(refused) => tracing::warn!(id = self.record.id, %refused, "Event out of order"),
        }
    }

    fn publish(&self) {
        let instance = Instance {
            id: self.record.id.clone(),
            spec: self.record.spec.clone(),
            digest: self.record.digest,
            state: self.state,
            created_at: self.record.created_at,
            started_at: self.started_at,
            stopped_at: self.record.end.as_ref().map(|end| end.at),
            ending: self.ending.clone(),
            phases: self.history.timeline.phases(),
        };
        self.view.send_replace(Arc::new(instance));
    }

    /// Ends the machine and removes all there is. The record goes last: a server killed in
    /// between leaves it behind in phase `Deleting`, and the next one comes here again.
    async fn delete(&mut self, graceful: bool) -> Result<(), DeleteError> {
        let id = self.record.id.clone();
        let failed = |source| DeleteError::Record { id: id.clone(), source };
        self.record.phase = Phase::Deleting;
        let record = &self.record;
        self.shared.store.transact(|records| record.update(records)).map_err(failed)?;
        self.end_worker(graceful).await?;
        let dir = self.shared.dir_of(&id);
        remove_folder(&dir).map_err(|source| DeleteError::Folder { path: dir, source })?;
        self.shared.store.transact(|records| Record::remove(&id, records)).map_err(failed)?;
        self.shared.write().remove(&id);
        Ok(())
    }

    async fn end_worker(&mut self, graceful: bool) -> Result<(), DeleteError> {
        if self.state == State::Unknown && self.worker.is_none() {
            let dir = self.shared.dir_of(&self.record.id);
            let found = self.shared.fleet.adopt(&dir).await;
            self.worker = found.map_err(|error| DeleteError::Worker {
                id: self.record.id.clone(),
                source: error.source,
            })?;
        }
        let Some(pid) = self.worker.as_ref().map(Worker::pid) else { return Ok(()) };
        let asks_first = graceful && self.record.spec.agent && self.history.agent_ready();
        if self.state != State::Shutdown {
            self.change(Event::Stop);
            self.publish();
        }
        if asks_first {
            let _late = time::timeout(GRACEFUL_TIMEOUT, self.end_gracefully()).await;
        }
        if self.worker.is_some() {
            let _late = time::timeout(STOP_TIMEOUT, self.cut_power()).await;
        }
        if let Some(worker) = &self.worker {
            let failed = |source| DeleteError::Worker { id: self.record.id.clone(), source };
            worker.kill().map_err(failed)?;
            let killed = time::timeout(KILL_TIMEOUT, self.wait_for_end()).await;
            killed.map_err(|_| DeleteError::Stuck { pid })?;
        }
        Ok(())
    }

    async fn end_gracefully(&mut self) {
        let socket = self.shared.dir_of(&self.record.id).join(files::VSOCK);
        match agent::shutdown(&socket, GRACE).await {
            Ok(()) => self.wait_for_end().await,
            Err(error) => tracing::warn!(id = self.record.id, %error, "Agent was not asked to end"),
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

/// What the worker says next; never, if there is none.
async fn next(worker: &mut Option<Worker>) -> Happened {
    match worker {
        Some(worker) => worker.next().await,
        None => future::pending().await,
    }
}

/// The time of day at which CLOCK_MONOTONIC was `at_ns`. Its zero is a boot of the host: a stamp
/// that lies ahead is from before the last one, and is taken for now.
fn wall_clock(at_ns: u64) -> DateTime<Utc> {
    let ago_ns = i64::try_from(now_ns().saturating_sub(at_ns)).unwrap_or(i64::MAX);
    Utc::now() - TimeDelta::nanoseconds(ago_ns)
}
