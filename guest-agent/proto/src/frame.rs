//! Frames on the vsock stream between the server and the agent.
//!
//! The agent listens on [`crate::AGENT_PORT`]; the server connects, and may do so more than once.
//! Each connection is a sequence of frames in both directions:
//!
//! ```text
//! u32 LE  bytes that follow this word: 5 + length of the body, at most FRAME_BYTES_MAX
//! u8      kind
//! u32 LE  stream
//! ...     body, laid out by the kind; a string is the rest of its body, in UTF-8
//! ```
//!
//! **Streams.** Stream 0 is the connection itself. Whatever the server asks for, it asks under a
//! stream number of its choice, not 0 and not in use; everything that belongs to that request, in
//! both directions, carries the number. [`ToServer::Ack`] or [`ToServer::Error`] answers it. The
//! number is free again after an error, and after the ack of a request that has no more to say.
//!
//! **Kinds.** The high bit tells who sends: clear from the server, set from the agent.
//!
//! | kind | message | stream | body |
//! |---|---|---|---|
//! | 0x01 | [`ToAgent::Shutdown`] | request | u8 signal, u32 LE grace in ms |
//! | 0x80 | [`ToServer::Hello`] | 0 | u32 LE version, string build |
//! | 0x81 | [`ToServer::Ack`] | request | empty |
//! | 0x82 | [`ToServer::Error`] | request | u8 code, string message |
//! | 0x83 | [`ToServer::Exited`] | 0 | u8 exit status, u8 OOM (0 or 1) |
//!
//! The first frame of the agent is its hello. A receiver skips the frame of a kind it does not
//! know, and the agent answers it with [`ErrorCode::Unsupported`]; so new kinds need no new
//! version. Kinds 0x10-0x1f are kept for requests that open a stream of bytes (exec, copy),
//! 0x20-0x2f and 0xa0-0xaf for what flows on it: data, window credit, end. Such frames stay below
//! the same bound, so one stream cannot hold up another for longer than one frame.
//!
//! Nothing here does I/O: both ends keep the bytes they received and call [`Frame::decode`] until
//! it asks for more.

use crate::report::Exit;

/// Most bytes after the length word of a frame.
///
/// Room for 32 KiB of data, the most that one message of an exec or copy carries, and then some:
/// it bounds what a peer can make us hold.
pub const FRAME_BYTES_MAX: usize = 64 << 10;

/// Stream of what belongs to the connection and to no request.
pub const CONNECTION: u32 = 0;

/// Bytes of the length word.
const LENGTH_BYTES: usize = 4;

/// Bytes of kind and stream, the least a frame has after its length word.
const HEAD_BYTES: usize = 5;

const SHUTDOWN: u8 = 0x01;
const HELLO: u8 = 0x80;
const ACK: u8 = 0x81;
const ERROR: u8 = 0x82;
const EXITED: u8 = 0x83;

/// One frame as it lies in the bytes received; what its body means is up to its kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Which message this is.
    pub kind: u8,
    /// Which request it belongs to; [`CONNECTION`] for none.
    pub stream: u32,
    /// The rest.
    pub body: &'a [u8],
}

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
    /// The request was not done.
    Error {
        /// What kind of no.
        code: ErrorCode,
        /// Why, for people.
        message: String,
    },
    /// The workload ended; the guest powers off next. The report says the same and cannot be lost.
    Exited(Exit),
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
}

/// Why bytes are not what this version speaks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Nothing after this can be trusted: the connection is to be closed.
    #[error("Frame of {bytes} bytes, where {HEAD_BYTES} to {FRAME_BYTES_MAX} are allowed")]
    Length {
        /// The length word.
        bytes: u32,
    },
    /// The frame is whole but of a kind that this end does not receive; it can be skipped.
    #[error("Frame of unknown kind {kind:#04x}")]
    Kind {
        /// The kind.
        kind: u8,
    },
    /// The body is not laid out as its kind demands.
    #[error("Frame of kind {kind:#04x} with a malformed body of {bytes} bytes")]
    Body {
        /// The kind.
        kind: u8,
        /// Length of the body.
        bytes: usize,
    },
}

impl<'a> Frame<'a> {
    /// Finds the first frame in `bytes`; returns it with the number of bytes it takes, or nothing
    /// if more are needed.
    ///
    /// # Errors
    ///
    /// [`FrameError::Length`] as soon as the length word is there and wrong.
    pub fn decode(bytes: &'a [u8]) -> Result<Option<(Self, usize)>, FrameError> {
        let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_BYTES>() else {
            return Ok(None);
        };
        let length_word = u32::from_le_bytes(*length);
        let length = usize::try_from(length_word)
            .ok()
            .filter(|length| (HEAD_BYTES..=FRAME_BYTES_MAX).contains(length))
            .ok_or(FrameError::Length { bytes: length_word })?;
        let Some(&[kind, s0, s1, s2, s3, ref body @ ..]) = rest.get(..length) else {
            return Ok(None);
        };
        let stream = u32::from_le_bytes([s0, s1, s2, s3]);
        Ok(Some((Self { kind, stream, body }, LENGTH_BYTES + length)))
    }

