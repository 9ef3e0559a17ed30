//! Guest memory.

use vm_memory::GuestMemoryMmap;

/// Guest memory as devices see it.
pub type Mem = GuestMemoryMmap<()>;
