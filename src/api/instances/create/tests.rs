//! Bodies of `POST /instances`: what they become, and what is said about bad ones.

use std::num::NonZeroUsize;
use std::time::Duration;

use serde_json::{Value, json};

use super::*;
use crate::api::instances::policies::{HealthCheck, RestartPolicy};

const LIMITS: Limits = Limits {
    has_network: true,
    vcpus_max: 16,
    memory_bytes_max: 8 << 30,
    overlay_bytes_max: 20 << 30,
    body_bytes_max: 0,
    disk_io_bps: None,
    network_bps: None,
    host_cpus: NonZeroUsize::MIN,
};

fn spec(fields: &Value) -> Result<InstanceSpec, SpecError> {
    let mut body = json!({ "name": "web", "image": "nginx" });
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    Ok(serde_json::from_value::<CreateInstance>(body).unwrap().into_spec(&LIMITS)?.0)
}

/// The field a body is refused for.
fn refused(fields: &Value) -> String {
    match spec(fields) {
        Err(
            SpecError::Schema { field, .. }
            | SpecError::Invalid { field, .. }
            | SpecError::NotSupported { field },
        ) => field.to_owned(),
        other => panic!("{fields}: {other:?}"),
    }
}

#[test]
fn name_and_image_are_enough() {
    let spec = spec(&json!({})).unwrap();

    assert_eq!(spec.name.as_str(), "web");
    assert_eq!(spec.image.to_string(), "docker.io/library/nginx:latest");
    assert_eq!((spec.memory_bytes, spec.overlay_bytes, spec.vcpus), (1 << 30, 10 << 30, 2));
    assert!(spec.agent);
    assert_eq!(spec.hypervisor, "native");
}

#[test]
fn what_is_given_is_taken() {
    let spec = spec(&json!({
        "platform": "linux/amd64", "size": "512 MiB", "overlay_size": "2g", "vcpus": 4,
        "env": { "A": "b=c" }, "tags": { "team": "one" }, "hypervisor": "qemu-microvm",
        "skip_guest_agent": true, "skip_kernel_headers": true, "entrypoint": ["a"], "cmd": ["b"],
        "unknown": { "property": 1 }, "ttl": null,
    }))
    .unwrap();

    assert_eq!((spec.memory_bytes, spec.overlay_bytes, spec.vcpus), (512 << 20, 2 << 30, 4));
    assert_eq!(spec.env["A"], "b=c");
    assert_eq!(spec.hypervisor, "qemu-microvm");
    assert!(!spec.agent);
    assert_eq!((spec.entrypoint, spec.cmd), (vec!["a".into()], vec!["b".into()]));
}

#[test]
fn what_asks_for_nothing_is_no_reason_to_refuse() {
    let nothing = json!({
        "hotplug_size": "0", "disk_io_bps": "0", "ttl": "0s", "credentials": {}, "devices": [],
        "network": { "enabled": false }, "gpu": {}, "volumes": [], "auto_standby": {},
        "health_check": { "type": "none" }, "restart_policy": { "policy": "never" },
    });

    assert!(spec(&nothing).is_ok());
}

#[test]
fn what_is_not_there_yet_is_refused_by_name() {
    for (field, value) in asking() {
        assert_eq!(spec(&json!({ (field): value })), Err(SpecError::NotSupported { field }));
    }
    let secret = json!({
        "env": { "KEY": "x" },
        "network": { "enabled": true, "egress": { "enabled": true } },
        "credentials": { "KEY": {
            "source": { "env": "KEY" },
            "inject": [{ "as": { "header": "Authorization", "format": "Bearer ${value}" } }],
        } },
    });
    assert_eq!(spec(&secret), Err(SpecError::NotSupported { field: "network.egress" }));
}