    /// Appends this frame to `out`. A body that is too long for a frame is cut; the messages of
    /// this module only ever cut text for people.
    fn encode(self, out: &mut Vec<u8>) {
        let body = &self.body[..self.body.len().min(FRAME_BYTES_MAX - HEAD_BYTES)];
        let length = u32::try_from(HEAD_BYTES + body.len()).expect("bounded by FRAME_BYTES_MAX");
        out.extend_from_slice(&length.to_le_bytes());
        out.push(self.kind);
        out.extend_from_slice(&self.stream.to_le_bytes());
        out.extend_from_slice(body);
    }

    fn malformed(self) -> FrameError {
        FrameError::Body { kind: self.kind, bytes: self.body.len() }
    }
}

impl ToAgent {
    /// Appends this message to `out`, as a frame of `stream`.
    pub fn encode(&self, stream: u32, out: &mut Vec<u8>) {
        match self {
            Self::Shutdown { signal, grace_ms } => {
                let [g0, g1, g2, g3] = grace_ms.to_le_bytes();
                Frame { kind: SHUTDOWN, stream, body: &[*signal, g0, g1, g2, g3] }.encode(out);
            }
        }
    }

    /// Reads a frame that came from the server.
    ///
    /// # Errors
    ///
    /// [`FrameError::Kind`] or [`FrameError::Body`]; the frames after it are unharmed.
    pub fn decode(frame: Frame<'_>) -> Result<Self, FrameError> {
        match (frame.kind, frame.body) {
            (SHUTDOWN, &[signal @ 0..=64, g0, g1, g2, g3]) => {
                Ok(Self::Shutdown { signal, grace_ms: u32::from_le_bytes([g0, g1, g2, g3]) })
            }
            (SHUTDOWN, _) => Err(frame.malformed()),
            (kind, _) => Err(FrameError::Kind { kind }),
        }
    }
}

impl ToServer {
    /// Appends this message to `out`, as a frame of `stream`.
    pub fn encode(&self, stream: u32, out: &mut Vec<u8>) {
        let mut body = Vec::new();
        let kind = match self {
            Self::Hello { version, build } => {
                body.extend_from_slice(&version.to_le_bytes());
                body.extend_from_slice(build.as_bytes());
                HELLO
            }
            Self::Ack => ACK,
            Self::Error { code, message } => {
                body.push(*code as u8);
                body.extend_from_slice(message.as_bytes());
                ERROR
            }
            Self::Exited(Exit { code, oom }) => {
                body.extend_from_slice(&[*code, u8::from(*oom)]);
                EXITED
            }
        };
        Frame { kind, stream, body: &body }.encode(out);
    }

    /// Reads a frame that came from the agent. Text that is not UTF-8 is repaired, being for people
    /// only.
    ///
    /// # Errors
    ///
    /// [`FrameError::Kind`] or [`FrameError::Body`]; the frames after it are unharmed.
    pub fn decode(frame: Frame<'_>) -> Result<Self, FrameError> {
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        match (frame.kind, frame.body) {
            (HELLO, &[v0, v1, v2, v3, ref build @ ..]) => Ok(Self::Hello {
                version: u32::from_le_bytes([v0, v1, v2, v3]),
                build: text(build),
            }),
            (ACK, []) => Ok(Self::Ack),
            (ERROR, &[code, ref message @ ..]) => {
                let code = ErrorCode::ALL.into_iter().find(|&known| known as u8 == code);
                let code = code.ok_or_else(|| frame.malformed())?;
                Ok(Self::Error { code, message: text(message) })
            }
            (EXITED, &[code, oom @ 0..=1]) => Ok(Self::Exited(Exit { code, oom: oom == 1 })),
            (HELLO | ACK | ERROR | EXITED, _) => Err(frame.malformed()),
            (kind, _) => Err(FrameError::Kind { kind }),
        }
    }
}

impl ErrorCode {
    /// All codes.
    pub const ALL: [Self; 3] = [Self::Unsupported, Self::Malformed, Self::System];
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample;

    use super::*;

    fn to_agent() -> impl Strategy<Value = ToAgent> {
        (0_u8..=64, any::<u32>())
            .prop_map(|(signal, grace_ms)| ToAgent::Shutdown { signal, grace_ms })
    }

    fn to_server() -> impl Strategy<Value = ToServer> {
        let text = "\\PC{0,60}";
        prop_oneof![
            (any::<u32>(), text).prop_map(|(version, build)| ToServer::Hello { version, build }),
            Just(ToServer::Ack),
            (sample::select(ErrorCode::ALL.to_vec()), text)
                .prop_map(|(code, message)| ToServer::Error { code, message }),
            (any::<u8>(), any::<bool>())
                .prop_map(|(code, oom)| ToServer::Exited(Exit { code, oom })),
        ]
    }

