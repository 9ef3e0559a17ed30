//! Logs as a stream: the last lines, then each as it is written.

use std::io;
use std::sync::Arc;

use futures_util::Stream;
use futures_util::stream;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::task;
use tokio_util::sync::CancellationToken;

use crate::fleet::files;
use crate::instances::state::State;
use crate::instances::{FindError, Instance, Instances};
use crate::logs::LogFile;
use crate::logs::watch::Growth;

/// Most logs that are followed at a time; each costs two open files and a connection.
pub const FOLLOWERS_MAX: usize = 1024;

/// Which log of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogSource {
    /// The guest's console: kernel, agent and workload.
    App,
    /// The worker process.
    Vmm,
    /// The server, about this instance.
    Server,
}

/// What is read of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogQuery {
    /// Which.
    pub source: LogSource,
    /// How many lines back it starts.
    pub tail: usize,
    /// When it ends.
    pub until: LogEnd,
}

/// When the reading of a log ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogEnd {
    /// At its present end.
    Now,
    /// When the instance has stopped and all of it was read.
    Stopped,
    /// When the instance is deleted.
    Never,
}

/// Why there are no lines.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// Which one?
    #[error(transparent)]
    Find(#[from] FindError),
    /// Too many are followed already.
    #[error("{FOLLOWERS_MAX} logs are followed already: try again when one of them has ended")]
    TooMany,
    /// The log does not exist yet.
    #[error("There is no such log yet")]
    NoLog,
    /// The file.
    #[error("Failed to read the log of instance {id}")]
    Io {
        /// Which instance.
        id: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// One reader of one log.
#[derive(Debug)]
struct Follower {
    log: LogFile,
    growth: Growth,
    view: watch::Receiver<Arc<Instance>>,
    until: LogEnd,
    closing: CancellationToken,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Instances {
    /// The lines of a log, in batches, none of them empty.
    ///
    /// # Errors
    ///
    /// [`LogError`], before the first line; a file that breaks later ends the stream.
    pub async fn logs(
        &self,
        key: &str,
        query: LogQuery,
    ) -> Result<impl Stream<Item = Vec<String>> + Send + use<>, LogError> {
        let view = self.entry(key)?.view;
        let id = view.borrow().id.clone();
        let permit = match query.until {
            LogEnd::Now => None,
            LogEnd::Stopped | LogEnd::Never => {
                let permit = Arc::clone(&self.shared.followers).try_acquire_owned();
                Some(permit.map_err(|_| LogError::TooMany)?)
            }
        };
        let path = self.shared.dir_of(&id).join(match query.source {
            LogSource::App => files::CONSOLE,
            LogSource::Vmm => files::WORKER_LOG,
            LogSource::Server => files::SERVER_LOG,
        });
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => LogError::NoLog,
            _ => LogError::Io { id: id.clone(), source },
        };
        // The watch before the first look: what is written in between wakes it up.
        let growth = self.shared.log_watch.growth(&path).map_err(failed)?;
        let open = move || LogFile::open(&path, query.tail);
        let log = task::spawn_blocking(open).await.map_err(io::Error::other).flatten();
        let log = log.map_err(failed)?;
        let closing = self.shared.closing.clone();
        let until = query.until;
        let follower = Follower { log, growth, view, until, closing, _permit: permit };
        Ok(stream::unfold(Some(follower), |follower| async { follower?.next().await }))
    }
}

impl Follower {
    /// The next lines, and the follower unless they are the last.
    async fn next(mut self) -> Option<(Vec<String>, Option<Self>)> {
        loop {
            // First the state, then the file: what a stopped instance wrote is in there by now.
            let has_stopped = self.view.borrow_and_update().state == State::Stopped;
            let (log, lines) = read(self.log).await?;
            self.log = log;
            if !lines.is_empty() {
                return Some((lines, Some(self)));
            }
            let is_over = match self.until {
                LogEnd::Now => true,
                LogEnd::Stopped => has_stopped,
                LogEnd::Never => false,
            };
            if is_over {
                return self.finish();
            }
            tokio::select! {
                () = self.growth.wait() => {}
                changed = self.view.changed() => if changed.is_err() {
                    return self.finish();
                },
                () = self.closing.cancelled() => return None,
            }
        }
    }

    fn finish(mut self) -> Option<(Vec<String>, Option<Self>)> {
        self.log.finish().map(|line| (vec![line], None))
    }
}

async fn read(mut log: LogFile) -> Option<(LogFile, Vec<String>)> {
    let reading = task::spawn_blocking(move || {
        let lines = log.read();
        (log, lines)
    });
    match reading.await {
        Ok((log, Ok(lines))) => Some((log, lines)),
        Ok((_, Err(error))) => {
            tracing::warn!(%error, "Failed to read on in a log");
            None
        }
        Err(error) => {
            tracing::error!(%error, "Reading of a log was cut off");
            None
        }
    }
}
