//! Guests boot, run what their image says, and end as it ends.

use std::fs;

use futures_util::future::join_all;
use ovum_test_host::{BUSYBOX, DEBIAN, TestHost};
use serde_json::{Value, json};

use crate::cases;

cases![
    a_command_runs_and_its_output_and_exit_code_come_back,
    the_boot_has_a_timeline,
    a_failing_command_gives_its_exit_code,
    a_command_killed_by_a_signal_gives_128_and_its_number,
    a_missing_command_is_127,
    a_command_without_the_executable_bit_is_126,
    memory_that_runs_out_is_told,
    an_entrypoint_of_its_own_keeps_the_cmd_of_the_image,
    the_environment_of_the_request_lies_over_that_of_the_image,
    the_root_is_writable_and_the_size_asked_for,
    what_a_container_expects_is_mounted,
    output_through_dev_stdout_arrives,
    orphans_are_reaped,
    every_vcpu_is_online,
    a_kernel_has_nothing_to_warn_of_and_uses_what_the_processor_has,
    a_guest_larger_than_the_32_bit_hole_has_all_its_memory,
    a_debian_root_runs,
    a_reboot_and_a_panic_are_told_apart_from_an_exit,
    a_megabyte_of_output_arrives_whole,
    bytes_that_are_not_text_do_no_harm,
    an_instance_without_an_agent_runs_too,
    eight_at_once_all_run,
];

const SH: [&str; 2] = ["sh", "-c"];

fn sh(script: &str) -> Vec<&str> {
    SH.into_iter().chain([script]).collect()
}

fn exit_code(instance: &Value) -> i64 {
    instance["exit_code"].as_i64().unwrap_or_else(|| panic!("no exit code: {instance}"))
}

async fn a_command_runs_and_its_output_and_exit_code_come_back(host: &TestHost) {
    let (log, instance) = host.server.run("hello", BUSYBOX, &sh("echo hello; uname -m")).await;

    assert!(log.contains("hello\nx86_64\n"), "{log}");
    assert_eq!((exit_code(&instance), &instance["exit_message"]), (0, &json!("success")));
    assert_eq!(instance["state"], "Stopped");
}

async fn the_boot_has_a_timeline(host: &TestHost) {
    let (_, instance) = host.server.run("timeline", BUSYBOX, &sh("echo first")).await;

    let phases = &instance["phase_durations_ms"];
    for phase in ["image", "queue", "disks", "worker", "vmm", "kernel", "agent", "workload"] {
        assert!(phases[phase].is_number(), "{phase} is missing: {phases}");
    }
    assert!(phases["kernel"].as_u64() > Some(0), "a kernel takes time: {phases}");
}

async fn a_failing_command_gives_its_exit_code(host: &TestHost) {
    let (_, instance) = host.server.run("failing", BUSYBOX, &sh("exit 7")).await;

    assert_eq!((exit_code(&instance), &instance["exit_message"]), (7, &json!("exit code 7")));
}

async fn a_command_killed_by_a_signal_gives_128_and_its_number(host: &TestHost) {
    let (_, instance) = host.server.run("killed", BUSYBOX, &sh("kill -9 $$")).await;

    assert_eq!(exit_code(&instance), 137, "{instance}");
}

async fn a_missing_command_is_127(host: &TestHost) {
    let (log, instance) = host.server.run("missing", BUSYBOX, &["no-such-program"]).await;

    assert_eq!(exit_code(&instance), 127, "{instance}");
    assert_eq!(instance["exit_message"], "command not found");
    assert!(log.contains("no-such-program"), "the log names it: {log}");
}

async fn a_command_without_the_executable_bit_is_126(host: &TestHost) {
    host.server.pull(DEBIAN).await;
    let (_, instance) = host.server.run("plain-file", DEBIAN, &["/etc/passwd"]).await;

    assert_eq!(exit_code(&instance), 126, "{instance}");
}

