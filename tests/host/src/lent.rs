//! The NVMe controller that `dev/in-host --vfio` has to lend.

use std::fs;
use std::path::{Path, PathBuf};

/// NVMe controllers in sysfs.
const NVME_CLASS: &str = "0x010802";

/// Where sysfs lists devices.
pub const PCI: &str = "/sys/bus/pci/devices";

/// Its address.
pub fn nvme() -> String {
    let is_nvme = |path: &Path| {
        fs::read_to_string(path.join("class")).is_ok_and(|class| class.trim() == NVME_CLASS)
    };
    let found = fs::read_dir(PCI).expect("sysfs is mounted").flatten().map(|entry| entry.path());
    let found = found.into_iter().find(|path| is_nvme(path));
    let found = found.expect("no device to lend: run this through dev/in-host --vfio");
    found.file_name().and_then(|name| name.to_str()).expect("an address is text").to_owned()
}

/// The controller, bound to vfio-pci; dropped, it is its driver's again.
#[derive(Debug)]
pub struct Lent {
    address: String,
}

impl Lent {
    /// Takes it from its driver.
    pub fn take() -> Self {
        let lent = Self { address: nvme() };
        lent.bind("vfio-pci");
        lent
    }

    /// Where sysfs lists it.
    pub fn path(&self) -> PathBuf {
        Path::new(PCI).join(&self.address)
    }

    fn bind(&self, driver: &str) {
        let path = self.path();
        let put = |path: &Path, text: &str| fs::write(path, text).expect("sysfs takes it");
        put(&path.join("driver_override"), &format!("{driver}\n"));
        if path.join("driver").exists() {
            put(&path.join("driver/unbind"), &self.address);
        }
        put(Path::new("/sys/bus/pci/drivers_probe"), &self.address);
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.bind("");
    }
}
