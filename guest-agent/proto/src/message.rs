//! What the two sides say: a message is what a frame means.

use crate::exec::{ExecSpec, WindowSize};
use crate::files::{Entry, GetSpec, PathInfo, PutSpec, StatSpec};
use crate::frame::{FRAME_COST_BYTES, Frame, FrameError, fits};
use crate::report::Exit;
use crate::volumes::{AttachSpec, DetachSpec};

const SHUTDOWN: u8 = 0x01;
const STAT: u8 = 0x02;
const ATTACH: u8 = 0x03;
const DETACH: u8 = 0x04;
const EXEC: u8 = 0x10;
const PUT: u8 = 0x11;
const GET: u8 = 0x12;
const INPUT: u8 = 0x20;
const INPUT_END: u8 = 0x21;
const INPUT_CREDIT: u8 = 0x22;
const RESIZE: u8 = 0x23;
const CANCEL: u8 = 0x24;
const HELLO: u8 = 0x80;
const ACK: u8 = 0x81;
const ERROR: u8 = 0x82;
const EXITED: u8 = 0x83;
const PATH_INFO: u8 = 0x84;
const OUTPUT: u8 = 0xa0;
const ERROR_OUTPUT: u8 = 0xa1;
const OUTPUT_CREDIT: u8 = 0xa2;
const ENTRY: u8 = 0xa3;
const OUTPUT_END: u8 = 0xa4;
const STORED: u8 = 0xa5;
const ENDED: u8 = 0xa6;

/// What the server says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToAgent {
    /// End the workload, then the guest. Acknowledged when the signal was sent; how it ended comes
    /// as a report and as [`ToServer::Exited`].
    Shutdown {
        /// Signal for the workload, 1 to 64; 0 leaves the choice to the agent.
        signal: u8,
        /// Milliseconds after which whatever still runs is killed.
        grace_ms: u32,
    },
    /// Say what lies at a path. Answered with [`ToServer::PathInfo`].
    Stat(StatSpec),
    /// Mount a volume. Acknowledged when it is mounted; an error leaves nothing mounted.
    Attach(AttachSpec),
    /// Unmount a volume and let go of its disk, if it is there. Acknowledged when its disk can go;
    /// an error leaves it mounted.
    Detach(DetachSpec),
    /// Run a command. Opens a stream: input to the command, its output back.
    Exec(ExecSpec),
    /// Make a file. Opens a stream: its bytes.
    Put(PutSpec),
    /// Read a tree. Opens a stream: its entries and their bytes, back.
    Get(GetSpec),
    /// Bytes.
    Data(Vec<u8>),
    /// There are no more bytes.
    End,
    /// So many bytes were taken.
    Credit(u32),
    /// The terminal of a command has another size.
    Resize(WindowSize),
    /// Nobody waits for the rest: a command's process group is killed.
    Cancel,
}

/// What the agent says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToServer {
    /// The first frame of a connection.
    Hello {
        /// The agent's [`crate::VERSION`].
        version: u32,
        /// Which build of the agent, for people.
        build: String,
    },
    /// The request was understood and done, or begun.
    Ack,
    /// The request was not done, or not to its end.
    Error {
        /// What kind of no.
        code: ErrorCode,
        /// Why, for people.
        message: String,
    },
    /// The workload ended; the guest powers off next. The report says the same and cannot be lost.
    Exited(Exit),
    /// What lies at the path that was asked for.
    PathInfo(PathInfo),
    /// Bytes: of a file, or of a command's output.
    Data(Vec<u8>),
    /// Bytes of a command's standard error, if it is kept apart.
    ErrorData(Vec<u8>),
    /// So many bytes were taken.
    Credit(u32),
    /// The next entry of a tree.
    Entry(Entry),
    /// The tree is complete.
    End,
    /// The file is there.
    Stored {
        /// How many bytes it has.
        bytes: u64,
    },
    /// The command ended, and this is all of its output.
    Ended {
        /// As a shell would tell it: 128 + N for signal N, 124 if its time was over.
        code: u8,
    },
}

