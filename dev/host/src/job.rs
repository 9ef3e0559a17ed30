//! The command as the shell inside runs it: same words, same folder, the environment that matters.

use std::env;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};

/// Variables that go along, and prefixes of more of them.
const NAMES: &[&str] = &["PATH", "HOME", "TERM", "USER", "LANG", "NO_COLOR"];
const PREFIXES: &[&str] = &["CARGO", "RUST", "OVUM", "LC_"];

/// Folders of which the emulated host has its own. PID 1 binds a working directory in `/tmp` there.
const HIDDEN: &[&str] = &["/dev", "/proc", "/run", "/sys", "/var/lib/ovum"];

/// Returns a script that becomes `command`, with a first line that PID 1 reads: the time, the kind
/// of file system on the scratch disk and the working directory.
///
/// # Errors
///
/// If the time or the working directory cannot be told.
pub fn script(command: &[OsString], disk_kind: &str) -> Result<Vec<u8>> {
    let folder = env::current_dir().context("Failed to read the working directory")?;
    if let Some(hidden) = HIDDEN.iter().find(|hidden| folder.starts_with(hidden)) {
        bail!("{} is not visible inside, where {hidden} is another", folder.display());
    }
    if folder.as_os_str().as_bytes().contains(&b'\n') {
        bail!("{} has a line feed in its name", folder.display());
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).context("The clock is before 1970")?;
    // Rounded up: a file just written outside must not lie in the future inside.
    let mut script = format!("#{} {disk_kind} ", now.as_secs() + 1).into_bytes();
    script.extend_from_slice(folder.as_os_str().as_bytes());
    script.push(b'\n');
    for (name, value) in env::vars_os().filter(|(name, _)| passes(name)) {
        script.extend_from_slice(b"export ");
        script.extend_from_slice(name.as_bytes());
        script.push(b'=');
        quote(&mut script, &value);
        script.push(b'\n');
    }
    script.extend_from_slice(b"cd ");
    quote(&mut script, folder.as_os_str());
    script.extend_from_slice(b" || exit 126\nexec");
    for word in command {
        script.push(b' ');
        quote(&mut script, word);
    }
    script.push(b'\n');
    Ok(script)
}

fn passes(name: &OsStr) -> bool {
    let Some(name) = name.to_str() else { return false };
    let is_word = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    is_word && (NAMES.contains(&name) || PREFIXES.iter().any(|prefix| name.starts_with(prefix)))
}

fn quote(script: &mut Vec<u8>, word: &OsStr) {
    script.push(b'\'');
    for &byte in word.as_bytes() {
        match byte {
            b'\'' => script.extend_from_slice(b"'\\''"),
            _ => script.push(byte),
        }
    }
    script.push(b'\'');
}
