//! Layers as tools write them and as an enemy would, merged and then seen through the kernel.

use std::env;
use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;

use flate2::Compression;
use flate2::write::GzEncoder;
use proptest::collection::vec;
use proptest::prelude::{ProptestConfig, Strategy};
use proptest::sample::select;

use super::*;
use crate::images::erofs;
use crate::images::room::Room;
use crate::images::testing::{Mount, TarBuilder, file_of, header, layer, listing};
use crate::images::tree::NodeId;

struct Flag(bool);

impl Watch for Flag {
    fn is_cancelled(&self) -> bool {
        self.0
    }
}

fn merge_into(dir: &tempfile::TempDir, layers: Vec<Layer>, max: u64) -> Result<(), MergeError> {
    let path = dir.path().join("image");
    let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
    let mut data = DataArea::new(file, Room::new(dir.path(), 0).unwrap());
    let tree = merge(layers, max, &mut data, &Flag(false))?;
    erofs::finish(data, &tree, [0; 16]).unwrap();
    Ok(())
}

fn try_merge(layers: Vec<Layer>) -> Result<(), MergeError> {
    merge_into(&tempfile::tempdir().unwrap(), layers, u64::MAX)
}

/// The merged tree as the kernel shows it: paths with content or kind.
fn merged(layers: Vec<TarBuilder>) -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    merge_into(&dir, layers.into_iter().map(TarBuilder::layer).collect(), u64::MAX).unwrap();
    let mount = Mount::new(&dir.path().join("image"));
    let mut found = Vec::new();
    for line in listing(mount.path()) {
        let path = line.split(' ').next().unwrap().to_owned();
        let on_disk = mount.path().join(&path[1..]);
        let kind = fs::symlink_metadata(&on_disk).unwrap().file_type();
        if kind.is_file() {
            found.push(format!("{path}={}", fs::read_to_string(on_disk).unwrap()));
        } else if kind.is_symlink() {
            found.push(format!("{path}->{}", fs::read_link(on_disk).unwrap().display()));
        } else if path != "/" {
            found.push(path + "/");
        }
    }
    found
}

fn cause(layers: Vec<Layer>) -> (usize, Cause) {
    match try_merge(layers) {
        Err(MergeError::Layer { index, source }) => (index, source),
        other => panic!("{other:?}"),
    }
}

fn tar() -> TarBuilder {
    TarBuilder::new()
}

#[test]
fn upper_layers_add_replace_and_hide() {
    let base = tar().dir("etc").file("etc/a", "1").file("etc/b", "1").file("gone", "1");
    let middle = tar().file("etc/a", "2").file(".wh.gone", "").file("new", "2");
    let top = tar().file("etc/.wh.b", "").file("gone", "3");

    assert_eq!(merged(vec![base, middle, top]), ["/etc/", "/etc/a=2", "/gone=3", "/new=2"]);
}

#[test]
fn an_opaque_directory_hides_lower_content_only_before_or_after_its_own() {
    let base = || tar().dir("d").file("d/low", "1").dir("d/s").file("d/s/low", "1").file("e", "1");
    let first = tar().dir("d").file("d/.wh..wh..opq", "").file("d/s/up", "2");
    let last = tar().dir("d").file("d/s/up", "2").file("d/.wh..wh..opq", "");
    let expected = ["/d/", "/d/s/", "/d/s/up=2", "/e=1"];

    assert_eq!(merged(vec![base(), first]), expected);
    assert_eq!(merged(vec![base(), last]), expected);
}

#[test]
fn a_whiteout_and_the_same_name_in_one_layer_leave_the_new_one() {
    let base = || tar().dir("d").file("d/low", "1").file("f", "1");
    let before =
        tar().file(".wh.d", "").file(".wh.f", "").dir("d").file("d/up", "2").file("f", "2");
    let after = tar().dir("d").file("d/up", "2").file("f", "2").file(".wh.d", "").file(".wh.f", "");
    let expected = ["/d/", "/d/up=2", "/f=2"];

    assert_eq!(merged(vec![base(), before]), expected);
    assert_eq!(merged(vec![base(), after]), expected);
}

#[test]
fn whiteouts_of_directories_hide_all_below() {
    let base = tar().file("a/b/c/d", "1").file("a/x", "1");
    let top = tar().file("a/.wh.b", "");

    assert_eq!(merged(vec![base, top]), ["/a/", "/a/x=1"]);
}

#[test]
fn hard_links_reach_into_lower_layers_and_outlive_their_target() {
    let base = tar().file("low", "1");
    let top = tar().hard_link("link", "/low").hard_link("d/deep", "./link").file(".wh.low", "");

    assert_eq!(merged(vec![base, top]), ["/d/", "/d/deep=1", "/link=1"]);
}

