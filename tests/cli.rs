//! The command line where no guest is needed: what is typed wrong, what is set where, and a server
//! that is found by its data folder.

#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use ovum::server;
use tempfile::TempDir;
use tokio::time;

#[expect(clippy::disallowed_methods, reason = "programs are started as a user would")]
fn ovum() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ovum"));
    for name in ["BASE_URL", "API_KEY"] {
        command.env_remove(format!("OVUM_{name}")).env_remove(format!("HYPEMAN_{name}"));
    }
    command
}

fn typed(words: &[&str]) -> Output {
    ovum().args(words).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A file with settings, and the data folder they name.
struct Settings {
    dir: TempDir,
}

impl Settings {
    fn new(text: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        let text = format!("data_dir = {:?}\njwt_secret = \"of a test\"\n{text}", data.display());
        fs::write(dir.path().join("config.toml"), text).unwrap();
        Self { dir }
    }

    fn file(&self) -> String {
        self.dir.path().join("config.toml").display().to_string()
    }

    fn data_dir(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// A server with these settings, once it answers.
    async fn serve(&self) -> Served {
        let mut command = ovum();
        command.args(["serve", "--network", "false", "--config", &self.file()]);
        command.stderr(Stdio::null());
        let served = Served(command.spawn().unwrap());
        let deadline = Instant::now() + Duration::from_secs(60);
        while !self.ps().status.success() {
            assert!(Instant::now() < deadline, "{}", stderr(&self.ps()));
            time::sleep(Duration::from_millis(20)).await;
        }
        served
    }

    fn ps(&self) -> Output {
        typed(&["ps", "--all", "--json", "--config", &self.file()])
    }
}

/// A server, killed when it is not needed any more.
struct Served(Child);

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_mistake_in_the_file_is_named_by_every_command() {
    let settings = Settings::new("max_vcpu = 4\n");
    let file = settings.file();

    for command in [
        &["serve", "--config", &file][..],
        &["ps", "--config", &file],
        &["run", "--config", &file, "image"],
        &["doctor", "--config", &file],
    ] {
        let refused = typed(command);

        let message = stderr(&refused);
        assert_eq!(refused.status.code(), Some(1), "{command:?}: {message}");
        assert!(message.contains("max_vcpu\"") && message.contains(&file), "{message}");
    }
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let refused = typed(&["serve", "--config", "/nowhere/config.toml"]);

    assert_eq!(refused.status.code(), Some(1));
    let expected = "Failed to read configuration file /nowhere/config.toml: No such file";
    assert!(stderr(&refused).contains(expected), "{}", stderr(&refused));
}

#[tokio::test]
async fn a_server_is_found_by_its_data_folder_wherever_it_listens() {
    let settings = Settings::new("listen = \"127.0.0.1:0\"\n");

    let served = settings.serve().await;
    let listed = settings.ps();
    let second = typed(&["serve", "--config", &settings.file()]);
    drop(served);
    let nobody = settings.ps();

    assert_eq!(String::from_utf8_lossy(&listed.stdout), "[]\n");
    assert!(stderr(&second).contains("in use by another server"), "{}", stderr(&second));
    assert!(server::socket(&settings.data_dir()).exists(), "it was killed");
    assert!(stderr(&nobody).contains("`ovum serve` starts one"), "{}", stderr(&nobody));
    settings.serve().await;
}

#[test]
fn a_run_without_a_server_fails_with_its_reason_and_leaves_no_socket() {
    let settings = Settings::new("kernel = \"/nowhere/vmlinux\"\n");

    let ran = typed(&["run", "--config", &settings.file(), "127.0.0.1:1/no:image"]);

    assert_eq!(ran.status.code(), Some(1));
    assert!(stderr(&ran).contains("127.0.0.1:1"), "{}", stderr(&ran));
    assert!(!server::socket(&settings.data_dir()).exists());
}

#[test]
fn a_data_folder_that_cannot_be_made_is_named() {
    let ran = typed(&["run", "--data-dir", "/proc/ovum", "image"]);

    assert_eq!(ran.status.code(), Some(1));
    assert!(stderr(&ran).contains("data folder /proc/ovum"), "{}", stderr(&ran));
}

/// The first words of the lines below `heading`, as far as they begin with `mark`.
fn listed(help: &str, heading: &str, mark: &str) -> Vec<String> {
    let (_, below) = help.split_once(&format!("\n{heading}:\n")).unwrap_or_default();
    let block = below.split("\n\n").next().unwrap_or_default().lines();
    let first =
        block.filter_map(|line| line.split_whitespace().find(|word| word.starts_with(mark)));
    first.map(|word| word.trim_end_matches(',').to_owned()).collect()
}

#[test]
fn every_shell_is_told_all_commands_and_flags() {
    let scripts = ["bash", "zsh", "fish"].map(|shell| {
        let script = typed(&["completions", shell]);
        assert!(script.status.success());
        String::from_utf8(script.stdout).unwrap()
    });
    let help = |words: &[&str]| String::from_utf8(typed(words).stdout).unwrap();

    let commands = listed(&help(&["--help"]), "Commands", "");
    assert!(commands.len() > 20, "{commands:?}");
    for command in &commands {
        let mut words = vec![command.clone()];
        words.extend(listed(&help(&[command, "--help"]), "Options", "--"));
        for (script, word) in
            scripts.iter().flat_map(|script| words.iter().map(move |w| (script, w)))
        {
            assert!(script.contains(word.trim_start_matches('-')), "{command}: no {word}");
        }
    }
    assert!(scripts.iter().all(|script| !script.contains("worker")), "it is not for people");
}

/// What a shell offers after these words.
#[expect(clippy::disallowed_methods, reason = "programs are started as a user would")]
fn offered(words: &[&str]) -> Vec<String> {
    let script = String::from_utf8(typed(&["completions", "bash"]).stdout).unwrap();
    let ask = "COMP_WORDS=(\"$@\"); COMP_CWORD=$(($# - 1)); \
        _ovum ovum \"${*: -1}\" \"${@: -2:1}\"; \
        printf '%s\\n' \"${COMPREPLY[@]}\"";
    let script = format!("{script}\n{ask}");
    let asked = Command::new("bash").args(["-c", &script, "-"]).args(words).output().unwrap();
    assert!(asked.status.success(), "{}", stderr(&asked));
    String::from_utf8(asked.stdout).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn a_tab_completes_commands_flags_and_values() {
    assert_eq!(offered(&["ovum", "st"]), ["stop", "start", "stats"]);
    assert_eq!(offered(&["ovum", "update", "--health-r"]), ["--health-retries"]);
    assert_eq!(offered(&["ovum", "wait", "x", "--state", "St"]), ["Stopped", "Standby"]);
    assert_eq!(offered(&["ovum", "image", "p"]), ["pull"]);
}

#[test]
fn a_kernel_that_is_none_is_no_kernel() {
    let missing = typed(&["boot", "--kernel", "/nowhere/vmlinux"]);
    let wrong = typed(&["boot", "--kernel", "k", "--vcpus", "0"]);

    assert_eq!(missing.status.code(), Some(1), "{}", stderr(&missing));
    assert!(stderr(&missing).contains("kernel /nowhere/vmlinux"), "{}", stderr(&missing));
    assert!(stderr(&wrong).contains("--vcpus"), "{}", stderr(&wrong));
}

#[test]
fn a_doctor_speaks_json() {
    let settings = Settings::new("listen = \"127.0.0.1:0\"\n");

    let examined = typed(&["doctor", "--json", "--config", &settings.file()]);

    let findings: serde_json::Value = serde_json::from_slice(&examined.stdout).unwrap();
    let findings = findings.as_array().unwrap();
    let named = |name: &str| findings.iter().find(|finding| finding["subject"] == name).unwrap();
    assert_eq!(named("data folder")["ok"], true);
    assert_eq!(named("mkfs.ext4")["ok"], true);
    let all = findings.iter().all(|finding| finding["ok"] == true);
    assert_eq!(examined.status.success(), all);
}
