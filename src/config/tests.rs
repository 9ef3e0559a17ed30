//! Configuration, from what is typed and written down to what is meant.

use std::fs;
use std::time::Duration;

use clap::Parser;

use super::*;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    args: ConfigArgs,
}

/// What a server with this file and these flags is configured to be.
fn load(file: &str, line: &[&str]) -> Result<Config, ConfigError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.toml");
    fs::write(&path, file).unwrap();
    let words = ["serve", "--config", path.to_str().unwrap()];
    Line::parse_from(words.iter().chain(line)).args.load()
}

#[test]
fn without_flags_everything_has_a_value() {
    let config = load("", &[]).unwrap();

    assert_eq!(config.data_dir, Path::new("/var/lib/ovum"));
    assert_eq!(config.listen, ["127.0.0.1:8080".parse().unwrap()]);
    assert_eq!(config.limits, Limits::default());
    assert_eq!(config.images.jobs_max, 2);
}

#[test]
fn addresses_add_up_and_sizes_have_units() {
    let line = [
        "--listen=127.0.0.1:8080",
        "--listen=127.0.0.1:4973",
        "--max-memory=2GB",
        "--insecure-registry=a:1,b",
    ];

    let config = load("", &line).unwrap();

    assert_eq!(config.listen.len(), 2);
    assert_eq!(config.limits.memory_bytes_max, 2 << 30);
    assert_eq!(config.images.insecure_registries, ["a:1", "b"]);
}

#[test]
fn a_flag_goes_before_the_file_and_the_file_before_the_default() {
    let file = "max_vcpus = 4\nmax_memory = \"2GB\"\nlisten = [\"127.0.0.1:1\"]";

    let config = load(file, &["--max-vcpus=8", "--listen=127.0.0.1:2"]).unwrap();

    assert_eq!(config.limits.vcpus_max, 8);
    assert_eq!(config.listen, ["127.0.0.1:2".parse().unwrap()]);
    assert_eq!(config.limits.memory_bytes_max, 2 << 30);
    assert_eq!(config.limits.overlay_bytes_max, 100 << 30);
}

/// A file with all that can be set but the hotplug policy.
const EVERYTHING: &str = r#"
    data_dir = "/srv/ovum"
    listen = ["127.0.0.1:1", "[::1]:2"]
    kernel = "/k"
    share_kernel = false
    agent = "/a"
    insecure_registries = "localhost:5000"
    image_jobs = 3
    max_vcpus = 4
    max_memory = "1GB"
    max_overlay = "2GB"
    max_image_packed = "3GB"
    max_image_unpacked = "4GB"
    min_free = 0
    network = true
    subnet = "10.7.0.0/24"
    dns = ["9.9.9.9", "10.7.0.1"]
    disk_io_capacity = "1GB/s"
    jwt_secret = "s"
    max_volumes = "5GB"
    disk_capacity = "6GB"
    network_capacity = "1Gbps"
    overcommit_cpu = 8
    overcommit_memory = 1.5
    overcommit_disk = "2"
    overcommit_network = 3
    overcommit_disk_io = 0.5
"#;

