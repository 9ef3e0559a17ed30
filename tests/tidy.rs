//! Rules of the house that a compiler cannot check: who may import whom, how long a file is, and
//! that documents name files that exist.

use std::fs;
use std::path::{Path, PathBuf};

/// `src/<module>` may use only these siblings. The order is the layering, top first.
const LAYERS: &[(&str, &[&str])] = &[
    (
        "api",
        &[
            "causes",
            "config",
            "devices",
            "duration",
            "images",
            "instances",
            "resources",
            "size",
            "token",
            "volumes",
        ],
    ),
    (
        "cli",
        &[
            "api",
            "client",
            "config",
            "control",
            "doctor",
            "duration",
            "initramfs",
            "server",
            "size",
            "tar",
            "timeline",
            "token",
            "worker",
        ],
    ),
    (
        "instances",
        &[
            "agent",
            "control",
            "devices",
            "disks",
            "fleet",
            "images",
            "initramfs",
            "logs",
            "network",
            "resources",
            "store",
            "subnet",
            "text",
            "timeline",
            "volumes",
        ],
    ),
    ("volumes", &["causes", "disks", "os", "ratio", "resources", "store", "tar", "text"]),
    ("devices", &["causes", "store", "text"]),
    ("resources", &["os", "ratio", "size"]),
    ("images", &["causes", "loopback", "os", "store", "tar"]),
    ("disks", &["os"]),
    ("network", &["causes", "os", "subnet"]),
    ("fleet", &["control", "os"]),
    ("agent", &[]),
    ("logs", &["os"]),
    ("initramfs", &["os"]),
    ("worker", &["control", "os"]),
    ("timeline", &["control"]),
    ("control", &[]),
    ("store", &[]),
    ("tar", &[]),
    ("text", &[]),
    ("loopback", &[]),
    ("os", &[]),
];

/// Lines of a file before its tests, unless it is a table.
const LINES_MAX: usize = 600;

const COLUMNS_MAX: usize = 100;

/// Scripts are for what a shell does best; anything longer is Rust.
const SCRIPT_LINES_MAX: usize = 120;

/// Names that say nothing about what is inside.
const EMPTY_NAMES: &[&str] = &["common", "helpers", "manager", "misc", "mod", "types", "utils"];

#[test]
fn the_house_is_tidy() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    let mut files = 0;
    for path in tracked(root) {
        let Ok(text) = fs::read_to_string(root.join(&path)) else { continue };
        files += 1;
        if path.extension().is_some_and(|extension| extension == "rs") {
            found.extend(rust_violations(&path, &text));
        } else if path.extension().is_some_and(|extension| extension == "md") {
            found.extend(names_of_nothing(root, &path, &text));
        } else if text.starts_with("#!") {
            found.extend(script_violations(&path, &text));
        }
    }
    assert!(files > 20, "only {files} files seen: the walk is broken");
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}

#[test]
fn each_rule_catches_its_sin() {
    let long = "//! x\n".to_owned() + &"\n".repeat(LINES_MAX);
    let sins = [
        ("src/x.rs", "fn main() {}\n", "does not say what it is for"),
        ("src/x.rs", long.as_str(), "lines before its tests"),
        ("src/utils.rs", "//! x\n", "a name that says nothing"),
        ("src/x.rs", concat!("//! x\n#![", "allow(unused)]\n"), "silences a lint"),
        ("src/x.rs", concat!("//! x\n// TO", "DO\n"), "unfinished"),
        ("src/store.rs", "//! x\nuse crate::api::Api;\n", "store may not use api"),
    ];
    for (path, text, expected) in sins {
        let found = rust_violations(Path::new(path), text);
        assert!(found.iter().any(|line| line.contains(expected)), "{path}: {found:?}");
    }
    let found = script_violations(Path::new("x"), "#!/bin/sh\npackages=\"a # for `make b`\"\n");
    assert!(found.iter().any(|line| line.contains("a backtick")), "{found:?}");
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let found = names_of_nothing(root, Path::new("x.md"), "`tests/tidy.rs`, `tests/none.rs`");
    assert_eq!(found, ["x.md: names tests/none.rs, which is not there"]);
}

