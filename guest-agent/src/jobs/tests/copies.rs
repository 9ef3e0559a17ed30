//! Files and trees, into the guest and out of it, and what lies at a path.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use ovum_agent_proto::files::{Entry, EntryKind, GetSpec, PathInfo, PathKind, StatSpec};
use ovum_agent_proto::frame::WINDOW_BYTES;

use super::*;

fn store(guest: &mut Guest, spec: PutSpec, chunks: &[&[u8]]) -> ToServer {
    guest.say(1, ToAgent::Put(spec));
    for chunk in chunks {
        guest.say(1, ToAgent::Data(chunk.to_vec()));
    }
    guest.say(1, ToAgent::End);
    loop {
        match guest.next() {
            (1, ToServer::Ack | ToServer::Credit(_)) => {}
            (1, last) => return last,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_file_is_put_with_mode_and_time_and_its_parents() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a/b/file");
    let spec = PutSpec { mode: 0o4751, mtime: Some(1_700_000_000), ..put(&path, PutKind::File) };

    let stored = store(&mut Guest::new(), spec, &[b"hello ", b"there"]);

    assert_eq!(stored, ToServer::Stored { bytes: 11 });
    assert_eq!(fs::read(&path).unwrap(), b"hello there");
    let found = fs::metadata(&path).unwrap();
    assert_eq!((found.mode() & 0o7777, found.mtime()), (0o4751, 1_700_000_000));
    let parent = fs::metadata(dir.path().join("a")).unwrap();
    assert!(parent.is_dir() && parent.mode() & 0o700 == 0o700);
}

#[test]
fn an_existing_file_is_replaced_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    fs::write(&path, "a longer content").unwrap();

    assert_eq!(
        store(&mut Guest::new(), put(&path, PutKind::File), &[b"short"]),
        ToServer::Stored { bytes: 5 }
    );

    assert_eq!(fs::read(&path).unwrap(), b"short");
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o640);
}

#[test]
fn zeroes_become_holes_and_the_size_is_right() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sparse");
    let zeroes = vec![0; 32 << 10];
    let mut chunks: Vec<&[u8]> = vec![b"start"];
    chunks.extend([zeroes.as_slice(); 64]);
    let mut guest = Guest::new();

    let stored = store(&mut guest, put(&path, PutKind::File), &chunks);

    assert_eq!(stored, ToServer::Stored { bytes: 5 + 64 * (32 << 10) });
    let found = fs::metadata(&path).unwrap();
    assert_eq!(found.len(), 5 + 64 * (32 << 10));
    assert!(found.blocks() * 512 < 64 << 10, "{} blocks", found.blocks());
}

#[test]
fn directories_and_links_are_put_and_put_again() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, link) = (dir.path().join("d"), dir.path().join("l"));
    let mut guest = Guest::new();

    for _ in 0..2 {
        let stored = store(&mut guest, put(&folder, PutKind::Directory), &[]);
        assert_eq!(stored, ToServer::Stored { bytes: 0 });
        let kind = PutKind::Link("d/x".into());
        assert_eq!(store(&mut guest, put(&link, kind), &[]), ToServer::Stored { bytes: 0 });
    }

    assert_eq!(fs::read_link(&link).unwrap(), Path::new("d/x"));
    assert_eq!(fs::metadata(&folder).unwrap().mode() & 0o7777, 0o640);
}

#[test]
fn one_kind_does_not_replace_another() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let refusal = |path: &Path, kind| Guest::new().refusal(ToAgent::Put(put(path, kind))).1;

    assert!(refusal(dir.path(), PutKind::File).ends_with("is a directory"));
    assert!(refusal(dir.path(), PutKind::Link("x".into())).ends_with("is a directory"));
    assert!(refusal(&file, PutKind::Directory).ends_with("is a file"));
    assert!(refusal(Path::new("/dev/null"), PutKind::File).ends_with("is not a regular file"));
}

