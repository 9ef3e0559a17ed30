//! Kernel headers: modules of a user's own, for the kernel that runs.

use std::env;
use std::fmt::Write as _;
use std::fs;

use ovum_test_host::{BUSYBOX, TestHost};
use serde_json::{Value, json};

use crate::cases;

cases![
    a_module_built_with_them_is_loaded_by_the_kernel_that_runs,
    a_guest_that_skips_headers_has_nothing_of_them,
];

/// Runs a script to its end, which must be a good one; returns what it wrote.
async fn run(host: &TestHost, name: &str, extra: Value, script: &str) -> String {
    let mut body = json!({
        "name": name, "image": BUSYBOX, "size": "256MB", "vcpus": 1, "cmd": ["sh", "-ec", script],
    });
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    host.server.create(body).await;
    let ended = host.server.wait(name, "Stopped").await;
    let log = host.server.log(name).await;
    host.server.delete(name).await;
    assert_eq!(ended["exit_code"], 0, "{log}");
    log
}

/// What `dev/test-module` has built comes in as a script writes it. The programs of a build run
/// without a C library.
async fn a_module_built_with_them_is_loaded_by_the_kernel_that_runs(host: &TestHost) {
    let path = env::var("OVUM_TEST_MODULE").unwrap();
    let module = fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let mut octal = String::new();
    for byte in module {
        write!(octal, "\\{byte:03o}").unwrap();
    }
    let script = format!(
        "build=/lib/modules/$(uname -r)/build; test -f $build/Makefile -a -f $build/Module.symvers
         echo 'void f(void);' > /f.c; printf '/f.o: /f.c\\n' > /f.d
         $build/scripts/basic/fixdep /f.d /f.o cc > /f.cmd && grep -q 'cmd_/f.o := cc' /f.cmd
         printf '{octal}' > /claim.ko
         insmod /claim.ko && grep '^claim ' /proc/modules && rmmod claim
         test ! -e /sys/module/claim && readlink $build"
    );

    let log = run(host, "builds", json!({ "skip_kernel_headers": false }), &script).await;

    assert!(log.contains("claim ") && log.contains("/usr/src/linux-headers-"), "{log}");
}

async fn a_guest_that_skips_headers_has_nothing_of_them(host: &TestHost) {
    let script = "ls /sys/block; ls -d /usr/src /lib/modules || true";

    let without = run(host, "skips", json!({ "skip_kernel_headers": true }), script).await;
    let with = run(host, "has", json!({}), script).await;

    let folder = |log: &str| log.lines().any(|line| line == "/usr/src");
    let disks = |log: &str| log.lines().filter(|line| line.starts_with("vd")).count();
    assert_eq!((disks(&without), folder(&without)), (2, false), "{without}");
    assert_eq!((disks(&with), folder(&with)), (3, true), "as the original has it: {with}");
}
