//! What goes wrong with devices of the host, as statuses.

use crate::api::devices::DeviceSpecError;
use crate::api::error::ApiError;
use crate::devices::{
    ClaimError, DeleteError, FindError, GiveBackError, HostError, LendError, RegisterError,
    UnfitError, WantError,
};

impl From<DeviceSpecError> for ApiError {
    fn from(error: DeviceSpecError) -> Self {
        match &error {
            DeviceSpecError::Address(_) => Self::bad("invalid_pci_address", &error),
            DeviceSpecError::Name(_) => Self::bad("invalid_name", &error),
        }
    }
}

impl From<HostError> for ApiError {
    fn from(error: HostError) -> Self {
        Self::internal(&error)
    }
}

impl From<FindError> for ApiError {
    fn from(error: FindError) -> Self {
        match &error {
            FindError::Missing { .. } => Self::missing("not_found", &error),
            FindError::Records(_) | FindError::Host(_) => Self::internal(&error),
        }
    }
}

impl From<UnfitError> for ApiError {
    fn from(error: UnfitError) -> Self {
        match &error {
            UnfitError::Missing { .. } => Self::missing("device_not_found", &error),
            UnfitError::NoIommu { .. }
            | UnfitError::Bridge { .. }
            | UnfitError::HostUse { .. }
            | UnfitError::Group { .. }
            | UnfitError::NoDriver => Self::conflict("conflict", &error),
            UnfitError::Host(_) => Self::internal(&error),
        }
    }
}

impl From<RegisterError> for ApiError {
    fn from(error: RegisterError) -> Self {
        match error {
            RegisterError::Unfit(error) => error.into(),
            RegisterError::NameTaken { .. } | RegisterError::Registered { .. } => {
                Self::conflict("conflict", &error)
            }
            RegisterError::Records(_) => Self::internal(&error),
        }
    }
}

impl From<DeleteError> for ApiError {
    fn from(error: DeleteError) -> Self {
        match error {
            DeleteError::Find(error) => error.into(),
            DeleteError::InUse { .. } => Self::conflict("in_use", &error),
            DeleteError::Records(_) => Self::internal(&error),
        }
    }
}

impl From<WantError> for ApiError {
    fn from(error: WantError) -> Self {
        match error {
            WantError::Find(error) => error.into(),
            WantError::Unfit(error) => error.into(),
            WantError::Twice { .. } | WantError::NoProfile { .. } => {
                Self::bad("invalid_request", &error)
            }
            WantError::NoSlot { .. } => Self::conflict("insufficient_resources", &error),
        }
    }
}

impl From<ClaimError> for ApiError {
    fn from(error: ClaimError) -> Self {
        match &error {
            ClaimError::Missing { .. } => Self::missing("not_found", &error),
            ClaimError::Taken { .. } | ClaimError::GroupTaken { .. } => {
                Self::conflict("conflict", &error)
            }
            ClaimError::Records(_) => Self::internal(&error),
        }
    }
}

impl From<LendError> for ApiError {
    fn from(error: LendError) -> Self {
        match error {
            LendError::Want(error) => error.into(),
            LendError::GiveBack(error) => error.into(),
            LendError::Bind { .. }
            | LendError::Make { .. }
            | LendError::NoFile { .. }
            | LendError::Records(_)
            | LendError::Stuck { .. } => Self::internal(&error),
        }
    }
}

impl From<GiveBackError> for ApiError {
    fn from(error: GiveBackError) -> Self {
        Self::internal(&error).may_pass()
    }
}