#[test]
fn a_network_is_had_unless_the_server_has_none_or_it_is_not_wanted() {
    let network = |fields: Value| spec(&json!({ "network": fields })).unwrap().network;
    let without = Limits { has_network: false, ..LIMITS };
    let body = json!({ "name": "web", "image": "nginx" });
    let by_default = |limits: &Limits| {
        let body: CreateInstance = serde_json::from_value(body.clone()).unwrap();
        body.into_spec(limits).unwrap().0.network
    };

    assert_eq!(by_default(&LIMITS), Some(InterfaceSpec::default()));
    assert_eq!(by_default(&without), None);
    assert_eq!(network(json!({ "enabled": false, "bandwidth_upload": "1MB/s" })), None);
    let limited = network(json!({ "bandwidth_download": "1Gbps", "bandwidth_upload": "0" }));
    let download_bps = NonZeroU64::new(125_000_000);
    assert_eq!(limited, Some(InterfaceSpec { download_bps, upload_bps: None }));
}

#[test]
fn what_is_malformed_goes_before_what_is_not_there_yet() {
    assert_eq!(refused(&json!({ "gpu": { "profile": "x" }, "size": "1.5GB" })), "size");
}

#[test]
fn values_out_of_range_are_refused_by_name() {
    for (field, value) in [
        ("name", json!("Upper")),
        ("size", json!("0")),
        ("size", json!("63MB")),
        ("size", json!("9GB")),
        ("size", json!("1Gb")),
        ("overlay_size", json!("0")),
        ("overlay_size", json!("21GB")),
        ("vcpus", json!(0)),
        ("vcpus", json!(-1)),
        ("vcpus", json!(17)),
        ("vcpus", json!(1_000_000_000_000_i64)),
        ("env", json!({ "": "x" })),
        ("env", json!({ "A=B": "x" })),
        ("env", json!({ "A": "x\0" })),
        ("cmd", json!(["a\0b"])),
        ("entrypoint", json!(["\0"])),
        ("hypervisor", json!("vz")),
        ("hotplug_size", json!("much")),
        ("hotplug_size", json!("-1")),
        ("hotplug_size", json!("7GB1")),
        ("hotplug_size", json!("8GB")),
        ("disk_io_bps", json!("fast")),
        ("disk_io_bps", json!("255KB/s")),
        ("disk_io_bps", json!("100")),
    ] {
        assert_eq!(refused(&json!({ (field): value })), field);
    }
}

#[test]
fn values_inside_of_what_is_not_there_yet_are_checked_too() {
    let mount = |path: &str| json!({ "volumes": [{ "volume_id": "v", "mount_path": path }] });
    for path in ["", "data", "/", "/etc", "/a/../b", "/a//b", "/a/"] {
        assert_eq!(refused(&mount(path)), "volumes.mount_path", "{path}");
    }
    assert_eq!(spec(&mount("/etc/app")).unwrap().volumes[0].path, "/etc/app");
    for (fields, field) in [
        (json!({ "network": { "bandwidth_upload": "1.5" } }), "network.bandwidth_upload"),
        (
            json!({ "network": { "enabled": false, "egress": { "enabled": true } } }),
            "network.egress",
        ),
        (json!({ "auto_standby": { "enabled": true } }), "auto_standby.idle_timeout"),
        (
            json!({ "auto_standby": { "ignore_source_cidrs": ["10.0.0.0/33"] } }),
            "auto_standby.ignore_source_cidrs",
        ),
        (
            json!({ "auto_standby": { "ignore_destination_ports": [0] } }),
            "auto_standby.ignore_destination_ports",
        ),
        (json!({ "health_check": { "type": "http" } }), "health_check"),
        (json!({ "health_check": { "tcp": { "port": 70_000 } } }), "health_check.tcp.port"),
        (
            json!({ "health_check": { "http": { "port": 1, "path": "x" } } }),
            "health_check.http.path",
        ),
        (
            json!({ "health_check": { "tcp": { "port": 1 }, "timeout": "11s" } }),
            "health_check.timeout",
        ),
        (json!({ "restart_policy": { "max_attempts": -1 } }), "restart_policy.max_attempts"),
        (
            json!({ "snapshot_policy": { "compression": { "enabled": true, "level": 20 } } }),
            "snapshot_policy.compression.level",
        ),
        (
            json!({ "volumes": [{ "volume_id": "v", "mount_path": "/v", "overlay": true }] }),
            "volumes.overlay_size",
        ),
        (
            json!({ "credentials": { "K": { "source": { "env": "K" }, "inject": [] } } }),
            "credentials",
        ),
    ] {
        assert_eq!(refused(&fields), field);
    }
}