#[test]
fn everything_can_be_in_the_file() {
    let config = load(EVERYTHING, &[]).unwrap();

    let Config {
        data_dir,
        listen,
        jwt_secret,
        kernel,
        shares_kernel,
        agent,
        kvm: _,
        limits,
        images,
        capacity,
        network,
        hotplug: _,
    } = config;
    assert_eq!([data_dir, kernel, agent], ["/srv/ovum", "/k", "/a"].map(PathBuf::from));
    assert!(!shares_kernel);
    assert_eq!(listen.len(), 2);
    assert_eq!(jwt_secret.as_deref(), Some("s"));
    assert_eq!((limits.vcpus_max, limits.memory_bytes_max), (4, 1 << 30));
    assert_eq!(limits.overlay_bytes_max, 2 << 30);
    assert_eq!(limits.disk_io_bps, NonZeroU64::new(512 << 20));
    let expected = ImagesConfig {
        insecure_registries: vec!["localhost:5000".to_owned()],
        jobs_max: 3,
        packed_bytes_max: 3 << 30,
        unpacked_bytes_max: 4 << 30,
        free_bytes_min: 0,
    };
    assert_eq!(images, expected);
    let expected = CapacityConfig {
        volumes_bytes_max: Some(5 << 30),
        disk_bytes: Some(6 << 30),
        network_bps: Some(125_000_000),
        disk_io_bps: Some(1 << 30),
        cpu_ratio: Ratio::whole(8),
        memory_ratio: "1.5".parse().unwrap(),
        disk_ratio: Ratio::whole(2),
        network_ratio: Ratio::whole(3),
        disk_io_ratio: "0.5".parse().unwrap(),
    };
    assert_eq!(capacity, expected);
    let NetworkConfig { subnet, dns } = network.unwrap();
    assert_eq!(subnet.to_string(), "10.7.0.0/24");
    assert_eq!(dns, [Ipv4Addr::new(9, 9, 9, 9), Ipv4Addr::new(10, 7, 0, 1)]);
}

#[test]
fn networks_are_on_unless_they_are_turned_off() {
    let on = load("", &[]).unwrap();
    let off = load("network = false", &[]).unwrap();
    let on_again = load("network = false", &["--network=true", "--dns=10.100.0.1"]).unwrap();

    assert_eq!(on.network.unwrap().subnet, Subnet::DEFAULT);
    assert!(on.limits.has_network);
    assert!(off.network.is_none() && !off.limits.has_network);
    assert_eq!(on_again.network.unwrap().dns, [Ipv4Addr::new(10, 100, 0, 1)]);
}

#[test]
fn memory_comes_at_boot_unless_it_is_to_come_on_demand() {
    let boot = load("hotplug_quiet = \"5s\"", &[]).unwrap();
    let demand = load("", &["--hotplug-policy=demand"]).unwrap();
    let file = load("hotplug_policy = \"demand\"\nhotplug_quiet = \"5s\"", &[]).unwrap();

    assert_eq!(boot.hotplug, HotplugConfig::Boot);
    assert_eq!(demand.hotplug, HotplugConfig::Demand { quiet: Duration::from_secs(60) });
    assert_eq!(file.hotplug, HotplugConfig::Demand { quiet: Duration::from_secs(5) });
}

/// A setting that can be typed and not be written down would be a trap.
#[test]
fn every_flag_has_a_key() {
    use clap::CommandFactory;

    let command = Line::command();
    let flags = command.get_arguments().map(|flag| flag.get_id().as_str());
    let settings: Vec<&str> = flags.filter(|&id| id != "config").collect();

    let missing: Vec<_> = settings.iter().filter(|id| !file::KEYS.contains(id)).collect();
    assert!(settings.len() > 10 && missing.is_empty(), "{missing:?} of {settings:?}");
}

#[test]
fn a_folder_whose_sockets_could_not_be_named_is_refused() {
    let deep = format!("/{}", "d".repeat(DATA_DIR_BYTES_MAX));

    let error = load("", &["--data-dir", &deep]);

    assert!(matches!(error, Err(ConfigError::DataDirTooLong { bytes: 60, .. })));
}

#[test]
fn a_client_finds_the_server_of_its_host_in_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.toml");
    fs::write(&path, "listen = \"0.0.0.0:81\"\ndata_dir = \"/d\"\njwt_secret = \"s\"").unwrap();
    let home = |data_dir: Option<&str>| {
        HomeArgs { config: Some(path.clone()), data_dir: data_dir.map(PathBuf::from) }.find()
    };

    let found = home(None).unwrap();

    assert_eq!(found.data_dir, Path::new("/d"));
    assert_eq!(found.address, "127.0.0.1:81".parse().unwrap());
    assert_eq!(home(Some("/e")).unwrap().data_dir, Path::new("/e"));
}