    proptest! {
        #[test]
        fn what_the_server_says_arrives(message in to_agent(), stream: u32) {
            let mut bytes = Vec::new();
            message.encode(stream, &mut bytes);

            let (frame, taken) = Frame::decode(&bytes).unwrap().unwrap();

            prop_assert_eq!((frame.stream, taken), (stream, bytes.len()));
            prop_assert_eq!(ToAgent::decode(frame), Ok(message));
        }

        #[test]
        fn what_the_agent_says_arrives_in_order_however_the_bytes_are_cut(
            messages in prop::collection::vec((to_server(), any::<u32>()), 0..8),
            cuts in prop::collection::vec(1_usize..40, 1..40),
        ) {
            let mut bytes = Vec::new();
            for (message, stream) in &messages {
                message.encode(*stream, &mut bytes);
            }

            let mut received = Vec::new();
            let (mut buffer, mut unsent) = (Vec::new(), &bytes[..]);
            for cut in cuts.iter().cycle() {
                let (now, later) = unsent.split_at((*cut).min(unsent.len()));
                buffer.extend_from_slice(now);
                unsent = later;
                while let Some((frame, taken)) = Frame::decode(&buffer).unwrap() {
                    received.push((ToServer::decode(frame).unwrap(), frame.stream));
                    buffer.drain(..taken);
                }
                if unsent.is_empty() {
                    break;
                }
            }

            prop_assert_eq!(received, messages);
            prop_assert!(buffer.is_empty());
        }

        /// A peer can send anything. What comes of it is frames, a wish for more, or an error.
        #[test]
        fn any_bytes_give_frames_or_a_clean_error(bytes: Vec<u8>, length in 0_u32..80) {
            for prefix in [bytes.clone(), [&length.to_le_bytes()[..], &bytes].concat()] {
                let mut rest = &prefix[..];
                while let Ok(Some((frame, taken))) = Frame::decode(rest) {
                    prop_assert_eq!(taken, LENGTH_BYTES + HEAD_BYTES + frame.body.len());
                    for error in [ToAgent::decode(frame).err(), ToServer::decode(frame).err()] {
                        let lost = matches!(error, Some(FrameError::Length { .. }));
                        prop_assert!(!lost, "a whole frame cost the connection");
                    }
                    rest = &rest[taken..];
                }
            }
        }
    }

    #[test]
    fn a_length_that_no_frame_has_is_refused_before_its_bytes_arrive() {
        let refused = |length: u32| Frame::decode(&length.to_le_bytes()).unwrap_err();

        assert_eq!(refused(4), FrameError::Length { bytes: 4 });
        assert_eq!(refused(65_537), FrameError::Length { bytes: 65_537 });
        assert_eq!(refused(u32::MAX), FrameError::Length { bytes: u32::MAX });
        assert_eq!(Frame::decode(&65_536_u32.to_le_bytes()), Ok(None));
    }

    #[test]
    fn a_text_that_does_not_fit_is_cut() {
        let mut bytes = Vec::new();
        let message = "m".repeat(FRAME_BYTES_MAX);
        ToServer::Error { code: ErrorCode::System, message }.encode(7, &mut bytes);

        let (frame, taken) = Frame::decode(&bytes).unwrap().unwrap();

        assert_eq!((frame.stream, taken), (7, LENGTH_BYTES + FRAME_BYTES_MAX));
    }

    /// The bytes on the wire, so that nobody changes them without noticing.
    #[test]
    fn the_wire_is_this() {
        let mut bytes = Vec::new();
        ToAgent::Shutdown { signal: 15, grace_ms: 5000 }.encode(1, &mut bytes);
        ToServer::Hello { version: 1, build: "0.1".into() }.encode(CONNECTION, &mut bytes);
        ToServer::Ack.encode(1, &mut bytes);
        ToServer::Exited(Exit { code: 137, oom: true }).encode(CONNECTION, &mut bytes);

        assert_eq!(
            bytes,
            [
                &[10, 0, 0, 0, 0x01, 1, 0, 0, 0, 15, 0x88, 0x13, 0, 0][..],
                &[12, 0, 0, 0, 0x80, 0, 0, 0, 0, 1, 0, 0, 0, b'0', b'.', b'1'],
                &[5, 0, 0, 0, 0x81, 1, 0, 0, 0],
                &[7, 0, 0, 0, 0x83, 0, 0, 0, 0, 137, 1],
            ]
            .concat()
        );
    }

    #[test]
    fn a_kind_from_the_future_can_be_told_from_a_broken_body() {
        let frame = |kind, body| Frame { kind, stream: 3, body };

        assert_eq!(ToAgent::decode(frame(0x10, &[])), Err(FrameError::Kind { kind: 0x10 }));
        assert_eq!(
            ToAgent::decode(frame(SHUTDOWN, &[65, 0, 0, 0, 0])),
            Err(FrameError::Body { kind: SHUTDOWN, bytes: 5 })
        );
        assert_eq!(
            ToServer::decode(frame(EXITED, &[0, 2])),
            Err(FrameError::Body { kind: EXITED, bytes: 2 })
        );
    }
}
