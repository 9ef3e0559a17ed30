//! Volumes: disks that outlive instances.
//!
//! ```text
//! create ──> claim ──> record `Creating` ──> folder ──> file ──> record `Kept`
//!              each step undone, in reverse, unless all of them worked
//! ```
//!
//! A volume is a folder with one sparse file, `data.ext4`, and a record. An instance has it by an
//! attachment, a row beside both records ([`record`]): one that writes is alone, those that only
//! read share. The file is locked besides while a machine has it.
//!
//! A killed server leaves records in another phase than `Kept`, and folders without a record; the
//! next one removes both.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, BufReader};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use chrono::{DateTime, Utc};
use rusqlite::ErrorCode;
use tokio::io::AsyncRead;
use tokio::sync::Mutex as AsyncMutex;
use tokio::task::spawn_blocking;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::disks::{self, Disks};
use crate::os::room::Room;
use crate::os::tool::ToolError;
use crate::resources::{Claim, Resources};
use crate::store::Store;
use crate::tar::stream::{CHUNK_BYTES, ChunkReader, feed};
use crate::volumes::content::{Bounds, ContentError, Measure};
use crate::volumes::record::{Phase, Record};
use crate::volumes::spec::{VolumeId, VolumeSpec};

pub use crate::disks::DiskError;
pub use errors::{AttachError, CreateError, DeleteError, FindError, OpenError};
pub use record::{Attachment, attach, detach};

pub mod content;
mod errors;
mod record;
pub mod spec;

/// The file in a volume's folder.
const DATA: &str = "data.ext4";

/// Where an archive is unpacked before it becomes the file.
const CONTENT: &str = "content";

/// What volumes are made with.
#[derive(Debug)]
pub struct VolumesSpec {
    /// Folder in which each volume gets its own.
    pub dir: PathBuf,
    /// The records.
    pub store: Store,
    /// Whom to ask for room.
    pub resources: Resources,
    /// Free bytes that an archive leaves on the file system.
    pub free_bytes_min: u64,
    /// Most GiB of all volumes together.
    pub total_gib_max: Option<u64>,
}

/// The volumes of this host. Clones are the same.
#[derive(Debug, Clone)]
pub struct Volumes {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    dir: PathBuf,
    store: Store,
    resources: Resources,
    room: Room,
    total_gib_max: Option<u64>,
    /// Of the volumes that are there, by id. Held for moments.
    claims: Mutex<HashMap<VolumeId, Claim>>,
    /// One at a time: whoever looks whether a disk is whole has to be alone with it.
    opening: AsyncMutex<()>,
    tasks: TaskTracker,
}

/// A volume as it is at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// Its id.
    pub id: VolumeId,
    /// Its name; others may have the same.
    pub name: String,
    /// Its size.
    pub size_gib: u64,
    /// When it was asked for.
    pub created_at: DateTime<Utc>,
    /// The caller's labels.
    pub tags: BTreeMap<String, String>,
    /// Who has it.
    pub attachments: Vec<Attachment>,
}