/// Why a request was not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorCode {
    /// This agent has no such request.
    Unsupported = 1,
    /// The request makes no sense.
    Malformed = 2,
    /// The guest kernel refused.
    System = 3,
    /// There is no such program, or no such path.
    NotFound = 4,
    /// The program is there and cannot be executed, or not where it was asked for.
    NotExecutable = 5,
    /// As much as this agent does at once is being done.
    Busy = 6,
    /// What was to go is being used, and stays.
    InUse = 7,
    /// What was to go is not seen any more, and yet being used: ask again.
    Held = 8,
}

impl ToAgent {
    /// Bytes of credit that this message takes.
    pub fn cost(&self) -> u32 {
        match self {
            Self::Data(bytes) => cost(bytes.len()),
            _ => 0,
        }
    }

    /// Appends this message to `out`, as a frame of `stream`.
    ///
    /// # Errors
    ///
    /// [`TooLong`] if it does not fit a frame; nothing is appended then.
    pub fn encode(&self, stream: u32, out: &mut Vec<u8>) -> Result<(), TooLong> {
        let (kind, body) = match self {
            Self::Shutdown { signal, grace_ms } => {
                let [g0, g1, g2, g3] = grace_ms.to_le_bytes();
                (SHUTDOWN, vec![*signal, g0, g1, g2, g3])
            }
            Self::Stat(spec) => (STAT, spec.write()),
            Self::Attach(spec) => (ATTACH, spec.write()),
            Self::Detach(spec) => (DETACH, spec.write()),
            Self::Exec(spec) => (EXEC, spec.write()),
            Self::Put(spec) => (PUT, spec.write()),
            Self::Get(spec) => (GET, spec.write()),
            Self::Data(bytes) => return encode(INPUT, stream, bytes, out),
            Self::End => (INPUT_END, Vec::new()),
            Self::Credit(bytes) => (INPUT_CREDIT, bytes.to_le_bytes().to_vec()),
            Self::Resize(WindowSize { rows, cols }) => {
                (RESIZE, [rows.to_le_bytes(), cols.to_le_bytes()].concat())
            }
            Self::Cancel => (CANCEL, Vec::new()),
        };
        encode(kind, stream, &body, out)
    }

    /// Reads a frame that came from the server.
    ///
    /// # Errors
    ///
    /// [`FrameError::Kind`] or [`FrameError::Body`]; the frames after it are unharmed.
    pub fn decode(frame: Frame<'_>) -> Result<Self, FrameError> {
        let message = match (frame.kind, frame.body) {
            (SHUTDOWN, &[signal @ 0..=64, g0, g1, g2, g3]) => {
                Some(Self::Shutdown { signal, grace_ms: u32::from_le_bytes([g0, g1, g2, g3]) })
            }
            (STAT, body) => StatSpec::read(body).map(Self::Stat),
            (ATTACH, body) => AttachSpec::read(body).map(Self::Attach),
            (DETACH, body) => DetachSpec::read(body).map(Self::Detach),
            (EXEC, body) => ExecSpec::read(body).map(Self::Exec),
            (PUT, body) => PutSpec::read(body).map(Self::Put),
            (GET, body) => GetSpec::read(body).map(Self::Get),
            (INPUT, body) => Some(Self::Data(body.to_owned())),
            (INPUT_END, []) => Some(Self::End),
            (INPUT_CREDIT, &[b0, b1, b2, b3]) => {
                Some(Self::Credit(u32::from_le_bytes([b0, b1, b2, b3])))
            }
            (RESIZE, &[r0, r1, c0, c1]) => {
                let (rows, cols) = (u16::from_le_bytes([r0, r1]), u16::from_le_bytes([c0, c1]));
                Some(Self::Resize(WindowSize { rows, cols }))
            }
            (CANCEL, []) => Some(Self::Cancel),
            (SHUTDOWN | INPUT_END | INPUT_CREDIT | RESIZE | CANCEL, _) => None,
            (kind, _) => return Err(FrameError::Kind { kind }),
        };
        message.ok_or_else(|| frame.malformed())
    }
}

impl ToServer {
    /// Bytes of credit that this message takes.
    pub fn cost(&self) -> u32 {
        match self {
            Self::Data(bytes) | Self::ErrorData(bytes) => frame_cost(bytes.len()),
            Self::Entry(entry) => frame_cost(entry.write().len()),
            _ => 0,
        }
    }

