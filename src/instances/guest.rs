//! What a guest shall run: the image's word, with the instance's over it.

use std::time::{SystemTime, UNIX_EPOCH};

use ovum_agent_proto::VERSION;
use ovum_agent_proto::config::{GuestConfig, GuestNetwork, INIT_SYSTEMS, MemoryWatchSpec};

use crate::control::HotplugPolicy;
use crate::images::config::ImageConfig;
use crate::instances::disks::{OVERLAY_DEVICE, ROOT_DEVICE, guest_mounts};
use crate::instances::spec::InstanceSpec;
use crate::network::Wiring;

/// What the agent of `spec`'s guest is told; `None` if neither says what to run.
///
/// Entrypoint and arguments override each other's counterpart only: an entrypoint alone keeps the
/// image's arguments. Programs run as root, whatever the image's user.
pub(super) fn config(
    spec: &InstanceSpec,
    image: &ImageConfig,
    wiring: Option<Wiring>,
    kernel_headers: bool,
    hotplug: HotplugPolicy,
) -> Option<GuestConfig> {
    let argv: Vec<String> = argv(spec, image).cloned().collect();
    let mut env = image.env.clone();
    env.extend(spec.env.clone());
    let working_dir =
        if image.working_dir.is_empty() { "/".to_owned() } else { image.working_dir.clone() };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    (!argv.is_empty()).then(|| GuestConfig {
        version: VERSION,
        hostname: spec.name.to_string(),
        root_device: ROOT_DEVICE.to_owned(),
        overlay_device: Some(OVERLAY_DEVICE.to_owned()),
        network: wiring.map(|Wiring { address, prefix, gateway, dns }| GuestNetwork {
            address,
            prefix,
            gateway,
            dns,
        }),
        argv,
        env: env.into_iter().collect(),
        working_dir,
        listen: spec.agent,
        realtime_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
        volumes: guest_mounts(spec),
        kernel_headers,
        memory_watch: memory_watch(spec, hotplug),
    })
}

/// Whether the guest says how it is off for memory: if it gets some on demand.
fn memory_watch(spec: &InstanceSpec, hotplug: HotplugPolicy) -> Option<MemoryWatchSpec> {
    match hotplug {
        HotplugPolicy::Demand { quiet_ms } if spec.hotplug_bytes > 0 => {
            Some(MemoryWatchSpec { boot_bytes: spec.memory_bytes, quiet_ms })
        }
        HotplugPolicy::Demand { .. } | HotplugPolicy::Boot => None,
    }
}

/// Whether `spec`'s guest is ended by a program of the image's, which has others to end before.
pub(super) fn has_init_system(spec: &InstanceSpec, image: &ImageConfig) -> bool {
    argv(spec, image).next().is_some_and(|program| INIT_SYSTEMS.contains(&program.as_str()))
}

fn argv<'a>(spec: &'a InstanceSpec, image: &'a ImageConfig) -> impl Iterator<Item = &'a String> {
    let entrypoint = if spec.entrypoint.is_empty() { &image.entrypoint } else { &spec.entrypoint };
    let cmd = if spec.cmd.is_empty() { &image.cmd } else { &spec.cmd };
    entrypoint.iter().chain(cmd)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    fn argv(ours: (&str, &str), images: (&str, &str)) -> Option<Vec<String>> {
        let image = ImageConfig {
            entrypoint: words(images.0),
            cmd: words(images.1),
            ..ImageConfig::default()
        };
        let spec = InstanceSpec {
            entrypoint: words(ours.0),
            cmd: words(ours.1),
            ..InstanceSpec::sample()
        };
        config(&spec, &image, None, false, HotplugPolicy::Boot).map(|config| config.argv)
    }

    #[test]
    fn entrypoint_and_arguments_are_overridden_one_by_one() {
        assert_eq!(argv(("", ""), ("run", "a b")), Some(words("run a b")));
        assert_eq!(argv(("", "c"), ("run", "a b")), Some(words("run c")));
        assert_eq!(argv(("own", ""), ("run", "a b")), Some(words("own a b")));
        assert_eq!(argv(("own", "c"), ("run", "a b")), Some(words("own c")));
        assert_eq!(argv(("", "c"), ("", "")), Some(words("c")));
        assert_eq!(argv(("", ""), ("", "")), None);
    }

    #[test]
    fn a_program_that_ends_the_guest_itself_is_known_by_its_path() {
        let has = |entrypoint: &str, cmd: &str| {
            let image = ImageConfig { cmd: words("/sbin/init"), ..ImageConfig::default() };
            let (entrypoint, cmd) = (words(entrypoint), words(cmd));
            let spec = InstanceSpec { entrypoint, cmd, ..InstanceSpec::sample() };
            has_init_system(&spec, &image)
        };

        assert!(has("", "") && has("/lib/systemd/systemd", "--user"));
        assert!(!has("", "sh") && !has("sh", ""));
    }

    #[test]
    fn memory_is_watched_if_there_is_more_and_it_comes_on_demand() {
        let watch = |hotplug_bytes, hotplug| {
            let (cmd, memory_bytes) = (words("run"), 128 << 20);
            let spec = InstanceSpec { cmd, memory_bytes, hotplug_bytes, ..InstanceSpec::sample() };
            let config = config(&spec, &ImageConfig::default(), None, false, hotplug);
            config.unwrap().memory_watch
        };
        let demand = HotplugPolicy::Demand { quiet_ms: 5 };

        let expected = MemoryWatchSpec { boot_bytes: 128 << 20, quiet_ms: 5 };
        assert_eq!(watch(1 << 30, demand), Some(expected));
        assert_eq!((watch(0, demand), watch(1 << 30, HotplugPolicy::Boot)), (None, None));
    }

    #[test]
    fn the_instances_environment_lies_over_the_images() {
        let env = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
            pairs.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect()
        };
        let image = ImageConfig {
            cmd: words("run"),
            env: env(&[("PATH", "/image"), ("LANG", "C")]),
            ..ImageConfig::default()
        };
        let spec = InstanceSpec { env: env(&[("PATH", "/own")]), ..InstanceSpec::sample() };

        let config = config(&spec, &image, None, false, HotplugPolicy::Boot).unwrap();

        assert_eq!(config.env, [("LANG".into(), "C".into()), ("PATH".into(), "/own".into())]);
        assert_eq!(config.working_dir, "/");
        assert_eq!(config.hostname, "sample");
    }
}
