//! The PCI bus of a machine that has devices of its host: one root bus, one function per device.
//!
//! A machine without such devices has no bus, so that its kernel looks for none. Configuration
//! space is memory (PCI Express Base 5.0, 7.2.2 "PCI Express Enhanced Configuration Access
//! Mechanism"); the old ports for it are not there. Behind it are the two windows for BARs, and
//! there is one of ports.

pub mod bars;
pub mod config;
pub mod msi;

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::layout::{
    ECAM_BYTES, ECAM_START, PCI_LOW_BYTES, PCI_LOW_START, PCI_PORTS, PCI_PORTS_START, pci_high,
};
use crate::vfio::passthrough::{Passthrough, Recall};
use bars::{Space, Windows};

/// Most devices of the host in a machine: a bus has 32, and the first is the host bridge.
pub const DEVICES_MAX: usize = 16;

/// Bytes of a function's configuration space, and functions of a device.
const FUNCTION_BYTES: u64 = 4096;
const FUNCTIONS: u64 = 8;

/// What the host bridge says of itself: a bridge without registers, of Red Hat's identity for
/// those that are not real (1b36:0008).
const BRIDGE: [u8; 16] = [0x36, 0x1b, 0x08, 0x00, 0, 0, 0, 0, 0, 0, 0x00, 0x06, 0, 0, 0, 0];

/// Where BARs can be in a machine whose memory, with all that can be added, ends at `memory_end`.
pub fn windows(memory_end: u64) -> Windows {
    Windows {
        low: PCI_LOW_START..PCI_LOW_START + PCI_LOW_BYTES,
        high: pci_high(memory_end),
        ports: u64::from(PCI_PORTS_START)..u64::from(PCI_PORTS_START) + u64::from(PCI_PORTS),
    }
}

/// The bus. Each function has a lock of its own; no two are ever held together.
#[derive(Debug)]
pub struct PciBus {
    functions: Vec<Mutex<Passthrough>>,
    windows: Windows,
}

/// Devices whose BARs do not all fit into the windows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("The BARs of all devices together do not fit into the guest's windows for them")]
pub struct NoRoom;

impl PciBus {
    /// A bus with these functions, as devices 1 and on.
    ///
    /// # Errors
    ///
    /// [`NoRoom`].
    pub fn new(mut functions: Vec<Passthrough>, windows: Windows) -> Result<Self, NoRoom> {
        let shapes: Vec<_> = functions.iter().flat_map(Passthrough::shapes).collect();
        let mut places = windows.place(&shapes).ok_or(NoRoom)?.into_iter();
        for function in &mut functions {
            let count = function.shapes().count();
            function.place_bars(places.by_ref().take(count));
        }
        Ok(Self { functions: functions.into_iter().map(Mutex::new).collect(), windows })
    }

    /// How the host asks for its functions back.
    ///
    /// # Errors
    ///
    /// If this process has no descriptor left.
    pub fn recalls(&self) -> io::Result<Vec<Recall>> {
        let recalls = self.functions.iter().map(|function| lock(function).recall());
        recalls.filter_map(Result::transpose).collect()
    }

    /// Where its BARs can be.
    pub fn windows(&self) -> &Windows {
        &self.windows
    }

    /// A vCPU reads an address; false if that is none of the bus.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        if let Some((device, offset)) = configuration(address) {
            data.fill(0xff);
            match device.and_then(|device| self.functions.get(device.checked_sub(1)?)) {
                Some(function) => lock(function).read_config(offset, data),
                None if device == Some(0) => read_bridge(offset, data),
                None => {}
            }
            return true;
        }
        self.read_bar(Space::Memory, address, data)
    }

    /// A vCPU reads ports; false if they are none of the bus.
    pub fn read_port(&self, port: u16, data: &mut [u8]) -> bool {
        self.read_bar(Space::Ports, port.into(), data)
    }

    /// What no BAR is at is ones.
    fn read_bar(&self, space: Space, address: u64, data: &mut [u8]) -> bool {
        if !self.windows.contain(space, address) {
            return false;
        }
        if !self.functions.iter().any(|function| lock(function).read(space, address, data)) {
            data.fill(0xff);
        }
        true
    }

    /// A vCPU writes; false if that is none of the bus.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        if let Some((device, offset)) = configuration(address) {
            let function = device.and_then(|device| self.functions.get(device.checked_sub(1)?));
            if let Some(function) = function {
                lock(function).write_config(offset, data);
            }
            return true;
        }
        self.write_bar(Space::Memory, address, data)
    }

    /// A vCPU writes ports; false if they are none of the bus.
    pub fn write_port(&self, port: u16, data: &[u8]) -> bool {
        self.write_bar(Space::Ports, port.into(), data)
    }

    /// What no BAR is at is dropped.
    fn write_bar(&self, space: Space, address: u64, data: &[u8]) -> bool {
        self.windows.contain(space, address) && {
            let mut functions = self.functions.iter();
            let _ = functions.any(|function| lock(function).write(space, address, data));
            true
        }
    }
}

/// The device that an address of configuration space is about, if there can be one, and the offset
/// in its own.
fn configuration(address: u64) -> Option<(Option<usize>, usize)> {
    let offset = address.checked_sub(ECAM_START).filter(|offset| *offset < ECAM_BYTES)?;
    let function = offset / FUNCTION_BYTES;
    let device = function.is_multiple_of(FUNCTIONS).then_some(function / FUNCTIONS);
    let device = device.and_then(|device| usize::try_from(device).ok());
    Some((device, usize::try_from(offset % FUNCTION_BYTES).unwrap_or(0)))
}

fn read_bridge(offset: usize, data: &mut [u8]) {
    for (index, byte) in data.iter_mut().enumerate() {
        let at = offset.saturating_add(index);
        *byte =
            if at < config::CONFIG_BYTES_MIN { BRIDGE.get(at).copied().unwrap_or(0) } else { 0xff };
    }
}

/// A vCPU that panicked while it held a lock took the machine with it.
fn lock(function: &Mutex<Passthrough>) -> MutexGuard<'_, Passthrough> {
    function.lock().unwrap_or_else(PoisonError::into_inner)
}
