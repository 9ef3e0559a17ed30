//! A command to run in the guest, beside its workload.

use crate::body::{Reader, Writer};

/// A command that was asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExecSpec {
    /// Program and arguments. Never empty.
    pub argv: Vec<String>,
    /// Environment, over the workload's.
    pub env: Vec<(String, String)>,
    /// Working directory; the workload's if there is none.
    pub working_dir: Option<String>,
    /// Milliseconds after which the command's process group is killed; 0 for never.
    pub timeout_ms: u32,
    /// The terminal it runs on, if it does.
    pub terminal: Option<WindowSize>,
    /// Standard error is kept apart from standard output. A terminal knows no difference.
    pub apart: bool,
}

/// The size of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WindowSize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub cols: u16,
}

impl ExecSpec {
    pub(crate) fn write(&self) -> Vec<u8> {
        let Self { argv, env, working_dir, timeout_ms, terminal, apart } = self;
        let size = terminal.unwrap_or(WindowSize { rows: 0, cols: 0 });
        Writer::default()
            .texts(argv.iter().map(String::as_str))
            .texts(env.iter().map(|(name, _)| name.as_str()))
            .texts(env.iter().map(|(_, value)| value.as_str()))
            .flag(working_dir.is_some())
            .text(working_dir.as_deref().unwrap_or_default())
            .u32(*timeout_ms)
            .flag(terminal.is_some())
            .u16(size.rows)
            .u16(size.cols)
            .flag(*apart)
            .finish()
    }

    pub(crate) fn read(body: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(body);
        let argv = reader.texts().filter(|argv| !argv.is_empty())?;
        let (names, values) = (reader.texts()?, reader.texts()?);
        if names.len() != values.len() {
            return None;
        }
        let env = names.into_iter().zip(values).collect();
        let (has_dir, dir) = (reader.flag()?, reader.text()?);
        let timeout_ms = reader.u32()?;
        let has_terminal = reader.flag()?;
        let size = WindowSize { rows: reader.u16()?, cols: reader.u16()? };
        let apart = reader.flag()?;
        reader.end()?;
        let (working_dir, terminal) = (has_dir.then_some(dir), has_terminal.then_some(size));
        Some(Self { argv, env, working_dir, timeout_ms, terminal, apart })
    }
}
