//! Lending devices to a machine, and getting them back.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;

use crate::causes::chain;
use crate::devices::binding::Change;
use crate::devices::errors::{GiveBackError, HostError, LendError, UnfitError, WantError};
use crate::devices::loans::{Lent, Rows};
use crate::devices::mediated::{MediatedType, profiles};
use crate::devices::{Device, Devices, Loan, NewLoan, Shared, Wanted};

/// Who borrows what.
#[derive(Debug, Clone)]
struct Borrower {
    instance_id: String,
    devices: Vec<String>,
    profile: Option<String>,
}

impl Devices {
    /// Finds the devices that an instance names, by id or name, and whether it could have them now.
    ///
    /// # Errors
    ///
    /// [`WantError`].
    pub fn want(&self, keys: &[String]) -> Result<Vec<Wanted>, WantError> {
        let found = self.shared.want(keys)?;
        Ok(found.into_iter().map(|(wanted, _)| wanted).collect())
    }

    /// Whether a part of a GPU could be made now.
    ///
    /// # Errors
    ///
    /// [`WantError`].
    pub fn want_profile(&self, profile: &str) -> Result<(), WantError> {
        self.shared.slot(profile).map(drop)
    }

    /// Lends an instance's devices to its machine; `None` if it has none. What an earlier machine
    /// of it had is given back first.
    ///
    /// # Errors
    ///
    /// [`LendError`]; nothing is lent.
    pub async fn lend(
        &self,
        instance_id: &str,
        devices: &[String],
        profile: Option<&str>,
    ) -> Result<Option<NewLoan>, LendError> {
        if devices.is_empty() && profile.is_none() {
            return Ok(None);
        }
        let borrower = Borrower {
            instance_id: instance_id.to_owned(),
            devices: devices.to_vec(),
            profile: profile.map(str::to_owned),
        };
        let devices = self.clone();
        // Made in the thread: if nobody waits for it any more, it is dropped there.
        let lent = self.change(move |shared| {
            let loan = shared.lend(&borrower)?;
            Ok(Some(NewLoan { devices, loan: Some(loan) }))
        });
        lent.await?
    }
}

impl Wanted {
    /// The device's id.
    pub fn id(&self) -> &str {
        &self.id
    }
}

impl Shared {
    fn want(&self, keys: &[String]) -> Result<Vec<(Wanted, Device)>, WantError> {
        let (mut devices, mut addresses) = (Vec::new(), BTreeSet::new());
        for key in keys {
            let device = self.find(key)?;
            if !addresses.insert(device.address.clone()) {
                return Err(WantError::Twice { device: key.clone() });
            }
            devices.push(device);
        }
        let mut wanted = Vec::new();
        for device in devices {
            let function = self.sysfs.fit(&device.address)?;
            let peers = self.sysfs.free_group(&function, &addresses)?;
            let want = Wanted { id: device.id.clone(), name: device.name.clone(), peers };
            wanted.push((want, device));
        }
        Ok(wanted)
    }

    /// A type that makes devices of `profile`, of a parent that has room for one more.
    fn slot(&self, profile: &str) -> Result<MediatedType, WantError> {
        let types = self.sysfs.mediated_types().map_err(HostError).map_err(UnfitError::Host)?;
        if !types.iter().any(|one| one.is(profile)) {
            let names: Vec<_> = profiles(&types).into_iter().map(|profile| profile.name).collect();
            let offered = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            return Err(WantError::NoProfile { profile: profile.to_owned(), offered });
        }
        // The one with most room: the others are left for what needs all of one.
        let free = types.into_iter().filter(|one| one.is(profile) && one.profile.available > 0);
        free.max_by_key(|one| one.profile.available)
            .ok_or_else(|| WantError::NoSlot { profile: profile.to_owned() })
    }

    fn lend(&self, borrower: &Borrower) -> Result<Loan, LendError> {
        self.give_back(Rows::Instance(&borrower.instance_id))?;
        let mut loan = Loan { id: cuid2::create_id(), paths: Vec::new(), mdev_uuid: None };
        let outcome = self.lend_all(borrower, &mut loan);
        if outcome.is_err()
            && let Err(error) = self.give_back(Rows::Loan(&loan.id))
        {
            tracing::error!(error = chain(&error), "A device is still lent");
        }
        outcome.map(|()| loan)
    }

    fn lend_all(&self, borrower: &Borrower, loan: &mut Loan) -> Result<(), LendError> {
        let lent = |loan: &Loan, change| Lent {
            loan: loan.id.clone(),
            instance_id: borrower.instance_id.clone(),
            change,
        };
        let note = |lent: &Lent| self.store.intend(|records| lent.insert(records, &self.boot_id));
        for key in &borrower.devices {
            let address = self.find(key).map_err(WantError::Find)?.address;
            // Of a machine that never ran, or whose instance is gone.
            self.give_back(Rows::Device(address.as_str()))?;
        }
        for (_, Device { address, .. }) in self.want(&borrower.devices)? {
            let failed = |source| LendError::Bind { address: address.clone(), source };
            if let Some(change) = self.sysfs.binding(&address).map_err(failed)? {
                note(&lent(loan, change))?;
                self.sysfs.bind(&address).map_err(failed)?;
            }
            let path = self.sysfs.folder(&address);
            self.check_file(&path, address.as_str(), failed)?;
            loan.paths.push(path);
        }
        if let Some(profile) = &borrower.profile {
            let failed = |source| LendError::Make { profile: profile.clone(), source };
            let slot = self.slot(profile)?;
            let uuid = self.sysfs.new_uuid().map_err(failed)?;
            note(&lent(loan, Change::Made { uuid: uuid.clone() }))?;
            self.sysfs.make_mediated(&slot, &uuid).map_err(failed)?;
            let path = self.sysfs.mediated(&uuid);
            self.check_file(&path, &uuid, failed)?;
            loan.paths.push(path);
            loan.mdev_uuid = Some(uuid);
        }
        Ok(())
    }

    /// Whether a machine can get the device at `path`, which is given away.
    fn check_file(
        &self,
        path: &Path,
        name: &str,
        failed: impl FnOnce(io::Error) -> LendError,
    ) -> Result<(), LendError> {
        let is_there = self.sysfs.has_file(path).map_err(failed)?;
        if is_there { Ok(()) } else { Err(LendError::NoFile { name: name.to_owned() }) }
    }

    /// Undoes what was changed, the last first, and forgets it.
    pub(super) fn give_back(&self, rows: Rows<'_>) -> Result<(), GiveBackError> {
        let mut outcome = Ok(());
        for lent in self.store.transact(|records| Lent::find(records, rows))?.iter().rev() {
            match self.sysfs.undo(&lent.change) {
                Ok(()) => self.store.intend(|records| lent.remove(records))?,
                // The others are given back all the same.
                Err(source) => {
                    let name = lent.change.name().to_owned();
                    outcome = Err(GiveBackError::Host { name, source });
                }
            }
        }
        outcome
    }
}

/// The loan of a machine that an earlier server has started.
pub(super) fn resumed(lent: &[Lent]) -> Option<Loan> {
    let id = lent.first()?.loan.clone();
    let mdev_uuid = lent.iter().find_map(|lent| match &lent.change {
        Change::Made { uuid } => Some(uuid.clone()),
        Change::Bound { .. } => None,
    });
    // Its machine has them open.
    Some(Loan { id, paths: Vec::new(), mdev_uuid })
}