impl Volumes {
    /// Opens the volumes in `spec.dir`, and removes what a killed server had half made or half
    /// removed.
    ///
    /// # Errors
    ///
    /// [`OpenError`].
    pub fn open(spec: VolumesSpec) -> Result<Self, OpenError> {
        let VolumesSpec { dir, store, resources, free_bytes_min, total_gib_max } = spec;
        let failed = |source| OpenError::Dir { path: dir.clone(), source };
        fs::create_dir_all(&dir).map_err(failed)?;
        let room = Room::new(&dir, free_bytes_min).map_err(failed)?;
        let records = store.transact(Record::all).map_err(OpenError::Records)?;
        for entry in fs::read_dir(&dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let id = entry.file_name().to_string_lossy().into_owned();
            if !records.contains_key(&id) {
                tracing::info!(id, "Removes a volume that was half made");
                remove_folder(&entry.path()).map_err(failed)?;
            }
        }
        let mut claims = HashMap::new();
        for record in records.into_values().flatten() {
            let id = record.id.as_str();
            if record.phase == Phase::Kept {
                claims
                    .insert(record.id.clone(), resources.count_volume(id, bytes(record.size_gib)));
                continue;
            }
            tracing::info!(id, "Removes a volume that was half made or half removed");
            remove_folder(&dir.join(id)).map_err(failed)?;
            store.transact(|records| Record::remove(id, records)).map_err(OpenError::Records)?;
        }
        let (claims, tasks) = (Mutex::new(claims), TaskTracker::new());
        let opening = AsyncMutex::default();
        let shared = Shared { dir, store, resources, room, total_gib_max, claims, opening, tasks };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Makes an empty volume.
    ///
    /// # Errors
    ///
    /// [`CreateError`]; nothing is left.
    pub async fn create(&self, spec: VolumeSpec) -> Result<Volume, CreateError> {
        let (shared, gone) = (Arc::clone(&self.shared), CancellationToken::new());
        let _gone_if_dropped = gone.clone().drop_guard();
        let making = spawn_blocking(move || {
            let making = Making::begin(&shared, spec)?;
            making.disk(None)?.keep(&gone)
        });
        self.shared.tasks.track_future(making).await.expect("making a volume does not panic")
    }

    /// Makes a volume of what is in `archive`: as large as that needs to be used, and no larger
    /// than was asked for.
    ///
    /// # Errors
    ///
    /// [`CreateError`]; nothing is left.
    pub async fn create_from_archive<R: AsyncRead + Unpin>(
        &self,
        spec: VolumeSpec,
        archive: R,
    ) -> Result<Volume, CreateError> {
        let (shared, gone) = (Arc::clone(&self.shared), CancellationToken::new());
        let _gone_if_dropped = gone.clone().drop_guard();
        let making = feed(archive, move |chunks| {
            let mut making = Making::begin(&shared, spec)?;
            let measure = making.unpack(chunks, &gone)?;
            making.disk(Some(measure))?.keep(&gone)
        });
        self.shared.tasks.track_future(making).await
    }

    /// The volume that `key` means: its id, else its name.
    ///
    /// # Errors
    ///
    /// [`FindError`].
    pub fn find(&self, key: &str) -> Result<Volume, FindError> {
        self.shared.store.transact(|records| {
            let found = one(Record::named(records, key)?, key)?;
            let mut attachments = record::attachments(records)?;
            Ok(Volume::new(found, &mut attachments))
        })
    }

    /// All volumes, oldest first.
    ///
    /// # Errors
    ///
    /// [`FindError::Records`].
    pub fn list(&self) -> Result<Vec<Volume>, FindError> {
        let (records, mut attachments) = self.shared.store.transact(|records| {
            Ok::<_, FindError>((Record::all(records)?, record::attachments(records)?))
        })?;
        let kept = records.into_values().flatten().filter(|record| record.phase == Phase::Kept);
        let mut list: Vec<_> = kept.map(|record| Volume::new(record, &mut attachments)).collect();
        list.sort_by(|a, b| (a.created_at, &a.id).cmp(&(b.created_at, &b.id)));
        Ok(list)
    }

    /// Removes a volume that nobody has. Goes on if the caller goes away.
    ///
    /// # Errors
    ///
    /// [`DeleteError`]; the volume is still there, unless its files could not be removed.
    pub async fn delete(&self, key: &str) -> Result<(), DeleteError> {
        let id = self.shared.store.transact(|records| {
            let record = one(Record::named(records, key)?, key)?;
            let attachments = record::attachments(records)?;
            if let Some(other) = attachments.get(record.id.as_str()).and_then(|all| all.first()) {
                let (volume, instance) = (record.id.to_string(), other.instance_id.clone());
                return Err(DeleteError::InUse { volume, instance });
            }
            Record { phase: Phase::Deleting, ..record.clone() }.update(records)?;
            Ok(record.id)
        })?;
        let shared = Arc::clone(&self.shared);
        let removing = spawn_blocking(move || {
            let path = shared.dir.join(id.as_str());
            remove_folder(&path).map_err(|source| DeleteError::Dir { path, source })?;
            shared.store.transact(|records| Record::remove(id.as_str(), records))?;
            drop(shared.claims().remove(&id));
            Ok(())
        });
        self.shared.tasks.track_future(removing).await.expect("removing a volume does not panic")
    }

    /// Opens the file of a volume for a machine.
    ///
    /// # Errors
    ///
    /// [`DiskError`].
    pub async fn disk(&self, id: &str, read_only: bool) -> Result<File, DiskError> {
        let path = self.shared.dir.join(id).join(DATA);
        if !read_only {
            return Disks::reopen(&path).await;
        }
        let _alone = self.shared.opening.lock().await;
        Disks::open_to_read(&path).await
    }

    /// Waits for what is under way.
    pub async fn close(&self) {
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
    }
}

impl Volume {
    fn new(record: Record, attachments: &mut BTreeMap<String, Vec<Attachment>>) -> Self {
        let Record { id, name, size_gib, created_at, tags, phase: _ } = record;
        let attachments = attachments.remove(id.as_str()).unwrap_or_default();
        Self { id, name: name.into(), size_gib, created_at, tags, attachments }
    }
}

impl Shared {
    fn claims(&self) -> MutexGuard<'_, HashMap<VolumeId, Claim>> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A volume that is not there yet: dropped, nothing of it is left, unless it was kept.
struct Making {
    shared: Arc<Shared>,
    record: Record,
    folder: PathBuf,
    claim: Option<Claim>,
}

impl Making {
    /// Reserves room and id, and makes the folder.
    fn begin(shared: &Arc<Shared>, spec: VolumeSpec) -> Result<Self, CreateError> {
        let VolumeSpec { id, name, size_gib, tags } = spec;
        let id = id.unwrap_or_else(VolumeId::new);
        let (created_at, phase) = (Utc::now(), Phase::Creating);
        let record = Record { id, name, size_gib, created_at, tags, phase };
        shared.store.transact(|records| {
            let all = Record::all(records)?;
            let used_gib = all.values().flatten().map(|record| record.size_gib).sum::<u64>();
            if let Some(total_gib_max) = shared.total_gib_max
                && used_gib.saturating_add(size_gib) > total_gib_max
            {
                return Err(CreateError::TotalSize { size_gib, used_gib, total_gib_max });
            }
            record.insert(records).map_err(|error| match error.sqlite_error_code() {
                Some(ErrorCode::ConstraintViolation) => {
                    CreateError::IdTaken { id: record.id.to_string() }
                }
                _ => error.into(),
            })
        })?;
        let folder = shared.dir.join(record.id.as_str());
        let mut making = Self { shared: Arc::clone(shared), record, folder, claim: None };
        let id = making.record.id.as_str();
        // Behind the record, without which another's claim of the same id would be replaced.
        making.claim = Some(shared.resources.claim_volume(id, bytes(size_gib))?);
        fs::create_dir(&making.folder).map_err(|source| making.dir_error(source))?;
        Ok(making)
    }