async fn memory_that_runs_out_is_told(host: &TestHost) {
    let (_, instance) = host.server.run("hungry", BUSYBOX, &["tail", "/dev/zero"]).await;

    assert_eq!(exit_code(&instance), 137, "{instance}");
    let message = instance["exit_message"].as_str().unwrap_or_default();
    assert!(message.ends_with("OOM"), "{instance}");
}

async fn an_entrypoint_of_its_own_keeps_the_cmd_of_the_image(host: &TestHost) {
    let body =
        json!({ "name": "entry", "image": BUSYBOX, "size": "128MB", "entrypoint": ["echo"] });
    let (log, _) = host.server.run_body(body).await;

    assert!(log.contains("sh\n"), "the image's cmd is `sh`: {log}");
}

async fn the_environment_of_the_request_lies_over_that_of_the_image(host: &TestHost) {
    let body = json!({
        "name": "environment", "image": BUSYBOX, "size": "128MB", "cmd": ["env"],
        "env": { "GREETING": "good morning", "PATH": "/bin" },
    });
    let (log, _) = host.server.run_body(body).await;

    assert!(log.contains("GREETING=good morning\n"), "{log}");
    assert!(log.contains("PATH=/bin\n"), "{log}");
}

async fn the_root_is_writable_and_the_size_asked_for(host: &TestHost) {
    let script = "echo data > /new && cat /new && df -m / | tail -1";
    let body = json!({
        "name": "writable", "image": BUSYBOX, "size": "128MB", "overlay_size": "3GB",
        "cmd": sh(script),
    });
    let (log, instance) = host.server.run_body(body).await;

    assert_eq!(exit_code(&instance), 0, "{log}");
    let words: Vec<&str> = log.split_whitespace().collect();
    let megabytes: u64 = words[words.len() - 5].parse().unwrap_or_else(|_| panic!("{log}"));
    assert!((2800..=3072).contains(&megabytes), "{megabytes} MiB of 3072: {log}");
}

async fn what_a_container_expects_is_mounted(host: &TestHost) {
    let script = "for m in /proc /sys /dev /dev/pts /dev/shm /sys/fs/cgroup; do \
        grep -q \" $m \" /proc/mounts || echo missing $m; done; \
        cat /sys/fs/cgroup/cgroup.controllers; hostname; id -u; pwd; echo done";
    let (log, _) = host.server.run("mounts", BUSYBOX, &sh(script)).await;

    assert!(!log.contains("missing"), "{log}");
    assert!(log.contains("memory") && log.contains("pids"), "{log}");
    assert!(log.contains("mounts\n0\n/\ndone\n"), "host name, user and folder: {log}");
}

async fn output_through_dev_stdout_arrives(host: &TestHost) {
    let script = "echo one > /dev/stdout; echo two > /dev/stderr; echo three > /proc/self/fd/1";
    let (log, _) = host.server.run("reopened", BUSYBOX, &sh(script)).await;

    assert!(log.contains("one\ntwo\nthree\n"), "{log}");
}

async fn orphans_are_reaped(host: &TestHost) {
    let script = "for i in 1 2 3 4 5; do (sleep 0.1 & ) ; done; sleep 1; \
        ps -o stat,comm | grep -c '^Z'; echo end";
    let (log, _) = host.server.run("orphans", BUSYBOX, &sh(script)).await;

    assert!(log.contains("0\nend\n"), "{log}");
}

async fn every_vcpu_is_online(host: &TestHost) {
    for vcpus in [2, 4] {
        let body = json!({
            "name": "vcpus", "image": BUSYBOX, "size": "256MB", "vcpus": vcpus, "cmd": ["nproc"],
        });
        let (log, _) = host.server.run_body(body).await;

        assert!(log.contains(&format!("{vcpus}\n")), "{log}");
    }
}

async fn a_kernel_has_nothing_to_warn_of_and_uses_what_the_processor_has(host: &TestHost) {
    let processor = fs::read_to_string("/proc/cpuinfo").unwrap();
    let script = "echo $(dmesg | grep -cE 'cut here|BUG:|Call Trace') warnings; \
                  grep -wom1 avx /proc/cpuinfo";

    let (log, _) = host.server.run("content", BUSYBOX, &sh(script)).await;

    assert!(processor.contains(" avx "), "nothing to look for: {processor}");
    assert!(log.contains("0 warnings\navx\n"), "{log}");
}