#[test]
fn a_replaced_file_leaves_its_other_names_alone() {
    let base = tar().file("a", "1").hard_link("b", "a");
    let top = tar().file("a", "2");

    assert_eq!(merged(vec![base, top]), ["/a=2", "/b=1"]);
}

#[test]
fn links_between_directories_are_followed_as_in_a_running_image() {
    let base = tar().dir("usr/lib").symlink("lib", "usr/lib").symlink("var/run", "../run");
    let top = tar().file("lib/new", "2").file("lib/.wh.none", "").file("var/run/pid", "2");

    assert_eq!(
        merged(vec![base, top]),
        [
            "/lib->usr/lib",
            "/run/",
            "/run/pid=2",
            "/usr/",
            "/usr/lib/",
            "/usr/lib/new=2",
            "/var/",
            "/var/run->../run"
        ]
    );
}

/// `/` and `..` in a link mean the image's root: the host's files are out of reach.
#[test]
fn links_out_of_the_image_stay_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let outside = dir.path().to_str().unwrap().to_owned();
    let layers = vec![
        tar().symlink("a", &outside).symlink("b", format!("../../../../..{outside}")),
        tar().file("a/one", "1").file("b/two", "2"),
    ];

    let found = merged(layers);

    assert!(found.contains(&format!("{outside}/one=1")), "{found:?}");
    assert!(found.contains(&format!("{outside}/two=2")), "{found:?}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn absolute_and_dotted_names_are_cleaned() {
    let layer = tar().mode(0o700).dir("./").file("/abs", "1").file("./d/./f", "2").dir("//e//");

    assert_eq!(merged(vec![layer]), ["/abs=1", "/d/", "/d/f=2", "/e/"]);
}

#[test]
fn names_that_climb_are_refused() {
    for name in ["../x", "a/../../x", "/..", "a/.."] {
        let (index, cause) = cause(vec![tar().layer(), tar().file(name, "").layer()]);
        assert_eq!(index, 1);
        assert_eq!(cause.to_string(), format!("Refused entry {name:?}"));
    }
}

#[test]
fn impossible_entries_are_refused_by_name() {
    let text = |tar: TarBuilder| cause(vec![tar.layer()]).1.to_string();

    assert_eq!(text(tar().hard_link("a", "b")), "Link \"a\" has no target \"b\"");
    assert_eq!(text(tar().symlink("a", "")), "Link \"a\" has no target \"\"");
    assert_eq!(text(tar().dir("d").hard_link("l", "d")), "Refused entry \"l\"");
    assert_eq!(text(tar().file("a", "").file("a/b", "")), "Refused entry \"a/b\"");
    assert_eq!(
        text(tar().dir("d").file("d/.wh...", "")),
        "Whiteout \"d/.wh...\" hides no possible name"
    );
    assert_eq!(text(tar().file(".wh.", "")), "Whiteout \".wh.\" hides no possible name");
    assert_eq!(text(tar().file(".", "")), "Refused entry \".\"");
    assert_eq!(
        text(tar().device(b'3', "null", 5000, 0)),
        "Device \"null\" has impossible numbers 5000:0"
    );
    assert_eq!(
        text(tar().file("n".repeat(256), "")),
        format!("Refused entry {:?}", "n".repeat(256))
    );
    assert_eq!(text(tar().symlink("l", "t".repeat(4033))), "Refused entry \"l\"");
}

#[test]
fn what_aufs_left_behind_is_skipped() {
    let layer = tar()
        .dir(".wh..wh.plnk")
        .file(".wh..wh.plnk/1.2", "x")
        .file(".wh..wh.aufs", "")
        .file("f", "1");

    assert_eq!(merged(vec![layer]), ["/f=1"]);
}

#[test]
fn attributes_of_overlayfs_are_dropped_and_others_kept() {
    let dir = tempfile::tempdir().unwrap();
    let archive = tar()
        .pax("SCHILY.xattr.trusted.overlay.opaque", b"y")
        .pax("SCHILY.xattr.system.nfs4_acl", b"?")
        .pax("SCHILY.xattr.user.kept", b"1")
        .file("f", "");
    merge_into(&dir, vec![archive.layer()], u64::MAX).unwrap();
    let mount = Mount::new(&dir.path().join("image"));

    let line = listing(mount.path()).pop().unwrap();

    assert!(line.ends_with(" user.kept=1") && !line.contains("overlay"), "{line}");
}

