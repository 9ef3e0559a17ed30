//! A configuration space, as the driver reads it while the device changes it.
//!
//! The device thread writes and vCPUs read; the lock is held for a copy of a few dozen bytes.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::shown::Shown;

/// One for what is shown while it changes, one for after that.
const GENERATION_STEP: u32 = 2;

/// A device's configuration space. Clones are the same one.
#[derive(Debug, Clone)]
pub struct ConfigSpace(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    bytes: Vec<u8>,
    generation: u32,
    shown: Shown,
}

impl ConfigSpace {
    /// With `bytes` in it, which the guest is `shown`.
    pub fn new(bytes: &[u8], shown: Shown) -> Self {
        shown.set_config(bytes, 0);
        Self(Arc::new(Mutex::new(State { bytes: bytes.to_vec(), generation: 0, shown })))
    }

    /// Puts `bytes` in it; true if they were others before. A driver that was in the middle of
    /// reading finds the generation changed (virtio 1.3, 2.5.2).
    pub fn publish(&self, bytes: &[u8]) -> bool {
        let mut state = self.state();
        let changes = state.bytes != bytes;
        if changes {
            state.bytes.clear();
            state.bytes.extend_from_slice(bytes);
            state.generation = state.generation.wrapping_add(GENERATION_STEP);
            state.shown.set_config(bytes, state.generation);
        }
        changes
    }

    /// Fills `data` from `offset` on; what is not all there is left alone.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        if let Some(bytes) = self.state().bytes.get(start..start.saturating_add(data.len())) {
            data.copy_from_slice(bytes);
        }
    }

    /// Another number after each change.
    pub fn generation(&self) -> u32 {
        self.state().generation
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics between two halves of a change.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::shown::ShownSlots;

    fn config_space() -> ConfigSpace {
        ConfigSpace::new(&[1, 2, 3, 4], ShownSlots::new().unwrap().slot(0).unwrap())
    }

    #[test]
    fn a_change_is_seen_and_has_a_generation_of_its_own() {
        let config = config_space();
        let mut data = [0xff; 2];

        assert!(!config.publish(&[1, 2, 3, 4]));
        assert_eq!(config.generation(), 0);
        assert!(config.clone().publish(&[5, 6, 7, 8]));

        assert_eq!(config.generation(), GENERATION_STEP);
        config.read(2, &mut data);
        assert_eq!(data, [7, 8]);
    }

    #[test]
    fn what_reaches_beyond_the_end_is_left_alone() {
        let config = config_space();

        for offset in [3, 4, 0xeff, u64::MAX] {
            let mut data = [0xff; 2];
            config.read(offset, &mut data);
            assert_eq!(data, [0xff; 2], "{offset}");
        }
    }
}