    fn unpack(
        &mut self,
        chunks: ChunkReader,
        gone: &CancellationToken,
    ) -> Result<Measure, CreateError> {
        let folder = self.folder.join(CONTENT);
        fs::create_dir(&folder).map_err(|source| self.dir_error(source))?;
        let bounds = Bounds {
            bytes_max: bytes(self.record.size_gib),
            room: &self.shared.room,
            is_abandoned: &|| gone.is_cancelled(),
        };
        let packed = BufReader::with_capacity(CHUNK_BYTES, chunks);
        let measure =
            content::unpack_into(packed, &folder, &bounds).map_err(|error| match error {
                ContentError::TooLarge { .. } => self.too_large(),
                ContentError::Abandoned => CreateError::Abandoned,
                error => error.into(),
            })?;
        // Half as much again, for what a guest adds, in whole GiB.
        let wanted = measure.bytes.saturating_add(measure.bytes / 2).div_ceil(1 << 30).max(1);
        self.record.size_gib = self.record.size_gib.min(wanted);
        if let Some(claim) = &self.claim {
            claim.shrink_volume(bytes(self.record.size_gib));
        }
        // The file holds all of it once more for a while.
        self.shared.room.claim(measure.bytes)?;
        Ok(measure)
    }

    /// Makes the file, with what was unpacked.
    fn disk(self, content: Option<Measure>) -> Result<Self, CreateError> {
        let folder = self.folder.join(CONTENT);
        let content =
            content.map(|Measure { files, .. }| disks::Content { folder: folder.clone(), files });
        let made =
            Disks::format(self.folder.join(DATA), bytes(self.record.size_gib), content.as_ref());
        let disk = made.map_err(|error| match error {
            // mkfs.ext4 has no exit status of its own for this.
            DiskError::Tool(ToolError::Failed { complaint, .. })
                if content.is_some() && complaint.contains("allocate") =>
            {
                self.too_large()
            }
            error => error.into(),
        })?;
        if content.is_some() {
            remove_folder(&folder).map_err(|source| self.dir_error(source))?;
        }
        disk.keep();
        Ok(self)
    }

    /// All steps worked: the record says so, unless nobody would ever hear of it.
    fn keep(mut self, gone: &CancellationToken) -> Result<Volume, CreateError> {
        if gone.is_cancelled() {
            return Err(CreateError::Abandoned);
        }
        let record = Record { phase: Phase::Kept, ..self.record.clone() };
        // The file is on the host's disk already; so shall be where it is.
        for folder in [&self.folder, &self.shared.dir] {
            let synced = File::open(folder).and_then(|folder| folder.sync_all());
            synced.map_err(|source| self.dir_error(source))?;
        }
        self.shared.store.transact(|records| record.update(records))?;
        if let Some(claim) = self.claim.take() {
            self.shared.claims().insert(record.id.clone(), claim);
        }
        self.record.phase = Phase::Kept;
        Ok(Volume::new(record, &mut BTreeMap::new()))
    }

    fn too_large(&self) -> CreateError {
        CreateError::TooLarge { size_gib: self.record.size_gib }
    }

    fn dir_error(&self, source: io::Error) -> CreateError {
        CreateError::Dir { path: self.folder.clone(), source }
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        let Self { shared, record, folder, .. } = self;
        if record.phase == Phase::Kept {
            return;
        }
        let id = record.id.as_str();
        if let Err(error) = remove_folder(folder) {
            // The record stays, so that the next server tries again.
            tracing::error!(folder = %folder.display(), %error, "Failed to remove a folder");
            return;
        }
        if let Err(error) = shared.store.transact(|records| Record::remove(id, records)) {
            tracing::error!(%id, %error, "Failed to remove a record");
        }
    }
}

/// The only record that was found.
fn one(mut found: Vec<Record>, key: &str) -> Result<Record, FindError> {
    let key = key.to_owned();
    match found.len() {
        0 => Err(FindError::Missing { key }),
        1 => Ok(found.remove(0)),
        _ => Err(FindError::Ambiguous { key }),
    }
}

fn bytes(gib: u64) -> u64 {
    gib.saturating_mul(1 << 30)
}

/// Removes a volume's folder, which may not exist.
fn remove_folder(folder: &Path) -> io::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests;