#[test]
fn layers_may_be_plain_gzip_or_zstd_and_of_several_members() {
    let archive = tar().file("f", "content").build();
    let gzip = |bytes: &[u8]| {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    };
    let halves = [gzip(&archive[..700]), gzip(&archive[700..])].concat();
    let frames = [&archive[..700], &archive[700..]].map(|half| zstd::encode_all(half, 1).unwrap());

    for blob in [archive.clone(), gzip(&archive), halves, frames.concat()] {
        let layer = Layer { blob: file_of(&blob), diff_id: Digest::of(&archive) };
        try_merge(vec![layer]).unwrap();
    }
}

#[test]
fn a_layer_that_unpacks_to_something_else_is_refused() {
    let archive = tar().file("f", "content").build();
    let other = Digest::of(b"other");

    let (_, cause) = cause(vec![Layer { blob: file_of(&archive), diff_id: other }]);

    let Cause::DiffId { expected, found } = cause else { panic!("{cause:?}") };
    assert_eq!((expected, found), (other, Digest::of(&archive)));
}

/// The digest covers what stands behind the archive's end too.
#[test]
fn bytes_after_the_end_belong_to_the_layer() {
    let mut archive = tar().file("f", "content").build();
    archive.extend([1; 5000]);

    try_merge(vec![layer(&archive)]).unwrap();
}

#[test]
fn layers_that_end_early_are_refused() {
    let archive = tar().file("f", "content".repeat(1000)).build();
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(&archive).unwrap();
    let gzip = encoder.finish().unwrap();
    let zstd = zstd::encode_all(&archive[..], 1).unwrap();

    for blob in [&archive[..3000], &gzip[..gzip.len() - 20], &zstd[..zstd.len() - 20], &gzip[..9]] {
        let layer = Layer { blob: file_of(blob), diff_id: Digest::of(&archive) };
        try_merge(vec![layer]).unwrap_err();
    }
}

/// A few kilobytes that unpack to more than an image may have are stopped on the way.
#[test]
fn a_bomb_is_stopped_at_the_limit() {
    const LIMIT: u64 = 16 << 20;
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    encoder.write_all(&header(b'0', b"f", b"", 1 << 40, &tar(), (0, 0))).unwrap();
    for _ in 0..1024 {
        encoder.write_all(&[0; 1 << 20]).unwrap();
    }
    let bomb = encoder.finish().unwrap();
    assert!(bomb.len() < 1 << 20);
    let dir = tempfile::tempdir().unwrap();
    let layer = Layer { blob: file_of(&bomb), diff_id: Digest::of(b"") };

    let error = merge_into(&dir, vec![layer], LIMIT).unwrap_err();

    assert_eq!(error.to_string(), format!("Image is larger than {LIMIT} bytes unpacked"));
    assert!(fs::metadata(dir.path().join("image")).unwrap().blocks() * 512 <= LIMIT);
}

#[test]
fn a_merge_nobody_waits_for_stops() {
    let dir = tempfile::tempdir().unwrap();
    let file = tempfile::tempfile().unwrap();
    let mut data = DataArea::new(file, Room::new(dir.path(), 0).unwrap());
    let layers = vec![tar().file("f", "x").layer()];

    let error = merge(layers, u64::MAX, &mut data, &Flag(true)).unwrap_err();

    assert!(matches!(error, MergeError::Cancelled));
}

#[test]
fn an_image_has_at_most_so_many_layers() {
    let layers: Vec<Layer> = (0..=LAYERS_MAX).map(|_| tar().layer()).collect();

    assert!(matches!(try_merge(layers), Err(MergeError::TooManyLayers { layers: 129 })));
}

/// One change of a layer.
#[derive(Debug, Clone)]
enum Change {
    File(String, String),
    Directory(String),
    Whiteout(String),
    Opaque(String),
}

mod model {
    //! What layers mean, said once more in the most naive way: a map from paths to content.

    use std::collections::{BTreeMap, BTreeSet};

    use super::Change;

    /// Content of files; `None` for directories.
    pub(super) type Files = BTreeMap<String, Option<String>>;

    fn parents(path: &str) -> impl Iterator<Item = &str> {
        path.match_indices('/').map(|(at, _)| &path[..at])
    }

    fn remove(files: &mut Files, path: &str) {
        let below = format!("{path}/");
        files.retain(|known, _| known != path && !known.starts_with(&below));
    }

