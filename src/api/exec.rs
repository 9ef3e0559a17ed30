//! `/instances/{id}/exec`: a command in an instance, over a WebSocket.
//!
//! ```text
//! client   TEXT request    BINARY input, TEXT {"resize":{"rows":R,"cols":C}}
//! server                   BINARY output                   TEXT {"exitCode":N}   close
//! ```
//!
//! Any other text is input. The last text has exactly that key: clients of the original refuse
//! every other. What goes wrong after the upgrade is told as output, with an exit code after it.
//! A client that leaves takes the command with it.
//!
//! Not in the original: a request with `"channels": true` gets each message of output with a byte
//! before it, 1 for standard output and 2 for standard error, and may end the input with
//! TEXT `{"eof":true}`.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::response::Response;
use serde::{Deserialize, Serialize};

use crate::api::error::ErrorBody;
use crate::api::socket::{self, Gone, Input, Sink, Source, Visit};
use crate::causes::chain;
use crate::instances::inside::Inside;
use crate::instances::inside::agent::exec::{Exec, ExecEvent};
use crate::instances::inside::agent::{AgentError, ExecSpec, WindowSize};

/// What is run if nothing is asked for.
const SHELL: &str = "/bin/sh";

/// The size of a terminal that was given none.
const TERMINAL_SIZE: WindowSize = WindowSize { rows: 24, cols: 80 };

/// Before output, for clients that tell the two apart.
const CHANNEL_OUTPUT: u8 = 1;
const CHANNEL_ERROR: u8 = 2;

/// What a client asks for. Whatever else it says is ignored.
#[derive(Debug, Default, Deserialize)]
struct ExecRequest {
    command: Option<Vec<String>>,
    #[serde(default)]
    tty: bool,
    env: Option<BTreeMap<String, String>>,
    cwd: Option<String>,
    /// Seconds; none if not positive.
    timeout: Option<i64>,
    /// Seconds; none if not positive.
    wait_for_agent: Option<i64>,
    rows: Option<i64>,
    cols: Option<i64>,
    #[serde(default)]
    channels: bool,
}

/// A text that is no input.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
enum Control {
    #[serde(rename = "resize")]
    Resize { rows: i64, cols: i64 },
    #[serde(rename = "eof")]
    Eof(bool),
}

/// The last word.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ExitView {
    exit_code: u8,
}

/// The last word to one who never said what to run.
#[derive(Debug, Serialize)]
struct RefusalView {
    error: String,
}

/// Runs a command in a running instance, over a WebSocket.
#[utoipa::path(
    get, path = "/instances/{id}/exec", tag = "instances",
    params(("id" = String, Path, description = "Id, name, or the beginning of an id")),
    responses((status = 101), (status = "default", body = ErrorBody)),
)]
pub(super) async fn exec(visit: Visit) -> Response {
    visit.begin(serve)
}

pub(super) async fn serve(inside: Inside, mut sink: Sink, mut source: Source) {
    let asked = match source.request::<ExecRequest>().await.and_then(ExecRequest::checked) {
        Ok(asked) => asked,
        Err(error) => {
            // One who has gone needs no answer; so below.
            let _ = socket::send_json(&mut sink, &RefusalView { error }).await;
            source.close(sink, "no command").await;
            return;
        }
    };
    let channels = asked.channels;
    let started = tokio::select! {
        started = start(&inside, asked) => started,
        () = source.gone() => return,
    };
    let ended = match &started {
        Ok(exec) => tokio::select! {
            ended = output(exec, &mut sink, channels) => ended,
            () = input(exec, &mut source, channels) => return,
        },
        Err(error) => fail(error, &mut sink, channels).await,
    };
    if let Ok(exit_code) = ended
        && socket::send_json(&mut sink, &ExitView { exit_code }).await.is_ok()
    {
        source.close(sink, "").await;
    }
}

async fn start(inside: &Inside, asked: Asked) -> Result<Exec, AgentError> {
    if !asked.wait_for_agent.is_zero() {
        inside.wait_for_agent(asked.wait_for_agent).await;
    }
    inside.exec(asked.spec).await
}

/// Passes output on until the command has ended; returns its status.
async fn output(exec: &Exec, sink: &mut Sink, channels: bool) -> Result<u8, Gone> {
    loop {
        let (channel, bytes) = match exec.next().await {
            Ok(ExecEvent::Output(bytes)) => (CHANNEL_OUTPUT, bytes),
            Ok(ExecEvent::Error(bytes)) => (CHANNEL_ERROR, bytes),
            Ok(ExecEvent::Ended(code)) => return Ok(code),
            Err(error) => return fail(&error, sink, channels).await,
        };
        socket::send_bytes(sink, marked(channel, bytes, channels)).await?;
    }
}

/// Passes input on until the client has gone. A command that reads no more does not end this:
/// somebody has to see the client go.
async fn input(exec: &Exec, source: &mut Source, channels: bool) {
    while let Ok(input) = source.next().await {
        let control = match &input {
            Input::Text(text) => serde_json::from_str::<Control>(text).ok(),
            Input::Binary(_) => None,
        };
        // A command that has ended takes nothing; how it ended is for `output` to tell.
        let _ = match (control, input) {
            (Some(Control::Resize { rows, cols }), _) => {
                exec.resize(WindowSize { rows: size(rows), cols: size(cols) }).await
            }
            (Some(Control::Eof(true)), _) if channels => exec.end_input().await,
            (_, Input::Text(text)) => exec.send(text.as_bytes()).await,
            (_, Input::Binary(bytes)) => exec.send(&bytes).await,
        };
    }
}

