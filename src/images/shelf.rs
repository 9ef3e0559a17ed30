//! The shelf: every image name of this host, what it stands for, and the work that is under way.
//!
//! Pure bookkeeping: no files, no records, no tasks. A name is an [`Entry`]; work is a [`Job`] per
//! digest, first in a queue and then with the task that does it. What happens to a digest is told
//! to the watchers of all its names.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::{Arc, Weak};

use chrono::Utc;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::images::config::ImageConfig;
use crate::images::digest::Digest;
use crate::images::image::{Image, ImageStatus, Progress};
use crate::images::jobs::{AuthSource, Pull};
use crate::images::manifest::{Manifest, PLATFORM};
use crate::images::records::{ImageRecord, Origin, RecordState};
use crate::images::reference::Reference;

/// Names and work.
#[derive(Debug, Default)]
pub(super) struct Shelf {
    entries: BTreeMap<String, Entry>,
    jobs: HashMap<Digest, Job>,
    /// Digests whose job has no task yet.
    queue: VecDeque<Digest>,
    /// Tasks that run.
    running: usize,
    /// Jobs there ever were.
    jobs_seen: u64,
    /// Blobs of each digest on the shelf.
    contents: HashMap<Digest, Vec<Digest>>,
    /// Who holds root disks.
    pins: HashMap<Digest, Weak<()>>,
}

/// One name.
#[derive(Debug)]
pub(super) struct Entry {
    channel: watch::Sender<Image>,
    serves: Option<Digest>,
    origin: Origin,
}

impl Entry {
    pub(super) fn image(&self) -> Image {
        self.channel.borrow().clone()
    }

    pub(super) fn watch(&self) -> watch::Receiver<Image> {
        self.channel.subscribe()
    }

    /// The last digest of this name that became ready.
    pub(super) fn serves(&self) -> Option<Digest> {
        self.serves
    }

    pub(super) fn origin(&self) -> Origin {
        self.origin
    }

    fn digest(&self) -> Digest {
        self.channel.borrow().digest
    }
}

/// The work for one digest.
#[derive(Debug)]
struct Job {
    id: u64,
    status: ImageStatus,
    progress: Option<Progress>,
    pull: Option<Pull>,
    cancel: CancellationToken,
}

/// A job whose task shall start now.
#[derive(Debug)]
pub(super) struct Started {
    pub(super) id: u64,
    pub(super) digest: Digest,
    /// Where to get what is missing; `None` if all should be here.
    pub(super) pull: Option<Pull>,
    pub(super) cancel: CancellationToken,
}

/// An image somebody asked for, whose documents are here.
#[derive(Debug)]
pub(super) struct Arrival {
    pub(super) name: Reference,
    pub(super) manifest: Manifest,
    pub(super) config: ImageConfig,
    /// Empty keeps those the name has.
    pub(super) tags: BTreeMap<String, String>,
    pub(super) origin: Origin,
    pub(super) pull: Option<Pull>,
}

/// What an earlier server left of an image besides its row.
#[derive(Debug)]
pub(super) struct Found {
    /// Its manifest, if that is in the store.
    pub(super) manifest: Option<Manifest>,
    /// Whether all blobs of the manifest are, too.
    pub(super) is_complete: bool,
    /// Disk use of its root disk, if there is one.
    pub(super) size_bytes: Option<u64>,
}

impl Shelf {
    /// The entry of exactly that name.
    pub(super) fn find_exactly(&self, name: &Reference) -> Option<&Entry> {
        self.entries.get(&name.to_string())
    }

    /// The entry of that name; by digest, any of that repository with that digest.
    pub(super) fn find(&self, name: &Reference) -> Option<&Entry> {
        self.find_exactly(name).or_else(|| {
            let names = self.names(name);
            names.first().and_then(|name| self.entries.get(name))
        })
    }

    /// The names that `name` means: itself, or all of its repository with its digest.
    pub(super) fn names(&self, name: &Reference) -> Vec<String> {
        let Some(digest) = name.digest() else {
            let known = self.entries.contains_key(&name.to_string());
            return known.then(|| name.to_string()).into_iter().collect();
        };
        let is_meant = |entry: &Entry| {
            let image = entry.channel.borrow();
            image.digest == digest && image.name.same_repository(name)
        };
        let meant = self.entries.iter().filter(|(_, entry)| is_meant(entry));
        meant.map(|(name, _)| name.clone()).collect()
    }

    pub(super) fn images(&self) -> Vec<Image> {
        self.entries.values().map(Entry::image).collect()
    }

