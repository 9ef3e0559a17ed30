//! `ovum wait`: until an instance is in a state.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use clap::builder::PossibleValuesParser;

use super::{ServerArgs, output};
use crate::api::instances::{WaitView, wait_states};
use crate::client::{Client, segment};
use crate::duration::GoDuration;

/// Longest that one request waits; the server answers any that is asked to wait for longer.
const REQUEST_WAIT_MAX: Duration = Duration::from_secs(50);

/// What can be typed after `ovum wait`.
#[derive(Debug, Args)]
pub(super) struct WaitArgs {
    /// Id, name, or the beginning of an id
    instance: String,
    /// The state, in any case
    #[arg(
        long, default_value = "Stopped", ignore_case = true,
        value_parser = PossibleValuesParser::new(wait_states()),
    )]
    state: String,
    /// For how long, for example 30s or 1h; without end if omitted
    #[arg(long, value_parser = duration)]
    timeout: Option<Duration>,
    #[command(flatten)]
    server: ServerArgs,
}

fn duration(text: &str) -> Result<Duration, String> {
    let duration: GoDuration =
        text.parse().map_err(|_| "it has to be a duration like 30s or 1h30m".to_owned())?;
    duration.positive().ok_or_else(|| "it has to be longer than nothing".to_owned())
}

/// Prints the state once the instance is in it.
pub(super) async fn wait(args: WaitArgs) -> anyhow::Result<()> {
    let client = args.server.client()?;
    let wanted = &args.state;
    let answer = until(&client, &args.instance, wanted, args.timeout).await?;
    if answer.state.eq_ignore_ascii_case(wanted) {
        return output::line(answer.state);
    }
    let (instance, state) = (&args.instance, answer.state);
    match args.timeout {
        Some(_) if answer.timed_out => bail!("Instance {instance} is still {state}, not {wanted}"),
        _ => bail!("Instance {instance} is {state} and will not be {wanted} by itself"),
    }
}

/// The last answer: the state has come, cannot come any more, or the time is over.
async fn until(
    client: &Client,
    instance: &str,
    state: &str,
    timeout: Option<Duration>,
) -> anyhow::Result<WaitView> {
    let deadline = timeout.map(|timeout| Instant::now() + timeout);
    loop {
        let left = deadline.map_or(REQUEST_WAIT_MAX, |deadline| {
            deadline.saturating_duration_since(Instant::now()).min(REQUEST_WAIT_MAX)
        });
        // A last look costs a millisecond: none at all is not a duration to the server.
        let left_ms = left.as_millis().max(1);
        let instance = segment(instance);
        let path = format!("/instances/{instance}/wait?state={state}&timeout={left_ms}ms");
        let answer: WaitView = client.get(&path).await.context("Failed to wait")?;
        let is_over = deadline.is_some_and(|deadline| Instant::now() >= deadline);
        if !answer.timed_out || is_over {
            return Ok(answer);
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: WaitArgs,
    }

    fn parse(line: &[&str]) -> Result<WaitArgs, clap::Error> {
        Line::try_parse_from(["wait"].iter().chain(line)).map(|line| line.args)
    }

    #[test]
    fn the_end_is_what_one_waits_for_unless_told_otherwise() {
        let args = parse(&["one"]).unwrap();
        assert_eq!((args.state.as_str(), args.timeout), ("Stopped", None));

        let args = parse(&["one", "--state=running", "--timeout=1m30s"]).unwrap();
        let minute_and_half = Some(Duration::from_secs(90));
        assert_eq!((args.state.as_str(), args.timeout), ("running", minute_and_half));
    }

    #[test]
    fn what_cannot_be_waited_for_is_refused_by_its_flag() {
        for flag in ["--state=unknown", "--timeout=0s", "--timeout=-1s", "--timeout=soon"] {
            let error = parse(&["one", flag]).unwrap_err().to_string();
            assert!(error.contains(flag.split('=').next().unwrap()), "{flag}: {error}");
        }
    }
}