fn rust_violations(path: &Path, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut rule = |broken: bool, what: String| {
        if broken {
            found.push(format!("{}: {what}", path.display()));
        }
    };
    let code = text.split("#[cfg(test)]").next().unwrap_or(text);
    let name = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or("");
    let is_test = path.components().any(|part| part.as_os_str() == "tests") || name == "tests";
    let lines = code.lines().count();
    rule(
        lines > LINES_MAX && !is_test && !name.ends_with("_table"),
        format!("{lines} lines before its tests, {LINES_MAX} allowed"),
    );
    rule(!text.starts_with("//!"), "does not say what it is for".into());
    rule(EMPTY_NAMES.contains(&name), "a name that says nothing".into());
    rule(code.contains(concat!("#![", "allow(")), "silences a lint for a whole file".into());
    for sign in [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("#[", "ignore")] {
        rule(text.contains(sign), format!("unfinished: {sign}"));
    }
    for (number, line) in text.lines().enumerate() {
        let columns = line.chars().count();
        rule(columns > COLUMNS_MAX, format!("line {} has {columns} columns", number + 1));
    }
    found.extend(layer_violations(path, code));
    found
}

/// A backtick in a script is a command, also in what looks like a comment within quotes.
fn script_violations(path: &Path, text: &str) -> Vec<String> {
    let is_long = text.lines().count() > SCRIPT_LINES_MAX;
    let long = is_long.then(|| format!("a script over {SCRIPT_LINES_MAX} lines"));
    let mut code = text.lines().filter(|line| !line.trim_start().starts_with('#'));
    let ticks = code
        .any(|line| line.contains('`'))
        .then(|| "a backtick: write $( ), or quote with \u{27}".into());
    long.into_iter().chain(ticks).map(|what| format!("{}: {what}", path.display())).collect()
}

/// Files that a document names in backticks, relative to it, to the root or to `src`, and that are
/// not there.
fn names_of_nothing(root: &Path, path: &Path, text: &str) -> Vec<String> {
    let folder = root.join(path.parent().unwrap_or(Path::new("")));
    let is_file = |word: &str| {
        let is_path = word.chars().all(|c| c.is_ascii_alphanumeric() || "_-./".contains(c));
        is_path && word.find('/').is_some_and(|at| at > 0) && word.rfind('.') > word.rfind('/')
    };
    text.split('`')
        .skip(1)
        .step_by(2)
        .filter(|word| is_file(word))
        .filter(|word| {
            ![folder.as_path(), root, &root.join("src")].iter().any(|at| at.join(word).exists())
        })
        .map(|word| format!("{}: names {word}, which is not there", path.display()))
        .collect()
}

fn layer_violations(path: &Path, code: &str) -> Vec<String> {
    let mut parts = path.iter();
    if parts.next().is_none_or(|first| first != "src") {
        return Vec::new();
    }
    let module = parts.next().and_then(|part| Path::new(part).file_stem()).unwrap_or_default();
    let Some((module, allowed)) = LAYERS.iter().find(|(name, _)| module == *name) else {
        return Vec::new();
    };
    code.lines()
        .filter_map(|line| line.trim().strip_prefix("use crate::"))
        .map(|rest| rest.split([':', ';', '{']).next().unwrap_or(""))
        .filter(|used| used != module && !allowed.contains(used))
        .map(|used| format!("{}: {module} may not use {used}", path.display()))
        .collect()
}

/// Every file that git would show to another clone, relative to `root`.
fn tracked(root: &Path) -> Vec<PathBuf> {
    let mut folders = vec![root.to_path_buf()];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path();
            let hidden = entry.file_name().as_encoded_bytes().starts_with(b".git");
            let built = entry.file_name() == "target";
            let Ok(kind) = entry.file_type() else { continue };
            if kind.is_dir() && !hidden && !built {
                folders.push(path);
            } else if let (true, Ok(path)) = (kind.is_file(), path.strip_prefix(root)) {
                files.push(path.to_path_buf());
            }
        }
    }
    files
}