    /// What the image of an arrival will be, and what its name serves meanwhile.
    pub(super) fn describe(
        &self,
        arrival: &Arrival,
        size_bytes: Option<u64>,
    ) -> (Image, Option<Digest>) {
        let digest = arrival.manifest.digest;
        let known = self.find_exactly(&arrival.name);
        let before = known.map(Entry::image);
        let (status, progress) = match (size_bytes, self.jobs.get(&digest)) {
            (Some(_), _) => (ImageStatus::Ready, None),
            (None, Some(job)) => (job.status, job.progress),
            (None, None) => (ImageStatus::Pending, None),
        };
        let tags = match &before {
            Some(before) if arrival.tags.is_empty() => before.tags.clone(),
            _ => arrival.tags.clone(),
        };
        let image = Image {
            name: arrival.name.clone(),
            digest,
            status,
            error: None,
            size_bytes,
            platform: PLATFORM.to_owned(),
            config: arrival.config.clone(),
            tags,
            created_at: before.map_or_else(Utc::now, |before| before.created_at),
            queue_position: None,
            progress,
        };
        let serves =
            if size_bytes.is_some() { Some(digest) } else { known.and_then(Entry::serves) };
        (image, serves)
    }

    /// Puts an arrival's image, as described, on the shelf and queues its job if it needs one.
    pub(super) fn receive(
        &mut self,
        arrival: Arrival,
        image: Image,
        serves: Option<Digest>,
        closing: &CancellationToken,
    ) -> Image {
        let digest = image.digest;
        let key = image.name.to_string();
        let blobs = arrival.manifest.blobs().map(|blob| blob.digest);
        self.contents.insert(digest, blobs.collect());
        let needs_job = image.status == ImageStatus::Pending && !self.jobs.contains_key(&digest);
        self.place(image, serves, arrival.origin);
        if needs_job {
            self.enqueue(digest, arrival.pull, closing);
        }
        self.entries[&key].image()
    }

    /// Puts an image on the shelf, over the one of its name.
    pub(super) fn place(&mut self, image: Image, serves: Option<Digest>, origin: Origin) {
        match self.entries.get_mut(&image.name.to_string()) {
            Some(entry) => {
                entry.serves = serves;
                entry.origin = origin;
                entry.channel.send_replace(image);
            }
            None => {
                let name = image.name.to_string();
                let entry = Entry { channel: watch::Sender::new(image), serves, origin };
                self.entries.insert(name, entry);
            }
        }
        self.cancel_orphans();
    }

    /// Puts a row of an earlier server back, and queues what it had not finished. Returns the row
    /// as it is now if it has changed.
    pub(super) fn restore(
        &mut self,
        row: ImageRecord,
        name: Reference,
        found: Found,
        closing: &CancellationToken,
    ) -> Option<ImageRecord> {
        let Found { manifest, is_complete, size_bytes } = found;
        let before = row.clone();
        let (digest, origin) = (row.digest, row.origin);
        let has_way = is_complete || (manifest.is_some() && origin == Origin::Registry);
        let (status, error) = match (&row.state, size_bytes) {
            (_, Some(_)) => (ImageStatus::Ready, None),
            (RecordState::Failed(why), None) => (ImageStatus::Failed, Some(why.clone())),
            (_, None) if has_way => (ImageStatus::Pending, None),
            (_, None) => (ImageStatus::Failed, Some(INTERRUPTED.to_owned())),
        };
        let serves = if size_bytes.is_some() { Some(digest) } else { row.serves };
        let image = Image {
            name: name.clone(),
            digest,
            status,
            error,
            size_bytes,
            platform: PLATFORM.to_owned(),
            config: row.config,
            tags: row.tags,
            created_at: row.created_at,
            queue_position: None,
            progress: None,
        };
        let record = image.record(serves, origin);
        if let Some(manifest) = manifest {
            let blobs = manifest.blobs().map(|blob| blob.digest);
            self.contents.insert(digest, blobs.collect());
        }
        self.place(image, serves, origin);
        if status == ImageStatus::Pending && !self.jobs.contains_key(&digest) {
            let pull =
                (origin == Origin::Registry).then_some(Pull { name, auth: AuthSource::Host });
            self.enqueue(digest, pull, closing);
        }
        (record != before).then_some(record)
    }

    /// Digests that would lose their last name with `names`.
    pub(super) fn only_in(&self, names: &[String]) -> HashSet<Digest> {
        let (gone, left): (Vec<_>, Vec<_>) =
            self.entries.iter().partition(|(name, _)| names.contains(name));
        let digests = |entries: Vec<(&String, &Entry)>| -> HashSet<Digest> {
            let both = entries.into_iter().map(|(_, entry)| [Some(entry.digest()), entry.serves]);
            both.flatten().flatten().collect()
        };
        let left = digests(left);
        digests(gone).into_iter().filter(|digest| !left.contains(digest)).collect()
    }

    /// Takes a name off the shelf. Its watchers see the channel close.
    pub(super) fn remove(&mut self, name: &str) {
        self.entries.remove(name);
        self.cancel_orphans();
    }