fn tree(spec: GetSpec) -> Vec<(Entry, Vec<u8>)> {
    let mut guest = Guest::new();
    guest.say(1, ToAgent::Get(spec));
    assert_eq!(guest.next(), (1, ToServer::Ack));
    let mut tree: Vec<(Entry, Vec<u8>)> = Vec::new();
    loop {
        let (1, message) = guest.next() else { panic!("another stream") };
        guest.say(1, ToAgent::Credit(message.cost()));
        match message {
            ToServer::Entry(entry) => tree.push((entry, Vec::new())),
            ToServer::Data(bytes) => tree.last_mut().unwrap().1.extend(bytes),
            ToServer::End => return tree,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_tree_comes_parents_first_with_files_links_and_modes() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("top");
    fs::create_dir_all(root.join("sub")).unwrap();
    fs::write(root.join("sub/big"), vec![b'x'; 1_000_000]).unwrap();
    fs::set_permissions(root.join("sub/big"), Permissions::from_mode(0o751)).unwrap();
    fs::write(root.join("empty"), "").unwrap();
    symlink("sub/big", root.join("link")).unwrap();
    let path = format!("{}/", root.display());

    let mut tree = tree(GetSpec { path, follow_links: false });

    assert_eq!(tree[0].0.path, "top");
    let position = |path: &str| tree.iter().position(|(entry, _)| entry.path == path).unwrap();
    assert!(position("top/sub") < position("top/sub/big"));
    tree.sort_by(|a, b| a.0.path.cmp(&b.0.path));
    let paths: Vec<_> = tree.iter().map(|(entry, _)| entry.path.as_str()).collect();
    assert_eq!(paths, ["top", "top/empty", "top/link", "top/sub", "top/sub/big"]);
    assert_eq!(tree[2].0.kind, EntryKind::Link("sub/big".into()));
    let (big, bytes) = &tree[4];
    assert_eq!((big.mode, big.size, bytes.len()), (0o751, 1_000_000, 1_000_000));
}

#[test]
fn links_are_followed_if_asked_but_never_in_a_circle() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("top");
    fs::create_dir(&root).unwrap();
    fs::write(root.join("file"), "text").unwrap();
    symlink("file", root.join("to-file")).unwrap();
    symlink(".", root.join("circle")).unwrap();
    symlink("nowhere", root.join("dangling")).unwrap();

    let tree = tree(GetSpec { path: root.to_str().unwrap().into(), follow_links: true });

    let kind = |name: &str| {
        let found = tree.iter().find(|(entry, _)| entry.path == format!("top/{name}"));
        found.unwrap().0.kind.clone()
    };
    assert_eq!(kind("to-file"), EntryKind::File);
    assert_eq!(kind("circle"), EntryKind::Link(".".into()));
    assert_eq!(kind("dangling"), EntryKind::Link("nowhere".into()));
}

#[test]
fn a_single_file_goes_by_its_own_name() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "text").unwrap();
    let path = dir.path().join("./file").to_str().unwrap().to_owned();

    let tree = tree(GetSpec { path, follow_links: false });

    assert_eq!(tree.len(), 1);
    assert_eq!((tree[0].0.path.as_str(), tree[0].1.as_slice()), ("file", &b"text"[..]));
}

#[test]
fn what_cannot_be_read_is_refused() {
    let get = |path: &str| {
        Guest::new().refusal(ToAgent::Get(GetSpec { path: path.into(), follow_links: false }))
    };

    assert_eq!(get("/nowhere/at/all").0, ErrorCode::NotFound);
    assert!(get("/dev/null").1.contains("neither a file"));
    assert_eq!(get("a\0b").0, ErrorCode::System);
}

#[test]
fn a_file_that_becomes_shorter_is_an_error_and_not_a_lie() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    fs::write(&path, vec![b'x'; 1 << 20]).unwrap();
    let mut guest = Guest::new();
    let spec = GetSpec { path: path.to_str().unwrap().into(), follow_links: false };
    guest.say(1, ToAgent::Get(spec));
    let mut heard = 0;
    while heard < WINDOW_BYTES / 2 {
        heard += guest.next().1.cost();
    }

    OpenOptions::new().write(true).open(&path).unwrap().set_len(0).unwrap();
    guest.say(1, ToAgent::Credit(heard));

    let last = loop {
        match guest.next().1 {
            ToServer::Data(_) => guest.say(1, ToAgent::Credit(WINDOW_BYTES)),
            last => break last,
        }
    };
    let ToServer::Error { message, .. } = last else { panic!("{last:?}") };
    assert_eq!(message, "file: became shorter while it was read");
}

#[test]
fn a_question_is_answered_with_what_lies_there() {
    let dir = tempfile::tempdir().unwrap();
    let (file, link) = (dir.path().join("file"), dir.path().join("link"));
    File::create(&file).unwrap().write_all(b"12345").unwrap();
    fs::set_permissions(&file, Permissions::from_mode(0o4711)).unwrap();
    symlink("file", &link).unwrap();
    let stat = |path: &Path, follow_links| {
        let path = path.to_str().unwrap().to_owned();
        let mut guest = Guest::new();
        guest.say(1, ToAgent::Stat(StatSpec { path, follow_links }));
        match guest.next() {
            (1, ToServer::PathInfo(info)) => info,
            other => panic!("{other:?}"),
        }
    };

    let info = PathInfo { kind: PathKind::File, mode: 0o4711, size: 5 };
    assert_eq!(stat(&file, false), info);
    assert_eq!(stat(&link, true), info);
    assert_eq!(stat(&link, false).kind, PathKind::Link("file".into()));
    assert_eq!(stat(dir.path(), false).kind, PathKind::Directory);
    assert_eq!(stat(Path::new("/dev/null"), false).kind, PathKind::Special);
    assert_eq!(stat(&file.join("below"), false).kind, PathKind::Missing);
    assert_eq!(stat(&dir.path().join("nothing"), true).kind, PathKind::Missing);
}