#[test]
fn disks_have_the_limit_asked_for_or_their_share_of_the_hosts() {
    let of = |fields: Value, limits: &Limits| {
        let mut body = json!({ "name": "web", "image": "nginx", "vcpus": 4 });
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let body = serde_json::from_value::<CreateInstance>(body).unwrap();
        body.into_spec(limits).unwrap().0.disk_io_bps.map(NonZeroU64::get)
    };
    let host_cpus = NonZeroUsize::new(16).unwrap();
    let shared = Limits { disk_io_bps: NonZeroU64::new(2 << 30), host_cpus, ..LIMITS };

    for limits in [LIMITS, shared] {
        assert_eq!(of(json!({ "disk_io_bps": "10MB/s" }), &limits), Some(10 << 20));
        assert_eq!(of(json!({ "disk_io_bps": "500MBps" }), &limits), Some(500 << 20));
        assert_eq!(of(json!({ "disk_io_bps": "0" }), &limits), None);
    }
    assert_eq!(of(json!({}), &LIMITS), None);
    assert_eq!(of(json!({}), &shared), Some(512 << 20), "a quarter");
    let small = Limits { host_cpus: NonZeroUsize::MIN, ..shared };
    assert_eq!(of(json!({}), &small), Some(2 << 30), "all there is, and no more");
}

#[test]
fn a_network_has_the_rates_that_are_asked_for_or_its_share() {
    let limits = Limits {
        network_bps: NonZeroU64::new(1000 << 20),
        host_cpus: NonZeroUsize::new(8).unwrap(),
        ..LIMITS
    };
    let body = json!({
        "name": "web", "image": "nginx", "vcpus": 2,
        "network": { "enabled": true, "bandwidth_upload": "80Mbps" },
    });

    let body = serde_json::from_value::<CreateInstance>(body).unwrap();
    let network = body.into_spec(&limits).unwrap().0.network.unwrap();

    assert_eq!(network.download_bps, NonZeroU64::new(250 << 20));
    assert_eq!(network.upload_bps, NonZeroU64::new(10_000_000));
}

#[test]
fn there_is_one_platform() {
    for platform in ["linux/arm64", "linux/arm64/v8", "linux/amd64/v3"] {
        let refused = spec(&json!({ "platform": platform }));
        assert!(matches!(refused, Err(SpecError::OtherPlatform { .. })), "{platform}");
    }
    for platform in ["", "linux", "windows/amd64", "linux/AMD64", "linux/amd64/", "linux/s390x"] {
        let refused = spec(&json!({ "platform": platform }));
        assert!(matches!(refused, Err(SpecError::Platform { .. })), "{platform}");
    }
}

#[test]
fn an_image_name_that_is_none_is_refused() {
    assert!(matches!(spec(&json!({ "image": "a b" })), Err(SpecError::Image(_))));
}

/// A value that asks for something, for each field whose feature is not there yet.
fn asking() -> BTreeMap<&'static str, Value> {
    BTreeMap::from([
        ("snapshot_policy", json!({ "compression": { "enabled": true } })),
        ("auto_standby", json!({ "enabled": true, "idle_timeout": "5m" })),
    ])
}