/// Tells what went wrong, as output; returns the status that goes with it.
async fn fail(error: &AgentError, sink: &mut Sink, channels: bool) -> Result<u8, Gone> {
    let text = format!("Error: {}\r\n", chain(error));
    socket::send_bytes(sink, marked(CHANNEL_ERROR, text.into_bytes(), channels)).await?;
    Ok(error.exit_code())
}

fn marked(channel: u8, mut bytes: Vec<u8>, channels: bool) -> Vec<u8> {
    if channels {
        bytes.insert(0, channel);
    }
    bytes
}

/// A command, checked.
#[derive(Debug, PartialEq, Eq)]
struct Asked {
    spec: ExecSpec,
    wait_for_agent: Duration,
    channels: bool,
}

impl ExecRequest {
    fn checked(self) -> Result<Asked, String> {
        let Self { command, tty, env, cwd, timeout, wait_for_agent, rows, cols, channels } = self;
        let argv = command.filter(|argv| !argv.is_empty()).unwrap_or(vec![SHELL.to_owned()]);
        let env: Vec<_> = env.unwrap_or_default().into_iter().collect();
        if let Some((name, _)) = env.iter().find(|(name, _)| name.is_empty() || name.contains('='))
        {
            return Err(format!("env has the name {name:?}: it may not be empty nor have a ="));
        }
        let WindowSize { rows: rows_default, cols: cols_default } = TERMINAL_SIZE;
        let terminal = WindowSize {
            rows: rows.map_or(rows_default, size),
            cols: cols.map_or(cols_default, size),
        };
        let timeout_ms = seconds(timeout).saturating_mul(1000);
        let spec = ExecSpec {
            argv,
            env,
            working_dir: cwd.filter(|path| !path.is_empty()),
            timeout_ms: u32::try_from(timeout_ms).unwrap_or(u32::MAX),
            terminal: tty.then_some(terminal),
            apart: channels && !tty,
        };
        let wait_for_agent = Duration::from_secs(seconds(wait_for_agent));
        Ok(Asked { spec, wait_for_agent, channels })
    }
}

fn seconds(asked: Option<i64>) -> u64 {
    asked.and_then(|seconds| u64::try_from(seconds).ok()).unwrap_or(0)
}

/// A terminal has at least one line, and no more than its size can say.
fn size(asked: i64) -> u16 {
    u16::try_from(asked.max(1)).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(json: &str) -> Result<Asked, String> {
        serde_json::from_str::<ExecRequest>(json).map_err(|e| e.to_string())?.checked()
    }

    #[test]
    fn no_command_is_a_shell() {
        for json in ["{}", r#"{"command":null,"tty":false}"#, r#"{"command":[]}"#] {
            let spec = ExecSpec { argv: vec![SHELL.into()], ..ExecSpec::default() };
            let wait_for_agent = Duration::ZERO;
            assert_eq!(asked(json), Ok(Asked { spec, wait_for_agent, channels: false }), "{json}");
        }
    }

    #[test]
    fn a_request_is_read_field_by_field() {
        let json = r#"{"command":["ls","-l"],"tty":true,"env":{"A":"b"},"cwd":"/tmp","timeout":3,
            "wait_for_agent":2,"rows":50,"cols":70000,"later":1,"channels":true}"#;

        let Asked { spec, wait_for_agent, channels } = asked(json).unwrap();

        assert_eq!(spec.argv, ["ls", "-l"]);
        assert_eq!(spec.env, [("A".to_owned(), "b".to_owned())]);
        assert_eq!((spec.working_dir.as_deref(), spec.timeout_ms), (Some("/tmp"), 3000));
        assert_eq!(spec.terminal, Some(WindowSize { rows: 50, cols: u16::MAX }));
        assert_eq!((wait_for_agent, channels), (Duration::from_secs(2), true));
        assert!(!spec.apart, "a terminal is one stream");
    }

    #[test]
    fn numbers_out_of_range_mean_none_or_the_next_best() {
        let spec = |json| asked(json).unwrap().spec;

        assert_eq!(spec(r#"{"timeout":-5}"#).timeout_ms, 0);
        assert_eq!(spec(r#"{"timeout":9999999999}"#).timeout_ms, u32::MAX);
        let terminal = spec(r#"{"tty":true,"rows":0,"cols":-3}"#).terminal;
        assert_eq!(terminal, Some(WindowSize { rows: 1, cols: 1 }));
        assert_eq!(spec(r#"{"tty":true}"#).terminal, Some(TERMINAL_SIZE));
    }

    #[test]
    fn what_makes_no_sense_is_refused_in_words() {
        for json in ["[]", r#"{"command":"ls"}"#, r#"{"tty":1}"#, r#"{"env":{"A":1}}"#] {
            assert!(asked(json).is_err(), "{json}");
        }
        let error = asked(r#"{"env":{"A=B":"c"}}"#).unwrap_err();
        assert_eq!(error, r#"env has the name "A=B": it may not be empty nor have a ="#);
    }

    #[test]
    fn only_a_control_text_is_no_input() {
        let control = |text| serde_json::from_str::<Control>(text).ok();

        assert!(matches!(
            control(r#"{"resize":{"rows":24,"cols":80}}"#),
            Some(Control::Resize { rows: 24, cols: 80 })
        ));
        assert!(matches!(control(r#"{"eof":true}"#), Some(Control::Eof(true))));
        for text in ["", "ls", "{}", r#"{"resize":{"rows":24}}"#, r#"{"resize":1,"a":2}"#, "1"] {
            assert!(control(text).is_none(), "{text}");
        }
    }

    #[test]
    fn the_last_word_has_one_key() {
        let text = serde_json::to_string(&ExitView { exit_code: 137 }).unwrap();

        assert_eq!(text, r#"{"exitCode":137}"#);
    }
}
