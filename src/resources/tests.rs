//! Promises held against what there is.

use std::fs;
use std::sync::Barrier;
use std::thread;

use super::*;

const GIB: u64 = 1 << 30;

fn resources(dir: &tempfile::TempDir, disk_bytes: u64) -> Resources {
    let one = Ratio::whole(1);
    Resources::new(ResourcesSpec {
        data_dir: dir.path().to_owned(),
        images_dir: dir.path().join("images"),
        blobs_dir: dir.path().join("blobs"),
        ratios: Ratios {
            cpu: Ratio::whole(4),
            memory: one,
            disk: one,
            network: Ratio::whole(2),
            disk_io: one,
        },
        configured: Configured {
            disk_bytes: Some(disk_bytes),
            network_bps: Some(1000),
            disk_io_bps: None,
        },
    })
}

fn status(resources: &Resources, kind: Kind) -> Status {
    resources.report().statuses[&kind]
}

/// Twenty clients at once, and room for eight.
#[test]
fn claims_at_once_promise_no_more_than_there_is() {
    let dir = tempfile::tempdir().unwrap();
    let resources = resources(&dir, 8 * GIB + GIB / 2);
    let barrier = Barrier::new(20);
    let need = Need { disk_bytes: GIB, ..Need::default() };

    let claims: Vec<_> = thread::scope(|scope| {
        let claiming: Vec<_> = (0..20)
            .map(|number| {
                let (resources, barrier) = (&resources, &barrier);
                scope.spawn(move || {
                    barrier.wait();
                    resources.claim_instance(&format!("i{number}"), "name", need)
                })
            })
            .collect();
        claiming.into_iter().map(|claim| claim.join().unwrap()).collect()
    });

    let (kept, refused): (Vec<_>, Vec<_>) = claims.into_iter().partition(Result::is_ok);
    assert_eq!((kept.len(), refused.len()), (8, 12));
    let text = refused[0].as_ref().unwrap_err().to_string();
    let shortage = "Not enough disk: 1GB asked for, 512MB left of 8704MB: ask for less";
    assert!(text.starts_with(shortage) && text.ends_with(" --overcommit-disk"), "{text}");
    drop(kept);
    assert_eq!(status(&resources, Kind::Disk).allocated, 0);
}

#[test]
fn each_kind_is_looked_after_if_the_host_has_a_number_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let resources = resources(&dir, GIB);
    let refused = |need| resources.claim_instance("i", "name", need).map(drop).unwrap_err().kind;
    let cpus = status(&resources, Kind::Cpu);
    let memory = status(&resources, Kind::Memory);

    assert_eq!(cpus.limit(), cpus.capacity * 4);
    assert_eq!(refused(Need { vcpus: cpus.limit() + 1, ..Need::default() }), Kind::Cpu);
    let memory_bytes = memory.capacity + 1;
    assert_eq!(refused(Need { memory_bytes, ..Need::default() }), Kind::Memory);
    assert_eq!(refused(Need { disk_bytes: GIB + 1, ..Need::default() }), Kind::Disk);
    assert_eq!(refused(Need { upload_bps: 2001, ..Need::default() }), Kind::Network);
    let unknown = Need { disk_io_bps: u64::MAX, ..Need::default() };
    assert!(resources.claim_instance("i", "name", unknown).is_ok());
}

#[test]
fn both_ways_of_a_network_are_not_added() {
    let dir = tempfile::tempdir().unwrap();
    let resources = resources(&dir, GIB);
    let need = Need { download_bps: 1500, upload_bps: 700, ..Need::default() };

    let _claim = resources.claim_instance("i", "name", need).unwrap();

    assert_eq!(status(&resources, Kind::Network).allocated, 1500);
}

#[test]
fn images_volumes_and_layers_share_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("images/x")).unwrap();
    fs::write(dir.path().join("images/x/root"), vec![1; 1 << 20]).unwrap();
    let resources = resources(&dir, 4 * GIB);

    let volume = resources.claim_volume("v", 3 * GIB).unwrap();
    let need = Need { disk_bytes: GIB, ..Need::default() };
    let refused = resources.claim_instance("i", "name", need).unwrap_err();
    volume.shrink_volume(GIB);
    let claim = resources.claim_instance("i", "name", need).unwrap();

    assert_eq!((refused.kind, refused.asked), (Kind::Disk, GIB));
    assert!(refused.available < GIB && refused.available > GIB - (8 << 20), "{refused:?}");
    let report = resources.report();
    assert_eq!((report.disk.volumes_bytes, report.disk.overlays_bytes), (GIB, GIB));
    assert!(report.disk.images_bytes >= 1 << 20, "{report:?}");
    assert_eq!(report.allocations.len(), 1);
    drop((volume, claim));
    assert_eq!(resources.report().allocations, []);
}

#[test]
fn a_rate_changes_within_what_is_left_or_stays() {
    let dir = tempfile::tempdir().unwrap();
    let mut spec = resources(&dir, GIB).shared.spec.clone();
    spec.configured.disk_io_bps = Some(1000);
    let resources = Resources::new(spec);
    let need = Need { disk_io_bps: 400, ..Need::default() };
    let claim = resources.claim_instance("i", "one", need).unwrap();
    let _other = resources.claim_instance("j", "other", need).unwrap();

    claim.change_disk_io(600).unwrap();
    let refused = claim.change_disk_io(601).unwrap_err();

    assert_eq!((refused.kind, refused.available), (Kind::DiskIo, 0));
    assert_eq!(status(&resources, Kind::DiskIo).allocated, 1000);
    claim.change_disk_io(0).unwrap();
    assert_eq!(status(&resources, Kind::DiskIo).allocated, 400);
}

/// After a restart what runs is counted even if the configuration has shrunk meanwhile.
#[test]
fn what_runs_already_is_counted_fit_or_not() {
    let dir = tempfile::tempdir().unwrap();
    let resources = resources(&dir, GIB);

    let need = Need { disk_bytes: 5 * GIB, ..Need::default() };
    let _claim = resources.count_instance("i", "name", need);

    let disk = status(&resources, Kind::Disk);
    assert_eq!((disk.allocated, disk.available()), (5 * GIB, 0));
}
