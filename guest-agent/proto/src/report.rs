//! Reports: what the agent tells the machine it runs in, one 32-bit word at a time.
//!
//! A report is a single write to an I/O port. It costs one exit, needs no connection, and cannot
//! be lost: the worker has it, with the time, before the guest executes its next instruction. That
//! is why phases of the boot and the end of the workload travel this way and not over vsock; and a
//! shortage of memory, which the machine has to mend at once, whether or not there is a server.
//!
//! The word is `kind << 24 | value`. A guest can write anything here; all it can spoil is what is
//! said about itself.

/// The I/O port, written 32 bits wide. Nothing on a PC answers in this range; 0x510, the customary
/// choice, is where other machine monitors keep their firmware configuration.
pub const REPORT_PORT: u16 = 0x0b00;

const KIND_PHASE: u32 = 1;
const KIND_EXIT: u32 = 2;
const KIND_FAILED: u32 = 3;
const KIND_PRESSED: u32 = 4;
const KIND_QUIET: u32 = 5;
const OOM_BIT: u32 = 1 << 8;

/// Most MiB that a word can tell of: 16 TiB.
const MIB_MAX: u32 = (1 << 24) - 1;

/// One report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Report {
    /// A step of the boot is done.
    Phase(Phase),
    /// The workload ended; the guest powers off next.
    Exit(Exit),
    /// The agent could not start the workload; the console says more. The guest powers off next.
    Failed(Failure),
    /// How the guest is off for memory, if its agent was told to watch that.
    Memory(MemoryReport),
}

/// Steps of a boot, in the order in which they are reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// The agent runs: the guest's first user instruction.
    AgentStarted = 1,
    /// Root, overlay and the kernel's file systems are mounted.
    RootMounted = 2,
    /// The agent listens on vsock.
    AgentReady = 3,
    /// The workload's process exists.
    WorkloadStarted = 4,
    /// The workload wrote its first output.
    FirstOutput = 5,
}

/// How the workload ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Its exit status; 126 not executable, 127 not found, 128 + N killed by signal N.
    pub code: u8,
    /// The guest kernel killed something for lack of memory.
    pub oom: bool,
}

/// Why there was no workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// The configuration was missing or malformed.
    Config = 1,
    /// The image or the overlay could not be mounted.
    Mount = 2,
    /// Something else that the kernel should never refuse.
    System = 3,
}

/// How a guest is off for memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryReport {
    /// Somebody had to wait for memory just now; else, nobody had to for some time.
    pub pressed: bool,
    /// What programs could still get, in MiB; more than a word can tell is told as the most.
    pub available_mib: u32,
}

impl Report {
    /// The word that says this.
    pub fn encode(self) -> u32 {
        match self {
            Self::Phase(phase) => KIND_PHASE << 24 | phase as u32,
            Self::Exit(Exit { code, oom }) => {
                KIND_EXIT << 24 | if oom { OOM_BIT } else { 0 } | u32::from(code)
            }
            Self::Failed(failure) => KIND_FAILED << 24 | failure as u32,
            Self::Memory(MemoryReport { pressed, available_mib }) => {
                let kind = if pressed { KIND_PRESSED } else { KIND_QUIET };
                kind << 24 | available_mib.min(MIB_MAX)
            }
        }
    }

    /// What a word says, or nothing if no agent of this version writes it.
    pub fn decode(word: u32) -> Option<Self> {
        let [kind, high, middle, low] = word.to_be_bytes();
        match (u32::from(kind), high, middle, low) {
            (KIND_PHASE, 0, 0, low) => Phase::ALL
                .into_iter()
                .find(|&phase| phase as u32 == u32::from(low))
                .map(Self::Phase),
            (KIND_EXIT, 0, 0 | 1, code) => Some(Self::Exit(Exit { code, oom: middle == 1 })),
            (KIND_FAILED, 0, 0, low) => Failure::ALL
                .into_iter()
                .find(|&failure| failure as u32 == u32::from(low))
                .map(Self::Failed),
            (kind @ (KIND_PRESSED | KIND_QUIET), ..) => Some(Self::Memory(MemoryReport {
                pressed: kind == KIND_PRESSED,
                available_mib: word & MIB_MAX,
            })),
            _ => None,
        }
    }
}

impl Phase {
    /// All phases, in order.
    pub const ALL: [Self; 5] = [
        Self::AgentStarted,
        Self::RootMounted,
        Self::AgentReady,
        Self::WorkloadStarted,
        Self::FirstOutput,
    ];
}

impl Failure {
    /// All failures.
    pub const ALL: [Self; 3] = [Self::Config, Self::Mount, Self::System];
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_report_survives_its_word_and_no_other_word_is_one() {
        let phases = Phase::ALL.map(Report::Phase);
        let failures = Failure::ALL.map(Report::Failed);
        let exits =
            (0..=255).flat_map(|code| [false, true].map(|oom| Report::Exit(Exit { code, oom })));
        let memory = (0..1 << 10).flat_map(|available_mib| {
            [false, true].map(|pressed| Report::Memory(MemoryReport { pressed, available_mib }))
        });
        let all: Vec<_> = phases.into_iter().chain(failures).chain(exits).chain(memory).collect();

        for &report in &all {
            assert_eq!(Report::decode(report.encode()), Some(report));
        }
        let decodable = (0..1_u32 << 18)
            .map(|bits| (bits & 0x3ff) | (bits >> 10) << 24)
            .filter_map(Report::decode);
        assert_eq!(decodable.count(), all.len());
    }

    #[test]
    fn more_memory_than_a_word_can_tell_is_told_as_the_most() {
        let told = |available_mib| {
            Report::decode(Report::Memory(MemoryReport { pressed: true, available_mib }).encode())
        };

        assert_eq!(told(u32::MAX), told(MIB_MAX));
        let most = MemoryReport { pressed: true, available_mib: MIB_MAX };
        assert_eq!(told(u32::MAX), Some(Report::Memory(most)));
    }
}
