//! The owner of one instance: the task in which all of its changes happen.
//!
//! Events of the worker and orders of clients are taken one at a time. Each change is published,
//! so that whoever waits for a state or reads a list sees it at once and never half.

use std::future;
use std::mem;
use std::sync::Arc;

use chrono::{DateTime, TimeDelta, Utc};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use crate::control::{Event as WorkerEvent, Happening, now_ns};
use crate::devices::Loan;
use crate::fleet::files;
use crate::fleet::worker::{Happened, Worker};
use crate::instances::admission::Turn;
use crate::instances::diary::Diary;
use crate::instances::health::Health;
use crate::instances::history::{Ending, History};
use crate::instances::owner::checking::Checks;
use crate::instances::owner::upkeep::ring;
use crate::instances::reclaim::{Hold, Moved, ReclaimError};
use crate::instances::record::{End, Phase, Record};
use crate::instances::restart::RestartStatus;
use crate::instances::spec::{Command, Upkeep, VolumeMount};
use crate::instances::state::{Event, State};
use crate::instances::{
    DeleteError, Instance, RecordError, Shared, StartError, StopError, UpkeepError, VolumeError,
};
use crate::network::Lease;
use crate::resources::Claim;

mod checking;
mod ending;
mod reclaiming;
mod starting;
mod upkeep;
mod volumes;

/// Where the outcome of an order goes.
pub(super) type Done<T, E> = oneshot::Sender<Result<T, E>>;

/// What a client orders. Orders queue behind each other; a client that goes away leaves its own.
#[derive(Debug)]
pub(super) enum Order {
    /// End it; its disk stays.
    Stop {
        /// The instance afterwards.
        done: Done<Arc<Instance>, StopError>,
    },
    /// Start it again.
    Start {
        /// What to run from now on.
        command: Command,
        /// The instance afterwards.
        done: Done<Arc<Instance>, StartError>,
    },
    /// Give it a volume.
    Attach {
        /// Which, by id, and where.
        mount: VolumeMount,
        /// The instance afterwards.
        done: Done<Arc<Instance>, VolumeError>,
    },
    /// Take a volume from it.
    Detach {
        /// Which, by id.
        volume: String,
        /// The instance afterwards.
        done: Done<Arc<Instance>, VolumeError>,
    },
    /// Look after it in another way.
    LookAfter {
        /// How.
        upkeep: Upkeep,
        /// The instance afterwards.
        done: Done<Arc<Instance>, UpkeepError>,
    },
    /// Have its guest give up memory.
    Reclaim {
        /// How much and until when; nothing gives all of it back.
        hold: Option<Hold>,
        /// How it stands so far.
        done: Done<Moved, ReclaimError>,
    },
    /// Say how much memory its guest got, and how much it has given up.
    CountMoved {
        /// How it stands.
        done: Done<Moved, ReclaimError>,
    },
    /// End it and remove all of it.
    Delete {
        /// The workload gets a moment to end by itself.
        graceful: bool,
        /// What came of it.
        done: Done<(), DeleteError>,
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
    /// Of the present boot.
    checks: Checks,
    /// The machine is being ended for its bad health.
    is_unhealthy: bool,
    /// Nothing is done by itself before: the last time something failed.
    quiet_until: Option<DateTime<Utc>>,
    worker: Option<Worker>,
    /// What the host has promised to it, unless it has ended.
    claim: Option<Claim>,
    /// It boots in it, until its workload runs.
    turn: Option<Turn>,
    /// The address of its machine.
    lease: Option<Lease>,
    /// What of the host its machine has.
    loan: Option<Loan>,
    /// What the last one had is on its way back.
    returning: Option<JoinHandle<()>>,
    state_since: DateTime<Utc>,
    diary: Diary,
    view: watch::Sender<Arc<Instance>>,
}

impl Owner {
    /// Around an instance without a worker: one that ended, or that is about to get one.
    pub(super) fn new(shared: Arc<Shared>, record: Record) -> Self {
        let state = if record.end.is_some() { State::Stopped } else { State::Created };
        let history = History::new(record.timeline.clone());
        let diary = Diary::new(shared.dir_of(&record.id).join(files::SERVER_LOG));
        let view = Instance {
            id: record.id.clone(),
            spec: record.spec.clone(),
            digest: record.digest,
            address: record.address,
            state,
            created_at: record.created_at,
            expires_at: None,
            started_at: None,
            stopped_at: None,
            ending: Ending::default(),
            phase: ("created", None),
            phases: Vec::new(),
            health: Health::default(),
            held_bytes: 0,
            restart: RestartStatus::default(),
            restart_at: None,
            mdev_uuid: None,
        };
        let mut owner = Self {
            shared,
            record,
            state,
            history,
            started_at: None,
            ending: Ending::default(),
            checks: Checks::default(),
            is_unhealthy: false,
            quiet_until: None,
            worker: None,
            claim: None,
            turn: None,
            lease: None,
            loan: None,
            returning: None,
            state_since: Utc::now(),
            diary,
            view: watch::Sender::new(Arc::new(view)),
        };
        owner.recall_end();
        owner.publish();
        owner
    }

