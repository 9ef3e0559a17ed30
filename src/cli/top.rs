//! `ovum top`: what the instances that run cost the host, again and again.
//!
//! On a terminal the picture is renewed in place until `q` or Ctrl-C. Elsewhere, and with `--once`,
//! it is printed once. How much of a CPU an instance takes is what it took between two looks.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use futures_util::{StreamExt, TryStreamExt, future, stream};
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time;

use super::interrupt::interrupted;
use super::stats::{AT_A_TIME, percent, running};
use super::terminal::{self, Raw};
use super::{ServerArgs, output};
use crate::api::instances::view::InstanceView;
use crate::api::stats::StatsView;
use crate::client::{Client, segment};
use crate::duration::GoDuration;

/// Shortest time between two looks: each of them asks for every instance.
const INTERVAL_MIN: Duration = Duration::from_millis(100);

/// Keys that end it: `q`, and Ctrl-C and Ctrl-D as a raw terminal passes them on.
const ENDING: &[u8] = b"q\x03\x04";

/// Another screen without a cursor, and back.
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";

/// To the top left; to the end of a line; everything below.
const HOME: &str = "\x1b[H";
const END_LINE: &str = "\x1b[K\r\n";
const END_SCREEN: &str = "\x1b[J";

/// What can be typed after `ovum top`.
#[derive(Debug, Args)]
pub(super) struct TopArgs {
    /// Ids or names; all that run if there are none
    instances: Vec<String>,
    /// Print it once, also on a terminal
    #[arg(long)]
    once: bool,
    /// Print it once, as JSON
    #[arg(long)]
    json: bool,
    /// From one look to the next
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = interval)]
    interval: Duration,
    #[command(flatten)]
    server: ServerArgs,
}

fn interval(text: &str) -> Result<Duration, String> {
    let duration = text.parse::<GoDuration>().ok().and_then(GoDuration::positive);
    let long_enough = duration.filter(|&duration| duration >= INTERVAL_MIN);
    long_enough.ok_or_else(|| format!("it has to be a duration like 2s, at least {INTERVAL_MIN:?}"))
}

/// One look at all instances that run.
#[derive(Debug)]
struct Look {
    at: Instant,
    instances: Vec<(InstanceView, StatsView)>,
}

/// What is shown of one instance.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Line {
    id: String,
    name: String,
    state: String,
    health: String,
    /// Of one CPU; nothing at the first look.
    cpu_percent: Option<f64>,
    memory_rss_bytes: u64,
    allocated_memory_bytes: u64,
    memory_utilization_ratio: Option<f64>,
    started: String,
}

