//! The I/O ports of a machine: report, sleep, reset, panic, and a 16550 for kernel developers.
//!
//! Few and fixed, so they are one `match` and no bus. All vCPUs share them.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::events::{Events, MachineEventKind, StopReason};
use crate::kernel_text::Keeper;
use crate::layout::{
    PANIC_EVENT, PANIC_PORT, REPORT_PORT, RESET_PORT, RESET_VALUE, SERIAL_PORT, SERIAL_PORTS,
    SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT, TEXT_PORT,
};

/// SLP_EN of the sleep control register (ACPI 6.5, 4.8.3.7). Only S5 is announced.
const SLEEP_ENABLE: u8 = 1 << 5;

/// The ports of one machine.
#[derive(Debug)]
pub struct Ports {
    events: Arc<Events>,
    panicked: AtomicBool,
    serial: Option<Mutex<SerialPort>>,
    /// Who keeps the kernel's text, until it is kept or the guest is past the kernel's start.
    keeper: Mutex<Option<Keeper>>,
}

type SerialPort = Serial<SerialInterrupt, NoEvents, File>;

/// Raises the 16550's line.
#[derive(Debug)]
pub struct SerialInterrupt(pub EventFd);

impl Trigger for SerialInterrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

impl Ports {
    /// Ports that report to `events`; with `serial` there is a 16550 that writes to that file.
    /// With a keeper the first guest of this kernel has its text kept.
    pub fn new(
        events: Arc<Events>,
        serial: Option<(SerialInterrupt, File)>,
        keeper: Option<Keeper>,
    ) -> Self {
        let serial = serial.map(|(interrupt, out)| Mutex::new(Serial::new(interrupt, out)));
        Self { events, panicked: AtomicBool::new(false), serial, keeper: Mutex::new(keeper) }
    }

    /// A vCPU reads. What is not there reads as ones.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        let Some(first) = data.first_mut() else { return };
        match port {
            PANIC_PORT => *first = PANIC_EVENT,
            SLEEP_STATUS_PORT => *first = 0,
            _ => {
                if let Some((serial, offset)) = self.serial(port) {
                    let mut serial = serial.lock().unwrap_or_else(PoisonError::into_inner);
                    *first = serial.read(offset);
                }
            }
        }
    }

    /// A vCPU writes; an answer is the end of the machine.
    pub fn write(&self, port: u16, data: &[u8]) -> Option<StopReason> {
        let first = *data.first()?;
        match port {
            REPORT_PORT => {
                let word = u32::from_le_bytes(data.try_into().ok()?);
                // The agent has started: from here on a guest could want something kept.
                *self.keeper() = None;
                self.events.push(MachineEventKind::Reported { word });
            }
            SLEEP_CONTROL_PORT if first & SLEEP_ENABLE != 0 => return Some(StopReason::PowerOff),
            RESET_PORT if first == RESET_VALUE => {
                let panicked = self.panicked.load(Ordering::SeqCst);
                return Some(if panicked { StopReason::Panic } else { StopReason::Reboot });
            }
            TEXT_PORT => {
                let mut keeper = self.keeper();
                // A text that cannot be kept costs later guests time, and this one nothing.
                if !keeper.as_mut().is_some_and(|keeper| keeper.hear(first).unwrap_or(false)) {
                    *keeper = None;
                }
            }
            PANIC_PORT => self.panicked.store(true, Ordering::SeqCst),
            _ => {
                if let Some((serial, offset)) = self.serial(port) {
                    // A log that takes no more loses bytes, as a real serial line would.
                    let mut serial = serial.lock().unwrap_or_else(PoisonError::into_inner);
                    let _ = serial.write(offset, first);
                }
            }
        }
        None
    }

    fn keeper(&self) -> MutexGuard<'_, Option<Keeper>> {
        self.keeper.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serial(&self, port: u16) -> Option<(&Mutex<SerialPort>, u8)> {
        let offset = port.checked_sub(SERIAL_PORT).filter(|&offset| offset < SERIAL_PORTS)?;
        Some((self.serial.as_ref()?, u8::try_from(offset).ok()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports() -> (Ports, Arc<Events>) {
        let events = Arc::new(Events::new().unwrap());
        (Ports::new(Arc::clone(&events), None, None), events)
    }

    #[test]
    fn power_off_reset_and_panic_are_told_apart() {
        let (ports, _) = ports();

        assert_eq!(ports.write(SLEEP_CONTROL_PORT, &[0]), None);
        assert_eq!(ports.write(SLEEP_CONTROL_PORT, &[0x34]), Some(StopReason::PowerOff));
        assert_eq!(ports.write(RESET_PORT, &[0]), None);
        assert_eq!(ports.write(RESET_PORT, &[RESET_VALUE]), Some(StopReason::Reboot));
        assert_eq!(ports.write(PANIC_PORT, &[PANIC_EVENT]), None);
        assert_eq!(ports.write(RESET_PORT, &[RESET_VALUE]), Some(StopReason::Panic));
    }

    #[test]
    fn only_whole_words_are_reports() {
        let (ports, events) = ports();

        ports.write(REPORT_PORT, &[1]);
        ports.write(REPORT_PORT, &[1, 2]);
        ports.write(REPORT_PORT, &[1, 0, 0, 2]);

        assert_eq!(events.next().unwrap().kind, MachineEventKind::Reported { word: 0x0200_0001 });
        assert_eq!(events.next(), None);
    }

    #[test]
    fn what_is_not_there_reads_as_ones() {
        let (ports, _) = ports();
        let mut data = [0; 4];

        ports.read(0x60, &mut data);

        assert_eq!(data, [0xff; 4]);
    }
}
