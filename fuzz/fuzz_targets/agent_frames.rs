//! A stream of bytes, as either end of the agent's connection reads it: whole frames, each a
//! message or a clean error, until more is needed or the connection is lost.

#![no_main]

use libfuzzer_sys::fuzz_target;
use ovum_agent_proto::frame::{FRAME_BYTES_MAX, Frame};
use ovum_agent_proto::message::{ToAgent, ToServer};

fuzz_target!(|bytes: &[u8]| {
    let mut rest = bytes;
    while let Ok(Some((frame, taken))) = Frame::decode(rest) {
        assert!(taken <= 4 + FRAME_BYTES_MAX && frame.body.len() < taken);
        let _ = (ToAgent::decode(frame), ToServer::decode(frame));
        rest = &rest[taken..];
    }
});
