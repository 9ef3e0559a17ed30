//! Where the time of a boot went, one bar below the other.

use std::time::Duration;

use super::output;

/// Characters of the longest bar.
const BAR_CHARS: u128 = 40;

/// Shows phases that followed each other, on stderr.
pub(super) fn show(what: &str, phases: &[(&str, Duration)]) {
    let total: Duration = phases.iter().map(|(_, took)| took).sum();
    output::note(&format!("{what}, {} ms in all:", total.as_millis()));
    for line in lines(phases) {
        output::note(&line);
    }
}

fn lines(phases: &[(&str, Duration)]) -> Vec<String> {
    let longest = phases.iter().map(|(_, took)| took.as_micros()).max().unwrap_or(0).max(1);
    let line = |(name, took): &(&str, Duration)| {
        let chars = took.as_micros() * BAR_CHARS / longest;
        let bar = "#".repeat(usize::try_from(chars).unwrap_or_default());
        let took_ms = took.as_secs_f64() * 1e3;
        format!("  {name:<12} {took_ms:>9.1} ms  {bar}").trim_end().to_owned()
    };
    phases.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_as_long_as_their_phases() {
        let phases = [("kernel", 80_000), ("agent", 2_000), ("workload", 0)]
            .map(|(name, took_us)| (name, Duration::from_micros(took_us)));

        let lines = lines(&phases);

        assert_eq!(lines[0], format!("  kernel            80.0 ms  {}", "#".repeat(40)));
        assert_eq!(lines[1], "  agent              2.0 ms  #");
        assert_eq!(lines[2], "  workload           0.0 ms");
        assert_eq!(super::lines(&[]), [""; 0]);
    }
}