async fn a_guest_larger_than_the_32_bit_hole_has_all_its_memory(host: &TestHost) {
    let body = json!({
        "name": "large", "image": BUSYBOX, "size": "6GB",
        "cmd": ["grep", "MemTotal", "/proc/meminfo"],
    });
    let (log, _) = host.server.run_body(body).await;

    let kib: u64 = log
        .split_whitespace()
        .find_map(|word| word.parse().ok())
        .unwrap_or_else(|| panic!("no number: {log}"));
    assert!((5_900_000..=6_291_456).contains(&kib), "{log}");
}

async fn a_debian_root_runs(host: &TestHost) {
    let image = host.server.pull(DEBIAN).await;
    let script = ". /etc/os-release; echo $ID $VERSION_ID; dpkg -l | tail -1; perl -e 'print 6*7'";
    let (log, instance) = host.server.run("debian", DEBIAN, &["bash", "-c", script]).await;

    assert!(image["size_bytes"].as_u64() > Some(100 << 20), "{image}");
    assert!(log.contains("debian 12\n") && log.ends_with("42\n"), "{log}");
    assert_eq!(exit_code(&instance), 0);
}

async fn a_reboot_and_a_panic_are_told_apart_from_an_exit(host: &TestHost) {
    let reboot = "echo b > /proc/sysrq-trigger; sleep 60";
    let (_, rebooted) = host.server.run("reboots", BUSYBOX, &sh(reboot)).await;
    let panic = "echo c > /proc/sysrq-trigger; sleep 60";
    let (_, panicked) = host.server.run("panics", BUSYBOX, &sh(panic)).await;

    assert_eq!(rebooted.get("exit_code"), None, "{rebooted}");
    assert!(panicked["state_error"].as_str().unwrap_or("").contains("panic"), "{panicked}");
    assert!(!rebooted["state_error"].as_str().unwrap_or("").contains("panic"), "{rebooted}");
}

async fn a_megabyte_of_output_arrives_whole(host: &TestHost) {
    let (log, _) = host.server.run("talkative", BUSYBOX, &sh("seq 1 150000")).await;

    let numbers: Vec<u64> = log.lines().filter_map(|line| line.parse().ok()).collect();
    let last: Vec<u64> = (150_001 - numbers.len() as u64..=150_000).collect();
    assert!(numbers.len() >= 99_000, "the API gives the last 100,000 lines: {}", numbers.len());
    assert_eq!(numbers, last, "lines are lost or in the wrong order");
}

async fn bytes_that_are_not_text_do_no_harm(host: &TestHost) {
    let script = "printf '\\377\\376\\000x\\n'; echo; echo after";
    let (log, _) = host.server.run("binary", BUSYBOX, &sh(script)).await;

    assert!(log.contains("after\n"), "{log:?}");
}

async fn an_instance_without_an_agent_runs_too(host: &TestHost) {
    let body = json!({
        "name": "no-agent", "image": BUSYBOX, "size": "128MB", "skip_guest_agent": true,
        "cmd": sh("echo alone"),
    });
    let (log, instance) = host.server.run_body(body).await;

    assert!(log.contains("alone\n"), "{log}");
    assert_eq!(exit_code(&instance), 0);
}

async fn eight_at_once_all_run(host: &TestHost) {
    let names: Vec<String> = (0..8).map(|n| format!("crowd-{n}")).collect();

    let runs = names.iter().map(|name| host.server.run(name, BUSYBOX, &["hostname"]));
    let ended = join_all(runs).await;

    for (name, (log, instance)) in names.iter().zip(ended) {
        assert!(log.contains(&format!("{name}\n")), "{log}");
        assert_eq!(exit_code(&instance), 0);
    }
}