pub(super) async fn top(args: TopArgs) -> anyhow::Result<ExitCode> {
    let client = args.server.client()?;
    if args.once || args.json || !io::stdout().is_terminal() {
        let before = Look::take(&client, &args.instances).await?;
        // A share of time needs time to pass.
        time::sleep(args.interval).await;
        let lines = Look::take(&client, &args.instances).await?.since(Some(&before));
        if args.json {
            output::json(&lines)?;
        } else {
            table(&lines).iter().try_for_each(output::line)?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let _screen = Screen::enter()?;
    tokio::select! {
        ended = watch(&client, &args) => ended.map(|()| ExitCode::SUCCESS),
        code = interrupted() => code,
    }
}

/// Renews the picture until a key ends it.
async fn watch(client: &Client, args: &TopArgs) -> anyhow::Result<()> {
    let mut keys = terminal::input();
    let mut has_keys = io::stdin().is_terminal();
    let mut resized = signal(SignalKind::window_change())?;
    let mut ticks = time::interval(args.interval);
    let mut before = None;
    let mut lines = Vec::new();
    loop {
        tokio::select! {
            _ = ticks.tick() => {
                let look = Look::take(client, &args.instances).await?;
                lines = look.since(before.as_ref());
                before = Some(look);
            }
            _ = resized.recv() => {}
            typed = keys.recv(), if has_keys => match typed {
                Some(keys) if keys.iter().any(|key| ENDING.contains(key)) => return Ok(()),
                Some(_) => continue,
                None => { has_keys = false; continue }
            },
        }
        let picture = picture(&lines, terminal::size().unwrap_or((24, 80)));
        let mut out = io::stdout().lock();
        out.write_all(picture.as_bytes())?;
        out.flush()?;
    }
}

impl Look {
    async fn take(client: &Client, wanted: &[String]) -> anyhow::Result<Self> {
        let mut instances = running(client).await?;
        let is_wanted = |instance: &InstanceView| {
            wanted.iter().any(|key| instance.name == *key || instance.id.starts_with(key.as_str()))
        };
        instances.retain(|instance| wanted.is_empty() || is_wanted(instance));
        let cost = async |instance: InstanceView| {
            let stats = client.find(&format!("/instances/{}/stats", segment(&instance.id))).await;
            stats.map(|stats: Option<StatsView>| Some((instance, stats?)))
        };
        // One that was deleted since it was listed is no reason to end.
        let costs = stream::iter(instances).map(cost).buffered(AT_A_TIME);
        let instances = costs.try_filter_map(future::ok).try_collect().await?;
        Ok(Self { at: Instant::now(), instances })
    }

    /// What is to be shown, the busiest first.
    fn since(&self, before: Option<&Self>) -> Vec<Line> {
        let seconds = before.map(|before| (self.at - before.at).as_secs_f64());
        let earlier: BTreeMap<_, _> = before
            .into_iter()
            .flat_map(|before| &before.instances)
            .map(|(instance, stats)| (&instance.id, stats.cpu_seconds))
            .collect();
        let mut lines: Vec<_> = self
            .instances
            .iter()
            .map(|(instance, stats)| {
                let spent = earlier.get(&instance.id).map(|before| stats.cpu_seconds - before);
                // A new boot begins at nothing.
                let spent = spent.filter(|&spent| spent >= 0.0);
                Line {
                    id: instance.id.clone(),
                    name: instance.name.clone(),
                    state: instance.state.clone(),
                    health: instance.health_status.status.clone(),
                    cpu_percent: spent.zip(seconds).map(|(spent, time)| 100.0 * spent / time),
                    memory_rss_bytes: stats.memory_rss_bytes,
                    allocated_memory_bytes: stats.allocated_memory_bytes,
                    memory_utilization_ratio: stats.memory_utilization_ratio,
                    started: instance.started_at.map(output::ago).unwrap_or_default(),
                }
            })
            .collect();
        let busy = |line: &Line| line.cpu_percent.unwrap_or(0.0);
        lines.sort_by(|a, b| busy(b).total_cmp(&busy(a)).then_with(|| a.name.cmp(&b.name)));
        lines
    }
}

fn table(lines: &[Line]) -> Vec<String> {
    let rows: Vec<_> = lines
        .iter()
        .map(|line| {
            [
                line.name.clone(),
                line.state.clone(),
                line.health.clone(),
                percent(line.cpu_percent.map(|percent| percent / 100.0)),
                output::size(line.memory_rss_bytes),
                output::size(line.allocated_memory_bytes),
                percent(line.memory_utilization_ratio),
                line.started.clone(),
            ]
        })
        .collect();
    let head = ["NAME", "STATE", "HEALTH", "CPU %", "MEM USED", "MEMORY", "MEM %", "STARTED"];
    output::columns(head, &rows)
}

/// What the terminal is told: never more than it has rows and columns.
fn picture(lines: &[Line], (rows, columns): (u16, u16)) -> String {
    let cpu: f64 = lines.iter().filter_map(|line| line.cpu_percent).sum();
    let memory: u64 = lines.iter().map(|line| line.memory_rss_bytes).sum();
    let count = lines.len();
    let sum = format!("{count} running, {cpu:.1} % CPU, {} of memory", output::size(memory));
    let all = [sum, String::new()].into_iter().chain(table(lines));
    let mut text = HOME.to_owned();
    // The last row stays empty: a line's end on it would move all of them.
    for line in all.take(usize::from(rows.saturating_sub(1))) {
        let shown: String = line.chars().take(columns.into()).collect();
        let _ = write!(text, "{shown}{END_LINE}");
    }
    text + END_SCREEN
}

/// A screen of our own, until this is dropped.
#[derive(Debug)]
struct Screen {
    _keys: Option<Raw>,
}

impl Screen {
    fn enter() -> anyhow::Result<Self> {
        let keys = io::stdin().is_terminal().then(Raw::make).transpose()?;
        let screen = Self { _keys: keys };
        io::stdout().write_all(ENTER.as_bytes())?;
        Ok(screen)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // A terminal that is gone needs no repair.
        let mut out = io::stdout().lock();
        let _ = out.write_all(LEAVE.as_bytes()).and_then(|()| out.flush());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(name: &str, cpu_percent: Option<f64>) -> Line {
        Line {
            id: name.into(),
            name: name.into(),
            state: "Running".into(),
            health: "disabled".into(),
            cpu_percent,
            memory_rss_bytes: 64 << 20,
            allocated_memory_bytes: 128 << 20,
            memory_utilization_ratio: Some(0.5),
            started: "5 s ago".into(),
        }
    }

    #[test]
    fn a_picture_fits_its_terminal() {
        let lines: Vec<_> = (0..50).map(|n| line(&format!("name-{n}"), Some(1.5))).collect();

        let picture = picture(&lines, (10, 30));

        let shown = picture.strip_prefix(HOME).and_then(|text| text.strip_suffix(END_SCREEN));
        let shown: Vec<_> = shown.unwrap().split_terminator(END_LINE).collect();
        assert_eq!(shown.len(), 9);
        assert!(shown.iter().all(|line| line.chars().count() <= 30), "{shown:?}");
        assert_eq!(shown[0], "50 running, 75.0 % CPU, 3.1 Gi");
    }

    #[test]
    fn a_line_says_what_is_known() {
        assert_eq!(
            table(&[line("web", Some(12.34)), line("new", None)]),
            [
                "NAME  STATE    HEALTH    CPU %  MEM USED  MEMORY     MEM %  STARTED",
                "web   Running  disabled  12.3   64.0 MiB  128.0 MiB  50.0   5 s ago",
                "new   Running  disabled  -      64.0 MiB  128.0 MiB  50.0   5 s ago",
            ]
        );
    }

    #[test]
    fn a_look_costs_requests_and_has_its_time() {
        assert_eq!(interval("500ms"), Ok(Duration::from_millis(500)));
        for text in ["0s", "1ms", "-2s", "2", "often"] {
            assert!(interval(text).is_err(), "{text}");
        }
    }
}