    /// First all hiding, by the state before the layer; then all adding. No order matters.
    pub(super) fn apply(files: &mut Files, layer: &[Change]) {
        let lower: BTreeSet<String> = files.keys().cloned().collect();
        for change in layer {
            match change {
                Change::Whiteout(path) => remove(files, path),
                Change::Opaque(path) => {
                    let below = format!("{path}/");
                    files.retain(|known, _| !known.starts_with(&below));
                }
                Change::File(..) | Change::Directory(_) => {}
            }
        }
        drop(lower);
        for change in layer {
            match change {
                Change::File(path, content) => {
                    add_parents(files, path);
                    remove(files, path);
                    files.insert(path.clone(), Some(content.clone()));
                }
                Change::Directory(path) => {
                    add_parents(files, path);
                    if files.get(path) != Some(&None) {
                        remove(files, path);
                    }
                    files.insert(path.clone(), None);
                }
                Change::Whiteout(_) | Change::Opaque(_) => {}
            }
        }
    }

    fn add_parents(files: &mut Files, path: &str) {
        for parent in parents(path) {
            if files.get(parent).is_none_or(Option::is_some) {
                remove(files, parent);
                files.insert(parent.to_owned(), None);
            }
        }
    }
}

/// Layers no tool would make, but whose meaning is clear: a name is one thing per layer.
fn layer_strategy() -> impl Strategy<Value = Vec<Change>> {
    let path = vec(select(vec!["a", "b", "c"]), 1..4).prop_map(|p| p.join("/"));
    let change = (path, 0..6_u8, 0..1000_u32).prop_map(|(path, kind, content)| match kind {
        0..3 => Change::File(path, content.to_string()),
        3 => Change::Directory(path),
        4 => Change::Whiteout(path),
        _ => Change::Opaque(path),
    });
    vec(change, 0..8).prop_map(|changes| {
        // A file above another entry of the same layer is not a layer but a contradiction.
        let mut kept: Vec<Change> = Vec::new();
        for change in changes {
            let path = |change: &Change| match change {
                Change::File(path, _) | Change::Directory(path) => Some(path.clone()),
                Change::Opaque(path) => Some(format!("{path}/opaque")),
                Change::Whiteout(_) => None,
            };
            let is_file = |change: &Change| matches!(change, Change::File(..));
            let clashes = kept.iter().any(|other| match (path(&change), path(other)) {
                (Some(new), Some(old)) => {
                    new == old
                        || (is_file(&change) && old.starts_with(&format!("{new}/")))
                        || (is_file(other) && new.starts_with(&format!("{old}/")))
                }
                _ => false,
            });
            if !clashes {
                kept.push(change);
            }
        }
        kept
    })
}

fn archive(changes: &[Change]) -> TarBuilder {
    changes.iter().fold(tar(), |tar, change| match change {
        Change::File(path, content) => tar.file(path, content),
        Change::Directory(path) => tar.dir(path),
        Change::Whiteout(path) => match path.rsplit_once('/') {
            Some((above, name)) => tar.file(format!("{above}/.wh.{name}"), ""),
            None => tar.file(format!(".wh.{path}"), ""),
        },
        Change::Opaque(path) => tar.file(format!("{path}/.wh..wh..opq"), ""),
    })
}

/// Files and directories of a tree, without the kernel, so that many trees can be looked at.
fn files_of(tree: &Tree, contents: &File) -> model::Files {
    use std::os::unix::fs::FileExt;
    let mut todo = vec![(String::new(), NodeId::ROOT)];
    let mut files = model::Files::new();
    while let Some((above, id)) = todo.pop() {
        let Kind::Directory(children) = &tree.node(id).kind else { continue };
        for (name, child) in children {
            let path = format!("{above}{}", String::from_utf8_lossy(name));
            let content = match &tree.node(child.node).kind {
                Kind::File(body) => match &body.tail {
                    Some(tail) => Some(String::from_utf8(tail.to_vec()).unwrap()),
                    None => {
                        let mut bytes = vec![0; usize::try_from(body.size_bytes).unwrap()];
                        contents.read_exact_at(&mut bytes, u64::from(body.block) * 4096).unwrap();
                        Some(String::from_utf8(bytes).unwrap())
                    }
                },
                _ => None,
            };
            files.insert(path.clone(), content);
            todo.push((path + "/", child.node));
        }
    }
    files
}

proptest::proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Layers mean what the naive model says, whatever the order of entries in their archives.
    #[test]
    fn layers_mean_what_the_model_says(
        layers in vec(layer_strategy(), 1..5)
    ) {
        let mut expected = model::Files::new();
        for layer in &layers {
            model::apply(&mut expected, layer);
        }
        let dir = env::temp_dir();
        let file = tempfile::tempfile().unwrap();
        let contents = file.try_clone().unwrap();
        let mut data = DataArea::new(file, Room::new(&dir, 0).unwrap());
        let archives = layers.iter().map(|layer| archive(layer).layer()).collect();

        let tree = merge(archives, u64::MAX, &mut data, &Flag(false)).unwrap();

        proptest::prop_assert_eq!(files_of(&tree, &contents), expected);
    }
}
