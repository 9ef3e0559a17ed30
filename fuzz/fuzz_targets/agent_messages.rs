//! The body of one message, in both directions: what is understood can be said again, and is
//! understood as the same. So is a word on the report port.

#![no_main]

use libfuzzer_sys::fuzz_target;
use ovum_agent_proto::frame::Frame;
use ovum_agent_proto::message::{ToAgent, ToServer};
use ovum_agent_proto::report::Report;

fuzz_target!(|input: (u8, &[u8])| {
    let (kind, body) = input;
    let frame = Frame { kind, stream: 1, body };
    let mut bytes = Vec::new();
    if let Some(word) = body.first_chunk().copied().map(u32::from_le_bytes) {
        assert!(Report::decode(word).is_none_or(|report| report.encode() == word));
    }
    if let Ok(message) = ToAgent::decode(frame) {
        if message.encode(1, &mut bytes).is_ok() {
            let (again, _) = Frame::decode(&bytes).unwrap().unwrap();
            assert_eq!(ToAgent::decode(again), Ok(message));
        }
    }
    bytes.clear();
    if let Ok(message) = ToServer::decode(frame) {
        // Names that are not UTF-8 were repaired, and may have grown beyond a frame.
        if message.encode(1, &mut bytes).is_ok() {
            let (again, _) = Frame::decode(&bytes).unwrap().unwrap();
            assert_eq!(ToServer::decode(again), Ok(message));
        }
    }
});