#[test]
fn how_an_instance_is_looked_after_is_taken_and_read_back() {
    let spec = spec(&json!({
        "health_check": { "exec": { "command": ["true"], "working_dir": "/srv" }, "timeout": "1s" },
        "restart_policy": { "policy": "on_failure", "backoff": "1m30s", "max_attempts": 3 },
    }))
    .unwrap();

    let check = HealthCheck::from(spec.health_check.as_ref().unwrap());
    let policy = RestartPolicy::from(spec.restart_policy.as_ref().unwrap());
    assert_eq!(
        serde_json::to_value(check).unwrap(),
        json!({
            "type": "exec", "exec": { "command": ["true"], "working_dir": "/srv" },
            "interval": "10s", "timeout": "1s", "start_period": "30s",
            "failure_threshold": 3, "success_threshold": 1,
        })
    );
    assert_eq!(
        serde_json::to_value(policy).unwrap(),
        json!({
            "policy": "on_failure", "backoff": "1m30s", "max_attempts": 3, "stable_after": "10m0s",
        })
    );
}

#[test]
fn a_check_that_needs_what_is_not_there_is_refused_by_name() {
    let health_check = |check: Value| refused(&json!({ "health_check": check }));

    for (check, field) in [
        (json!({ "http": { "port": 0 } }), "health_check.http.port"),
        (json!({ "http": { "port": 80, "path": "x" } }), "health_check.http.path"),
        (json!({ "http": { "port": 80, "path": "/a b" } }), "health_check.http.path"),
        (
            json!({ "http": { "port": 80, "expected_status": 99 } }),
            "health_check.http.expected_status",
        ),
        (json!({ "tcp": { "port": 65536 } }), "health_check.tcp.port"),
    ] {
        assert_eq!(health_check(check), field);
    }
    for check in [json!({ "http": { "port": 80 } }), json!({ "tcp": { "port": 80 } })] {
        let cut_off = json!({ "health_check": check, "network": { "enabled": false } });
        assert_eq!(refused(&cut_off), "health_check");
    }
    for (exec, field) in [
        (json!({ "command": [] }), "health_check.exec.command"),
        (json!({ "command": [""] }), "health_check.exec.command"),
        (json!({ "command": ["a\0"] }), "health_check.exec.command"),
        (json!({ "command": ["a"], "working_dir": "b" }), "health_check.exec.working_dir"),
    ] {
        assert_eq!(health_check(json!({ "exec": exec })), field);
    }
    let many = json!({ "exec": { "command": ["a"] }, "failure_threshold": 5_000_000_000_i64 });
    assert_eq!(health_check(many), "health_check.failure_threshold");
    let agentless = json!({
        "health_check": { "exec": { "command": ["true"] } }, "skip_guest_agent": true,
    });
    assert_eq!(refused(&agentless), "health_check");
}

#[test]
fn a_lifetime_is_a_duration_or_a_time() {
    let expiry = |fields: Value| {
        let mut body = json!({ "name": "web", "image": "nginx" });
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        Ok(serde_json::from_value::<CreateInstance>(body).unwrap().into_spec(&LIMITS)?.1)
    };

    assert_eq!(expiry(json!({})), Ok(Expiry::Never));
    assert_eq!(expiry(json!({ "ttl": "0s" })), Ok(Expiry::Never));
    assert_eq!(expiry(json!({ "ttl": "90s" })), Ok(Expiry::In(Duration::from_secs(90))));
    let at = "2999-01-01T00:00:00Z";
    assert_eq!(expiry(json!({ "expires_at": at })), Ok(Expiry::At(at.parse().unwrap())));
    for fields in [
        json!({ "ttl": "1" }),
        json!({ "ttl": "-1s" }),
        json!({ "ttl": "99999999999999h" }),
        json!({ "ttl": "1h", "expires_at": at }),
        json!({ "expires_at": "2001-01-01T00:00:00Z" }),
    ] {
        assert!(matches!(expiry(fields.clone()), Err(SpecError::Invalid { .. })), "{fields}");
    }
}
