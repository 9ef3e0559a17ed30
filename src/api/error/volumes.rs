//! What goes wrong with volumes, as statuses.

use crate::api::error::ApiError;
use crate::api::volumes::VolumeSpecError;
use crate::images::room::RoomError;
use crate::instances::VolumeError;
use crate::volumes::content::ContentError;
use crate::volumes::{AttachError, CreateError, DeleteError, DiskError, FindError};

impl From<VolumeSpecError> for ApiError {
    fn from(error: VolumeSpecError) -> Self {
        match &error {
            VolumeSpecError::Missing { .. } => Self::bad("missing_field", &error),
            VolumeSpecError::Size | VolumeSpecError::Id(_) | VolumeSpecError::Name(_) => {
                Self::bad("invalid_field", &error)
            }
        }
    }
}

impl From<FindError> for ApiError {
    fn from(error: FindError) -> Self {
        match &error {
            FindError::Missing { .. } => Self::missing("not_found", &error),
            FindError::Ambiguous { .. } => Self::missing("ambiguous", &error),
            FindError::Records(_) => Self::internal(&error),
        }
    }
}

impl From<CreateError> for ApiError {
    fn from(error: CreateError) -> Self {
        match &error {
            CreateError::IdTaken { .. } => Self::conflict("already_exists", &error),
            CreateError::TotalSize { .. }
            | CreateError::Shortage(_)
            | CreateError::Room(RoomError::Full { .. })
            | CreateError::Content(ContentError::Room(RoomError::Full { .. }))
            | CreateError::Disk(DiskError::NoSpace { .. }) => {
                Self::conflict("insufficient_resources", &error)
            }
            CreateError::TooLarge { .. } | CreateError::Content(ContentError::TooLarge { .. }) => {
                Self::bad("archive_too_large", &error)
            }
            CreateError::Content(
                ContentError::NotAnArchive
                | ContentError::Tar(_)
                | ContentError::Read(_)
                | ContentError::Refused { .. },
            ) => Self::bad("invalid_source", &error),
            CreateError::Abandoned
            | CreateError::Content(
                ContentError::Abandoned | ContentError::Room(_) | ContentError::Write { .. },
            )
            | CreateError::Room(_)
            | CreateError::Disk(_)
            | CreateError::Dir { .. }
            | CreateError::Records(_) => Self::internal(&error),
        }
    }
}

impl From<DeleteError> for ApiError {
    fn from(error: DeleteError) -> Self {
        match error {
            DeleteError::Find(error) => error.into(),
            DeleteError::InUse { .. } => Self::conflict("conflict", &error),
            DeleteError::Dir { .. } | DeleteError::Records(_) => Self::internal(&error),
        }
    }
}

impl From<AttachError> for ApiError {
    fn from(error: AttachError) -> Self {
        match &error {
            AttachError::Missing { .. } => Self::missing("not_found", &error),
            AttachError::Twice { .. } | AttachError::Taken { .. } => {
                Self::conflict("conflict", &error)
            }
            AttachError::Records(_) => Self::internal(&error),
        }
    }
}

impl From<VolumeError> for ApiError {
    fn from(error: VolumeError) -> Self {
        match error {
            VolumeError::Order(error) => error.into(),
            VolumeError::Refused { .. }
            | VolumeError::NoAgent
            | VolumeError::OldAgent
            | VolumeError::Hides { .. } => Self::conflict("invalid_state", &error),
            VolumeError::NoSlot
            | VolumeError::InUse { .. }
            | VolumeError::Held { .. }
            | VolumeError::Guest { .. }
            | VolumeError::Disk(DiskError::InUse { .. }) => Self::conflict("conflict", &error),
            VolumeError::PathTaken { .. } | VolumeError::TooMany => {
                Self::bad("invalid_request", &error)
            }
            VolumeError::NotAttached { .. } => Self::missing("not_found", &error),
            VolumeError::Find(error) => error.into(),
            VolumeError::Attach(error) => error.into(),
            VolumeError::Silent(_)
            | VolumeError::Worker(_)
            | VolumeError::Disk(_)
            | VolumeError::Records(_) => Self::internal(&error),
        }
    }
}