    /// Appends this message to `out`, as a frame of `stream`. Text for people that does not fit is
    /// cut.
    ///
    /// # Errors
    ///
    /// [`TooLong`] if it does not fit a frame; nothing is appended then.
    pub fn encode(&self, stream: u32, out: &mut Vec<u8>) -> Result<(), TooLong> {
        let (kind, body) = match self {
            Self::Hello { version, build } => {
                (HELLO, [&version.to_le_bytes(), build.as_bytes()].concat())
            }
            Self::Ack => (ACK, Vec::new()),
            Self::Error { code, message } => {
                let body = [&[*code as u8], message.as_bytes()].concat();
                Frame { kind: ERROR, stream, body: &body }.encode(out);
                return Ok(());
            }
            Self::Exited(Exit { code, oom }) => (EXITED, vec![*code, u8::from(*oom)]),
            Self::PathInfo(info) => (PATH_INFO, info.write()),
            Self::Data(bytes) => return encode(OUTPUT, stream, bytes, out),
            Self::ErrorData(bytes) => return encode(ERROR_OUTPUT, stream, bytes, out),
            Self::Credit(bytes) => (OUTPUT_CREDIT, bytes.to_le_bytes().to_vec()),
            Self::Entry(entry) => (ENTRY, entry.write()),
            Self::End => (OUTPUT_END, Vec::new()),
            Self::Stored { bytes } => (STORED, bytes.to_le_bytes().to_vec()),
            Self::Ended { code } => (ENDED, vec![*code]),
        };
        encode(kind, stream, &body, out)
    }

    /// Reads a frame that came from the agent. Text that is not UTF-8 is repaired.
    ///
    /// # Errors
    ///
    /// [`FrameError::Kind`] or [`FrameError::Body`]; the frames after it are unharmed.
    pub fn decode(frame: Frame<'_>) -> Result<Self, FrameError> {
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        let message = match (frame.kind, frame.body) {
            (HELLO, &[v0, v1, v2, v3, ref build @ ..]) => Some(Self::Hello {
                version: u32::from_le_bytes([v0, v1, v2, v3]),
                build: text(build),
            }),
            (ACK, []) => Some(Self::Ack),
            (ERROR, &[code, ref message @ ..]) => {
                let code = ErrorCode::ALL.into_iter().find(|&known| known as u8 == code);
                code.map(|code| Self::Error { code, message: text(message) })
            }
            (EXITED, &[code, oom @ 0..=1]) => Some(Self::Exited(Exit { code, oom: oom == 1 })),
            (PATH_INFO, body) => PathInfo::read(body).map(Self::PathInfo),
            (OUTPUT, body) => Some(Self::Data(body.to_owned())),
            (ERROR_OUTPUT, body) => Some(Self::ErrorData(body.to_owned())),
            (OUTPUT_CREDIT, &[b0, b1, b2, b3]) => {
                Some(Self::Credit(u32::from_le_bytes([b0, b1, b2, b3])))
            }
            (ENTRY, body) => Entry::read(body).map(Self::Entry),
            (OUTPUT_END, []) => Some(Self::End),
            (STORED, body) => {
                body.try_into().ok().map(|bytes| Self::Stored { bytes: u64::from_le_bytes(bytes) })
            }
            (ENDED, &[code]) => Some(Self::Ended { code }),
            (HELLO | ACK | ERROR | EXITED | OUTPUT_CREDIT | OUTPUT_END | ENDED, _) => None,
            (kind, _) => return Err(FrameError::Kind { kind }),
        };
        message.ok_or_else(|| frame.malformed())
    }
}

impl ErrorCode {
    /// All codes.
    pub const ALL: [Self; 8] = [
        Self::Unsupported,
        Self::Malformed,
        Self::System,
        Self::NotFound,
        Self::NotExecutable,
        Self::Busy,
        Self::InUse,
        Self::Held,
    ];
}

/// A message does not fit a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("A message of {bytes} bytes does not fit a frame")]
pub struct TooLong {
    /// How many bytes its body has.
    pub bytes: usize,
}

fn encode(kind: u8, stream: u32, body: &[u8], out: &mut Vec<u8>) -> Result<(), TooLong> {
    if !fits(body.len()) {
        return Err(TooLong { bytes: body.len() });
    }
    Frame { kind, stream, body }.encode(out);
    Ok(())
}

fn frame_cost(bytes: usize) -> u32 {
    cost(bytes).saturating_add(FRAME_COST_BYTES)
}

fn cost(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
