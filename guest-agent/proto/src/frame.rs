//! Frames on the vsock stream between the server and the agent.
//!
//! The agent listens on [`crate::AGENT_PORT`]; the server connects, and may do so more than once.
//! Each connection is a sequence of frames in both directions:
//!
//! ```text
//! u32 LE  bytes that follow this word: 5 + length of the body, at most FRAME_BYTES_MAX
//! u8      kind
//! u32 LE  stream
//! ...     body, laid out by the kind
//! ```
//!
//! **Streams.** Stream 0 is the connection itself. Whatever the server asks for, it asks under a
//! stream number of its choice, not 0 and not in use; everything that belongs to that request, in
//! both directions, carries the number. The number is free again after an error, after the answer
//! to a request that has no more to say, and after the last message of one that has. What then
//! still comes for it was under way, and is skipped.
//!
//! **Kinds.** The high bit tells who sends: clear from the server, set from the agent.
//!
//! | kind | message | stream | body |
//! |---|---|---|---|
//! | 0x01 | [`ToAgent::Shutdown`] | request | u8 signal, u32 grace in ms |
//! | 0x02 | [`ToAgent::Stat`] | request | [`StatSpec`] |
//! | 0x10 | [`ToAgent::Exec`] | request | [`ExecSpec`] |
//! | 0x11 | [`ToAgent::Put`] | request | [`PutSpec`] |
//! | 0x12 | [`ToAgent::Get`] | request | [`GetSpec`] |
//! | 0x20 | [`ToAgent::Data`] | open | bytes |
//! | 0x21 | [`ToAgent::End`] | open | empty |
//! | 0x22 | [`ToAgent::Credit`] | open | u32 bytes |
//! | 0x23 | [`ToAgent::Resize`] | open | u16 rows, u16 columns |
//! | 0x24 | [`ToAgent::Cancel`] | open | empty |
//! | 0x80 | [`ToServer::Hello`] | 0 | u32 version, build to the end |
//! | 0x81 | [`ToServer::Ack`] | request | empty |
//! | 0x82 | [`ToServer::Error`] | request, open | u8 code, message to the end |
//! | 0x83 | [`ToServer::Exited`] | 0 | u8 exit status, u8 OOM (0 or 1) |
//! | 0x84 | [`ToServer::PathInfo`] | request | [`PathInfo`] |
//! | 0xa0 | [`ToServer::Data`] | open | bytes |
//! | 0xa1 | [`ToServer::ErrorData`] | open | bytes |
//! | 0xa2 | [`ToServer::Credit`] | open | u32 bytes |
//! | 0xa3 | [`ToServer::Entry`] | open | [`Entry`] |
//! | 0xa4 | [`ToServer::End`] | open | empty |
//! | 0xa5 | [`ToServer::Stored`] | open | u64 bytes |
//! | 0xa6 | [`ToServer::Ended`] | open | u8 exit status |
//!
//! Bodies of specifications are their fields in order, as `body.rs` writes them. The first frame of
//! the agent is its hello. A receiver skips the frame of a kind it does not know, and the agent
//! answers it with [`ErrorCode::Unsupported`]; so new kinds need no new version.
//!
//! **Streams of bytes.** Three requests open one; each ends with a message of the agent, or an
//! error, or a [`ToAgent::Cancel`], to which there is no answer.
//!
//! ```text
//! Exec   Ack   Data, End, Resize ->   <- Data, ErrorData   Ended
//! Put    Ack   Data, End         ->                        Stored
//! Get    Ack                          <- Entry, Data       End
//! ```
//!
//! **Credit.** On a stream either side may send [`WINDOW_BYTES`], and then as many more as the
//! other side has said it took. What counts is bodies of data and entries, and for what the agent
//! sends, which the server keeps frame by frame, [`FRAME_COST_BYTES`] for each of them. One frame
//! of data carries at most [`DATA_BYTES_MAX`], so no stream holds up another for long. A side that
//! is sent more than it allowed closes the connection.
//!
//! Nothing here does I/O: both ends keep the bytes they received and call [`Frame::decode`] until
//! it asks for more.

#[cfg(doc)]
use crate::exec::ExecSpec;
#[cfg(doc)]
use crate::files::{Entry, GetSpec, PathInfo, PutSpec, StatSpec};
#[cfg(doc)]
use crate::message::{ErrorCode, ToAgent, ToServer};

/// Most bytes after the length word of a frame.
///
/// Room for a command with all of its arguments, of which the kernel takes 128 KiB at a time: it
/// bounds what a peer can make us hold.
pub const FRAME_BYTES_MAX: usize = 256 << 10;

/// Most bytes in one frame of data.
pub const DATA_BYTES_MAX: usize = 32 << 10;

/// Bytes of data and entries that may be under way on a stream, in each direction, before the
/// other side says that it took some.
pub const WINDOW_BYTES: u32 = 256 << 10;

/// What a frame of data or an entry takes of the window beside its body, if the agent sends it: so
/// many small ones do not cost the server more than a few large ones.
pub const FRAME_COST_BYTES: u32 = 64;

/// Stream of what belongs to the connection and to no request.
pub const CONNECTION: u32 = 0;

/// Bytes of the length word.
const LENGTH_BYTES: usize = 4;

/// Bytes of kind and stream, the least a frame has after its length word.
const HEAD_BYTES: usize = 5;

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

    /// Appends this frame to `out`. A body that is too long for a frame is cut; whoever has one
    /// that must not be cut asks [`fits`] first.
    pub(crate) fn encode(self, out: &mut Vec<u8>) {
        let body = &self.body[..self.body.len().min(FRAME_BYTES_MAX - HEAD_BYTES)];
        let length = u32::try_from(HEAD_BYTES + body.len()).expect("bounded by FRAME_BYTES_MAX");
        out.extend_from_slice(&length.to_le_bytes());
        out.push(self.kind);
        out.extend_from_slice(&self.stream.to_le_bytes());
        out.extend_from_slice(body);
    }

    pub(crate) fn malformed(self) -> FrameError {
        FrameError::Body { kind: self.kind, bytes: self.body.len() }
    }
}

/// Whether a frame has room for a body of `bytes`.
pub(crate) fn fits(bytes: usize) -> bool {
    bytes <= FRAME_BYTES_MAX - HEAD_BYTES
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// A peer can send anything. What comes of it is frames, a wish for more, or an error.
        #[test]
        fn any_bytes_give_frames_or_a_clean_error(bytes: Vec<u8>, length in 0_u32..80) {
            for prefix in [bytes.clone(), [&length.to_le_bytes()[..], &bytes].concat()] {
                let mut rest = &prefix[..];
                while let Ok(Some((frame, taken))) = Frame::decode(rest) {
                    prop_assert_eq!(taken, LENGTH_BYTES + HEAD_BYTES + frame.body.len());
                    rest = &rest[taken..];
                }
            }
        }
    }

    #[test]
    fn a_length_that_no_frame_has_is_refused_before_its_bytes_arrive() {
        let refused = |length: u32| Frame::decode(&length.to_le_bytes()).unwrap_err();

        assert_eq!(refused(4), FrameError::Length { bytes: 4 });
        assert_eq!(refused(262_145), FrameError::Length { bytes: 262_145 });
        assert_eq!(refused(u32::MAX), FrameError::Length { bytes: u32::MAX });
        assert_eq!(Frame::decode(&262_144_u32.to_le_bytes()), Ok(None));
    }
}