    /// Holds a root disk until what comes back is dropped, with all its clones.
    pub(super) fn hold(&mut self, digest: &Digest) -> Arc<()> {
        self.pins.retain(|_, pin| pin.strong_count() > 0);
        let pin = self.pins.entry(*digest).or_default();
        pin.upgrade().unwrap_or_else(|| {
            let fresh = Arc::new(());
            *pin = Arc::downgrade(&fresh);
            fresh
        })
    }

    /// Whether somebody holds the root disk of a digest.
    pub(super) fn is_held(&self, digest: &Digest) -> bool {
        self.pins.get(digest).is_some_and(|pin| pin.strong_count() > 0)
    }

    /// Digests that names or jobs need.
    pub(super) fn needed(&self) -> HashSet<Digest> {
        let named = self.entries.values().flat_map(|entry| [Some(entry.digest()), entry.serves]);
        named.flatten().chain(self.jobs.keys().copied()).collect()
    }

    /// The blobs of these: manifests and all they refer to. Contents nobody needs are forgotten
    /// with the next restart.
    pub(super) fn needed_blobs(&self) -> HashSet<Digest> {
        let needed = self.needed();
        let contents = needed.iter().filter_map(|digest| self.contents.get(digest)).flatten();
        let contents: Vec<Digest> = contents.copied().collect();
        needed.into_iter().chain(contents).collect()
    }

    fn enqueue(&mut self, digest: Digest, pull: Option<Pull>, closing: &CancellationToken) {
        self.jobs_seen += 1;
        let job = Job {
            id: self.jobs_seen,
            status: ImageStatus::Pending,
            progress: None,
            pull,
            cancel: closing.child_token(),
        };
        self.jobs.insert(digest, job);
        self.queue.push_back(digest);
        self.number();
    }

    /// The next job whose task shall start, if there is room for one.
    pub(super) fn start(&mut self, jobs_max: usize) -> Option<Started> {
        if self.running >= jobs_max.max(1) {
            return None;
        }
        let digest = self.queue.pop_front()?;
        let job = self.jobs.get_mut(&digest)?;
        let started =
            Started { id: job.id, digest, pull: job.pull.take(), cancel: job.cancel.clone() };
        self.running += 1;
        self.tell(&digest, |image| image.queue_position = None);
        self.number();
        Some(started)
    }

    /// Says how far the job `id` is.
    pub(super) fn advance(
        &mut self,
        id: u64,
        digest: &Digest,
        status: ImageStatus,
        progress: Option<Progress>,
    ) {
        let Some(job) = self.jobs.get_mut(digest).filter(|job| job.id == id) else { return };
        (job.status, job.progress) = (status, progress);
        self.tell(digest, |image| (image.status, image.progress) = (status, progress));
    }

    /// Takes note that the task of job `id` has ended: with the disk use of the root disk, with an
    /// error text, or cancelled. Returns the rows that have changed.
    pub(super) fn finish(
        &mut self,
        id: u64,
        digest: &Digest,
        outcome: Option<Result<u64, String>>,
    ) -> Vec<ImageRecord> {
        self.running -= 1;
        if self.jobs.get(digest).is_none_or(|job| job.id != id) {
            return Vec::new();
        }
        self.jobs.remove(digest);
        let Some(outcome) = outcome else { return Vec::new() };
        self.tell(digest, |image| {
            image.progress = None;
            match &outcome {
                Ok(size_bytes) => {
                    image.status = ImageStatus::Ready;
                    image.size_bytes = Some(*size_bytes);
                }
                Err(why) => {
                    image.status = ImageStatus::Failed;
                    image.error = Some(why.clone());
                }
            }
        });
        let mut changed = Vec::new();
        for entry in self.entries.values_mut() {
            let image = entry.channel.borrow();
            if image.digest == *digest {
                if outcome.is_ok() {
                    entry.serves = Some(*digest);
                }
                changed.push(image.record(entry.serves, entry.origin));
            }
        }
        changed
    }

    /// Ends jobs that no name wants any more.
    fn cancel_orphans(&mut self) {
        let wanted: HashSet<Digest> = self.entries.values().map(Entry::digest).collect();
        self.jobs.retain(|digest, job| {
            let keep = wanted.contains(digest);
            if !keep {
                job.cancel.cancel();
            }
            keep
        });
        let before = self.queue.len();
        self.queue.retain(|digest| wanted.contains(digest));
        if self.queue.len() != before {
            self.number();
        }
    }

    /// Tells those who wait their places.
    fn number(&self) {
        for (index, digest) in self.queue.iter().enumerate() {
            self.tell(digest, |image| image.queue_position = Some(index + 1));
        }
    }

    fn tell(&self, digest: &Digest, change: impl Fn(&mut Image)) {
        for entry in self.entries.values().filter(|entry| entry.digest() == *digest) {
            entry.channel.send_modify(|image| change(image));
        }
    }
}

/// What became of a pull that cannot be resumed.
const INTERRUPTED: &str = "Interrupted by a restart of the server, which keeps neither \
    credentials nor archives: ask again";
