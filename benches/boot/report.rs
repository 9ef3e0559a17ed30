//! What a run found out: kept as JSON, shown as a table.

use std::collections::BTreeMap;
use std::env;
use std::fmt::{self, Display, Formatter};
use std::fs;

use serde::{Deserialize, Serialize};

/// One run.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Report {
    /// The commit that was measured, if it is known.
    pub(crate) commit: String,
    /// The processor, as the kernel names it.
    pub(crate) machine: String,
    /// Whether a nanosecond was an instruction: then figures in ms are millions of these.
    pub(crate) counts_instructions: bool,
    /// How many boots of whom did not get there, and are not among the figures.
    #[serde(default)]
    pub(crate) given_up: BTreeMap<String, u32>,
    pub(crate) shapes: Vec<ShapeReport>,
    /// Many at once.
    pub(crate) crowd: Vec<Row>,
    /// What the guest kernel's dearest calls took, in ms.
    pub(crate) initcalls: Vec<(String, f64)>,
}

/// Guests of one size.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ShapeReport {
    pub(crate) vcpus: u8,
    pub(crate) memory_mib: u32,
    /// The first is the peer, beside which others in its unit are shown.
    pub(crate) rows: Vec<Row>,
    /// Medians of what follows each other from the request to the first output, in ms.
    pub(crate) phases: Vec<(String, f64)>,
}

/// One figure, as often as it was measured.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Row {
    pub(crate) what: String,
    pub(crate) unit: String,
    pub(crate) values: Vec<f64>,
}

impl Report {
    pub(crate) fn new(
        counts_instructions: bool,
        given_up: BTreeMap<String, u32>,
        shapes: Vec<ShapeReport>,
        crowd: Vec<Row>,
        initcalls: Vec<(String, f64)>,
    ) -> Self {
        let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let name = cpus.lines().find_map(|line| line.strip_prefix("model name"));
        Self {
            commit: env::var("OVUM_BENCH_COMMIT").unwrap_or_else(|_| "unknown".to_owned()),
            machine: name.unwrap_or(": unknown").trim_start_matches(['\t', ':', ' ']).to_owned(),
            counts_instructions,
            given_up,
            shapes,
            crowd,
            initcalls,
        }
    }

    /// What a figure in ms is.
    pub(crate) fn unit(&self) -> &'static str {
        if self.counts_instructions { "M instr." } else { "ms" }
    }
}

impl Row {
    pub(crate) fn new(what: &str, unit: &str, values: Vec<f64>) -> Self {
        Self { what: what.to_owned(), unit: unit.to_owned(), values }
    }

    fn quartile(&self, nth: usize) -> f64 {
        let mut values = self.values.clone();
        values.sort_by(f64::total_cmp);
        values[(values.len() - 1) * nth / 4]
    }
}

impl Display for Report {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        let unit = self.unit();
        writeln!(formatter, "commit {}, {}", self.commit, self.machine)?;
        for (whom, count) in &self.given_up {
            writeln!(formatter, "{count} boots of {whom} stood still and were begun anew")?;
        }
        for shape in &self.shapes {
            let ShapeReport { vcpus, memory_mib, rows, .. } = shape;
            writeln!(formatter, "\n{vcpus} vCPU, {memory_mib} MiB")?;
            table(formatter, rows, unit)?;
        }
        if !self.crowd.is_empty() {
            writeln!(formatter, "\nmany at once")?;
            table(formatter, &self.crowd, unit)?;
        }
        writeln!(formatter, "\nthe guest kernel's dearest calls")?;
        for (name, took) in &self.initcalls {
            writeln!(formatter, "{name:<55}{took:>10.1} {unit}")?;
        }
        Ok(())
    }
}

fn table(formatter: &mut Formatter<'_>, rows: &[Row], unit: &str) -> fmt::Result {
    let peer = rows.first().map(|row| row.quartile(2));
    for row in rows {
        let unit = if row.unit == "ms" { unit } else { &row.unit };
        let [low, middle, high] = [1, 2, 3].map(|nth| row.quartile(nth));
        write!(formatter, "{:<55}{middle:>10.1} {unit:<9}{low:>10.1} to {high:.1}", row.what)?;
        match peer.filter(|_| row.unit == "ms") {
            Some(peer) => writeln!(formatter, "   {:.2}", middle / peer)?,
            None => writeln!(formatter)?,
        }
    }
    Ok(())
}