    /// The host has promised this to it.
    pub(super) fn with_claim(mut self, claim: Claim) -> Self {
        self.claim = Some(claim);
        self
    }

    /// It boots in this turn.
    pub(super) fn with_turn(mut self, turn: Option<Turn>) -> Self {
        self.turn = turn;
        self
    }

    /// The machine runs in `worker`; what it has already said is taken.
    pub(super) fn with_worker(
        mut self,
        worker: Worker,
        lease: Option<Lease>,
        loan: Option<Loan>,
    ) -> Self {
        self.attach(worker, lease, loan);
        self
    }

    fn attach(&mut self, mut worker: Worker, lease: Option<Lease>, loan: Option<Loan>) {
        self.lease = lease;
        self.loan = loan;
        self.change(Event::Launched);
        while let Some(event) = worker.queued() {
            self.follow(&event);
        }
        self.worker = Some(worker);
        self.publish();
    }

    /// What the record says of the last end, if there was one.
    fn recall_end(&mut self) {
        if let Some(End { started_at, how, .. }) = &self.record.end {
            self.started_at = *started_at;
            self.ending = how.clone();
        }
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
    pub(super) fn unknown(mut self, why: String, lease: Option<Lease>, loan: Option<Loan>) -> Self {
        self.lease = lease;
        self.loan = loan;
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
        self.finish_stop().await;
        loop {
            let alarm = self.alarm();
            let is_gone = tokio::select! {
                () = closing.cancelled() => return,
                happened = next(&mut self.worker) => {
                    self.take(happened);
                    false
                }
                order = orders.recv() => match order {
                    Some(order) => self.obey(order).await,
                    None => return,
                },
                due = ring(alarm) => self.act(due).await,
                answer = self.checks.answer() => {
                    self.take_answer(answer).await;
                    false
                }
            };
            if is_gone {
                return;
            }
        }
    }

    /// Follows an order; true if there is nothing left to own. Whoever gave it may be gone, which
    /// changes nothing.
    async fn obey(&mut self, order: Order) -> bool {
        match order {
            Order::Stop { done } => {
                let _ = done.send(self.stop().await);
            }
            Order::Start { command, done } => {
                let _ = done.send(self.start(command).await);
            }
            Order::Attach { mount, done } => {
                let _ = done.send(self.attach_volume(mount).await);
            }
            Order::Detach { volume, done } => {
                let _ = done.send(self.detach_volume(&volume).await);
            }
            Order::LookAfter { upkeep, done } => {
                let _ = done.send(self.look_after(upkeep).await);
            }
            Order::Reclaim { hold, done } => {
                let _ = done.send(self.reclaim(hold).await);
            }
            Order::CountMoved { done } => {
                let _ = done.send(self.count_moved().await);
            }
            Order::Delete { graceful, done } => {
                let outcome = self.delete(graceful).await;
                let is_gone = outcome.is_ok();
                if let Err(error) = &outcome {
                    tracing::error!(id = self.record.id, %error, "Failed to delete");
                }
                let _ = done.send(outcome);
                return is_gone;
            }
        }
        false
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
        if self.history.is_ready(false) {
            self.turn = None;
        }
        let is_ready = self.history.is_ready(self.record.spec.agent);
        if is_ready && self.state == State::Initializing {
            self.change(Event::Ready);
            self.begin_checks();
        }
    }

    /// The worker is gone: writes down how it ended.
    fn ended(&mut self) {
        if self.worker.take().is_some_and(|worker| worker.ran_out_of_memory()) {
            self.history.ran_out_of_memory();
        }
        self.claim = None;
        self.turn = None;
        self.lease = None;
        self.returning = self.loan.take().map(|loan| self.shared.devices.give_back(loan));
        self.record.hold = None;
        self.change(Event::Ended);
        self.begin_checks();
        self.ending = self.history.ending();
        let at = self.history.stopped_ns().map_or_else(Utc::now, wall_clock);
        self.record.timeline = self.history.timeline.clone();
        let (started_at, how) = (self.started_at, self.ending.clone());
        let unhealthy = mem::take(&mut self.is_unhealthy);
        self.record.end = Some(End { at, started_at, how, unhealthy });
        if self.record.phase == Phase::Stopping {
            self.record.phase = Phase::Kept;
        }
        self.reckon();
        // If this fails the events file still has it, and the next server reads that.
        self.save();
        self.end_volume_change();
        let Ending { exit_code, exit_message, error } = &self.ending;
        let how = exit_message.as_ref().or(error.as_ref()).map_or("told to", String::as_str);
        self.diary.note(&format!("ended: {how}"));
        tracing::info!(name = %self.record.spec.name, ?exit_code, error, "Instance stopped");
        self.publish();
    }

    /// Writes down what has happened already. If that fails the next write has it, too.
    fn save(&self) {
        let record = &self.record;
        if let Err(error) = self.shared.store.transact(|records| record.update(records)) {
            tracing::error!(id = record.id, %error, "Failed to write down what has happened");
        }
    }

    /// Changes the record, on disk first. If that fails nothing has changed.
    fn update(&mut self, change: impl FnOnce(&mut Record)) -> Result<(), RecordError> {
        let mut record = self.record.clone();
        change(&mut record);
        let written = self.shared.store.transact(|records| record.update(records));
        self.replace(record, written)
    }

    /// As [`Self::update`], for the beginning of what nobody is told of before it is done: a disk
    /// is not waited for.
    fn begin(&mut self, change: impl FnOnce(&mut Record)) -> Result<(), RecordError> {
        let mut record = self.record.clone();
        change(&mut record);
        let written = self.shared.store.intend(|records| record.update(records));
        self.replace(record, written)
    }

    fn replace(
        &mut self,
        record: Record,
        written: rusqlite::Result<()>,
    ) -> Result<(), RecordError> {
        written.map_err(|source| RecordError { id: record.id.clone(), source })?;
        self.record = record;
        Ok(())
    }

    fn instance(&self) -> Arc<Instance> {
        Arc::clone(&self.view.borrow())
    }

    fn change(&mut self, event: Event) {
        match self.state.after(event) {
            Ok(state) => {
                self.diary.note(&format!("{} -> {state}", self.state));
                self.state = state;
                self.state_since = Utc::now();
            }
            Err(refused) => tracing::warn!(id = self.record.id, %refused, "Event out of order"),
        }
    }

    /// While it is started again the record still has the previous end.
    fn stopped_at(&self) -> Option<DateTime<Utc>> {
        let end = self.record.end.as_ref().filter(|_| self.state == State::Stopped);
        end.map(|end| end.at)
    }

    /// What it is at, and since when: a phase of its boot, or the state it is in.
    fn phase(&self) -> (&'static str, Option<DateTime<Utc>>) {
        let boots = matches!(self.state, State::Created | State::Initializing);
        match self.history.timeline.open_phase().filter(|_| boots) {
            Some((name, since_ns)) => (name, Some(wall_clock(since_ns))),
            None => (self.state.phase(), self.stopped_at().or(Some(self.state_since))),
        }
    }

    fn publish(&self) {
        let instance = Instance {
            id: self.record.id.clone(),
            spec: self.record.spec.clone(),
            digest: self.record.digest,
            address: self.record.address,
            state: self.state,
            created_at: self.record.created_at,
            expires_at: self.record.expires_at,
            started_at: self.started_at,
            stopped_at: self.stopped_at(),
            ending: self.ending.clone(),
            phase: self.phase(),
            phases: self.history.timeline.phases(),
            health: self.checks.health.seen(self.record.spec.health_check.as_ref(), self.state),
            held_bytes: self.record.hold.map_or(0, |hold| hold.bytes),
            restart: self.record.restart.clone(),
            restart_at: self.restart_at(),
            mdev_uuid: self.loan.as_ref().and_then(|loan| loan.mdev_uuid.clone()),
        };
        self.view.send_replace(Arc::new(instance));
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
