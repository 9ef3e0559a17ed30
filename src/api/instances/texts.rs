//! What was written of instances, to be written again: a list of a thousand is asked for every
//! second by whoever watches, and next to none of them has changed.
//!
//! An instance is published anew with each change and never altered, so that the text of one holds
//! as long as it is the same object. Each instance has one text at most.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use serde_json::Error;

use crate::api::instances::view::InstanceView;
use crate::instances::Instance;

/// Bytes of an instance's text, about: room for a list is made for as many.
const TEXT_BYTES: usize = 2 << 10;

/// Texts of instances. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Texts {
    /// By id.
    known: Arc<Mutex<HashMap<String, Text>>>,
}

#[derive(Debug)]
struct Text {
    of: Weak<Instance>,
    json: Vec<u8>,
}

impl Texts {
    /// The list of `instances`, as JSON of an [`InstanceView`] each.
    ///
    /// # Errors
    ///
    /// [`Error`], which a view does not give cause for.
    pub(super) fn list(&self, instances: &[Arc<Instance>]) -> Result<Vec<u8>, Error> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let mut list = Vec::with_capacity(instances.len().saturating_mul(TEXT_BYTES));
        list.push(b'[');
        for instance in instances {
            if list.len() > 1 {
                list.push(b',');
            }
            let is_same = |text: &&Text| text.of.as_ptr() == Arc::as_ptr(instance);
            if let Some(text) = known.get(&instance.id).filter(is_same) {
                list.extend_from_slice(&text.json);
                continue;
            }
            let json = serde_json::to_vec(&InstanceView::from(&**instance))?;
            list.extend_from_slice(&json);
            known.insert(instance.id.clone(), Text { of: Arc::downgrade(instance), json });
        }
        list.push(b']');
        // Nobody asks for those again.
        known.retain(|_, text| text.of.strong_count() > 0);
        Ok(list)
    }
}
