//! A server that says anything in any order, and what that costs.

use std::collections::BTreeMap;

use ovum_agent_proto::exec::WindowSize;
use ovum_agent_proto::files::{GetSpec, StatSpec};
use ovum_agent_proto::frame::WINDOW_BYTES;
use proptest::prelude::*;

use super::*;

/// What is allowed to wait for a server that does not read: what a session keeps, and one more
/// frame of each stream.
const UNSENT_BYTES_MAX: usize = (128 << 10) + 8 * (33 << 10);

/// What a server does.
#[derive(Debug, Clone)]
enum Step {
    Say(u32, Word),
    Turn,
    /// It reads all there is.
    Read,
}

/// What it says. Commands and paths are those of a test: a fuzzer's own would be run.
#[derive(Debug, Clone)]
enum Word {
    Exec(&'static str),
    Put(PutKind),
    Get,
    Stat,
    Data(usize),
    End,
    Credit(u32),
    Resize,
    Cancel,
}

fn word() -> impl Strategy<Value = Word> {
    let scripts = ["true", "cat", "head -c 1000000 /dev/zero", "exec <&-; sleep 1000", "yes >&2"];
    let kinds = [PutKind::File, PutKind::Directory, PutKind::Link("x".into())];
    prop_oneof![
        3 => prop::sample::select(scripts.to_vec()).prop_map(Word::Exec),
        2 => prop::sample::select(kinds.to_vec()).prop_map(Word::Put),
        2 => Just(Word::Get),
        1 => Just(Word::Stat),
        4 => (0..=32_usize << 10).prop_map(Word::Data),
        2 => Just(Word::End),
        2 => prop_oneof![0..WINDOW_BYTES, any::<u32>()].prop_map(Word::Credit),
        1 => Just(Word::Resize),
        2 => Just(Word::Cancel),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..6_u32, word()).prop_map(|(stream, word)| Step::Say(stream, word)),
        2 => Just(Step::Turn),
        1 => Just(Step::Read),
    ]
}

impl Word {
    fn message(self, dir: &Path) -> ToAgent {
        let path = || dir.join("entry").to_str().unwrap().to_owned();
        match self {
            Self::Exec(script) => ToAgent::Exec(sh(script)),
            Self::Put(kind) => ToAgent::Put(put(&dir.join("entry"), kind)),
            Self::Get => ToAgent::Get(GetSpec { path: path(), follow_links: false }),
            Self::Stat => ToAgent::Stat(StatSpec { path: path(), follow_links: true }),
            Self::Data(bytes) => ToAgent::Data(vec![7; bytes]),
            Self::End => ToAgent::End,
            Self::Credit(bytes) => ToAgent::Credit(bytes),
            Self::Resize => ToAgent::Resize(WindowSize { rows: 1, cols: 1 }),
            Self::Cancel => ToAgent::Cancel,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Every job keeps to its window, whoever does not read costs a bounded buffer, and when all is
    /// called off nothing runs.
    #[test]
    fn words_in_any_order_cost_no_more_than_the_window(
        steps in prop::collection::vec(step(), 1..60),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut guest = Guest::new();
        // What each stream may still be sent, as if all jobs it ever had were one.
        let mut allowed: BTreeMap<u32, u64> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Say(stream, word) => {
                    let credit = match word {
                        Word::Exec(_) | Word::Get | Word::Put(_) => WINDOW_BYTES,
                        // More than the window is no more than the window.
                        Word::Credit(bytes) => bytes.min(WINDOW_BYTES),
                        _ => 0,
                    };
                    *allowed.entry(stream).or_default() += u64::from(credit);
                    if guest.try_say(stream, word.message(dir.path())).is_err() {
                        break;
                    }
                }
                Step::Turn => guest.turn(),
                Step::Read => {
                    while let Some((stream, message)) = guest.heard() {
                        let cost = u64::from(message.cost());
                        let left = allowed.entry(stream).or_default();
                        prop_assert!(cost <= *left, "{} of {}", cost, left);
                        *left -= cost;
                    }
                }
            }
            prop_assert!(guest.session.unsent_bytes() <= UNSENT_BYTES_MAX);
        }
        let pids: Vec<Pid> = guest.jobs.running.values().filter_map(pid).collect();
        for stream in 0..6 {
            guest.say(stream, ToAgent::Cancel);
        }
        prop_assert!(guest.jobs.running.is_empty());
        for pid in pids {
            let _ended = waitpid(Some(pid), WaitOptions::empty());
        }
    }
}
